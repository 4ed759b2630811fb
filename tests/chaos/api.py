"""`velocity api` with faults built in: `python -m tests.chaos.api`."""

from __future__ import annotations

from api.cli.main import app
from tests.chaos import entry, points

if __name__ == "__main__":
    entry.arm(points.OF_THE_API)
    entry.hurry()
    app(["api"])
