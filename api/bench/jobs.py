"""Bulk as a job through /jobs: kept long enough for the block, watched, and removed afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import httpx

from api.bench.load import DEFAULTS, Done, Prompts, Sizes
from api.cli.client import AnswerError, VelocityClient

_ITEMS, _MOST_ITEMS = 1000, 20_000
_POLL, _FINE_POLL = 1.0, 0.2
_TRIES = 30
_OVER_SECONDS = 120.0
_TERMINAL = frozenset({"completed", "cancelled", "expired", "failed"})


class JobLoad:
    """Jobs of one block. What counts is what the ledger has committed: completed items, and their tokens."""

    def __init__(self, client: VelocityClient, model: str, sizes: Sizes, prompts: Prompts) -> None:
        self._client = client
        self._model = model
        self._sizes = sizes
        self._prompts = prompts
        self._jobs: dict[str, dict[str, Any]] = {}
        self._next_items = _ITEMS
        self.done: list[tuple[float, Done]] = []
        """When tokens were seen to have been committed, in seconds of the block, and how many since the look before."""
        self.failed = 0
        """Items that ended in an error, other than by our cancelling the job."""

    async def run(self, zero: float, seconds: float, over: Callable[[], bool]) -> None:
        """Submit, and look about once a second until `over()`; exactly at the block's begin and end, too.

        Raises AnswerError if velocity refuses the job, httpx.TransportError if it is away for long.
        """
        marks = [0.0, seconds]
        try:
            await self._submit()
            while not over():
                now = time.monotonic() - zero
                await self._look(marks.pop(0) if marks and now >= marks[0] else now)
                if self._left < self._next_items // 4:
                    await self._submit()
                coming = zero + marks[0] - time.monotonic() if marks else _POLL
                await asyncio.sleep(max(0.0, min(_POLL, coming)))
        finally:
            await asyncio.shield(self._remove())

    @property
    def _left(self) -> int:
        counts = [job["counts"] for job in self._jobs.values()]
        return int(sum(count["total"] - count["completed"] - count["failed"] for count in counts))

    async def _submit(self) -> None:
        items = [{"id": str(number), **self._prompts.item(self._sizes)} for number in range(self._next_items)]
        body = {"name": "velocity bench", "model": self._model, "defaults": DEFAULTS, "items": items}
        job = await self._ask("POST", "/jobs", json=body)
        self._jobs[job["id"]] = job
        self._next_items = min(2 * self._next_items, _MOST_ITEMS)

    async def _look(self, at: float) -> None:
        """Note what was committed since the last look."""
        for name, before in list(self._jobs.items()):
            if before["status"] in _TERMINAL:
                continue
            now = await self._ask("GET", f"/jobs/{name}")
            new = Done(*(now["usage"][kind] - before["usage"][kind] for kind in ("output_tokens", "input_tokens")))
            if new.output:
                self.done.append((at, new))
            self._jobs[name] = now
        self.failed = sum(job["counts"]["failed"] for job in self._jobs.values())

    async def _ask(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        """The answer; a machine at its limits is asked again."""
        for left in reversed(range(_TRIES)):
            try:
                return dict(await self._client.json(method, path, **more))
            except (AnswerError, httpx.TransportError):
                if not left:
                    raise
            await asyncio.sleep(_FINE_POLL)
        raise AssertionError

    async def _remove(self) -> None:
        """Cancel what runs, wait until its requests have left the engine, delete all of it."""
        for name, job in self._jobs.items():
            if job["status"] not in _TERMINAL:
                await self._ask("POST", f"/jobs/{name}/cancel")
        deadline = time.monotonic() + _OVER_SECONDS
        for name in self._jobs:
            while (job := await self._ask("GET", f"/jobs/{name}"))["status"] not in _TERMINAL:
                if time.monotonic() > deadline:
                    raise AnswerError(f"{name} is still {job['status']} {_OVER_SECONDS:.0f} s after it was cancelled.")
                await asyncio.sleep(_FINE_POLL)
            self._jobs[name] = job
            await self._ask("DELETE", f"/jobs/{name}")
