"""The engine's launcher: its environment, its log, its ports."""

from __future__ import annotations

import socket
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest
import structlog

from engine import embedded, ports, profile
from engine.errors import ProfileError, SettingsError, StartError
from engine.serve import _environment, _folders, _forward_line, serve
from engine.settings import EngineSettings


@pytest.mark.parametrize(
    ("line", "level", "event"),
    [
        ("INFO 11-22 19:40:01 [api_server.py:12] Starting", "info", "Starting"),
        ("(EngineCore pid=7) ERROR 11-22 19:40:01 [core.py:3] it broke", "error", "it broke"),
        ("WARNING 11-22 19:40:01 [x.py:1] careful", "warning", "careful"),
        ("Traceback (most recent call last):", "info", "Traceback (most recent call last):"),
    ],
)
def test_vllms_lines_become_structlog_events(line: str, level: str, event: str) -> None:
    with structlog.testing.capture_logs() as logs:
        _forward_line(line)
    wanted: list[MutableMapping[str, Any]] = [{"event": event, "log_level": level}]
    assert logs == wanted


def test_the_operators_environment_wins_over_the_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    environment = _environment(profile.load("cpu"))
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert Path(environment["PYTHONPATH"].split(":")[0], "engine").is_dir()


def test_the_schedulers_reports_have_a_folder_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VELOCITY_SCHEDULER_DIR", raising=False)
    assert _folders(tmp_path) == {
        "VLLM_RPC_BASE_PATH": str(tmp_path),
        "VELOCITY_SCHEDULER_DIR": str(tmp_path / "scheduler"),
    }
    assert (tmp_path / "scheduler").stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("VELOCITY_SCHEDULER_DIR", str(tmp_path / "operators" / "own"))
    assert _folders(tmp_path)["VELOCITY_SCHEDULER_DIR"] == str(tmp_path / "operators" / "own")
    assert (tmp_path / "operators" / "own").is_dir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("VELOCITY_SCHEDULER_DIR", str(tmp_path / "file"))
    with pytest.raises(SettingsError, match="VELOCITY_SCHEDULER_DIR"):
        _folders(tmp_path)


def test_a_taken_port_is_said_and_a_free_one_is_free() -> None:
    with ports.listen("127.0.0.1", 0, "a test") as taken:
        taken.listen()
        with pytest.raises(StartError, match="in use"):
            ports.require_free("127.0.0.1", taken.getsockname()[1], "a test")
    with socket.create_server(("127.0.0.1", ports.free_port())):
        pass


async def test_a_model_that_can_not_fit_is_refused_with_the_reason() -> None:
    with pytest.raises(ProfileError, match="FP8 weights are 326 GiB"):
        await serve(
            EngineSettings(engine_url=f"http://127.0.0.1:{ports.free_port()}"), profile.load("nemotron-4-340b"), {}
        )


async def test_a_prepared_model_is_not_prepared_again(tmp_path: Path) -> None:
    model = tmp_path / "models" / "M"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    stages: list[str] = []
    assert await embedded.prepare("embedded:M", tmp_path, lambda stage, _: stages.append(stage)) == model
    assert stages == []


async def test_a_failed_preparation_says_where_the_reason_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no model")
    monkeypatch.setattr(embedded, "_source", lambda: broken)
    with pytest.raises(ProfileError, match=r"M\.log"):
        await embedded.prepare("embedded:M", tmp_path, lambda *_: None)
    assert not (tmp_path / "models" / "M").exists()
    assert (tmp_path / "models" / "M.log").read_text()
