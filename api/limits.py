"""Limits per key, decided in Redis in one round trip before the first byte."""

from __future__ import annotations

import math
from dataclasses import dataclass

from redis.asyncio import Redis

from api.errors import ApiError, Header
from api.keys import Key
from workers import redis_keys
from workers.redis import translated
from workers.scripts import Scripts


@dataclass(frozen=True, slots=True)
class Admission:
    """What the limiter said; `headers` are OpenAI's x-ratelimit-…, for every answer."""

    headers: tuple[Header, ...] = ()


class Limits:
    """The limiter."""

    def __init__(self, redis: Redis) -> None:
        self._scripts = Scripts(redis, "api")

    async def admit(self, key: Key) -> Admission:
        """Count one request of the key. Raises ApiError 429 with a Retry-After that is true, or LedgerUnavailable."""
        if key.rpm is None:
            return Admission()
        with translated():
            admitted, left, full, wait = await self._scripts.run(
                "admit", key.rpm, keys=(redis_keys.request_rate(key.id),)
            )
        headers: tuple[Header, ...] = (
            (b"x-ratelimit-limit-requests", str(key.rpm).encode()),
            (b"x-ratelimit-remaining-requests", str(left).encode()),
            (b"x-ratelimit-reset-requests", duration(full / 1e6).encode()),
        )
        if admitted:
            return Admission(headers)
        seconds = wait / 1e6
        raise ApiError(
            429,
            f"Rate limit reached: {key.rpm} requests per minute, all used. Try again in {duration(seconds)}.",
            type="requests",
            code="rate_limit_exceeded",
            headers=(
                *headers,
                (b"retry-after", str(math.ceil(seconds)).encode()),
                (b"retry-after-ms", str(math.ceil(seconds * 1000)).encode()),
            ),
        )


def duration(seconds: float) -> str:
    """Seconds the way OpenAI writes them: 120ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(seconds, 60)
    text = f"{rest:.3f}".rstrip("0").rstrip(".")
    return f"{int(minutes)}m{text}s" if minutes else f"{text}s"
