"""RQ carries tickets and nothing else."""

from __future__ import annotations

import threading

import pytest
import redis
from rq import Queue
from rq.serializers import JSONSerializer

from workers.redis import connect_sync
from workers.tickets import TicketJob, TicketWorker, ring


@pytest.fixture
def connection(clean_redis: str) -> redis.Redis:
    return connect_sync(clean_redis)


def test_a_ticket_drains(connection: redis.Redis) -> None:
    drained: list[threading.Event] = []
    assert ring(connection, "bulk", 3) == 3
    assert ring(connection, "bulk", 3) == 0
    worker = TicketWorker(connection, "bulk", "w", drained.append)
    worker.work(burst=True, logging_level=None)
    assert len(drained) == 3
    connection.close()


@pytest.mark.parametrize("function", ["os.system", "builtins.eval", "velocity.other"])
def test_a_planted_function_name_is_not_run(connection: redis.Redis, function: str) -> None:
    drained: list[threading.Event] = []
    queue = Queue("bulk", connection=connection, serializer=JSONSerializer)
    queue.enqueue_call(function, args=("touch /tmp/velocity-was-here",))
    TicketWorker(connection, "bulk", "w", drained.append).work(burst=True, logging_level=None)
    assert drained == []
    connection.close()


def test_a_planted_callback_is_not_imported(connection: redis.Redis) -> None:
    drained: list[threading.Event] = []
    ring(connection, "bulk", 1)
    (job_id,) = Queue("bulk", connection=connection, serializer=JSONSerializer).job_ids
    connection.hset(
        f"rq:job:{job_id}", mapping={"success_callback_name": "os.abort", "failure_callback_name": "os.abort"}
    )
    TicketWorker(connection, "bulk", "w", drained.append).work(burst=True, logging_level=None)
    assert len(drained) == 1
    assert TicketJob.drain is None
    connection.close()


def test_a_planted_pickle_is_not_opened(connection: redis.Redis) -> None:
    drained: list[threading.Event] = []
    Queue("bulk", connection=connection).enqueue_call("os.system", args=("true",))  # RQ's default serializer: pickle
    TicketWorker(connection, "bulk", "w", drained.append).work(burst=True, logging_level=None)
    assert drained == []
    connection.close()
