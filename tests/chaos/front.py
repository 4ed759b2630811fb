"""Clients of velocity: they submit jobs until each is acknowledged, and read them back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any, Self

import httpx
import orjson

from tests.fake_engine import MODEL

_PATIENCE = 120.0
"""Seconds after which even a client that tries again gives up: velocity was gone for too long."""
_POLL = 0.3
_AGAIN = frozenset({429, 500, 502, 503, 504, 507})


@dataclass
class Submission:
    """A job that some client wants done."""

    tag: str
    """Its name; prompts begin with it."""
    items: int
    key: str
    job: str = ""
    """Its id, once it was acknowledged."""
    tries: int = 0
    same_as: str = ""
    """Its Idempotency-Key, if that is not its name."""
    poison: frozenset[int] = frozenset()
    """Items that kill their worker."""

    def prompt(self, index: int) -> str:
        """What an item asks."""
        return f"{self.tag}/{index}{' poison' if index in self.poison else ''}"


@dataclass
class Front:
    """The addresses of the api processes, as a load balancer has them, and API keys of several tenants."""

    urls: list[str]
    http: httpx.AsyncClient
    chance: Random
    idempotent: bool
    """Whether a submission that is tried again says that it is the same."""
    keys: list[str] = field(default_factory=list)

    @classmethod
    @asynccontextmanager
    async def to(cls, ports: list[int], *, seed: int, idempotent: bool) -> AsyncIterator[Self]:
        """Clients of these api processes."""
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        async with httpx.AsyncClient(timeout=10) as http:
            yield cls(urls, http, Random(seed), idempotent)  # noqa: S311 - no secret

    async def make_keys(self, bootstrap: str, tenants: int) -> None:
        """An API key for each of some new tenants."""
        for number in range(tenants):
            terms = {"name": f"tenant-{number}"}
            answer = await self.ask("POST", "/admin/keys", bootstrap, content=orjson.dumps(terms))
            self.keys.append(answer.json()["key"])

    async def ask(
        self,
        method: str,
        path: str,
        key: str,
        tried: Callable[[], None] = lambda: None,
        headers: dict[str, str] | None = None,
        **request: Any,
    ) -> httpx.Response:
        """An answer below 400, asked for until there is one. Raises TimeoutError."""
        async with asyncio.timeout(_PATIENCE):
            while True:
                tried()
                try:
                    answer = await self.http.request(
                        method, self.chance.choice(self.urls) + path,
                        headers={"authorization": f"Bearer {key}", **(headers or {})}, **request,
                    )  # fmt: skip
                except httpx.TransportError:  # whether it was heard is not known
                    await asyncio.sleep(0.2)
                    continue
                if answer.status_code < 400:
                    return answer
                assert answer.status_code in _AGAIN, f"{method} {path}: {answer.status_code} {answer.text}"
                await asyncio.sleep(0.2)

    async def submit(self, job: Submission) -> Submission:
        """Send it until it is acknowledged."""
        items = [
            {"id": f"item-{index}", "messages": [{"role": "user", "content": job.prompt(index)}]}
            for index in range(job.items)
        ]
        body = orjson.dumps({"name": job.tag, "model": MODEL, "defaults": {"max_tokens": 8}, "items": items})

        def tried() -> None:
            job.tries += 1

        headers = {"content-type": "application/json"}
        if self.idempotent:
            headers["idempotency-key"] = job.same_as or job.tag
        answer = await self.ask("POST", "/jobs", job.key, tried, headers, content=body)
        job.job = answer.json()["id"]
        return job

    async def jobs(self, key: str) -> list[dict[str, Any]]:
        """All jobs of a key's tenant."""
        found: list[dict[str, Any]] = []
        after = ""
        while True:
            page = (await self.ask("GET", f"/jobs?limit=100{after}", key)).json()
            found += page["data"]
            if not page["has_more"]:
                return found
            after = f"&after={page['last_id']}"

    async def results(self, job: str, key: str) -> list[dict[str, Any]]:
        """What GET /jobs/{id}/results says; a reading that breaks off begins again."""
        answer = await self.ask("GET", f"/jobs/{job}/results", key)
        return [orjson.loads(line) for line in answer.content.splitlines()]

    async def state(self, job: Submission) -> dict[str, Any]:
        """An acknowledged job as it is now."""
        found: dict[str, Any] = (await self.ask("GET", f"/jobs/{job.job}", job.key)).json()
        return found

    async def finished(self, job: Submission, seconds: float) -> dict[str, Any]:
        """The job once it is over. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while not over(state := await self.state(job)):
                await asyncio.sleep(_POLL)
        return state


def over(state: dict[str, Any]) -> bool:
    """Whether nothing will change in a job any more."""
    return state["status"] in {"completed", "cancelled", "expired", "failed"}
