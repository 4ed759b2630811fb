"""GET /health: what serves and what does not, for people, load balancers and service managers."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from api.gateway import Gateway
from workers.errors import LedgerUnavailable

router = APIRouter()


@router.get("/health")
async def health(request: Request, response: Response) -> dict[str, Any]:
    """200 `ok`, 200 `degraded` when only bulk work suffers, 503 `unavailable` when chat can't be served."""
    gateway: Gateway = request.app.state.gateway
    await gateway.watch.refresh()
    workers = 0
    try:
        workers = await gateway.ledger.beat()
        redis = "ok"
    except LedgerUnavailable:
        redis = "down"
    engine = "ok" if gateway.watch.up else "down"
    serves = engine == redis == "ok"
    if not serves:
        response.status_code = 503
        response.headers["retry-after"] = "5"
    status = ("ok" if workers else "degraded") if serves else "unavailable"
    return {"status": status, "engine": engine, "redis": redis, "workers": "ok" if workers else "none"}
