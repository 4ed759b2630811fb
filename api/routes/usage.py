"""GET /v1/usage: what a key used, by day; an admin sees every key's."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from api.gateway import Gateway
from api.keys import Key, Scope
from api.usage_store import MOST_DAYS, usage_view

router = APIRouter()


@router.get("/v1/usage")
async def usage(request: Request, days: Annotated[int, Query(ge=1, le=MOST_DAYS)] = 7) -> dict[str, Any]:
    """Requests, tokens in and out, and refusals per key and day (UTC), bulk and interactive apart; newest first."""
    gateway: Gateway = request.app.state.gateway
    key: Key = request.state.key
    accounts = [key.id]
    if key.may(Scope.ADMIN):
        accounts = list(dict.fromkeys([key.id, *(other.id for other in await gateway.keys.all())]))
    return {"object": "list", "data": [usage_view(day) for day in await gateway.usage.of(accounts, days)]}
