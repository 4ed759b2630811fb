"""Why a request is refused, in words, with a time to wait that is true."""

from __future__ import annotations

import math

from api.errors import ApiError, Header
from api.limits.rates import Rates, Standing, duration
from api.metrics import Refusal

_LONGEST_GUESS = 60_000_000


def refusal(reason: str, wait: int, key: Rates, all_keys: Rates, standing: Standing, cost: int) -> ApiError:
    """The answer to a refused request. `wait` is in µs; `cost` in tokens."""
    headers = standing.headers(key)
    if reason == Refusal.NEVER_FITS:
        limit = min(rates.tpm for rates in (key, all_keys) if rates.tpm)
        return _never(f"Request too large: about {cost:,} tokens (input and max_tokens), of {limit:,} per minute. "
                      "Send less, or ask for fewer with max_tokens.", "tokens", headers)  # fmt: skip
    message = _sentence(reason, key, standing, cost)
    if reason not in {"requests", "tokens", "global_requests", "global_tokens"}:
        wait = min(max(wait, 1_000_000), _LONGEST_GUESS)  # others decide when: this is how long slots are held lately
    again = f" Try again in {duration(wait / 1e6)}."
    waits = (
        (b"retry-after", b"%d" % math.ceil(wait / 1e6)),
        (b"retry-after-ms", b"%d" % math.ceil(wait / 1e3)),
    )
    if reason.startswith("global_"):
        return ApiError(503, message + again, type="server_error", code="overloaded", headers=(*headers, *waits))
    kind = "tokens" if reason == "tokens" else "requests"
    return ApiError(429, message + again, type=kind, code="rate_limit_exceeded", headers=(*headers, *waits))


def _sentence(reason: str, key: Rates, standing: Standing, cost: int) -> str:
    if reason.startswith("global_"):
        return "velocity serves as much as it is set to already."
    if reason == "requests":
        burst = f" (at most {key.burst:,} at once)" if key.burst != key.rpm else ""
        return f"Rate limit reached: {key.rpm:,} requests per minute{burst}, all used."
    if reason == "tokens":
        return (
            f"Rate limit reached: {key.tpm:,} tokens per minute, {key.tpm - standing.tokens:,} used, "
            f"about {cost:,} requested (input and max_tokens)."
        )
    if reason == Refusal.MAX_WAITING:
        return f"Rate limit reached: {key.concurrency:,} requests run at the same time, and too many wait already."
    return f"Rate limit reached: {key.concurrency:,} requests run at the same time."


def _never(message: str, kind: str, headers: tuple[Header, ...]) -> ApiError:
    return ApiError(
        429, message, type=kind, code="rate_limit_exceeded", headers=(*headers, (b"x-should-retry", b"false"))
    )
