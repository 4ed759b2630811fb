"""The data directory: the truth about jobs, of which the ledger in Redis is an index that can be made again.

    DATA/jobs/<tenant>/<job>/
      job.json       what was asked for
      input.jsonl    one canonical item per line: {"id", "body"}; immutable
      input.index    offset of each line, 8 bytes little-endian, and the total length last
      seg/<unit>.<epoch>.<owner>   finished items of one lease: crc32 in hex, a space, the record, a newline
      output.jsonl, error.jsonl    written once by the finalizer, in input order

Whatever is acknowledged was fsynced before, and its directory too. Raises StorageError.
"""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import orjson

from workers import durable
from workers.errors import NoSuchJob, StorageError
from workers.job import Item, JobSpec, Record, is_id

_OFFSET = struct.Struct("<Q")


class JobFiles:
    """The files of one job."""

    def __init__(self, root: Path, tenant: str, job: str) -> None:
        if not (is_id(job) and is_id(tenant)):
            raise NoSuchJob(f"There is no job {job!r}.")
        self.path = root / "jobs" / tenant / job
        self.output = self.path / "output.jsonl"
        self.errors = self.path / "error.jsonl"

    def create(self, spec: JobSpec, items: Iterable[bytes]) -> None:
        """Write spec and input durably under a draft name, then rename: the job is there whole, or not at all.

        `items` are encoded with `encode_item`.
        """
        draft = self.path.with_suffix(".draft")
        with _storage("The job can't be stored"):
            try:
                durable.make_directory(draft / "seg")
                offset, offsets = 0, bytearray()
                with durable.new_file(draft / "input.jsonl") as lines:
                    for line in items:
                        offsets += _OFFSET.pack(offset)
                        durable.write_all(lines, line)
                        offset += len(line)
                with durable.new_file(draft / "input.index") as index:
                    durable.write_all(index, bytes(offsets + _OFFSET.pack(offset)))
                durable.replace(draft / "job.json", orjson.dumps(spec.model_dump()))
                draft.rename(self.path)
                durable.sync_directory(self.path.parent)
            except OSError:
                shutil.rmtree(draft, ignore_errors=True)
                raise

    def remove(self) -> None:
        """Forget a job that was not accepted."""
        shutil.rmtree(self.path, ignore_errors=True)

    def spec(self) -> JobSpec:
        """What was asked for."""
        with _storage("The job can't be read"):
            return JobSpec.model_validate_json((self.path / "job.json").read_bytes())

    def items(self, first: int, count: int) -> list[Item]:
        """`count` items of the input from `first` on."""
        size = _OFFSET.size
        with _storage("The job's input can't be read"), (self.path / "input.index").open("rb") as index:
            index.seek(first * size)
            offsets = [value for (value,) in _OFFSET.iter_unpack(index.read((count + 1) * size))]
            with (self.path / "input.jsonl").open("rb") as lines:
                lines.seek(offsets[0])
                data = lines.read(offsets[-1] - offsets[0])
        parsed = [orjson.loads(line) for line in data.splitlines()]
        return [Item(first + at, line["id"], line["body"]) for at, line in enumerate(parsed)]

    def segment(self, name: str) -> Segment:
        """A segment file to append to."""
        return Segment(self.path / "seg" / name)

    def committed(self, segments: Mapping[str, int]) -> dict[int, Record]:
        """Records in the committed parts of a shard's segments, by item index."""
        found: dict[int, Record] = {}
        for name, length in segments.items():
            with _storage("The job's results can't be read"), (self.path / "seg" / name).open("rb") as file:
                for line in file.read(length).splitlines():
                    record = _decode(line)
                    found.setdefault(record.index, record)
        return found

    def merge(self, records: Iterable[Record], owner: str) -> Callable[[], None]:
        """Write output.jsonl and error.jsonl from records in input order, as drafts that nobody else writes.

        Returns what puts them into place; two that do it put the same content there.
        """
        drafts = {path: path.with_suffix(f".{owner}.draft") for path in (self.output, self.errors)}
        output, errors = drafts.values()
        with (
            _storage("The job's results can't be written"),
            durable.new_file(output) as good,
            durable.new_file(errors) as bad,
        ):
            for record in records:
                durable.write_all(good if record.ok else bad, _encode(record) + b"\n")

        def publish() -> None:
            with _storage("The job's results can't be put into place"):
                for path, draft in drafts.items():
                    draft.rename(path)
                durable.sync_directory(self.path)

        return publish

    def drop_segments(self) -> None:
        """The result files have replaced them."""
        shutil.rmtree(self.path / "seg", ignore_errors=True)

    def results(self, after: int) -> Iterator[Record]:
        """Records of a finished job in input order, from the one after index `after` on."""
        with _storage("The job's results can't be read"), self.output.open("rb") as good, self.errors.open("rb") as bad:
            sides = [(_decode(line) for line in file) for file in (good, bad)]
            waiting = [next(side, None) for side in sides]
            while any(waiting):
                at = min((record.index, side) for side, record in enumerate(waiting) if record)[1]
                record = waiting[at]
                if record and record.index > after:
                    yield record
                waiting[at] = next(sides[at], None)


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
        data = b"".join(_encode(record) + b"\n" for record in records)
        with _storage("Results can't be written"):
            if self._file is None:
                self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
                durable.sync_directory(self._path.parent)
            durable.write_all(self._file, data)
            os.fdatasync(self._file)
        self.length += len(data)
        return self.length


def encode_item(item_id: str, body: dict[str, object]) -> bytes:
    """One line of input.jsonl."""
    return orjson.dumps({"id": item_id, "body": body}) + b"\n"


def _encode(record: Record) -> bytes:
    line = orjson.dumps(record)
    return b"%08x %s" % (zlib.crc32(line), line)


def _decode(line: bytes) -> Record:
    crc, _, data = line.rstrip(b"\n").partition(b" ")
    if int(crc, 16) != zlib.crc32(data):
        raise StorageError("A stored result is damaged: its checksum does not match.")
    return Record(**orjson.loads(data))


@contextmanager
def _storage(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{what}: {error.strerror or error}.") from error
