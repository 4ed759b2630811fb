"""The contract with vLLM's source: kept by the installed one, broken by damaged copies."""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path

import pytest

from engine.scheduler.contract import main
from engine.scheduler.coserver import NEEDED

_FIELDS = "\n".join(f"        self.{name} = 0" for name in NEEDED if "." not in name and name != "_preempt_request")
FILES = {
    "vllm/_version.py": "__version__ = version = '9.9.1'\n",
    "vllm/v1/core/sched/async_scheduler.py": "class AsyncScheduler(Scheduler):\n    pass\n",
    "vllm/v1/core/sched/scheduler.py": f"""
class Scheduler(SchedulerInterface):
    def __init__(self, config):
        self.parallel_config = config
{_FIELDS}
        self.max_num_active_reqs = 0
        self.kv_cache_manager: KVCacheManager = KVCacheManager()

    def schedule(self, throttle=False):
        budget = self.max_num_scheduled_tokens
        return budget if len(self.running) >= self.max_num_active_reqs else 0

    def add_request(self, request): ...
    def update_from_output(self, scheduler_output, model_runner_output): ...
    def _preempt_request(self, request, timestamp, drop=False): ...
""",
    "vllm/v1/core/sched/output.py": "class SchedulerOutput:\n    num_scheduled_tokens: dict[str, int]\n",
    "vllm/v1/core/kv_cache_manager.py": """
class KVCacheManager:
    def __init__(self):
        self.coordinator, self.block_pool = make()
""",
    "vllm/v1/core/block_pool.py": """
class BlockPool:
    def __init__(self):
        self.num_gpu_blocks = 1
    def get_num_free_blocks(self): ...
""",
    "vllm/config/parallel.py": """
class ParallelConfig:
    distributed_executor_backend: str | None = None
    data_parallel_size: int = 1
    data_parallel_rank: int = 0
""",
    "vllm/v1/request.py": """
class Request:
    def __init__(self):
        self.request_id = self.priority = self.arrival_time = self.status = 0
        self.num_prompt_tokens = self.num_computed_tokens = self.num_output_placeholders = 0
    @property
    def num_tokens(self): ...
    @property
    def num_tokens_with_spec(self): ...
    def is_finished(self): ...

class RequestStatus(enum.IntEnum):
    WAITING = enum.auto()
    PREEMPTED = enum.auto()
""",
    "vllm/engine/arg_utils.py": 'add("--scheduling-policy")\nadd("--scheduler-cls")\n',
    "vllm/entrypoints/any/cli_args.py": "class Arguments:\n    middleware: list[str] = field()\n",
    "vllm/entrypoints/openai/api_server.py": "async def init(state):\n    state.vllm_config = None\n",
}


def unpacked(folder: Path, file: str = "", old: str = "", new: str = "") -> Path:
    """A small tree that keeps the contract, but for `old`, which becomes `new`; without `old` the file is missing."""
    for name, text in FILES.items():
        if name == file and not old:
            continue
        assert name != file or old in text
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace(old, new) if name == file else text)
    return folder


def missing(capsys: pytest.CaptureFixture[str], place: Path) -> list[str]:
    """Runs the check, which has to fail; returns what it misses."""
    assert main([str(place)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "9.9.1 lacks" in lines[-1]
    found = [line.removeprefix("MISSING ").split("  ")[0] for line in lines if line.startswith("MISSING")]
    assert all(name in lines[-1] for name in found)
    return found


@pytest.mark.vllm
def test_the_installed_vllm_keeps_it(capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed (extra cpu)")
    assert main([]) == 0, capsys.readouterr().out
    assert "MISSING" not in capsys.readouterr().out


def test_a_tree_a_package_and_a_wheel_that_keep_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = unpacked(tmp_path / "tree")
    wheel = tmp_path / "vllm-9.9.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        for name, text in FILES.items():
            packed.writestr(name, text)
    for place in (tree, tree / "vllm", wheel):
        assert main([str(place)]) == 0
        assert capsys.readouterr().out.endswith("vLLM 9.9.1 has all that the scheduler relies on.\n")


SCHEDULER, ASYNC = "vllm/v1/core/sched/scheduler.py", "vllm/v1/core/sched/async_scheduler.py"
REQUEST, POOL = "vllm/v1/request.py", "vllm/v1/core/block_pool.py"


@pytest.mark.parametrize(
    ("file", "old", "new", "named"),
    [
        (ASYNC, "", "", "class AsyncScheduler(Scheduler)"),
        (ASYNC, "(Scheduler)", "", "class AsyncScheduler(Scheduler)"),
        (SCHEDULER, "def schedule(", "def plan(", "Scheduler.schedule()"),
        (SCHEDULER, "add_request", "take", "Scheduler.add_request()"),
        (SCHEDULER, "update_from_output", "update", "Scheduler.update_from_output()"),
        (SCHEDULER, "request, timestamp, drop=False", "request", "Scheduler._preempt_request(request, timestamp)"),
        (SCHEDULER, "drop=False", "drop", "Scheduler._preempt_request(request, timestamp)"),
        (SCHEDULER, "drop=False", "*, drop", "Scheduler._preempt_request(request, timestamp)"),
        (SCHEDULER, "= self.max_num_scheduled_tokens", "= 1", "schedule() reads self.max_num_scheduled_tokens"),
        (SCHEDULER, ">= self.max_num_active_reqs", ">= 1", "schedule() reads self.max_num_active_reqs"),
        (SCHEDULER, "self.max_num_active_reqs = 0", "pass", None),
        (SCHEDULER, "self._pause_state = 0", "pass", "scheduler._pause_state"),
        (SCHEDULER, "self.running = 0", "pass", "scheduler.running"),
        (SCHEDULER, "self.kv_cache_manager:", "manager:", "scheduler.kv_cache_manager.block_pool.num_gpu_blocks"),
        (POOL, "self.num_gpu_blocks", "self.num_blocks", "scheduler.kv_cache_manager.block_pool.num_gpu_blocks"),
        (POOL, "", "", "scheduler.kv_cache_manager.block_pool.get_num_free_blocks"),
        (REQUEST, "PREEMPTED", "EVICTED", "RequestStatus.PREEMPTED"),
        (REQUEST, "self.priority", "self.rank", "Request.priority"),
        ("vllm/v1/core/sched/output.py", "num_scheduled_tokens", "tokens", "SchedulerOutput.num_scheduled_tokens"),
        ("vllm/config/parallel.py", "data_parallel_rank", "rank", "scheduler.parallel_config.data_parallel_rank"),
        ("vllm/engine/arg_utils.py", "--scheduler-cls", "--scheduler", "--scheduler-cls"),
        ("vllm/entrypoints/any/cli_args.py", "middleware", "layers", "--middleware"),
        ("vllm/entrypoints/openai/api_server.py", "state.vllm_config", "state.config", "app.state.vllm_config"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, old: str, new: str, named: str | None
) -> None:
    found = missing(capsys, unpacked(tmp_path, file, old, new))
    # without the newer attribute, vLLM has to go by the older one
    assert (named or "schedule() reads self.max_num_running_reqs") in found


def test_what_is_no_vllm_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("no wheel")
    unpacked(tmp_path / "broken", ASYNC, "class", "klass")
    for place in (tmp_path, tmp_path / "text", tmp_path / "nowhere", tmp_path / "broken"):
        assert main([str(place)]) == 2
        assert capsys.readouterr().err
