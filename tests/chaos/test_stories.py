"""Every story of stories.py, each with processes of its own. They mostly wait, and so several run at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.chaos.stories import STORIES

AT_ONCE = 8


@pytest.fixture(scope="module")
async def told(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[dict[str, asyncio.Task[None]]]:
    """The stories that were selected, begun."""
    names = [item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")]
    room = asyncio.Semaphore(AT_ONCE)

    async def tell(name: str) -> None:
        async with room:
            await STORIES[name](tmp_path_factory.mktemp("story"))

    tasks = {name: asyncio.create_task(tell(name)) for name in names if name in STORIES}
    yield tasks
    for task in tasks.values():
        task.cancel()
    await asyncio.gather(*tasks.values(), return_exceptions=True)


@pytest.mark.parametrize("name", STORIES)
async def test_nothing_is_lost(name: str, told: dict[str, asyncio.Task[None]]) -> None:
    await told[name]
