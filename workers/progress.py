"""How fast items are finished, and when a job will be: from the ledger's count of what was finished lately."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

_RATE_SECONDS = 60.0
"""Time constant of the count in workers/lua/prelude.lua (count_recent)."""
_KNOWN_SECONDS = 5.0
"""A rate that was watched for less is none yet."""


def recent_rate(fields: Mapping[str, str]) -> float | None:
    """Items per second lately; None if that is not known yet."""
    if "recent" not in fields:
        return None
    now = 1000 * time.time()
    seconds = (now - int(fields["recent_since"])) / 1000
    if seconds < _KNOWN_SECONDS:
        return None
    age = max(0.0, now - int(fields["recent_at"])) / 1000
    if age > 3 * _RATE_SECONDS:
        return None  # nothing came for so long: that says nothing about how it will go on
    recent = float(fields["recent"]) * math.exp(-age / _RATE_SECONDS)
    return recent / (_RATE_SECONDS * (1 - math.exp(-seconds / _RATE_SECONDS)))


def seconds_left(left: int, own_rate: float | None, queued: int, all_rate: float | None) -> float | None:
    """Seconds until a job with `left` items ends, or None if nobody can say.

    A job that runs goes on at its own rate. One that waits has at worst all accepted items before its last one.
    """
    if own_rate:
        return left / own_rate
    return queued / all_rate if all_rate else None
