"""/webhooks: the secret that a tenant's receivers check signatures with, and a test event sent right now."""

from __future__ import annotations

import math
import time
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict

from api import shape
from api.asgi import read_body
from api.errors import ApiError
from api.key_store import checked
from api.routes.caller import caller
from workers.job import new_id
from workers.webhooks import event_body

router = APIRouter(prefix="/webhooks")

_BODY_MOST = 16 * 1024


class WebhookTest(BaseModel):
    """Body of POST /webhooks/test."""

    model_config = ConfigDict(extra="forbid")

    url: str
    """Where to send the event, as a job's `webhook` would be."""


@router.get("/secret")
async def secret(request: Request, response: Response) -> dict[str, str]:
    """The caller's signing secret, whsec_…: all keys of a tenant have the same."""
    gateway, key = caller(request)
    response.headers["cache-control"] = "no-store"
    return {"secret": await gateway.outbox.webhooks.secret(key.tenant)}


@router.post("/test")
async def test(request: Request) -> dict[str, Any]:
    """Send one signed event of the type webhook.test, and say what came of it."""
    gateway, key = caller(request)
    body = await read_body(request.receive, _BODY_MOST, gateway.settings.body_timeout)
    url = checked(WebhookTest, shape.parse(body)).url
    gateway.outbox.webhooks.check_url(url, "url")
    if wait := await gateway.outbox.test_wait(key.id):
        raise ApiError(
            429, f"Too many test events with this API key. Try again in {math.ceil(wait)} s.", type="requests",
            code="rate_limit_exceeded", headers=((b"retry-after", b"%d" % math.ceil(wait)),),
        )  # fmt: skip
    event = event_body("webhook.test", time.time(), {"object": "test"})
    result = await gateway.outbox.webhooks.send(key.tenant, url, new_id("evt"), event)
    return {
        "delivered": result.delivered, "status_code": result.status_code, "error": result.error,
        "seconds": result.seconds,
    }  # fmt: skip
