"""What the api's processes write into Redis about interactive work, without the api."""

from __future__ import annotations

import asyncio

from redis.asyncio import Redis

from workers import redis_keys


class Api:
    """What the api's processes write into Redis: that they live, and who is at the engine."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._signing: asyncio.Task[None] | None = None

    async def people(self, count: int) -> None:
        name = redis_keys.leases("all")
        await self._redis.delete(name)
        if count:
            await self._redis.zadd(name, {f"request-{n}": await self._now() + 60e6 for n in range(count)})

    async def signs(self) -> None:
        await self._sign(0)
        self._signing = asyncio.create_task(self._keep_signing())

    async def falls_silent(self, ago: float = 6) -> None:
        if self._signing:
            self._signing.cancel()
            await asyncio.wait([self._signing])
        await self._sign(ago)

    async def _keep_signing(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            await self._sign(0)

    async def _sign(self, ago: float) -> None:
        await self._redis.zadd(redis_keys.APIS, {"api": await self._now() - ago * 1e6})

    async def _now(self) -> float:
        seconds, micros = await self._redis.time()
        return float(seconds * 1_000_000 + micros)
