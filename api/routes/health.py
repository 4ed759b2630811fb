"""GET /health: what serves and what does not, for people, load balancers and service managers."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response

from api.gateway import Gateway
from workers.errors import LedgerUnavailable

_REDIS_SECONDS = 1.0

router = APIRouter()


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(request: Request, response: Response) -> dict[str, Any]:
    """200 `ok`, 200 `degraded` when only bulk work suffers, 503 `unavailable` when chat can't be served.

    Holders of a key are also told which part is down, and what keeps bulk work from slowing people down in the engine:
    `scheduler`, `priority` or `none`, null while that is not known.
    """
    gateway: Gateway = request.app.state.gateway
    await gateway.watch.refresh()
    workers, redis = 0, "ok"
    try:
        async with asyncio.timeout(_REDIS_SECONDS):
            workers = await gateway.ledger.beat()
    except (LedgerUnavailable, TimeoutError):
        redis = "down"
    engine = "ok" if gateway.watch.up else "down"
    if engine == "ok" and (redis == "ok" or gateway.limiter.decides):
        status = "ok" if workers else "degraded"
    else:
        status = "unavailable"
        response.status_code = 503
        response.headers["retry-after"] = "5"
    if "key" not in request.scope["state"]:
        return {"status": status}
    known = gateway.watch.protection
    return {
        "status": status,
        "engine": engine,
        "protection": known and known.protection.value,
        "redis": redis,
        "workers": "ok" if workers else "none",
    }
