"""Puts the front door together: the gate, the streaming path, and a FastAPI app for everything else."""

from __future__ import annotations

import http

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.routing import Match

from api import openapi
from api.asgi import App
from api.errors import ApiError, internal_error, to_api_error
from api.gate import Gate
from api.gateway import Gateway
from api.passthrough import Passthrough
from api.routes import admin, batches, files, health, jobs, models, submit, usage, webhooks
from engine.client import Endpoint
from engine.errors import VelocityError


def build(gateway: Gateway) -> App:
    """The ASGI application of one process."""
    app = FastAPI(title="velocity", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.gateway = gateway
    for module in (health, models, submit, jobs, files, batches, webhooks, usage, admin):
        app.include_router(module.router)
    if gateway.settings.docs:
        openapi.add_route(app, gateway.settings)
    app.add_exception_handler(VelocityError, _velocity_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(Exception, _internal_error)
    passthrough = Passthrough(
        gateway.settings, gateway.engine, gateway.watch, gateway.keys, gateway.limiter, gateway.metrics, gateway.tracer,
        gateway.bulk,
    )  # fmt: skip
    hot = {endpoint.value: passthrough for endpoint in Endpoint}
    return Gate(app, hot, gateway.keys, gateway.limiter, gateway.metrics)


async def _velocity_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, VelocityError)  # noqa: S101 - it is registered for that class
    return _response(to_api_error(error))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - it is registered for that class
    what = f"{request.method} {request.scope['path']}"
    message = {404: f"There is no such address: {what}.", 405: f"That method is not supported here: {what}."}
    text = message.get(error.status_code, http.HTTPStatus(error.status_code).phrase)
    headers = ((b"allow", _methods(request).encode()),) if error.status_code == 405 else ()
    return _response(ApiError(error.status_code, text, code=_code(error.status_code), headers=headers))


def _methods(request: Request) -> str:
    """All that an address takes; Starlette names only those of the first route that has it."""
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    return ", ".join(sorted({method for route in routes for method in route.methods}))


async def _validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - it is registered for that class
    first = error.errors()[0]
    kind, *place = first["loc"]
    name = ".".join(str(part) for part in place)
    if kind == "path":  # an id that can't exist
        what = name.removesuffix("_id")
        return _response(ApiError(404, f"There is no {what} {first['input']!r}.", code="not_found"))
    return _response(ApiError(400, f"{name}: {first['msg']}.", param=name))


async def _internal_error(_: Request, __: Exception) -> Response:
    return _response(internal_error())


def _code(status: int) -> str | None:
    return {404: "not_found", 405: "method_not_allowed"}.get(status)


def _response(error: ApiError) -> Response:
    response = Response(error.body(), error.status, media_type="application/json")
    for name, value in error.headers:
        response.headers[name.decode()] = value.decode()
    return response
