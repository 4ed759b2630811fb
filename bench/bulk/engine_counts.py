"""What the engine counts itself, read from its /metrics before and after an arm."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

_NAMES = {
    "vllm:prefix_cache_queries_total": "asked",
    "vllm:prefix_cache_hits_total": "cached",
    "vllm:e2e_request_latency_seconds_sum": "request_seconds",
    "vllm:iteration_tokens_total_count": "steps",
}


@dataclass(frozen=True)
class Counts:
    """Sums since the engine's start. An engine that does not tell has 0."""

    asked: float = 0
    """Prompt tokens looked up in the prefix cache."""
    cached: float = 0
    """Those of them that were there."""
    request_seconds: float = 0
    """How long the finished requests were at the engine, all together."""
    steps: float = 0
    """Steps that computed anything."""

    def since(self, before: Counts) -> Counts:
        """What came in between."""
        return Counts(**{name: value - getattr(before, name) for name, value in asdict(self).items()})


async def read(session: aiohttp.ClientSession, engine_url: str) -> Counts:
    """Ask now."""
    async with session.get(f"{engine_url}/metrics") as response:
        text = await response.text() if response.status == 200 else ""
    sums = dict.fromkeys(_NAMES.values(), 0.0)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if name := _NAMES.get(sample.name):
                sums[name] += sample.value
    return Counts(**sums)
