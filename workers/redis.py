"""Connections to Redis, with explicit timeouts, and the table that turns its errors into ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import redis as sync_redis
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, RedisError
from redis.retry import Retry

from workers.errors import LedgerFull, LedgerUnavailable

_CONNECTIONS = 64
"""Of one client; a command beyond them waits for one instead of failing."""


def connect(url: str, timeout: float, retries: int = 1) -> Redis:
    """An asynchronous client; commands fail after `timeout` seconds and are tried once more on a broken connection.

    One retry is safe because every script may be replayed. A Redis that is silent is not asked again.
    """
    pool = BlockingConnectionPool.from_url(
        url, max_connections=_CONNECTIONS, timeout=timeout, socket_timeout=timeout, socket_connect_timeout=timeout,
        retry=AsyncRetry(NoBackoff(), retries, (RedisConnectionError,)),
    )  # fmt: skip
    return Redis.from_pool(pool)


async def answers(url: str) -> bool:
    """Whether a Redis answers there within a second."""
    redis = connect(url, 1.0)
    try:
        with translated():
            await redis.ping()
    except LedgerUnavailable:
        return False
    finally:
        await close(redis)
    return True


async def close(redis: Redis) -> None:
    """Close a client; one that can't be closed in time is left to the garbage collector."""
    with suppress(RedisError, OSError):
        await redis.aclose()


def connect_sync(url: str, timeout: float | None = None) -> sync_redis.Redis:
    """A synchronous client for RQ; no retries, since a replayed enqueue would be a second one.

    A worker leaves `timeout` (seconds) out: it blocks in BLPOP, for which RQ sets a read timeout of its own.
    """
    return sync_redis.Redis.from_url(
        url, socket_timeout=timeout, socket_connect_timeout=timeout or 5.0, retry=Retry(NoBackoff(), 0)
    )


@contextmanager
def translated() -> Iterator[None]:
    """Redis's errors leave here as LedgerUnavailable."""
    try:
        yield
    except (RedisError, OSError) as error:
        if isinstance(error, OutOfMemoryError) or "-OOM " in str(error):  # the latter from scripts before Redis 7
            raise LedgerFull("Redis has no memory left: nothing was written.") from None
        raise LedgerUnavailable(f"Redis did not answer: {error}") from None
