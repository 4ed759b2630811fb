"""The ledger on a real Redis of each version that velocity runs on."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from workers.ledger import Ledger
from workers.redis import connect


@pytest.fixture
async def redis(each_clean_redis: str) -> AsyncIterator[Redis]:
    client = connect(each_clean_redis, 5)
    yield client
    await client.aclose()


@pytest.fixture
def ledger(redis: Redis) -> Ledger:
    return Ledger(redis)
