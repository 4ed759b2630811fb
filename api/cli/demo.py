"""`velocity demo`: the whole product in a few minutes, on a real engine."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text

from api.cli.client import ChatTiming, VelocityClient
from api.cli.keys import opened
from api.cli.progress import watch
from api.cli.terminal import errors_for_people, fail, load_settings, out
from api.keys import Terms
from api.settings import ApiSettings
from api.stack import Stack
from engine import log
from engine.errors import StartError, VelocityError
from engine.ports import free_port
from engine.stopping import run_until_signal

_MODEL = "velocity-30b"
_BESIDE_AFTER = 2.0
"""Seconds after the job's submission at which the second chat begins."""
_COMPONENTS = (
    "Button", "Card", "Modal", "Navbar", "Footer", "Hero", "Sidebar", "Tabs", "Table", "Tooltip", "Avatar", "Badge",
    "Spinner", "Alert", "Dropdown", "Pagination", "Breadcrumb", "Accordion", "Carousel", "Checkbox", "Slider",
    "Stepper", "Toast", "SearchBox",
)  # fmt: skip


def demo() -> None:
    """Start everything, stream a chat, run a bulk job beside a second chat, show the results, end everything."""
    directory = Path(tempfile.mkdtemp(prefix="velocity-demo-"))
    with errors_for_people():
        settings = load_settings(data_dir=directory, port=free_port(), log_level="WARNING")
        log.configure(settings, "demo")
        stack = Stack(
            settings,
            lambda message: out.print(f"  {message}", style="dim", markup=False),
            own_redis=True,
            own_engine=True,
        )
        try:
            stopped = asyncio.run(_run(stack))
        except (VelocityError, httpx.TransportError) as error:
            fail(f"The demo failed: {str(error) or type(error).__name__} Logs are kept in {stack.logs}")
    shutil.rmtree(directory)
    if stopped:
        fail("stopped")


def _say(message: str) -> None:
    out.print(f"  {message}", style="dim", markup=False, soft_wrap=True)


async def _run(stack: Stack) -> bool:
    return await run_until_signal(_story(stack))


async def _story(stack: Stack) -> None:
    began = time.monotonic()
    _stage(1, "Starting Redis, a real vLLM with a small model, a worker and the api (about a minute)")
    async with stack.running():
        supervising = asyncio.create_task(stack.supervise())
        story = asyncio.create_task(_use(stack.settings, stack.url, began))
        try:
            await asyncio.wait({supervising, story}, return_when=asyncio.FIRST_COMPLETED)
            if supervising.done():
                supervising.result()
            story.result()
            _stage(6, "Ending everything")
        finally:
            story.cancel()
            supervising.cancel()
            await asyncio.gather(story, supervising, return_exceptions=True)
    out.print("\n[bold green]Done.[/] To keep it running: [bold].venv/bin/velocity up[/]")


async def _use(settings: ApiSettings, url: str, began: float) -> None:
    _stage(2, "Creating an API key")
    async with opened(settings) as keys:
        _, key = await keys.create(Terms(name="demo", rpm=600))
    out.print(f"  {key[:18]}… (600 requests per minute)")
    async with VelocityClient(url, key) as client:
        _stage(3, "Streaming a chat answer from the idle engine")
        idle = await _chat(client, "Write a React button component.", 80)
        took = time.monotonic() - began - idle.last + (idle.first or 0)
        out.print(f"  [dim](that was {took:.0f} s after the demo began; the model is tiny and writes nonsense)[/]")
        _stage(4, f"Submitting a bulk job of {len(_COMPONENTS)} React components, and chatting while it runs")
        job = await client.json("POST", "/jobs", json=_job())
        out.print(f"  {job['id']} is {job['status']}")
        pieces: list[str] = []
        busy = asyncio.create_task(_chat_beside(client, pieces))
        over = await watch(client, job["id"], out, beside=lambda: _tail(pieces))
        beside = await busy
        _stage(5, "Results, in input order")
        await _show_results(client, over)
    out.print(Panel(Text(_summary(over, idle, beside)), title="summary", expand=False))
    if over["status"] != "completed" or over["counts"]["failed"]:
        raise StartError(f"The job ended as {over['status']} with {over['counts']['failed']} failed items.")


async def _chat_beside(client: VelocityClient, pieces: list[str]) -> ChatTiming:
    """A second chat, begun once the job is under way; its text goes to `pieces`."""
    await asyncio.sleep(_BESIDE_AFTER)
    timing = ChatTiming()
    async for piece in client.chat(_chat_body("Explain useState in two sentences.", 60), timing):
        pieces.append(piece)  # noqa: PERF401 - it is read while it grows
    return timing


def _tail(pieces: list[str]) -> str:
    """The end of the streamed text, as long as a line."""
    text = " ".join("".join(pieces).split())
    return f"  second chat: …{text[-(out.width - 20) :]}" if text else "  second chat: (about to ask)"


async def _chat(client: VelocityClient, prompt: str, max_tokens: int) -> ChatTiming:
    timing = ChatTiming()
    out.print(f"  > {prompt}\n  ", end="")
    async for piece in client.chat(_chat_body(prompt, max_tokens), timing):
        out.print(Text(piece, style="cyan"), end="")
    out.print(f"\n  [bold]{timing.summary}[/]")
    return timing


def _chat_body(prompt: str, max_tokens: int) -> dict[str, Any]:
    return {"model": _MODEL, "max_tokens": max_tokens, "messages": [{"role": "user", "content": prompt}]}


def _job() -> dict[str, Any]:
    items = [
        {"id": name, "messages": [{"role": "user", "content": f"Write a small React component {name}."}]}
        for name in _COMPONENTS
    ]
    return {"name": "demo components", "model": _MODEL, "defaults": {"max_tokens": 96}, "items": items}


async def _show_results(client: VelocityClient, job: dict[str, Any]) -> None:
    shown = 0
    async for line in client.results(job["id"]):
        if line["response"] and shown < 3:
            text = line["response"]["choices"][0]["message"]["content"]
            out.print(
                f"  {line['index']:2} [bold]{line['id']}[/]: {escape(' '.join(text.split())[:90])}…", soft_wrap=True
            )
            shown += 1
    out.print(f"  … and {job['counts']['completed'] - shown} more")


def _summary(job: dict[str, Any], idle: ChatTiming, beside: ChatTiming) -> str:
    counts, usage = job["counts"], job["usage"]
    seconds = max(1, job["completed_at"] - job["in_progress_at"]) if job["completed_at"] else 1
    return (
        f"bulk:  {counts['completed']} of {counts['total']} items completed, {counts['failed']} failed, "
        f"{usage['output_tokens']} tokens in {seconds} s ({usage['output_tokens'] / seconds:.0f} tokens/s)\n"
        f"chat on the idle engine:  {idle.summary}\nchat beside the job:      {beside.summary}"
    )


def _stage(number: int, what: str) -> None:
    out.print(f"\n[bold]{number}. {what}[/]", soft_wrap=True)
