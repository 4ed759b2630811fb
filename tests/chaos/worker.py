"""A worker process with faults built in: `python -m tests.chaos.worker [--lane LANE]`.

It is `velocity worker` without the command line, which takes longer to import than everything else.
"""

from __future__ import annotations

import sys

from engine import log
from tests.chaos import entry, points
from workers import process
from workers.job import LANE
from workers.settings import WorkerSettings

if __name__ == "__main__":
    entry.arm(points.OF_THE_WORKER)
    settings = WorkerSettings()
    log.configure(settings, "worker")
    process.run(settings, sys.argv[-1] if "--lane" in sys.argv else LANE)
