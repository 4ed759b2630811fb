"""What the api knows of bulk work at the engine, told by workers through Redis."""

from __future__ import annotations

import pytest

from api import bulk_watch
from tests.api.conftest import Door
from workers.window import Tally


def value(door: Door, name: str) -> float:
    lines = door.gateway.metrics.render()[0].decode().splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


async def test_bulk_at_the_engine_is_known_and_shown(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    bulk, ledger = door.gateway.bulk, door.gateway.ledger
    await bulk.refresh()
    assert bulk.requests == 0
    tally = Tally(in_flight=3, given_back=2, wasted=1.5)
    for name in ("one", "two"):
        await ledger.beat(name, 15, tally=tally)
    await bulk.refresh()
    assert bulk.requests == 6
    assert value(door, "velocity_bulk_requests_in_flight") == 6
    assert value(door, "velocity_bulk_given_back_total") == 4
    assert value(door, "velocity_bulk_wasted_seconds_total") == 3
    monkeypatch.setattr(bulk_watch, "_BELIEVED", -1)
    assert bulk.requests == 0
