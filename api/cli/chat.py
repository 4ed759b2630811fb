"""`velocity chat`: one streamed answer in the terminal."""

from __future__ import annotations

import asyncio
import sys

from api.cli.client import ChatTiming
from api.cli.terminal import ApiKey, Url, client_of, err, errors_for_people


def chat(prompt: str, model: str = "velocity-30b", max_tokens: int = 1024, url: Url = None, key: ApiKey = "") -> None:
    """Stream one chat answer."""

    async def run() -> None:
        timing = ChatTiming()
        body = {"model": model, "max_tokens": max_tokens, "messages": [{"role": "user", "content": prompt}]}
        async with client_of(url, key) as client:
            async for piece in client.chat(body, timing):
                sys.stdout.write(piece)
                sys.stdout.flush()
        sys.stdout.write("\n")
        err.print(timing.summary, style="dim", markup=False)

    with errors_for_people():
        asyncio.run(run())
