"""A Redis and a data directory with jobs that are over and whose owners are to be told."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path
from typing import Any, cast

from redis.asyncio import Redis

from tests.webhook_receiver import to
from workers.job import new_id
from workers.ledger import Ledger
from workers.outbox import Outbox
from workers.redis import connect
from workers.store import JobFiles
from workers.webhooks import Webhooks

TENANT = new_id("tenant")
OUTBOX = "velocity:outbox"
HERE = (ip_network("127.0.0.0/8"),)


@dataclass
class Office:
    """A Redis and a data directory with jobs that are over."""

    redis: Redis
    data: Path
    senders: list[Outbox] = field(default_factory=list)

    def sender(self, redis: Redis | None = None) -> Outbox:
        """One more sender, for which every name is this machine."""
        redis = redis or self.redis
        webhooks = Webhooks(self.data, HERE, resolve=to("127.0.0.1"))
        self.senders.append(Outbox(redis, Ledger(redis), webhooks, self.data))
        return self.senders[-1]

    async def over(self, url: str, status: str = "completed", tenant: str = TENANT, due: int = 1) -> str:
        """A job that has ended, as the ledger leaves it; `due` is what it has in the outbox."""
        job = new_id("job")
        self.path(job, tenant).mkdir(parents=True)
        fields: dict[Any, Any] = {
            "tenant": tenant, "status": status, f"{status}_at": 1_700_000_000_123, "name": "n", "model": "m",
            "endpoint": "e", "total": 3, "completed": 2, "failed": 1, "input_tokens": 4, "output_tokens": 5,
            "shards": 1, "shard_size": 8, "metadata": '{"a":"b"}', "webhook": url,
        }  # fmt: skip
        async with self.redis.pipeline() as pipe:
            pipe.hset(f"velocity:job:{job}", mapping=fields)
            pipe.zadd(OUTBOX, {f"{tenant}/{job}": due})
            await pipe.execute()
        return job

    def path(self, job: str, tenant: str = TENANT) -> Path:
        return JobFiles(self.data, tenant, job).path

    async def fields(self, job: str) -> tuple[str, str, str]:
        """Status, attempts and error of its webhook."""
        names = ["webhook_status", "webhook_attempts", "webhook_error"]
        found = cast("list[bytes | None]", await self.redis.hmget(f"velocity:job:{job}", names))
        status, attempts, error = (value.decode() if value else "" for value in found)
        return status, attempts, error

    async def wait(self, job: str) -> float | None:
        """Seconds until it is due."""
        score = await self.redis.zscore(OUTBOX, f"{TENANT}/{job}")
        return None if score is None else score / 1000 - time.time()

    async def make_due(self) -> None:
        for entry in cast("list[bytes]", await self.redis.zrange(OUTBOX, 0, -1)):
            await self.redis.zadd(OUTBOX, {entry: 1}, xx=True)


@asynccontextmanager
async def opened(redis_url: str, data: Path) -> AsyncIterator[Office]:
    """Ends its senders, too."""
    redis = connect(redis_url, 5)
    office = Office(redis, data)
    yield office
    for sender in office.senders:
        await sender.aclose()
    await redis.aclose()
