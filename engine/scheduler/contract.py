"""`python -m engine.scheduler.contract [WHEEL or directory]`: whether a vLLM has all that the scheduler relies on.

vLLM's scheduler interface is not public. Before an upgrade this reads the *source* of the vLLM that is installed, of a
wheel, or of an unpacked directory, without importing any of it, and names what is missing. What it cannot see is a
change of meaning: the end-to-end tests on the real vLLM are for that.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from engine.scheduler.coserver import NEEDED, STARTABLE

_CORE = "vllm/v1/core/"
_SCHEDULER = (f"{_CORE}sched/scheduler.py", "Scheduler")
_CLASSES = {
    "kv_cache_manager": (f"{_CORE}kv_cache_manager.py", "KVCacheManager"),
    "block_pool": (f"{_CORE}block_pool.py", "BlockPool"),
    "parallel_config": ("vllm/config/parallel.py", "ParallelConfig"),
}
"""Where the class of an attribute is: file and name."""
_METHODS = ("schedule", "add_request", "update_from_output")
_PARALLEL = ("distributed_executor_backend", "data_parallel_size", "data_parallel_rank")
_REQUEST = (
    "request_id", "priority", "arrival_time", "status", "num_prompt_tokens", "num_tokens", "num_tokens_with_spec",
    "num_computed_tokens", "num_output_placeholders", "is_finished",
)  # fmt: skip
_FLAGS = ("--scheduler-cls", "--scheduling-policy")

_Function = ast.FunctionDef | ast.AsyncFunctionDef


class NoVllm(Exception):
    """There is no vLLM to read. Says where it was looked for."""


@dataclass(frozen=True)
class Finding:
    """One thing that is relied on, where it has to be, and whether it is there."""

    what: str
    where: str
    there: bool


class Source:
    """The Python files of one vLLM, by their path from the folder that holds the package."""

    def __init__(self, names: Sequence[str], read: Callable[[str], str]) -> None:
        self.names = frozenset(names)
        self._read = read
        self.tree = cache(self._parsed)

    @classmethod
    def of(cls, place: Path | None) -> Source:
        """The vLLM that is installed (None), or that of a wheel or of a directory. Raises NoVllm."""
        if place is None:
            found = importlib.util.find_spec("vllm")
            if found is None or found.origin is None:
                raise NoVllm("No vLLM is installed; name a wheel or a directory.")
            place = Path(found.origin).parent
        if place.is_file() and zipfile.is_zipfile(place):
            wheel = zipfile.ZipFile(place)
            return cls(wheel.namelist(), lambda name: wheel.read(name).decode())
        root = place.parent if place.name == "vllm" else place
        if not (root / "vllm").is_dir():
            raise NoVllm(f"{place} is neither a wheel nor a directory that holds the package vllm.")
        names = [file.relative_to(root).as_posix() for file in (root / "vllm").rglob("*.py")]
        return cls(names, lambda name: (root / name).read_text(encoding="utf-8"))

    @property
    def version(self) -> str:
        """What it calls itself."""
        text = self._read("vllm/_version.py") if "vllm/_version.py" in self.names else ""
        found = re.search(r"""^__version__ = .*?["']([^"']+)["']""", text, re.MULTILINE)
        return found[1] if found else "of an unknown version"

    def named(self, pattern: str) -> Iterator[ast.Module]:
        """The files whose whole path is of that pattern."""
        return (self.tree(name) for name in sorted(self.names) if re.fullmatch(pattern, name))

    def class_at(self, place: tuple[str, str]) -> ast.ClassDef | None:
        """A class by its file and its name."""
        file, name = place
        if file not in self.names:
            return None
        return next((n for n in ast.walk(self.tree(file)) if isinstance(n, ast.ClassDef) and n.name == name), None)

    def _parsed(self, name: str) -> ast.Module:
        return ast.parse(self._read(name))


def findings(source: Source) -> list[Finding]:
    """Everything that is relied on, in the order in which it is used."""
    return [*_scheduler(source), *_attributes(source), *_requests(source), *_command_line(source)]


def _scheduler(source: Source) -> Iterator[Finding]:
    file = f"{_CORE}sched/async_scheduler.py"
    asynchronous = source.class_at((file, "AsyncScheduler"))
    bases = [ast.unparse(base) for base in asynchronous.bases] if asynchronous else []
    yield Finding("class AsyncScheduler(Scheduler)", file, "Scheduler" in bases)
    functions = _functions(source.class_at(_SCHEDULER))
    for name in _METHODS:
        yield Finding(f"Scheduler.{name}()", _SCHEDULER[0], name in functions)
    preempt = functions.get("_preempt_request")
    fits = preempt is not None and _takes(preempt, ["self", "request", "timestamp"])
    yield Finding("Scheduler._preempt_request(request, timestamp)", _SCHEDULER[0], fits)
    seats = "max_num_active_reqs"
    if seats not in _members(source.class_at(_SCHEDULER)):
        seats = "max_num_running_reqs"
    read = _read_of_self(functions.get("schedule"))
    for name in ("max_num_scheduled_tokens", seats):
        yield Finding(f"schedule() reads self.{name}", _SCHEDULER[0], name in read)


def _attributes(source: Source) -> Iterator[Finding]:
    for path in (*NEEDED, *(f"parallel_config.{name}" for name in _PARALLEL)):
        place = _SCHEDULER
        *owners, last = path.split(".")
        there = True
        for name in owners:
            there = there and name in _members(source.class_at(place))
            place = _CLASSES[name]
        yield Finding(f"scheduler.{path}", place[0], there and last in _members(source.class_at(place)))
    file = f"{_CORE}sched/output.py"
    there = "num_scheduled_tokens" in _members(source.class_at((file, "SchedulerOutput")))
    yield Finding("SchedulerOutput.num_scheduled_tokens", file, there)


def _requests(source: Source) -> Iterator[Finding]:
    file = "vllm/v1/request.py"
    members = _members(source.class_at((file, "Request")))
    for name in _REQUEST:
        yield Finding(f"Request.{name}", file, name in members)
    states = _members(source.class_at((file, "RequestStatus")))
    for name in sorted(STARTABLE):
        yield Finding(f"RequestStatus.{name}", file, name in states)


def _command_line(source: Source) -> Iterator[Finding]:
    file = "vllm/engine/arg_utils.py"
    for flag in _FLAGS:
        yield Finding(flag, file, any(flag in _texts(tree) for tree in source.named(re.escape(file))))
    arguments = list(source.named(r"vllm/entrypoints/.*cli_args\.py"))
    fields = {name for tree in arguments for n in ast.walk(tree) if isinstance(n, ast.ClassDef) for name in _members(n)}
    yield Finding("--middleware", "vllm/entrypoints/**/cli_args.py", "middleware" in fields)
    entrypoints = source.named(r"vllm/entrypoints/.*(api_server|app_state)\.py")
    told = any("state.vllm_config" in _assigned(tree) for tree in entrypoints)
    yield Finding("app.state.vllm_config", "vllm/entrypoints/**/{api_server,app_state}.py", told)


def _functions(cls: ast.ClassDef | None) -> dict[str, _Function]:
    return {n.name: n for n in cls.body if isinstance(n, _Function)} if cls else {}


def _members(cls: ast.ClassDef | None) -> set[str]:
    """Methods, properties and fields of a class, and what its __init__ gives to self."""
    functions = _functions(cls)
    own = {text for n in (cls.body if cls else ()) for text in _targets(n)}
    given = _assigned(functions["__init__"]) if "__init__" in functions else set()
    return {*functions, *own, *(name.removeprefix("self.") for name in given if name.startswith("self."))}


def _assigned(tree: ast.AST) -> set[str]:
    """Every name, however deep, that gets a value, as it is written."""
    return {text for node in ast.walk(tree) for text in _targets(node)}


def _targets(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Assign):
        parts = [p for t in node.targets for p in (t.elts if isinstance(t, ast.Tuple) else [t])]
        return [ast.unparse(part) for part in parts]
    return [ast.unparse(node.target)] if isinstance(node, ast.AnnAssign) else []


def _takes(function: _Function, names: list[str]) -> bool:
    """Whether a function can be called with exactly these arguments, by place."""
    given = function.args
    arguments = [a.arg for a in (*given.posonlyargs, *given.args)]
    needed = len(arguments) - len(given.defaults)
    return arguments[: len(names)] == names and needed <= len(names) and None not in given.kw_defaults


def _read_of_self(function: _Function | None) -> set[str]:
    return {
        node.attr
        for node in (ast.walk(function) if function else ())
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and ast.unparse(node.value) == "self"
    }


def _texts(tree: ast.AST) -> set[object]:
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}


def main(arguments: Sequence[str]) -> int:
    """Print the findings; 0: all is there, 1: something is missing, 2: there is no vLLM to read."""
    try:
        source = Source.of(Path(arguments[0]) if arguments else None)
        found = findings(source)
    except (NoVllm, OSError, SyntaxError, zipfile.BadZipFile) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    missing = [each for each in found if not each.there]
    width = max(len(each.what) for each in found)
    for each in found:
        sys.stdout.write(f"{'ok     ' if each.there else 'MISSING'} {each.what:{width}}  {each.where}\n")
    verdict = f"lacks {', '.join(each.what for each in missing)}" if missing else "has all that the scheduler relies on"
    sys.stdout.write(f"vLLM {source.version} {verdict}.\n")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
