"""Knows how much bulk work is at the engine, and what it gave up for people: asked in the background, once a second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from workers.errors import LedgerUnavailable
from workers.ledger import Ledger

_INTERVAL = 1.0
_BELIEVED = 5.0
"""Seconds for which an answer stands while Redis gives no other."""


class BulkWatch(Collector):
    """The last known state, of all workers: every api process shows the same. `run()` keeps it fresh."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._requests = 0
        self._heard = float("-inf")
        self._given_back, self._wasted_seconds = 0, 0.0

    @property
    def requests(self) -> int:
        """Bulk requests at the engine, of all workers; 0 when that is not known."""
        return self._requests if time.monotonic() - self._heard < _BELIEVED else 0

    async def run(self) -> None:
        """Ask until cancelled."""
        while True:
            with suppress(LedgerUnavailable):
                await self.refresh()
            await asyncio.sleep(_INTERVAL)

    async def refresh(self) -> None:
        """Ask now. Raises LedgerUnavailable."""
        self._requests = (await self._ledger.at_engine()).requests
        self._given_back, self._wasted_seconds = await self._ledger.given_back()
        self._heard = time.monotonic()

    def collect(self) -> Iterator[Metric]:
        """For Prometheus."""
        yield GaugeMetricFamily(
            "velocity_bulk_requests_in_flight", "Bulk requests at the engine, of all workers.", self.requests
        )
        yield CounterMetricFamily(
            "velocity_bulk_given_back", "Bulk requests ended early for people's sake, to run again.", self._given_back
        )
        yield CounterMetricFamily(
            "velocity_bulk_wasted_seconds", "Seconds that those had been at the engine.", self._wasted_seconds
        )
