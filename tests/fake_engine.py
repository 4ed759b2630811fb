"""A fake engine that speaks vLLM's HTTP for real: its own process-local server on a free port, scripted by the prompt.

The last message's content says what happens: "hang", "die", "stall", "status 400", "tokens 5", … Anything else streams
three tokens. tests/engine/test_conformance.py runs the same checks against it and against the real vLLM.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import httptools
import orjson

MODEL = "tiny"
ALIAS = "velocity-30b"
CONTEXT = 8192


@dataclass
class FakeEngine:
    """What the fake saw, and how it is to behave."""

    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of generation requests, in order of arrival."""
    aborted: list[dict[str, Any]] = field(default_factory=list)
    """Those whose client closed the connection before the answer was complete."""
    running: int = 0
    most_running: int = 0
    token_seconds: float = 0.0
    """Time per token."""
    healthy: bool = True
    scheduler: dict[str, Any] | None = None
    """What velocity's door in the engine says; None: an engine without that door."""


E = TypeVar("E", bound=FakeEngine)


class Connection(asyncio.Protocol):
    """One connection; what behaves differently is a subclass, see `serving`."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.parser = httptools.HttpRequestParser(self)
        self.url, self.body = b"", b""
        self.task: asyncio.Task[None] | None = None
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.task:
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self.url, self.body = url, b""

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        path = self.url.decode()
        if path == "/health":
            self.answer(200 if self.engine.healthy else 503, b"")
        elif path == "/v1/models":
            cards = [{"id": name, "object": "model", "root": "/m", "max_model_len": CONTEXT} for name in (MODEL, ALIAS)]
            self.answer(200, orjson.dumps({"object": "list", "data": cards}))
        elif path == "/velocity/scheduler":
            found = self.engine.scheduler
            self.answer(404 if found is None else 200, orjson.dumps(found or {"detail": "Not Found"}))
        else:
            self.task = asyncio.get_running_loop().create_task(self.generate(orjson.loads(self.body)))

    def answer(self, status: int, body: bytes) -> None:
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self.transport.write(head.encode() + body)

    async def generate(self, request: dict[str, Any]) -> None:
        engine = self.engine
        engine.requests.append(request)
        engine.running += 1
        engine.most_running = max(engine.most_running, engine.running)
        try:
            await self._generate(request)
        except asyncio.CancelledError:
            engine.aborted.append(request)
        finally:
            engine.running -= 1

    async def _generate(self, request: dict[str, Any]) -> None:
        said = request["messages"][-1]["content"] if "messages" in request else request.get("input", "")
        script = str(said).split()
        word = script[0] if script else ""
        if not self.engine.healthy:
            self.answer(503, b"{}")
            return
        if word == "hang":
            await asyncio.sleep(3600)
        if word == "die":
            self.transport.abort()
            return
        if word == "html":  # what a proxy before the engine may say
            self.answer(int(script[1]), b"<html>no</html>")
            return
        if word == "status":
            error = {"message": "scripted refusal", "type": "BadRequestError", "param": None, "code": int(script[1])}
            self.answer(int(script[1]), orjson.dumps({"error": error}))
            return
        count = int(script[1]) if word in {"tokens", "stall", "break", "trouble"} else 3
        tokens = [f"t{number} " for number in range(count)]
        usage = {"prompt_tokens": 7, "completion_tokens": count, "total_tokens": 7 + count}
        if self.url == b"/v1/responses":
            await self._responses(tokens)
            return
        if request.get("stream"):
            await self._stream(request, tokens, usage, word)
            return
        await asyncio.sleep(self.engine.token_seconds * count)
        choice = {"index": 0, "message": {"role": "assistant", "content": "".join(tokens)}, "finish_reason": "stop"}
        answer = {
            "id": "x",
            "object": "chat.completion",
            "created": 1,
            "model": MODEL,
            "choices": [choice],
            "usage": usage,
        }
        self.answer(200, orjson.dumps(answer))

    async def _stream(self, request: dict[str, Any], tokens: list[str], usage: dict[str, int], word: str) -> None:
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        for token in tokens:
            await asyncio.sleep(self.engine.token_seconds)
            self.event({"choices": [{"index": 0, "delta": {"content": token}, "finish_reason": None}]})
        if word == "stall":
            await asyncio.sleep(3600)
        if word == "trouble":  # as vLLM does: an error event, and then an end like any other
            self.chunk(
                b'data: {"error":{"message":"it broke","type":"InternalServerError","param":null,"code":500}}\n\n'
            )
            self.chunk(b"data: [DONE]\n\n")
            self.transport.write(b"0\r\n\r\n")
            return
        if word == "break":
            self.transport.abort()
            return
        self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        if (request.get("stream_options") or {}).get("include_usage"):
            self.event({"choices": [], "usage": usage})
        self.chunk(b"data: [DONE]\n\n")
        self.transport.write(b"0\r\n\r\n")

    async def _responses(self, tokens: list[str]) -> None:
        """As vLLM does, opens the stream before it has read the prompt."""
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        self.chunk(b'event: response.created\ndata: {"type":"response.created"}\n\n')
        self.chunk(b'event: response.in_progress\ndata: {"type":"response.in_progress"}\n\n')
        for token in tokens:
            await asyncio.sleep(self.engine.token_seconds)
            delta = orjson.dumps({"type": "response.output_text.delta", "delta": token})
            self.chunk(b"event: response.output_text.delta\ndata: " + delta + b"\n\n")
        self.chunk(b'event: response.completed\ndata: {"response":{"usage":{"input_tokens":1,"output_tokens":3}}}\n\n')
        self.transport.write(b"0\r\n\r\n")

    def event(self, content: dict[str, Any]) -> None:
        head = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
        self.chunk(b"data: " + orjson.dumps({**head, **content}) + b"\n\n")

    def chunk(self, data: bytes) -> None:
        self.transport.write(b"%x\r\n%s\r\n" % (len(data), data))


@asynccontextmanager
async def serving(engine: E, connection: type[Connection] = Connection, port: int = 0) -> AsyncIterator[E]:
    """The engine behind connections of that class, on a free port unless one is named."""
    server = await asyncio.get_running_loop().create_server(lambda: connection(engine), "127.0.0.1", port)
    engine.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield engine
    finally:
        server.close()


@asynccontextmanager
async def fake_engine() -> AsyncIterator[FakeEngine]:
    """A running fake engine."""
    async with serving(FakeEngine()) as engine:
        yield engine
