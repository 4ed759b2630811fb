"""Named points at which a process ends itself as `kill -9` would; by wrapping, since the code has no hooks for it.

A marker file sees to it that this happens once: the process that is started in its stead goes on.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.chaos.child import CRASHED
from workers.job import Lease, Record
from workers.ledger import Ledger
from workers.segment import Segment
from workers.store import JobFiles

Condition = Callable[..., bool]
MERGED = 10
"""Records that were merged when the point mid-merge comes."""


def always(*_: Any, **__: Any) -> bool:
    """Every call is meant."""
    return True


class Crash:
    """Ends the process at one point, the first time."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def now(self) -> None:
        """End it, unless that was done before."""
        try:
            os.close(os.open(self._marker, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        os._exit(CRASHED)

    def before(self, owner: Any, name: str, condition: Condition = always) -> None:
        """In the place of the calls of `owner.name` that fulfil the condition on their arguments."""
        wrapped = getattr(owner, name)

        def crashing(*args: Any, **kwargs: Any) -> Any:
            if condition(*args, **kwargs):
                self.now()
            return wrapped(*args, **kwargs)

        setattr(owner, name, crashing)

    def after(self, owner: Any, name: str, condition: Condition = always) -> None:
        """After the calls of a function whose result fulfils the condition."""
        wrapped = getattr(owner, name)

        def crashing(*args: Any, **kwargs: Any) -> Any:
            result = wrapped(*args, **kwargs)
            if condition(result):
                self.now()
            return result

        setattr(owner, name, crashing)

    def after_async(self, owner: Any, name: str, condition: Condition = always) -> None:
        """After the calls of a coroutine function whose result and arguments fulfil the condition."""
        wrapped = getattr(owner, name)

        async def crashing(*args: Any, **kwargs: Any) -> Any:
            result = await wrapped(*args, **kwargs)
            if condition(result, *args):
                self.now()
            return result

        setattr(owner, name, crashing)


def _of_a_shard(lease: Lease | None, *_: Any) -> bool:
    return lease is not None and not lease.final


def _with_records(_: Ledger, __: Lease, records: list[Record], *___: Any) -> bool:
    return bool(records)


class _LastCommit:
    """Whether a commit brings the last items of its shard."""

    def __init__(self) -> None:
        self._brought: Counter[str] = Counter()

    def __call__(self, _: Ledger, lease: Lease, records: list[Record], *__: Any) -> bool:
        self._brought[lease.owner] += len(records)
        return bool(records) and self._brought[lease.owner] + len(lease.done) >= lease.count


def _renamed_to(name: str) -> Condition:
    return lambda _, target, **__: Path(target).name == name


def _draft_of_a_job(source: Any, *_: Any, **__: Any) -> bool:
    return Path(source).suffix == ".draft" and Path(source).is_dir()


def _mid_merge(crash: Crash) -> None:
    wrapped: Any = JobFiles.merge

    def merge(self: JobFiles, records: Iterator[Record], *args: Any, **kwargs: Any) -> Any:
        def some() -> Iterator[Record]:
            for place, record in enumerate(records):
                if place == MERGED:
                    crash.now()
                yield record

        return wrapped(self, some(), *args, **kwargs)

    setattr(JobFiles, "merge", merge)  # noqa: B010 - mypy lets nobody assign a method


def _between_the_renames(crash: Crash) -> None:
    seen: list[Path] = []

    def second(_: Any, target: Any, **__: Any) -> bool:
        if Path(target).name in {"output.jsonl", "error.jsonl"}:
            seen.append(Path(target))
        return len(seen) == 2

    crash.before(os, "rename", second)


OF_THE_WORKER: dict[str, Callable[[Crash], None]] = {
    "after-claim": lambda crash: crash.after_async(Ledger, "claim", _of_a_shard),
    "before-append": lambda crash: crash.before(Segment, "append"),
    "after-write-before-fdatasync": lambda crash: crash.before(os, "fdatasync"),
    "after-fdatasync-before-commit": lambda crash: crash.before(Ledger, "commit", _with_records),
    "after-commit": lambda crash: crash.after_async(Ledger, "commit", lambda _, *args: _with_records(*args)),
    "before-close": lambda crash: crash.before(Ledger, "commit", _LastCommit()),
    "mid-merge": _mid_merge,
    "after-merge-before-publish": lambda crash: crash.after(JobFiles, "merge"),
    "between-the-two-renames": _between_the_renames,
    "after-publish-before-finalize": lambda crash: crash.before(Ledger, "finalize"),
    "after-finalize": lambda crash: crash.after_async(Ledger, "finalize"),
    "before-drop-segments": lambda crash: crash.before(JobFiles, "drop_segments"),
}
OF_THE_API: dict[str, Callable[[Crash], None]] = {
    "after-draft-before-rename": lambda crash: crash.before(os, "rename", _draft_of_a_job),
    "after-rename-before-submit": lambda crash: crash.before(Ledger, "submit"),
    "after-submit-before-202": lambda crash: crash.after_async(Ledger, "submit"),
}
