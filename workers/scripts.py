"""Loads the Lua scripts of a package folder, each a file of its own, and calls them by digest."""

from __future__ import annotations

from importlib import resources
from typing import Any

from redis.asyncio import Redis
from redis.commands.core import AsyncScript


def texts(package: str, folder: str = "lua", prelude: str | None = None) -> dict[str, str]:
    """The scripts of one folder by name, each with the prelude before it."""
    base = resources.files(package) / folder
    head = (base / prelude).read_text() if prelude else ""
    return {
        file.name.removesuffix(".lua"): head + file.read_text()
        for file in base.iterdir()
        if file.name.endswith(".lua") and file.name != prelude
    }


class Scripts:
    """The scripts of one folder, compiled lazily by Redis and found again after its restart (NOSCRIPT loads anew)."""

    def __init__(self, redis: Redis, package: str, folder: str = "lua", prelude: str | None = None) -> None:
        self._scripts: dict[str, AsyncScript] = {
            name: redis.register_script(text) for name, text in texts(package, folder, prelude).items()
        }

    async def run(self, name: str, *args: str | float | bytes, keys: tuple[str, ...] = ()) -> Any:
        """Run one script in one round trip."""
        return await self._scripts[name](keys=list(keys), args=list(args))
