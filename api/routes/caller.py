"""Who asks, and how a page of what is theirs looks."""

from __future__ import annotations

from typing import Any

from fastapi import Request

from api.gateway import Gateway
from api.keys import Key


def caller(request: Request) -> tuple[Gateway, Key]:
    """What this process holds open, and the key that the gate has let in."""
    return request.app.state.gateway, request.state.key


def page(data: list[dict[str, Any]], *, more: bool) -> dict[str, Any]:
    """A list as OpenAI has it: of objects with an `id`, and whether there are more behind them."""
    return {
        "object": "list", "data": data, "has_more": more,
        "first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None,
    }  # fmt: skip
