"""A short run of chaos; `make chaos` runs longer ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.run import Plan, chaos

MOST_WASTED = 0.05
"""Of a run with a fault nearly every second; the aim of 2 % is for one kill every 1.5 s."""


@pytest.mark.timeout(400)
async def test_nothing_is_lost_while_everything_dies(tmp_path: Path) -> None:
    report = await chaos(Plan(seconds=40, seed=1), tmp_path)
    report.show()
    assert not report.findings.wrong, report.findings.examples
    assert report.findings.items >= 20_000
    assert report.findings.wasted <= MOST_WASTED
    assert not report.unforeseen
