"""How much batch work a step may carry.

While a person waits for a token, the promise is about the gap between tokens: a step may last `ratio` times as long as
it would with the interactive requests alone. While nobody does, it is about the next person's first token, who waits
for the step that is running (and, with an asynchronous worker, for one more). Such a step may last a share of what that
first token takes anyway, a share that grows with the same dial; or, on an engine that is fast enough for it, as long as
the first token still comes within a time that nobody notices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.scheduler.model import StepModel
from engine.scheduler.settings import Dial

WAIT_SHARE = 5.0
"""How much of a first token's own time a batch-only step may last, per unit of ratio above 1 (1.2: all of it)."""
WAIT_STEPS = 2.5
"""Steps that an arrival waits at worst: the running one, the one already queued behind it, and some air."""
SMALLEST_CHUNK = 32
"""Prompt tokens below which prefilling a batch request is not worth leaving the pure-decode path."""
SMALLEST_BESIDE = 4
"""The same beside people, where what fits into the ratio counts, and a larger chunk would be a gap that they see."""
LEAST_ROOM = 64
"""Prompt tokens that a batch-only step must have room for beside one decoding sequence, or nothing would ever start."""
PROBE_EVERY = 64
"""Steps between two that are kept pure so that the model keeps seeing such steps: interactive only, or a few decodes.

Half-way between them, a step takes a few sequences more than the model would have: if the engine became faster, or was
believed too slow, nothing else would ever find out. The floor rests in a pure step, too."""
PROBE_SIZES = (1, 2, 4, 8, 16, 0)
"""Sequences of those pure steps in turn while people are away, so that it is known what the next person's steps cost
before that person comes; 0: all of them."""
FIRST_PROBES = 2 * len(PROBE_SIZES)
"""So many of these come soon, every eighth of the usual distance."""
FLOOR_CHUNK_EVERY = 12
"""Steps between two chunks of prompt that the floor is worth. Every other one is the smallest: if that turns out to fit
into the ratio, the ratio gives it in every step, and no person sees a larger one any more."""
BACK_SOON = 0.3
"""Share of people who come back at once (an agent's next call, an app's second question) from which on they are awaited
for as long as a whole batch-only step takes: such a step in between would be most of their wait."""
AWAITING_SHARE = 0.25
"""How much of such a step may run meanwhile."""
TYPICAL_PROMPT = 256
"""Tokens that an interactive prompt is believed to have until some were seen."""


@dataclass(frozen=True)
class Demand:
    """What wants to run: counts of sequences, and prompt tokens still to compute."""

    decodes: int
    """Interactive sequences that decode."""
    prefill: int
    """Prompt tokens of interactive requests, running or waiting."""
    waiting: int
    """Interactive requests that are not running yet."""
    batch_decodes: int
    """Batch sequences that could decode."""
    token_budget: int
    """Tokens that a step may have at most (vLLM's own limit)."""
    awaited: bool = False
    """Whether somebody is likely to come at any moment."""

    @property
    def interactive(self) -> bool:
        """Whether a person waits for anything."""
        return self.decodes > 0 or self.prefill > 0 or self.waiting > 0


@dataclass(frozen=True)
class Grant:
    """What batch gets of the next step."""

    decodes: int
    """Sequences that decode."""
    prefill: int
    """Prompt tokens."""
    room: int
    """Sequences that could decode in a batch-only step: admitting more than these would only hold KV cache."""
    floor: bool = False
    """Whether the ratio alone would have given less."""


class Absence:
    """How often people who have gone are followed by others at once, and whether they have gone just now."""

    def __init__(self) -> None:
        self.back_soon = 0.0
        """Share of absences that were shorter than a batch-only step, lately."""
        self._since: float | None = None

    def look(self, there: bool, now: float, step: float) -> bool:
        """Whether somebody is to be awaited. `now` and `step`, the longest batch-only step, in seconds."""
        if there:
            if self._since is not None:  # it is noticed at the end of a step
                self.back_soon += 0.1 * ((now - self._since <= 1.25 * step) - self.back_soon)
            self._since = None
            return False
        if self._since is None:
            self._since = now
        return now - self._since < step and self.back_soon >= BACK_SOON


