"""vLLM's scheduler with two classes of requests. It runs inside vLLM's engine process and nowhere else.

Each step: ask the co-server who takes part and how much the step may hold, let vLLM's own code schedule exactly that,
and put the parked requests back. vLLM's scheduler interface is not public: what is relied on is checked at start-up,
and a vLLM that lacks it is refused with the name of what is missing.
"""

from __future__ import annotations

import os
from typing import Any

from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.version import __version__ as vllm_version

from engine.scheduler.coserver import CoServer
from engine.scheduler.settings import RANK

logger = init_logger(f"vllm.{__name__}")


class CoServingScheduler(AsyncScheduler):  # type: ignore[misc]  # vLLM publishes no types
    """Serves interactive requests as if they were alone, and batch requests from what that leaves.

    It has one attribute of its own, `velocity`; everything else is vLLM's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        in_process = self.parallel_config.distributed_executor_backend == "uni"
        rank = getattr(self.parallel_config, "data_parallel_index", self.parallel_config.data_parallel_rank)
        self.velocity = CoServer(
            self,
            {**os.environ, RANK: str(rank)},
            version=vllm_version,
            synchronous=in_process and bool(current_platform.is_cpu()),
        )
        logger.info("velocity's co-serving scheduler: %s", self.velocity.policy.dial)
        if news := self.velocity.look():  # the first report: vLLM does not call the scheduler of an idle engine
            logger.info("velocity's co-serving scheduler: %s", news)

    def add_request(self, request: Any) -> None:
        """Notes interactive requests on their way in."""
        super().add_request(request)
        self.velocity.add(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedules one step: vLLM's own way, over the requests that may take part in it."""
        news = self.velocity.look()
        if news:
            logger.info("velocity's co-serving scheduler: %s", news)
        if self._pause_state.value != 0:
            return super().schedule(*args, **kwargs)
        seats_name = "max_num_active_reqs" if hasattr(self, "max_num_active_reqs") else "max_num_running_reqs"
        before: tuple[int, int] = (getattr(self, "max_num_scheduled_tokens"), getattr(self, seats_name))  # noqa: B009
        limits = self.velocity.begin()
        self.max_num_scheduled_tokens = limits.tokens
        setattr(self, seats_name, limits.seats)
        output = None
        try:
            output = super().schedule(*args, **kwargs)
        finally:
            self.max_num_scheduled_tokens = before[0]
            setattr(self, seats_name, before[1])
            self.velocity.end(output)
        self.velocity.report.computed(output.num_scheduled_tokens, self.requests)
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Takes in a step's result, and how long the step took."""
        self.velocity.finished(scheduler_output)
        told = super().update_from_output(scheduler_output, model_runner_output)
        if not self.requests and (news := self.velocity.rest()):
            logger.info("velocity's co-serving scheduler: %s", news)
        return told
