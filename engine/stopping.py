"""Ends a long-running coroutine on SIGINT or SIGTERM, the way service managers expect."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine


async def run_until_signal(work: Coroutine[object, object, None]) -> bool:
    """Run `work`; on SIGINT or SIGTERM cancel it and wait for its clean-up, which a second signal cancels again.

    Returns True if a signal ended it. An exception of `work` is raised on.
    """
    loop = asyncio.get_running_loop()
    task = loop.create_task(work)
    signalled = asyncio.Event()

    def stop() -> None:
        signalled.set()
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        await task
    except asyncio.CancelledError:
        if not signalled.is_set():
            raise
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
    return signalled.is_set()