class Policy:
    """Decides, step by step, from what the model has learned."""

    def __init__(self, model: StepModel, dial: Dial) -> None:
        self.model = model
        self.dial = dial
        self.prompt = float(TYPICAL_PROMPT)
        self._steps = 0
        self._probes = 0

    def arrived(self, prompt_tokens: int) -> None:
        """Notes the length of an interactive prompt: the next person's first token is expected to take as long."""
        self.prompt += 0.05 * (prompt_tokens - self.prompt)

    def grant(self, demand: Demand) -> Grant:
        """Decides the next step."""
        self._steps += 1
        if not self.model.known:
            return self._blind(demand)
        return self._beside_people(demand) if demand.interactive else self._alone(demand)

    def longest_alone(self) -> float:
        """Seconds that a step may last while nobody waits."""
        first_token = self.model.seconds(1, round(self.prompt))
        by_ratio = WAIT_SHARE * (self.dial.interactive_ratio - 1.0) * first_token
        unnoticed = (self.dial.first_token - first_token) / WAIT_STEPS
        return max(by_ratio, unnoticed, self.model.seconds(1, LEAST_ROOM))

    def _beside_people(self, demand: Demand) -> Grant:
        room = self._room(demand.token_budget)
        mine, prompt = demand.decodes, min(demand.prefill, max(0, demand.token_budget - demand.decodes))
        limit = self.dial.interactive_ratio * self.model.seconds(mine, prompt)
        most = min(demand.batch_decodes, max(0, demand.token_budget - mine - prompt))
        if self._steps % PROBE_EVERY == 0:
            return Grant(0, 0, room)
        decodes = self._reaching(largest(lambda n: self.model.seconds(mine + n, prompt), limit, most), most)
        floor = min(self.dial.batch_floor, most)
        if decodes < floor:
            return Grant(floor, 0, room, floor=True)
        left = demand.token_budget - mine - prompt - decodes
        prefill = largest(lambda n: self.model.seconds(mine + decodes, prompt + n), limit, max(0, left))
        starving = most < self.dial.batch_floor and prefill < SMALLEST_BESIDE
        if starving and not demand.waiting and self._steps % FLOOR_CHUNK_EVERY == 0:
            return Grant(decodes, self._floor_chunk(), room, floor=True)
        # prompts that wait for a seat come after running ones in vLLM's step: a batch prompt must not go before them
        allowed = prefill >= SMALLEST_BESIDE and not demand.waiting and decodes == most
        return Grant(decodes, prefill if allowed else 0, room)

    def _floor_chunk(self) -> int:
        return SMALLEST_BESIDE if self._steps // FLOOR_CHUNK_EVERY % 2 else SMALLEST_CHUNK

    def _alone(self, demand: Demand) -> Grant:
        limit = self.longest_alone() * (AWAITING_SHARE if demand.awaited else 1.0)
        room = self._room(demand.token_budget)
        most = largest(lambda n: self.model.seconds(n, 0), limit, room) if demand.awaited else room
        decodes = min(max(most, self.dial.batch_floor, 1), demand.batch_decodes)
        if self._steps % (PROBE_EVERY if self._probes >= FIRST_PROBES else PROBE_EVERY // 8) == 0 and decodes:
            size = PROBE_SIZES[self._probes % len(PROBE_SIZES)]
            self._probes += 1
            return Grant(min(size or decodes, decodes), 0, room)
        left = demand.token_budget - decodes
        prefill = largest(lambda n: self.model.seconds(decodes, n), limit, left)
        allowed = prefill >= SMALLEST_CHUNK and decodes == demand.batch_decodes
        return Grant(decodes, prefill if allowed else 0, room)

    def _room(self, budget: int) -> int:
        return largest(lambda n: self.model.seconds(n, 0), self.longest_alone(), budget)

    def _blind(self, demand: Demand) -> Grant:
        """Before the first decode step nothing is known: little beside people, and alone enough to learn from."""
        if demand.interactive:
            return Grant(min(self.dial.batch_floor, demand.batch_decodes), 0, SMALLEST_CHUNK)
        return Grant(demand.batch_decodes, min(TYPICAL_PROMPT, demand.token_budget), SMALLEST_CHUNK)

    def _reaching(self, decodes: int, most: int) -> int:
        """What the model says, but now and then a little more."""
        extra = max(1, decodes // 4) if self._steps % PROBE_EVERY == PROBE_EVERY // 2 else 0
        return min(most, decodes + extra)


def largest(cost: Callable[[int], float], limit: float, most: int) -> int:
    """The largest n from 0 to `most` with cost(n) ≤ limit, for a cost that never falls; 0 if none fits."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if cost(middle) <= limit:
            low = middle
        else:
            high = middle - 1
    return low
