"""Which items begin alike: run one after the other they share the engine's prefix cache."""

from __future__ import annotations

import hashlib
from typing import Any

import orjson

_TEXT_CHARACTERS = 512


def prefix_of(body: dict[str, Any]) -> bytes:
    """A digest of what a group has in common: all messages but the last, or the beginning of the text."""
    said = body.get("messages") or body.get("input") or body.get("prompt")
    if isinstance(said, list) and said and isinstance(said[0], dict):
        shared: object = [body.get("tools"), body.get("instructions"), said[:-1]]
    else:
        shared = [body.get("instructions"), str(said)[:_TEXT_CHARACTERS]]
    return hashlib.blake2b(orjson.dumps(shared), digest_size=16).digest()
