"""The one door to RQ. A ticket says only "drain the lane"; which work there is stands in the ledger.

Nothing that stands in Redis is ever imported or unpickled: the serializer is JSON, and the job class runs one function,
whatever the job's data says.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from redis import Redis
from rq import Queue, SimpleWorker
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.timeouts import BaseDeathPenalty

from workers.errors import LedgerUnavailable
from workers.redis import translated

TICKET = "velocity.drain"
_TICKET_SECONDS = 7 * 24 * 3600
"""How long RQ believes in a ticket; a drain has no limit of its own but an empty lane."""
_MOST_WAITING = 8

Drain = Callable[[threading.Event], None]
"""Works until nothing is pending; returns early when the event is set."""


class TicketJob(Job):
    """An RQ job that can be nothing but a ticket."""

    drain: Callable[[], None] | None = None
    """Set once by the worker process."""

    @property
    def func(self) -> Callable[[], None] | None:
        """The drain, if this is a ticket; RQ would import whatever name stands in Redis."""
        if self.func_name != TICKET:
            raise LedgerUnavailable(f"An RQ job asks for {self.func_name!r}, which is no ticket; it is not run.")
        return type(self).drain

    @property
    def success_callback(self) -> None:
        """Never taken from Redis."""

    @property
    def failure_callback(self) -> None:
        """Never taken from Redis."""

    @property
    def stopped_callback(self) -> None:
        """Never taken from Redis."""


def ring(redis: Redis, lane: str, pending: int) -> int:
    """Make sure that tickets wait for `pending` units of work; returns how many were added."""
    with translated():
        queue = _queue(redis, lane)
        missing = min(pending, _MOST_WAITING) - queue.count
        for _ in range(missing):
            queue.enqueue_call(
                TICKET, timeout=_TICKET_SECONDS, result_ttl=0, ttl=_TICKET_SECONDS, failure_ttl=60, description="ticket"
            )
    return max(0, missing)


class NoDeathPenalty(BaseDeathPenalty):
    """RQ's time limit would raise in the middle of the event loop; the pump bounds its requests itself."""

    def setup_death_penalty(self) -> None:
        """No alarm."""

    def cancel_death_penalty(self) -> None:
        """No alarm."""


class TicketWorker(SimpleWorker):
    """RQ's worker without forks: one drain at a time in this process, ended softly by SIGTERM."""

    death_penalty_class = NoDeathPenalty

    def __init__(self, redis: Redis, lane: str, name: str, drain: Drain) -> None:
        self._stop = threading.Event()
        job_class = type("BoundTicketJob", (TicketJob,), {"drain": staticmethod(lambda: drain(self._stop))})
        super().__init__(
            [_queue(redis, lane, job_class)],
            name=name,
            connection=redis,
            job_class=job_class,
            serializer=JSONSerializer,
            log_job_description=False,
        )

    def procline(self, message: str) -> None:
        """Keep the process's own name, by which operators find it."""

    def handle_warm_shutdown_request(self) -> None:
        """Tell the running drain to end."""
        self._stop.set()
        super().handle_warm_shutdown_request()  # type: ignore[no-untyped-call] # RQ annotates most, not all


def _queue(redis: Redis, lane: str, job_class: type[Job] = TicketJob) -> Queue:
    options: dict[str, Any] = {"connection": redis, "serializer": JSONSerializer, "job_class": job_class}
    return Queue(lane, **options)
