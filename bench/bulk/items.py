"""The requests of an arm: the same lengths in every arm, and no prompt twice."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work number night point home water room mother area money "
    "story fact month lot right study book eye job word business side kind head house service friend father"
)


@dataclass(frozen=True)
class Sizes:
    """How many requests, and how long they are. With `prefixes`, that many system prompts take turns in the input."""

    items: int
    tokens: int
    """Output tokens of an item on average; how many each has is fixed."""
    words: int
    spread: float = 0.0
    """Share by which items are shorter or longer. With 0 a closed loop marches in step, which real work never does."""
    prefixes: int = 0
    prefix_words: int = 0

    @property
    def defaults(self) -> dict[str, Any]:
        """Fields that all of them share."""
        return {"ignore_eos": True, "temperature": 0}

    @property
    def lengths(self) -> list[int]:
        """Output tokens of each item, exactly."""
        low, high = round(self.tokens * (1 - self.spread)), round(self.tokens * (1 + self.spread))
        return [random.Random(f"length {index}").randint(max(1, low), high) for index in range(self.items)]


def make(sizes: Sizes, salt: int) -> list[dict[str, Any]]:
    """Every request's own fields. Another salt makes other prompts, from their first word on, of the same length."""
    found: list[dict[str, Any]] = []
    for index, tokens in enumerate(sizes.lengths):
        user = {"role": "user", "content": f"{salt:09d} {_text(index, sizes.words)}"}
        group = index % sizes.prefixes if sizes.prefixes else 0
        system = {"role": "system", "content": f"{salt:09d} {group} {_text(-1 - group, sizes.prefix_words)}"}
        found.append({"messages": [system, user] if sizes.prefixes else [user], "max_tokens": tokens})
    return found


def _text(seed: int, words: int) -> str:
    return " ".join(random.Random(f"{seed}").choices(_WORDS.split(), k=words))
