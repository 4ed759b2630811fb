"""vLLM's real scheduler before a virtual GPU: a worker that computes nothing, and a clock that moves by a cost model.

Everything that schedules is the installed vLLM's own code, two steps deep as with asynchronous scheduling on a GPU. The
worker answers with a token that follows from the request and its position alone, so every answer can be checked: a
scheduler that loses, repeats or reorders a token is found out, whatever it parks and preempts.
"""

from __future__ import annotations

import heapq
import itertools
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.version import __version__ as vllm_version

from engine.scheduler import CoServingScheduler
from engine.scheduler.coserver import CoServer

BLOCK = 16
DEPTH = 2
Cost = Callable[[int, int], float]


@dataclass(frozen=True)
class Size:
    """How much the virtual engine holds."""

    seats: int = 1024
    blocks: int = 24_000
    tokens: int = 8192
    length: int = 4096


@dataclass
class Answer:
    """What came back for one request; times in virtual seconds."""

    due: float
    prompt: int
    wanted: int
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def correct(self, name: str) -> bool:
        """Whether the tokens so far are exactly the ones that this request must get."""
        return self.tokens == [token(name, i) for i in range(len(self.tokens))]


def token(name: str, position: int) -> int:
    """The token that the virtual worker samples for a request at a position of its answer."""
    return (sum(name.encode()) * 31 + position * 7) % 4000 + 4


def make_scheduler(model: Path, size: Size, *, velocity: bool) -> Any:
    """vLLM's scheduler (fcfs, stock) or velocity's (priority), outside of any engine."""
    config = VllmConfig(
        model_config=ModelConfig(model=str(model), tokenizer=str(model), dtype="float32", seed=1),
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
        device_config=DeviceConfig(device="cpu"),
        scheduler_config=SchedulerConfig(
            max_num_seqs=size.seats,
            max_num_batched_tokens=size.tokens,
            max_model_len=size.length,
            enable_chunked_prefill=True,
            is_encoder_decoder=False,
            policy="priority" if velocity else "fcfs",
            async_scheduling=True,
        ),
    )
    config.scheduler_config.async_scheduling = True  # vLLM for CPUs turns it off; here it is what is rehearsed
    config.cache_config.num_gpu_blocks = size.blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    return (CoServingScheduler if velocity else AsyncScheduler)(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=size.blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        ),
        block_size=BLOCK,
        structured_output_manager=StructuredOutputManager(config),
        log_stats=True,
    )


class VirtualEngine:
    """Runs a scheduler against the virtual worker. `finished` is called with the name of each request that ends."""

    def __init__(
        self, scheduler: Any, cost: Cost, finished: Callable[[str], None], dial: dict[str, float], depth: int = DEPTH
    ) -> None:
        self._depth = depth
        self.now = 0.0
        self.scheduler = scheduler
        self.answers: dict[str, Answer] = {}
        self._cost = cost
        self._finished = finished
        self._worker_free = 0.0
        self._coming: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._queue: deque[tuple[Any, Any, float]] = deque()
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        if isinstance(scheduler, CoServingScheduler):
            environment = os.environ | {f"VELOCITY_{name.upper()}": str(value) for name, value in dial.items()}
            scheduler.velocity = CoServer(
                scheduler, environment, version=vllm_version, synchronous=depth == 1, now=lambda: self.now
            )

    def add(self, name: str, prompt: list[int], wanted: int, priority: int, due: float) -> None:
        """A request arrives now; `due` is when it should have."""
        self.answers[name] = Answer(due, len(prompt), wanted)
        self.scheduler.add_request(
            Request(
                request_id=name,
                prompt_token_ids=prompt,
                sampling_params=SamplingParams(max_tokens=wanted, ignore_eos=True),
                pooling_params=None,
                priority=priority,
                arrival_time=due,
                block_hasher=self._hasher,
            )
        )

    def run(self, events: list[tuple[float, Callable[[], None]]], until: float) -> None:
        """Plays events, given as (time, what happens), until the clock has reached `until` or nothing is left."""
        for at, what in events:
            self.later(at, what)
        while self.now < until:
            while self._coming and self._coming[0][0] <= self.now:
                heapq.heappop(self._coming)[2]()
            if not self.scheduler.has_requests() and not self._queue:
                if not self._coming:
                    return
                self.now = self._coming[0][0]
                continue
            self._step()

    def later(self, at: float, what: Callable[[], None]) -> None:
        """Plan an event."""
        heapq.heappush(self._coming, (at, next(self._order), what))

    def _step(self) -> None:
        """One turn of vLLM's engine loop: schedule ahead while there is room, else wait for the oldest result."""
        if self.scheduler.has_requests():
            plan = self.scheduler.schedule()
            self._queue.append((plan, *self._work(plan)))
            if len(self._queue) < self._depth and plan.total_num_scheduled_tokens > 0:
                return
        plan, result, end = self._queue.popleft()
        self.now = max(self.now, end)
        for outputs in self.scheduler.update_from_output(plan, result).values():
            for output in outputs.outputs:
                answer = self.answers[output.request_id]
                answer.tokens += output.new_token_ids
                answer.times += [self.now] * len(output.new_token_ids)
                if output.finish_reason is not None:
                    self._finished(output.request_id)

    def _work(self, plan: Any) -> tuple[Any, float]:
        """Samples a token for every request whose known tokens are all computed by this step; returns its end, too."""
        begin = {}
        for new in plan.scheduled_new_reqs:
            # with model runner V2 a preempted request comes back as a new one, its answer so far in the prefill
            known = new.prefill_token_ids or new.prompt_token_ids
            begin[new.req_id] = (new.num_computed_tokens, len(known) - self.answers[new.req_id].prompt)
        old = plan.scheduled_cached_reqs
        begin |= {
            name: (computed, written)
            for name, computed, written in zip(old.req_ids, old.num_computed_tokens, old.num_output_tokens, strict=True)
        }
        names = list(plan.num_scheduled_tokens)
        sampled: list[list[int]] = []
        decodes = prefill = 0
        for name in names:
            count = plan.num_scheduled_tokens[name]
            computed, written = begin[name]
            missing = self.answers[name].prompt + written - computed - count
            if missing < 0:
                raise AssertionError(f"{name} was scheduled past its end.")
            sampled.append([] if missing else [token(name, written)])
            decodes += count == 1
            prefill += 0 if count == 1 else count
        self._worker_free = max(self.now, self._worker_free) + (self._cost(decodes, prefill) if names else 0.0)
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=sampled,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )
        return result, self._worker_free
