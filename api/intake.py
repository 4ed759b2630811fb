"""Where inputs are read and checked: small ones in a thread, large ones in a process of their own.

Checking a large input takes seconds of Python. In this process every stream would wait for its turn between them.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TypeVar, TypeVarTuple

from api.errors import ApiError, to_api_error
from engine import log
from workers.errors import InputError

_THREAD_MOST = 1024 * 1024
"""Bytes up to which an input is read in a thread of this process."""
_NICENESS = 10

T = TypeVar("T")
A = TypeVarTuple("A")

logger = log.get(__name__)


class Intake:
    """One process, started when it is first needed and ended by `aclose`; a broken one is made anew."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    async def run(self, size: int, work: Callable[[*A], T], *args: *A) -> T:
        """`work(*args)` for an input of `size` bytes, outside the event loop. Both must be picklable.

        Raises what `work` does, and ApiError 503 if the process broke.
        """
        if size <= _THREAD_MOST:
            return await asyncio.to_thread(work, *args)
        pool = self._pool = self._pool or ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=_prepare_process
        )
        try:
            result = await asyncio.get_running_loop().run_in_executor(pool, _guarded, work, args)
        except BrokenProcessPool:
            logger.warning("intake_broken")
            if self._pool is pool:
                self._pool = None
            pool.shutdown(wait=False)
            raise ApiError(
                503, "The process that reads large inputs ended. Try again.", type="server_error",
                code="intake_failed", headers=((b"retry-after", b"2"),),
            ) from None  # fmt: skip
        if isinstance(result, _Refusal):
            raise ApiError(400, result.message, code=result.code, param=result.param)
        return result

    async def aclose(self) -> None:
        """End the process, after what it is at."""
        pool, self._pool = self._pool, None
        if pool is not None:
            await asyncio.to_thread(pool.shutdown, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class _Refusal:
    """An InputError or ApiError on its way between processes: these two can't be pickled."""

    message: str
    code: str | None
    param: str | None


def _guarded(work: Callable[[*A], T], args: tuple[*A]) -> T | _Refusal:
    try:
        return work(*args)
    except (InputError, ApiError) as error:
        told = to_api_error(error)
        return _Refusal(str(told), told.code, told.param)


def _prepare_process() -> None:
    """Yield to the process that streams, leave Ctrl-C to it, and do not outlive it."""
    os.nice(_NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
