"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from api.gateway import Gateway
from api.keys import Key
from engine.client import Model
from engine.errors import EngineUnreachable

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """Every name that the engine answers to."""
    gateway: Gateway = request.app.state.gateway
    if not gateway.watch.models:
        await gateway.watch.refresh()
    if not gateway.watch.models:
        raise EngineUnreachable("The engine is not up (yet). Try again in a few seconds.")
    key: Key = request.state.key
    models = [model for model in gateway.watch.models if key.may_use(model.id)]
    return {"object": "list", "data": [_card(model) for model in models]}


@router.get("/v1/models/{name:path}")
async def show_model(request: Request, name: str) -> dict[str, Any]:
    """One model, by its name or an alias."""
    gateway: Gateway = request.app.state.gateway
    return _card(await gateway.watch.resolve(name, request.state.key))


def _card(model: Model) -> dict[str, Any]:
    return {
        "id": model.id, "object": "model", "created": model.created, "owned_by": "velocity",
        "max_model_len": model.max_model_len,
    }  # fmt: skip
