"""The load of api.bench for a GPU: words that every shape's tokenizer knows, and a client for hundreds of streams."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import aiohttp

from api.bench.load import Done, OpenLoad, Prompts, Sizes, Stream, bulk, open_loop

__all__ = ["Client", "OpenLoad", "Sizes", "Stream", "bulk", "closed_loop", "open_loop", "prompts"]

_WORDS = [f"w{number}" for number in range(4, 3900)]
"""The first words, which every shape's tokenizer knows."""


def prompts(salt: int) -> Prompts:
    """Prompts that no other salt gives."""
    return Prompts(salt, _WORDS)


class Client:
    """A `Caller` straight to the engine: one connection pool, and no parsing of what is only timed."""

    def __init__(self, url: str, model: str, key: str = "") -> None:
        self._url = f"{url}/v1/chat/completions"
        self.model = model
        self._session = aiohttp.ClientSession(
            headers={"authorization": f"Bearer {key}"} if key else {},
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            timeout=aiohttp.ClientTimeout(total=600),
        )

    async def close(self) -> None:
        """Closes every connection; the engine aborts what was still running on them."""
        await self._session.close()

    async def stream(self, body: dict[str, Any], due: float, zero: float) -> Stream:
        """Sends a streamed request now and notes when each piece of text arrived."""
        seen = Stream(due=due)
        try:
            async with self._session.post(self._url, json=body) as reply:
                if reply.status != 200:
                    seen.error = f"{reply.status}: {(await reply.text())[:200]}"
                    return seen
                async for line in reply.content:
                    if b'"content":"' in line and b'"content":""' not in line:
                        seen.note(time.monotonic() - zero)
        except (aiohttp.ClientError, TimeoutError) as error:
            seen.error = repr(error)
        if not seen.tokens and not seen.error:
            seen.error = "no text"
        return seen

    async def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """Sends a request without streaming; returns what came, also if it is an error."""
        try:
            async with self._session.post(self._url, json=body) as reply:
                answer: dict[str, Any] = await reply.json()
                return answer
        except (aiohttp.ClientError, TimeoutError) as error:
            return {"error": repr(error)}

    async def whole(self, body: dict[str, Any]) -> Done:
        """The same; returns the tokens that it brought (none if it failed)."""
        usage = (await self.answer(body)).get("usage", {})
        return Done(usage.get("completion_tokens", 0), usage.get("prompt_tokens", 0))


async def closed_loop(
    client: Client, sizes: Sizes, *, users: int, rounds: int, salt: int, zero: float, priority: int | None
) -> list[Stream]:
    """`users` people who all start together and send `rounds` requests each, one after the other."""
    texts = prompts(salt)

    async def user() -> list[Stream]:
        return [
            await client.stream(texts.body(sizes, client.model, priority, stream=True), time.monotonic() - zero, zero)
            for _ in range(rounds)
        ]

    return [seen for person in await asyncio.gather(*(user() for _ in range(users))) for seen in person]
