"""One leased shard: its items go through the window to the engine, its results to a segment and then to the ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Literal

from engine import log
from workers.errors import LedgerUnavailable, NoSuchJob, StorageError
from workers.job import QUARANTINE, Item, Lease, Record
from workers.ledger import Ledger, Verdict
from workers.request import Requester
from workers.segment import Segment
from workers.settings import WorkerSettings
from workers.store import JobFiles
from workers.window import Place, Window

_COMMIT_SECONDS = 1.0
_COMMIT_ITEMS = 32
_POISON = 2
"""An item that took its worker along so often is not run again."""

logger = log.get(__name__)


class ShardRun:
    """Runs the items of a lease that are not done yet. Nothing counts before its commit; a lost lease ends the run."""

    def __init__(
        self,
        lease: Lease,
        ledger: Ledger,
        requester: Requester,
        window: Window,
        settings: WorkerSettings,
        on_fed: Callable[[], None],
    ) -> None:
        self._lease = lease
        self._ledger = ledger
        self._requester = requester
        self._window = window
        self._settings = settings
        self._on_fed = on_fed
        self._files = JobFiles(settings.data_dir, lease.tenant, lease.job)
        self._alone = lease.lane == QUARANTINE
        self._room = asyncio.Semaphore(1 if self._alone else max(2 * window.full, 2 * _COMMIT_ITEMS))
        """Items in memory: in flight, or finished and not yet committed."""
        self._cured = False
        self._left = 0
        """Items that have not been collected."""
        self._finished: asyncio.Queue[Record] = asyncio.Queue()
        self._requests: dict[asyncio.Task[None], Place] = {}
        self._stop_after: float | None = None
        self._fault: BaseException | None = None
        self.feeding = True
        """Whether items still wait for a place in the window: no other shard of this account need be claimed."""
        self.flow = lease.flow

    def stop(self, seconds: float) -> None:
        """Start no more items, give those in flight so many seconds, then release the shard."""
        self._stop_after = asyncio.get_running_loop().time() + seconds
        for request, place in self._requests.items():
            if not place.held:
                request.cancel()

    async def run(self) -> None:
        """Until every item is committed, the job stops, the lease is lost, or `stop()` ran out."""
        verdict: Verdict | None = None
        how: Literal["idle", "crashed", "cured"] = "crashed"  # unless it turns out otherwise
        feeder: asyncio.Task[None] | None = None
        try:
            plan = await asyncio.to_thread(self._files.plan, self._lease.first, self._lease.count)
            items = [index for index in plan if index not in self._lease.done]
            self._left = len(items)
            feeder = asyncio.create_task(self._feed(items))
            with self._files.segment(self._lease.segment) as segment:
                verdict = await self._commit_until_over(segment, feeder)
            how = "cured" if self._cured else "idle"
        except (LedgerUnavailable, StorageError, NoSuchJob, asyncio.CancelledError):
            how = "idle"
            raise
        finally:
            await self._end(feeder)
            if verdict in {None, Verdict.GO, Verdict.STOP}:
                await self._release(how)
        logger.debug("shard_over", job=self._lease.job, shard=self._lease.unit, verdict=verdict)

    async def _end(self, feeder: asyncio.Task[None] | None) -> None:
        tasks = [*self._requests, *([feeder] if feeder else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.feeding = False

    async def _feed(self, items: list[int]) -> None:
        """Start the items, each when there is room for it in memory and a place in the window."""
        for index in items:
            await self._room.acquire()
            if self._alone and not await self._may_run(index):
                break
            place = await self._window.take()
            try:
                item = await asyncio.to_thread(self._files.item, index) if self._stop_after is None else None
            except BaseException:
                place.release()
                raise
            if item is None:
                place.release()
                break
            request = asyncio.create_task(self._one(item, place))
            self._requests[request] = place
            request.add_done_callback(self._request_over)
        self.feeding = False
        self._on_fed()

    async def _may_run(self, index: int) -> bool:
        """In quarantine: note that the item runs now. One that is to blame gets its record, and the others leave."""
        deaths = await self._ledger.begin(self._lease, index)
        if deaths is None:
            return False
        if deaths < _POISON:
            return True
        item = await asyncio.to_thread(self._files.item, index)
        message = f"The worker died {deaths} times while it worked on this item."
        request_id = f"{self._lease.job}-{index}"
        error = {"code": "worker_crashed", "message": message}
        self._finished.put_nowait(Record(index, item.id, 0, request_id, error=error))
        self._cured = True
        return False

    async def _one(self, item: Item, place: Place) -> None:
        self._finished.put_nowait(await self._requester.run(item, self._lease, place))

    def _request_over(self, request: asyncio.Task[None]) -> None:
        """However it ended, also before it began: its place in the window is free; a fault ends the run."""
        self._requests.pop(request).release()
        if not self.feeding:
            self._on_fed()  # the place is another shard's
        if not request.cancelled() and request.exception():
            self._fault = request.exception()

    async def _commit_until_over(self, segment: Segment, feeder: asyncio.Task[None]) -> Verdict:
        """Commit what is finished at least once a second, which also renews the lease and hears of a cancellation."""
        clock = asyncio.get_running_loop().time
        while True:
            stopped = self._stop_after is not None and (clock() >= self._stop_after or not self._at_work)
            over = stopped or (self._cured and not self._requests)
            records = await self._collect(0 if over else _COMMIT_SECONDS)
            length = await asyncio.to_thread(segment.append, records) if records else segment.length
            verdict = await self._commit(records, length)
            for _ in records:
                self._room.release()
            if verdict is not Verdict.GO or over:
                return verdict
            if self._fault:
                raise self._fault
            if feeder.done() and (error := feeder.exception()):
                raise error
            if feeder.done() and not self._left and not self._requests:
                return verdict  # all is committed, and yet the ledger misses some: it came back older. They run again

    @property
    def _at_work(self) -> bool:
        return any(place.held for place in self._requests.values())

    async def _collect(self, seconds: float) -> list[Record]:
        """What finishes within `seconds`, or the first `_COMMIT_ITEMS` of it; with 0, all that has finished."""
        records: list[Record] = []
        most = 1 if self._alone else min(self._left, _COMMIT_ITEMS) or 1
        try:
            async with asyncio.timeout(seconds):
                while len(records) < most or not seconds:
                    records.append(await self._finished.get())
                    self._left -= 1
        except TimeoutError:
            pass  # the time is up: what came is the batch
        return records

    async def _commit(self, records: list[Record], length: int) -> Verdict:
        """Commit, waiting for a Redis that is away; the lease decides afterwards whether the work still counts."""
        while True:
            try:
                return await self._ledger.commit(self._lease, records, length, self._settings.lease_seconds)
            except LedgerUnavailable as error:
                logger.warning("commit_delayed", job=self._lease.job, shard=self._lease.unit, reason=str(error))
                if self._stop_after is not None:
                    raise
                await asyncio.sleep(_COMMIT_SECONDS)

    async def _release(self, how: Literal["idle", "crashed", "cured"]) -> None:
        try:
            await self._ledger.release(self._lease, how)
        except LedgerUnavailable as error:
            logger.warning("release_failed", job=self._lease.job, shard=self._lease.unit, reason=str(error))
