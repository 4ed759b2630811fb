"""Which arms there are, and which are run when."""

from __future__ import annotations

from api.bench.blocks import STRICT_DIAL, Arm

MAIN = "50"
"""Duty at which every arm is run; at the others only those that say something there."""
_ELSEWHERE = ("A", "C", "V", "O")
ARMS = ("A", "A'", "B", "B stock", "C", "S", "V", "V strict", "O")
QUICK = ("A", "B", "C", "S", "V", "V strict", "O")


def arms(window: int, naive: int, caps: list[int]) -> list[Arm]:
    """Every arm, in the order of a round.

    A   people alone, on V's engine              A'  the same on an engine with vLLM's default flags
    B   bulk alone, as a job                     B stock  the same with vLLM's own scheduler
    C   both, stock scheduler, bulk sent straight to the engine by someone who does not count its seats
    Sn  the same with a fixed window of n
    V   both, velocity's scheduler, bulk as a job      V strict  with ratio 1.05 and floor 0
    O   both, vLLM's own scheduler (priority), bulk as a job: only the worker's window protects people
    """
    return [
        Arm("A", "V"),
        Arm("B", "V", people=False, bulk="job", window=window),
        Arm("V", "V", bulk="job", window=window),
        Arm("C", "S", bulk="direct", window=naive),
        *(Arm(f"S{cap}", "S", bulk="direct", window=cap) for cap in caps),
        Arm("O", "S", bulk="job", window=window),
        Arm("V strict", "V", bulk="job", window=window, dial=STRICT_DIAL),
        Arm("A'", "D"),
        Arm("B stock", "S", people=False, bulk="job", window=window, once=True),
    ]


def chosen(every: list[Arm], names: list[str], duties: list[str]) -> dict[str, list[Arm]]:
    """The arms of each duty. `S` stands for all fixed windows. A is always there: presence is calibrated by it."""
    wanted = [arm for arm in every if arm.name in {"A", *names} or ("S" in names and arm.name[1:].isdigit())]
    main = MAIN if MAIN in duties else duties[0]
    return {
        duty: [arm for arm in wanted if duty == main or arm.name in _ELSEWHERE or not arm.people] for duty in duties
    }
