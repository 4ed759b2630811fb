"""Segments: append-only files of finished items, one per lease, each line with its checksum.

A line is the crc32 of the record in hex, a space, the record as JSON, a newline.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import orjson

from workers import durable
from workers.errors import StorageError
from workers.job import Record


class Segment:
    """An append-only file of finished items. `append` returns only when they are on the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None
        self.length = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def append(self, records: Sequence[Record]) -> int:
        """Write and fdatasync; returns the file's durable length in bytes."""
        data = b"".join(encode(record) + b"\n" for record in records)
        with durable.storage("Results can't be written"):
            if self._file is None:
                self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
                durable.sync_directory(self._path.parent)
            durable.write_all(self._file, data)
            os.fdatasync(self._file)
        self.length += len(data)
        return self.length


def age(segment: str) -> tuple[int, str]:
    """Sorts a shard's segments by lease."""
    _, epoch, owner = segment.split(".")
    return int(epoch), owner


def encode(record: Record) -> bytes:
    line = orjson.dumps(record)
    return b"%08x %s" % (zlib.crc32(line), line)


def decode(line: bytes) -> Record:
    """The record of a line. Raises StorageError if the line is damaged."""
    crc, _, data = line.rstrip(b"\n").partition(b" ")
    try:
        if int(crc, 16) == zlib.crc32(data):
            return Record(**orjson.loads(data))
    except (ValueError, TypeError):
        pass  # told below
    raise StorageError("A stored result is damaged: its checksum does not match.")
