"""The two arms. Both end when the last of their items is finished, and both count tokens as the engine reports them."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from bench.bulk import engine_counts
from bench.bulk.items import Sizes, make
from bench.bulk.stack import Stack

_SHARES = (25, 50, 75)
_POLL, _FINE_POLL = 1.0, 0.1
_TRIES = 10
_LAST_COMMIT = 32
"""So near the end progress is asked for often, and before seldom: a question costs the cores that the engine uses."""

clock = time.perf_counter


@dataclass
class Arm:
    """What one arm did. All times are seconds."""

    name: str
    seconds: float = 0.0
    """From the first request (the 202 of a job) until the last item was finished (committed)."""
    whole: float = 0.0
    """From the submission until the job was completed, its result files written."""
    submission: float = 0.0
    """Until the 202."""
    input_tokens: int = 0
    output_tokens: int = 0
    in_flight: float = 0.0
    """Requests at the engine, on average over `seconds`."""
    cached: float = 0.0
    """Share of the prompt tokens that the engine had in its prefix cache."""
    steps: int = 0
    """Steps of the engine: with as many requests in flight, more of them mean that they came one by one."""
    cpu: float | None = None
    """Processor time of the worker."""
    misses: dict[int, float | None] = field(default_factory=dict)
    """By how much the estimated completion was off (negative: too early), by per cent done; None: no estimate."""

    @property
    def rate(self) -> float:
        """Output tokens per second until the last item was finished."""
        return self.output_tokens / self.seconds

    @property
    def whole_rate(self) -> float:
        """The same with submission and finalizing."""
        return self.output_tokens / self.whole


class Bench:
    """Runs arms against one stack; no prompt comes twice, also not in another run."""

    def __init__(self, stack: Stack, model: str, concurrency: int, priority: int) -> None:
        self._stack = stack
        self._model = model
        self._concurrency = concurrency
        self._priority = priority
        self._salt = time.time_ns() // 10**6 % 10**7 * 100

    async def run(self, name: str, sizes: Sizes) -> Arm:
        """One arm, `direct` or `jobs`. Ends the program if an item fails or has not the length that was asked for."""
        self._salt += 1
        requests = make(sizes, self._salt)
        arm = Arm(name)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
            before = await engine_counts.read(session, self._stack.engine_url)
            cpu = self._stack.cpu_seconds()
            await (self._direct if name == "direct" else self._jobs)(session, sizes, requests, arm)
            cpu_after = self._stack.cpu_seconds()
            counts = (await engine_counts.read(session, self._stack.engine_url)).since(before)
        if arm.output_tokens != (due := sum(sizes.lengths)):
            raise SystemExit(f"{name}: {arm.output_tokens} output tokens instead of {due}.")
        arm.in_flight = counts.request_seconds / arm.seconds
        arm.steps = round(counts.steps)
        arm.cached = counts.cached / counts.asked if counts.asked else 0.0
        arm.cpu = None if cpu is None or cpu_after is None else cpu_after - cpu
        return arm

    async def _direct(
        self, session: aiohttp.ClientSession, sizes: Sizes, requests: list[dict[str, Any]], arm: Arm
    ) -> None:
        """A closed loop, as `vllm bench serve --max-concurrency` has it: whoever is answered sends the next one."""
        common = {"model": self._model, "stream": False, "priority": self._priority, **sizes.defaults}
        left = iter(requests)
        began = clock()

        async def client() -> None:
            for request in left:
                answer = await self._ask(
                    session, "POST", f"{self._stack.engine_url}/v1/chat/completions", {**common, **request}
                )
                arm.input_tokens += answer["usage"]["prompt_tokens"]
                arm.output_tokens += answer["usage"]["completion_tokens"]

        async with asyncio.TaskGroup() as group:
            for _ in range(self._concurrency):
                group.create_task(client())
        arm.seconds = arm.whole = clock() - began

    async def _jobs(
        self, session: aiohttp.ClientSession, sizes: Sizes, requests: list[dict[str, Any]], arm: Arm
    ) -> None:
        """The same as one job, whose progress is watched until it is completed."""
        items = [{"id": f"{index}", **request} for index, request in enumerate(requests)]
        body = {"name": "bench", "model": self._model, "defaults": sizes.defaults, "items": items}
        estimates: dict[int, float | None] = {}
        began = clock()
        job = await self._ask(session, "POST", f"{self._stack.url}/jobs", body)
        accepted = clock()
        while job["status"] not in {"completed", "failed", "cancelled", "expired"}:
            left = _left(job)
            if left:
                _note_estimates(job, estimates)
            await asyncio.sleep(_POLL if left > max(2 * self._concurrency, _LAST_COMMIT) else _FINE_POLL)
            job = await self._ask(session, "GET", f"{self._stack.url}/jobs/{job['id']}")
            if not _left(job) and not arm.seconds:
                arm.seconds = clock() - accepted
        arm.whole, ended = clock() - began, time.time()
        if job["status"] != "completed" or job["counts"]["failed"]:
            raise SystemExit(f"The job is {job['status']}: {job['counts']}")
        arm.submission = accepted - began
        arm.input_tokens, arm.output_tokens = job["usage"]["input_tokens"], job["usage"]["output_tokens"]
        arm.misses = {share: None if at is None else at - ended for share, at in estimates.items()}

    async def _ask(
        self, session: aiohttp.ClientSession, method: str, url: str, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The answer. A question that a busy machine did not answer in time (503) is asked again."""
        headers, fault = {"authorization": f"Bearer {self._stack.key}"}, ""
        for tries_left in reversed(range(_TRIES if method == "GET" else 1)):
            async with session.request(method, url, json=body, headers=headers) as response:
                if response.status < 400:
                    return dict(await response.json())
                fault = f"{url} answered {response.status}: {await response.text()}"
                if response.status != 503 or not tries_left:
                    break
            await asyncio.sleep(_POLL)
        raise SystemExit(fault)


def _left(job: dict[str, Any]) -> int:
    counts = job["counts"]
    return int(counts["total"] - counts["completed"] - counts["failed"])


def _note_estimates(job: dict[str, Any], estimates: dict[int, float | None]) -> None:
    """What is said of the end when a share of the items is done for the first time."""
    done = 100 * (1 - _left(job) / job["counts"]["total"])
    for share in _SHARES:
        if done >= share:
            estimates.setdefault(share, job["estimated_completion"])
