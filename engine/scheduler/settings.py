"""The operator's dial, from the environment of the engine process or, while it runs, from a file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

FOLDER = "VELOCITY_SCHEDULER_DIR"
"""Environment variable: the folder of ControlFolder."""
RANK = "VELOCITY_SCHEDULER_RANK"
"""Environment variable: which data-parallel rank an engine process is; CoServingScheduler says it, nobody else."""


@dataclass(frozen=True)
class Dial:
    """What the operator decides. Every field is an environment variable: VELOCITY_ and the name in capitals."""

    interactive_ratio: float = 1.2
    """How much longer batch work may make a step in which a person waits for a token (1.2: by a fifth)."""
    first_token: float = 0.1
    """Seconds that nobody notices: while people are away, batch steps may be so long that the next person still gets
    the first token within about this time, whatever the ratio says. 0: the ratio decides alone."""
    batch_floor: int = 1
    """Batch sequences that decode even when the ratio leaves no room for them. 0: batch may stop while people type."""
    max_parked: float = 20.0
    """Seconds after which a parked batch sequence gets a turn ahead of older ones."""
    seat_reserve: float = 0.125
    """Share of `--max-num-seqs` that batch leaves free."""
    kv_reserve: float = 0.1
    """Share of the KV cache blocks that admitting batch leaves free."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("interactive_ratio", 1.0, 100.0),
            ("first_token", 0.0, 60.0),
            ("batch_floor", 0, 100_000),
            ("max_parked", 0.0, 86_400.0),
            ("seat_reserve", 0.0, 0.9),
            ("kv_reserve", 0.0, 0.9),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"VELOCITY_{name.upper()} is {value}; it must lie between {low} and {high}.")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Dial:
        """Reads the variables that are set. Raises ValueError, naming the variable, for one that makes no sense."""
        values: dict[str, float] = {}
        for field in fields(cls):
            name = f"VELOCITY_{field.name.upper()}"
            if environment.get(name):
                try:
                    values[field.name] = int(environment[name]) if field.type == "int" else float(environment[name])
                except ValueError as error:
                    raise ValueError(f"{name} is {environment[name]!r}; it must be a number.") from error
        return cls(**values)  # type: ignore[arg-type]

    def turned(self, values: Mapping[str, object]) -> Dial:
        """This dial with some fields changed; names that it does not have are ignored."""
        known = {f.name: f.type for f in fields(self)}
        changes = {
            name: int(value) if known[name] == "int" else float(value)
            for name, value in values.items()
            if name in known and isinstance(value, int | float)
        }
        return replace(self, **changes)  # type: ignore[arg-type]


class ControlFolder:
    """A folder (VELOCITY_SCHEDULER_DIR) for turning the dial of a running engine, and for seeing what it does.

    `dial.json` may hold any of the dial's fields; it is looked at when its modification time changes. `status.json` is
    replaced about once a second while the engine works, and never half-written. Data-parallel ranks share the dial, and
    those after the first (0) report in `status-1.json`, `status-2.json` and so on.
    """

    def __init__(self, path: Path, rank: int = 0) -> None:
        self._dial = path / "dial.json"
        self._status = path / (f"status-{rank}.json" if rank else "status.json")
        self._read_at: int | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> ControlFolder | None:
        """The folder that the environment names, or None. VELOCITY_SCHEDULER_RANK is the rank of this engine."""
        path = environment.get(FOLDER)
        return cls(Path(path), int(environment.get(RANK, "0"))) if path else None

    @staticmethod
    def reports(path: Path) -> dict[int, dict[str, Any]]:
        """What the schedulers of all ranks last said, by rank, without those of processes that have ended.

        A rank whose file cannot be read is left out.
        """
        found = {}
        for file in path.glob("status*.json"):
            with suppress(OSError, ValueError, KeyError, TypeError):
                rank = int(file.stem.partition("-")[2] or 0)
                report = json.loads(file.read_text(encoding="utf-8"))
                if _lives(int(report["pid"])):
                    found[rank] = report
        return dict(sorted(found.items()))

    def dial(self, current: Dial) -> Dial:
        """The dial as the file has it, or `current` if there is no news. Raises ValueError for one without sense."""
        try:
            changed = self._dial.stat().st_mtime_ns
        except OSError:
            return current
        if changed == self._read_at:
            return current
        self._read_at = changed
        values = json.loads(self._dial.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("dial.json must hold one JSON object.")  # noqa: TRY004 - the content, not a type
        return current.turned(values)

    def report(self, status: Mapping[str, object]) -> None:
        """Replaces status.json. Raises OSError when the folder cannot be written."""
        fresh = self._status.with_suffix(".tmp")
        fresh.write_text(json.dumps(status), encoding="utf-8")
        fresh.replace(self._status)


def _lives(pid: int) -> bool:
    """Whether a process of that number runs: a report outlives the engine that wrote it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
