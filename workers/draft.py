"""The files of a job that is not there yet, and how its input is laid out."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import orjson

from workers import durable
from workers.job import JobSpec, Outcome

OFFSET = struct.Struct("<Q")
"""An entry of input.index: where a line of input.jsonl begins."""
OUTCOME = "outcome.json"


class Draft:
    """The input of a job that is not there yet. Raises StorageError."""

    def __init__(self, path: Path, target: Path, lines: int) -> None:
        self._path = path
        self._target = target
        self._lines = lines
        self._offset = 0
        self._offsets = bytearray()
        self.count = 0
        """Items so far."""

    def add(self, line: bytes) -> None:
        """One more item, encoded with `encode_item`."""
        self._offsets += OFFSET.pack(self._offset)
        durable.write_all(self._lines, line)
        self._offset += len(line)
        self.count += 1

    def publish(self, spec: JobSpec, outcome: Outcome | None = None) -> None:
        """Make all of it durable and the job appear, whole; with an outcome if it is over before it begins."""
        os.fsync(self._lines)
        with durable.new_file(self._path / "input.index") as index:
            durable.write_all(index, bytes(self._offsets + OFFSET.pack(self._offset)))
        durable.replace(self._path / "job.json", orjson.dumps(spec.model_dump()))
        if outcome is not None:
            durable.replace(self._path / OUTCOME, outcome.model_dump_json().encode())
        self._path.rename(self._target)
        durable.sync_directory(self._target.parent)
