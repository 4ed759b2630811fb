"""How often people come, so that somebody is there for the wanted share of the time whatever the machine's speed."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, replace

from api.bench.figures import Record, covered
from api.bench.load import Caller, OpenLoad, Prompts, Sizes, Steady, Stream
from engine.errors import VelocityError

CHAT = Sizes(prompt=(100, 300), output=(48, 80))
SHORT = Sizes(prompt=(100, 300), output=(8, 16))
"""For rare people: more requests per block than with long answers."""
BULK = Sizes(prompt=(100, 300), output=(24, 72))
_BURST_SECONDS = 2.0
_BURST_PEOPLE = 2.5
"""People at the same time during a burst, if answers took no longer than when alone."""
_SAMPLES = 5
_HALVINGS = 40


class BenchError(VelocityError):
    """The benchmark can't go on; the message says why."""


@dataclass(frozen=True)
class Duty:
    """One kind of presence. `share` of the time somebody is there; 1 means always."""

    name: str
    share: float
    sizes: Sizes
    bursts: bool = False

    def load(self, service: float, seconds: float, seed: int) -> OpenLoad | Steady:
        """People of one block. `service` is how long an answer takes on the idle engine, in seconds.

        The rate is fitted to the pattern of arrivals that `seed` gives, so that also a short block has its share.
        """
        if self.share >= 1:
            return Steady(self.sizes, pause=service)
        if self.bursts:
            burst = OpenLoad(self.sizes, _BURST_PEOPLE / service, _BURST_SECONDS, 60.0)
            periods = [_BURST_SECONDS * 1.15**n for n in range(_HALVINGS)]
            loads = [replace(burst, period=period) for period in periods]
            return min(loads, key=lambda load: abs(_presence(load, 2 * service, seconds, seed) - self.share))
        low, high = 1e-3 / service, 10.0 / service
        for _ in range(_HALVINGS):
            rate = math.sqrt(low * high)
            if _presence(OpenLoad(self.sizes, rate), service, seconds, seed) < self.share:
                low = rate
            else:
                high = rate
        return OpenLoad(self.sizes, high)


DUTIES = {
    duty.name: duty
    for duty in (
        Duty("10", 0.1, SHORT),
        Duty("50", 0.5, CHAT),
        Duty("bursts", 0.5, CHAT, bursts=True),
        Duty("100", 1.0, CHAT),
    )
}


def _presence(load: OpenLoad, service: float, seconds: float, seed: int) -> float:
    """The share of the block with somebody there, if every answer took `service` seconds."""
    return covered((at, min(at + service, seconds)) for at in load.arrivals(seconds, seed)) / seconds


async def service_seconds(caller: Caller, sizes: Sizes, prompts: Prompts) -> float:
    """How long an answer takes when nobody else is there. Raises BenchError if it fails."""
    times: list[float] = []
    for number in range(_SAMPLES + 1):
        zero = time.monotonic()
        seen: Stream = await caller.stream(prompts.body(sizes, caller.model, None, stream=True), 0.0, zero)
        if seen.error:
            raise BenchError(f"A chat request failed: {seen.error}")
        if number:  # the first one warms up
            times.append(seen.last)
    return statistics.median(times)


def service_of(record: Record, before: float) -> float:
    """The same as seen in a block in which people were alone; `before` if too few came."""
    took = [s["last"] - s["due"] for s in record["streams"] if not s["error"]]
    return statistics.mean(took) if len(took) >= _SAMPLES else before
