"""Supervised children: real processes that come up, fail to, die, and end."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from engine import child as child_module
from engine.child import Child, ChildSpec
from engine.errors import SettingsError, StartError


def spec(code: str, flag: Path, **options: object) -> ChildSpec:
    """A child that runs `code` with `flag` as a path that it may touch to be ready."""

    async def ready() -> bool:
        return flag.exists()

    program = f"import os, pathlib, signal, sys, time\nflag = pathlib.Path({str(flag)!r})\n{code}"
    return ChildSpec(name="child", command=[sys.executable, "-c", program], ready=ready, **options)  # type: ignore[arg-type] # the options of a test


STAYS = "flag.touch(); time.sleep(60)"


async def test_it_comes_up_and_ends_on_sigterm(tmp_path: Path) -> None:
    lines: list[str] = []
    child = Child(
        spec("print('hello', flush=True); " + STAYS, tmp_path / "up", line=lines.append, log_file=tmp_path / "log")
    )
    await child.start()
    pid = child.pid
    assert pid
    await child.stop()
    await child.stop()
    assert child.pid is None
    assert lines == ["hello"]
    assert (tmp_path / "log").read_text() == "hello\n"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_one_that_ends_while_starting_is_told_with_its_last_words(tmp_path: Path) -> None:
    talk = "print('ValueError: no such model'); [print(n) for n in range(50)]; print('bye'); sys.exit(3)"
    child = Child(spec(talk, tmp_path / "up"))
    with pytest.raises(StartError, match="exit code 3") as caught:
        await child.start()
    assert "ValueError: no such model" in str(caught.value)
    assert "bye" in str(caught.value)
    assert "| 7" not in str(caught.value)


async def test_one_that_never_gets_ready_is_ended(tmp_path: Path) -> None:
    child = Child(spec("time.sleep(60)", tmp_path / "up", start_seconds=0.3))
    with pytest.raises(StartError, match="not ready within"):
        await child.start()
    assert child.pid is None


async def test_one_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN); " + STAYS
    child = Child(spec(code, tmp_path / "up", stop_seconds=0.3))
    await child.start()
    await child.stop()
    assert child.pid is None


async def test_one_that_dies_is_restarted_until_it_dies_too_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "_BACKOFF_FIRST", 0.01)
    child = Child(spec("flag.touch(); time.sleep(0.5); sys.exit(9)", tmp_path / "up", restarts=2))
    await child.start()
    with pytest.raises(StartError, match="died 3 times"):
        async with asyncio.timeout(30):
            await child.supervise()
    assert child.restarts == 2
    await child.stop()


async def test_a_killed_child_is_noticed_although_what_it_started_lives_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "_BACKOFF_FIRST", 0.01)
    child = Child(spec("import subprocess; subprocess.Popen(['sleep', '60']); " + STAYS, tmp_path / "up"))
    await child.start()
    supervising = asyncio.create_task(child.supervise())
    assert child.pid
    os.kill(child.pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        while not child.restarts or not child.pid:
            await asyncio.sleep(0.05)
    supervising.cancel()
    await asyncio.gather(supervising, return_exceptions=True)
    await child.stop()


async def test_what_a_child_started_ends_with_it(tmp_path: Path) -> None:
    code = (
        "import subprocess; p = subprocess.Popen(['sleep', '60']); (flag.parent / 'pid').write_text(str(p.pid)); "
        + STAYS
    )
    child = Child(spec(code, tmp_path / "up"))
    await child.start()
    grandchild = int((tmp_path / "pid").read_text())
    await child.stop()
    async with asyncio.timeout(5):
        while Path(f"/proc/{grandchild}/stat").exists():
            await asyncio.sleep(0.05)


async def test_what_no_restart_mends_is_raised_and_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "_BACKOFF_FIRST", 0.01)
    said = tmp_path / "fault"

    def fault() -> SettingsError | None:
        return SettingsError(said.read_text()) if said.exists() else None

    up = f"said = pathlib.Path({str(said)!r}); said.exists() and sys.exit(3); flag.touch(); time.sleep(1)"
    child = Child(
        spec(f"{up}; flag.unlink(); said.write_text('it is broken'); sys.exit(9)", tmp_path / "up", fault=fault)
    )
    await child.start()
    with pytest.raises(SettingsError, match="it is broken"):
        async with asyncio.timeout(30):
            await child.supervise()
    assert child.restarts == 1


async def test_a_child_without_output_of_its_own_inherits_ours_and_descriptors(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "file").open("w") as file:
        code = f"os.write({file.fileno()}, b'written'); print('hello', flush=True); " + STAYS
        child = Child(spec(code, tmp_path / "up", own_output=False, descriptors=(file.fileno(),)))
        await child.start()
        await child.stop()
    assert (tmp_path / "file").read_text() == "written"
    assert capfd.readouterr().out == "hello\n"
