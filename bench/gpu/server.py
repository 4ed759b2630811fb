"""Starts and stops one vLLM server, and knows the flags of each kind."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def _environment() -> dict[str, str]:
    """No calls to the outside, and no kernels that need packages or a compiler that the machine may lack."""
    return {
        "VLLM_USE_DEEP_GEMM": "0",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONPATH": os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p),
    }


def tuned_kernels(folder: Path) -> Path:
    """Gives the H100 the expert kernels' settings that vLLM ships for the H200, the same processor; returns `folder`.

    vLLM 0.25 has settings for 128 experts of width 768 in 128×128 FP8 blocks for the H200 only; without any the kernel
    falls back to a guess. Every server of a run gets the same ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vllm = importlib.util.find_spec("vllm")
    if vllm is None or vllm.origin is None:
        return folder
    shipped = Path(vllm.origin).parent / "model_executor" / "layers" / "fused_moe" / "configs"
    name = "E=128,N=768,device_name={},dtype=fp8_w8a8,block_shape=[128,128].json"
    source = shipped / name.format("NVIDIA_H200")
    if source.exists():
        shutil.copy(source, folder / name.format("NVIDIA_H100_80GB_HBM3"))
    return folder


@dataclass
class Server:
    """One vLLM process group that serves a model directory on a local port."""

    kind: str
    model: Path
    work: Path
    port: int = 8100
    extra: list[str] = field(default_factory=list)
    dummy: bool = True
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Base address, without /v1."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        """Where the server's output goes."""
        return self.work / f"{self.kind}.log"

    @property
    def control(self) -> Path | None:
        """The folder through which the co-serving scheduler takes its dial and reports, if it runs."""
        return self.work / "control" if self.kind == "velocity" else None

    def command(self) -> list[str]:
        """The command line: stock flags, and for velocity its scheduler on top."""
        flags = ["--model", str(self.model), "--served-model-name", "bench"]
        flags += ["--load-format", "dummy"] if self.dummy else []
        flags += ["--host", "127.0.0.1", "--port", str(self.port), "--generation-config", "vllm"]
        flags += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes", *self.extra]
        if self.kind == "velocity":
            flags += ["--scheduling-policy", "priority", "--scheduler-cls", "engine.scheduler.CoServingScheduler"]
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags]

    def start(self, timeout: float) -> float:
        """Starts the server and waits until it answers; returns the seconds that took.

        Raises RuntimeError with the end of the log when it dies or takes longer than `timeout` seconds.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        environment = _environment() | {"VLLM_TUNED_CONFIG_FOLDER": str(tuned_kernels(self.work / "kernels"))}
        if self.control is not None:
            self.control.mkdir(parents=True, exist_ok=True)
            environment["VELOCITY_SCHEDULER_DIR"] = str(self.control)
        began = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command(), stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        while time.monotonic() - began < timeout:
            if self.process.poll() is not None:
                break
            if self._answers():
                return time.monotonic() - began
            time.sleep(0.5)
        end = self.log.read_text(encoding="utf-8", errors="replace")[-6000:]
        self.stop()
        raise RuntimeError(f"The {self.kind} server did not come up. The end of its log:\n{end}")

    def stop(self) -> None:
        """Ends the whole process group: first politely, then for good."""
        process, self.process = self.process, None
        if process is None:
            return
        for name in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, name)
                process.wait(timeout=20)
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as reply:  # noqa: S310 - our own server
                return bool(reply.status == 200)
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return False
