"""What each key used, by day: counted where requests are settled and items are committed, read here."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from redis.asyncio import Redis

from workers import redis_keys
from workers.redis import translated

MOST_DAYS = 400
"""For how long usage is kept."""
_DAY = 86400


@dataclass(frozen=True, slots=True)
class Usage:
    """One kind of traffic of one key on one day."""

    requests: int
    input_tokens: int
    output_tokens: int
    refused: int


@dataclass(frozen=True, slots=True)
class DayUsage:
    """One key on one day (UTC)."""

    key: str
    date: str
    interactive: Usage
    bulk: Usage


class UsageStore:
    """Reads usage. Raises LedgerUnavailable."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def of(self, accounts: list[str], days: int) -> list[DayUsage]:
        """Days on which a key was used, the newest first; today is one of the `days`."""
        today = int(time.time()) // _DAY
        wanted = [(account, today - back) for back in range(days) for account in accounts]
        with translated():
            async with self._redis.pipeline(transaction=False) as pipe:
                for account, day in wanted:
                    pipe.hgetall(redis_keys.usage(account, day))
                raws: list[dict[bytes, bytes]] = await pipe.execute()
        return [_day(account, day, raw) for (account, day), raw in zip(wanted, raws, strict=True) if raw]


def _day(account: str, day: int, raw: dict[bytes, bytes]) -> DayUsage:
    def usage(prefix: str) -> Usage:
        names = ("requests", "input_tokens", "output_tokens", "refused")
        return Usage(*(int(raw.get(f"{prefix}{name}".encode(), 0)) for name in names))

    date = datetime.fromtimestamp(day * _DAY, UTC).date().isoformat()
    return DayUsage(account, date, usage(""), usage("bulk_"))


def usage_view(day: DayUsage) -> dict[str, Any]:
    """One day as clients see it."""
    return {
        "object": "usage", "key": day.key, "date": day.date,
        **{
            name: {
                "requests": usage.requests, "input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens,
                "refused": usage.refused,
            }
            for name, usage in (("interactive", day.interactive), ("bulk", day.bulk))
        },
    }  # fmt: skip
