"""A TCP proxy before Redis that, now and then, loses an EVALSHA or the reply to it together with the connection.

Whoever sent it can't know which: the script may have run or not.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random

_CHUNK = 65536


class Proxy:
    """Between velocity's processes and the socket of a Redis, which may be away."""

    def __init__(self, upstream: Path, chance: Random) -> None:
        self._upstream = upstream
        self._chance = chance
        self.share = 0.0
        """Share of the EVALSHA calls that are lost, half of them before Redis sees them."""
        self.lost: Counter[str] = Counter()
        self.url = ""

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """On a free port."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        try:
            yield
        finally:
            server.close()

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            server, to_server = await asyncio.open_unix_connection(str(self._upstream))
            doomed = asyncio.Event()
            ways = [self._requests(client, to_server, doomed), self._replies(server, to_client, doomed)]
            tasks = [asyncio.create_task(way) for way in ways]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                to_server.close()
        to_client.close()

    async def _requests(
        self, client: asyncio.StreamReader, server: asyncio.StreamWriter, doomed: asyncio.Event
    ) -> None:
        while data := await client.read(_CHUNK):
            if self.share and b"EVALSHA" in data and self._chance.random() < self.share:
                what = self._chance.choice(["request", "reply"])
                self.lost[what] += 1
                if what == "request":
                    return
                doomed.set()
            server.write(data)

    @staticmethod
    async def _replies(server: asyncio.StreamReader, client: asyncio.StreamWriter, doomed: asyncio.Event) -> None:
        while data := await server.read(_CHUNK):
            if doomed.is_set():
                return
            client.write(data)
