"""The data directory: the truth about jobs, of which the ledger in Redis is an index that can be made again.

    DATA/jobs/<tenant>/<job>/
      job.json       what was asked for
      input.jsonl    one canonical item per line: {"id", "body"}; immutable
      input.index    offset of each line, 8 bytes little-endian, and the total length last
      cancelled      there once its owner has cancelled it
      seg/<unit>.<epoch>.<owner>   finished items of one lease: crc32 in hex, a space, the record, a newline
      output.jsonl, error.jsonl    written once by the finalizer, in input order
      outcome.json   written after them: how the job ended

Whatever is acknowledged was fsynced before, and its directory too. Raises StorageError.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import orjson
from pydantic import ValidationError

from workers import durable
from workers.draft import OFFSET, OUTCOME, Draft
from workers.errors import NoSuchJob, StorageError
from workers.job import Item, JobSpec, Outcome, Record, is_id
from workers.prefix import prefix_of
from workers.segment import Segment, age, decode, encode

TRASH = "trash"
_INPUT = "The job's input can't be read"


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
        with self.draft() as draft:
            for line in items:
                draft.add(line)
            draft.publish(spec)

    @contextmanager
    def draft(self) -> Iterator[Draft]:
        """A new job's files, item by item; gone again on the way out unless they were published."""
        path = self.path.with_suffix(".draft")
        try:
            with durable.storage("The job can't be stored"):
                durable.make_directory(path / "seg")
                with durable.new_file(path / "input.jsonl") as lines:
                    yield Draft(path, self.path, lines)
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """Forget a job that was not accepted."""
        for path in (self.path, self.path.with_suffix(".draft")):
            shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def _storage(self, what: str) -> Iterator[None]:
        """Raises StorageError that says what could not be done; NoSuchJob if the job was deleted meanwhile."""
        try:
            with durable.storage(what):
                yield
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError) and not self.path.exists():
                raise NoSuchJob(f"There is no job {self.path.name!r}.") from None
            raise

    def spec(self) -> JobSpec:
        """What was asked for."""
        with self._storage("The job can't be read"):
            text = (self.path / "job.json").read_bytes()
        try:
            return JobSpec.model_validate_json(text)
        except ValidationError as error:
            raise StorageError(f"job.json of {self.path.name} is damaged.") from error

    def plan(self, first: int, count: int) -> list[int]:
        """In which order to run items: those that begin alike together, for the engine's prefix cache.

        Groups stand in the order of their first item, items in input order. One item at a time is in memory.
        """
        groups: dict[bytes, list[int]] = {}
        with self._input() as (lines, offsets):
            spans = offsets(first, count)
            lines.seek(spans[0])
            for at in range(count):
                line = lines.read(spans[at + 1] - spans[at])
                groups.setdefault(prefix_of(orjson.loads(line)["body"]), []).append(first + at)
        return [index for group in groups.values() for index in group]

    def item(self, index: int) -> Item:
        """One item of the input."""
        with self._input() as (lines, offsets):
            begin, end = offsets(index, 1)
            lines.seek(begin)
            line = orjson.loads(lines.read(end - begin))
        return Item(index, line["id"], line["body"])

    def input_bytes(self) -> int:
        """Size of the input."""
        with self._storage(_INPUT):
            return (self.path / "input.jsonl").stat().st_size

    def ids(self) -> Iterator[str]:
        """Every item's id, in input order."""
        with self._storage(_INPUT), (self.path / "input.jsonl").open("rb") as lines:
            for line in lines:
                yield orjson.loads(line)["id"]

    def discard(self) -> None:
        """Delete all of it: gone at once for everybody, then from the disk."""
        with durable.storage("The job can't be deleted"):
            durable.discard(self.path, self.path.parents[2] / TRASH)

    @contextmanager
    def _input(self) -> Iterator[tuple[BinaryIO, Callable[[int, int], list[int]]]]:
        with (
            self._storage(_INPUT),
            (self.path / "input.index").open("rb") as index,
            (self.path / "input.jsonl").open("rb") as lines,
        ):

            def offsets(first: int, count: int) -> list[int]:
                index.seek(first * OFFSET.size)
                return [value for (value,) in OFFSET.iter_unpack(index.read((count + 1) * OFFSET.size))]

            try:
                yield lines, offsets
            except (ValueError, KeyError):
                raise StorageError(f"The input of {self.path.name} is damaged.") from None

    def cancel(self) -> None:
        """Make its owner's wish to end it durable."""
        with self._storage("The job can't be cancelled"):
            durable.replace(self.path / "cancelled", b"")

    def is_cancelled(self) -> bool:
        """Whether its owner wished it to end."""
        return (self.path / "cancelled").exists()

    def write_outcome(self, outcome: Outcome) -> None:
        """The job is over, for good; its result files are in place."""
        with self._storage("The job's outcome can't be written"):
            durable.replace(self.path / OUTCOME, outcome.model_dump_json().encode())

    def outcome(self) -> Outcome | None:
        """How it ended; None as long as it has not."""
        try:
            return Outcome.model_validate_json((self.path / OUTCOME).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise StorageError(f"The outcome of {self.path.name} can't be read.") from error

    def segment(self, name: str) -> Segment:
        """A segment file to append to."""
        return Segment(self.path / "seg" / name)

    def committed(self, segments: Mapping[str, int], *, strict: bool = True) -> dict[int, Record]:
        """Records in the committed parts of a shard's segments by item index, in the order in which they finished.

        Unless `strict`, what is damaged or gone is left out.
        """
        found: dict[int, Record] = {}
        for name in sorted(segments, key=age):
            for line in self._lines(name, segments[name], strict=strict):
                try:
                    record = decode(line)
                except StorageError:
                    if strict:
                        raise
                    continue
                found.setdefault(record.index, replace(record, nth=len(found)))
        return found

    def _lines(self, segment: str, length: int, *, strict: bool) -> list[bytes]:
        try:
            with self._storage("The job's results can't be read"), (self.path / "seg" / segment).open("rb") as file:
                return file.read(length).splitlines()
        except StorageError as error:
            if strict or not isinstance(error.__cause__, FileNotFoundError):
                raise
            return []

    def surviving(self) -> Iterator[tuple[int, str, list[Record], int]]:
        """Shard, segment name, records and valid length of every segment on the disk, oldest leases first.

        What follows a torn or damaged line is not valid.
        """
        names = [path.name for path in (self.path / "seg").glob("*.*.*")]
        for name in sorted(names, key=age):
            records: list[Record] = []
            length = 0
            with self._storage("The job's results can't be read"), (self.path / "seg" / name).open("rb") as file:
                for line in file:
                    try:
                        record = decode(line)
                    except StorageError:
                        break
                    if not line.endswith(b"\n"):
                        break
                    records.append(record)
                    length += len(line)
            yield int(name.split(".")[0]), name, records, length

    def merge(self, records: Iterable[Record], owner: str) -> Callable[[], None]:
        """Write output.jsonl and error.jsonl from records in input order, as drafts that nobody else writes.

        Returns what puts them into place; two that do it put the same content there.
        """
        drafts = {path: path.with_suffix(f".{owner}.draft") for path in (self.output, self.errors)}
        output, errors = drafts.values()
        with (
            self._storage("The job's results can't be written"),
            durable.new_file(output) as good,
            durable.new_file(errors) as bad,
        ):
            for record in records:
                durable.write_all(good if record.ok else bad, encode(record) + b"\n")

        def publish() -> None:
            with self._storage("The job's results can't be put into place"):
                for path, draft in drafts.items():
                    draft.rename(path)
                durable.sync_directory(self.path)

        return publish

    def drop_drafts(self) -> None:
        """Of finalizers that crashed or were overtaken."""
        for result in (self.output, self.errors):
            for draft in self.path.glob(f"{result.stem}.*.draft"):
                draft.unlink(missing_ok=True)

    def drop_segments(self) -> None:
        """The result files have replaced them."""
        shutil.rmtree(self.path / "seg", ignore_errors=True)

    def completed(self) -> set[int]:
        """Items of a finished job that have a result."""
        with self._storage("The job's results can't be read"), self.output.open("rb") as lines:
            return {decode(line).index for line in lines}

    def results(self, after: int) -> Iterator[Record]:
        """Records of a finished job in input order, from the one after index `after` on."""
        with (
            self._storage("The job's results can't be read"),
            self.output.open("rb") as good,
            self.errors.open("rb") as bad,
        ):
            sides = [(decode(line) for line in file) for file in (good, bad)]
            waiting = [next(side, None) for side in sides]
            while any(waiting):
                at = min((record.index, side) for side, record in enumerate(waiting) if record)[1]
                record = waiting[at]
                if record and record.index > after:
                    yield record
                waiting[at] = next(sides[at], None)


def empty_trash(root: Path) -> None:
    """Remove what was deleted, where a process died before it was gone."""
    for entry in (root / TRASH).glob("*"):
        shutil.rmtree(entry, ignore_errors=True)


def encode_item(item_id: str, body: dict[str, object]) -> bytes:
    """One line of input.jsonl."""
    return orjson.dumps({"id": item_id, "body": body}) + b"\n"
