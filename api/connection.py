"""A client's connection: uvicorn's, but for one system call less per answer."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class _Transport(asyncio.Transport):
    """The client's: it sends the head of an answer together with the first bytes of its body, in one packet."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._transport = transport
        self._loop = loop
        self._head: bytes | None = None
        self.get_extra_info = transport.get_extra_info  # type: ignore[method-assign] # here and below: no detour
        self.is_closing = transport.is_closing  # type: ignore[method-assign]
        self.pause_reading = transport.pause_reading  # type: ignore[method-assign]
        self.resume_reading = transport.resume_reading  # type: ignore[method-assign]

    def next_answer(self) -> None:
        """What is written next is a head."""
        self.write = self._write_first  # type: ignore[method-assign]

    def _write_first(self, data: Any) -> None:
        if self._head is None:
            self._head = data
            self._loop.call_soon(self._flush)
        else:
            head, self._head = self._head, None
            self.write = self._transport.write  # type: ignore[method-assign]
            self._transport.write(head + data)

    def close(self) -> None:
        """After what was written has left."""
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        """At once."""
        self._transport.abort()

    def _flush(self) -> None:
        if self._head is not None:
            head, self._head = self._head, None
            self.write = self._transport.write  # type: ignore[method-assign]
            self._transport.write(head)


class Connection(HttpToolsProtocol):
    """A client's connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        """uvicorn gets our transport."""
        ours = _Transport(transport, self.loop)
        ours.next_answer()
        super().connection_made(ours)

    def on_response_complete(self) -> None:
        """The next head is to be held again."""
        assert isinstance(self.transport, _Transport)  # noqa: S101 - we gave it
        self.transport.next_answer()
        super().on_response_complete()
