"""The numbers: what is allowed, how much of it is left, and how clients are told."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

from api.errors import Header
from api.keys import Key


@dataclass(frozen=True, slots=True)
class Rates:
    """What one key, or everybody together, may do; 0 is no limit."""

    rpm: int = 0
    """Requests per minute."""
    burst: int = 0
    """Requests at once."""
    tpm: int = 0
    """Tokens per minute."""
    concurrency: int = 0
    """Requests at the same time."""

    @staticmethod
    def of(key: Key) -> Rates:
        """A key's."""
        return _rates(key.rpm or 0, key.burst or key.rpm or 0, key.tpm or 0, key.concurrency or 0)

    @property
    def args(self) -> tuple[int, int, int, int]:
        """As the scripts take them."""
        return self.rpm, self.burst, self.tpm, self.concurrency


@lru_cache(maxsize=1000)
def _rates(rpm: int, burst: int, tpm: int, concurrency: int) -> Rates:
    """Of requests with the same rates there are many."""
    return Rates(rpm, burst, tpm, concurrency)


@dataclass(slots=True)
class Standing:
    """What is left of a key's rates; times in µs until all of it is left again."""

    requests: int
    requests_reset: int
    tokens: int
    tokens_reset: int

    @classmethod
    def of(cls, values: Iterable[bytes | int]) -> Self:
        """From a script's answer."""
        return cls(*map(int, values))

    def headers(self, rates: Rates) -> tuple[Header, ...]:
        """OpenAI's x-ratelimit-…, for the limits that there are."""
        requests: tuple[Header, ...] = ()
        tokens: tuple[Header, ...] = ()
        if rates.rpm and rates.burst:
            requests = _told(b"requests", rates.burst, self.requests, self.requests_reset)
        if rates.tpm:
            tokens = _told(b"tokens", rates.tpm, self.tokens, self.tokens_reset)
        return requests + tokens


def _told(what: bytes, limit: int, left: int, reset: int) -> tuple[Header, ...]:
    return (
        (b"x-ratelimit-limit-" + what, b"%d" % limit),
        (b"x-ratelimit-remaining-" + what, b"%d" % left),
        (b"x-ratelimit-reset-" + what, duration(reset / 1e6).encode()),
    )


def duration(seconds: float) -> str:
    """Seconds the way OpenAI writes them: 120ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(seconds, 60)
    text = f"{rest:.3f}".rstrip("0").rstrip(".")
    return f"{int(minutes)}m{text}s" if minutes else f"{text}s"
