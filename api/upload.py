"""Bodies that may be large: streamed to the disk as they come, with their size, lines and digest found on the way."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from api.asgi import Receive
from api.errors import CLOSE, ApiError
from api.settings import ApiSettings
from workers import durable
from workers.files import Files

_BLOCK = 256 * 1024
"""What is written at a time, in a thread."""
_MOST_PARTS = 32
_MOST_FIELD_BYTES = 1024


@dataclass(slots=True)
class Upload:
    """What came. It is gone with its `directory` once its request is over, unless it was made a file."""

    directory: Path
    filename: str | None = None
    fields: dict[str, str] = field(default_factory=dict)
    """The form's other fields."""
    size: int = 0
    lines: int = 0
    """Number of the last line that is not blank."""
    digest: str = ""
    """SHA-256, hexadecimal."""

    @property
    def content(self) -> Path:
        """The bytes as they came."""
        return self.directory / "content"


@asynccontextmanager
async def receive_body(
    receive: Receive, files: Files, settings: ApiSettings, most: int, kind: bytes
) -> AsyncIterator[Upload]:
    """A whole body of at most `most` bytes; the digest is of its `kind` (the content type) too.

    Raises ApiError 413, 408, 400; StorageError.
    """
    async with _upload(files) as upload:
        sink = _Sink(upload, most, kind + b"\n")
        try:
            await _pour(receive, settings, sink.write)
        finally:
            await asyncio.to_thread(sink.close)
        yield upload


@asynccontextmanager
async def receive_form(
    receive: Receive, files: Files, settings: ApiSettings, content_type: str
) -> AsyncIterator[Upload]:
    """A multipart form with one `file` of at most `max_file_bytes`. Raises ApiError 413, 408, 400; StorageError."""
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise ApiError(400, "Send the file as multipart/form-data, with the fields 'file' and 'purpose'.", param="file")
    async with _upload(files) as upload:
        sink = _Sink(upload, settings.max_file_bytes, b"")
        try:
            form = _Form(options[b"boundary"], sink, upload)
            await _pour(receive, settings, form.feed)
        except FormParserError as error:
            raise ApiError(400, f"The multipart form can't be read: {error}.") from None
        finally:
            await asyncio.to_thread(sink.close)
        form.require_end()
        yield upload


@asynccontextmanager
async def _upload(files: Files) -> AsyncIterator[Upload]:
    directory = await asyncio.to_thread(files.begin)
    try:
        yield Upload(directory)
    finally:
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)


async def _pour(receive: Receive, settings: ApiSettings, feed: Callable[[bytes], None]) -> None:
    """The body in blocks, each fed in a thread; no more of it than a block is in memory."""
    clock = asyncio.get_running_loop().time
    end = clock() + settings.upload_timeout
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        patience = min(settings.body_timeout, end - clock())
        try:
            async with asyncio.timeout(patience):
                message = await receive()
        except TimeoutError:
            raise ApiError(
                408, f"The upload stalled for {settings.body_timeout:g} s, or took more than "
                f"{settings.upload_timeout:g} s.", code="request_timeout", headers=(CLOSE,),
            ) from None  # fmt: skip
        if message["type"] == "http.disconnect":
            raise ApiError(400, "The request body ended early.")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = message.get("more_body", False)
        if size >= _BLOCK or not more:
            await asyncio.to_thread(feed, b"".join(parts))
            parts, size = [], 0


class _Sink:
    """Writes an upload's content. Not for two threads at once."""

    def __init__(self, upload: Upload, most: int, prefix: bytes) -> None:
        self._upload = upload
        self._most = most
        self._digest = hashlib.sha256(prefix)
        self._newlines = 0
        with durable.storage("The upload can't be stored"):
            self._file = upload.content.open("wb")

    def write(self, data: bytes) -> None:
        """Raises ApiError 413, StorageError."""
        upload = self._upload
        upload.size += len(data)
        if upload.size > self._most:
            raise ApiError(
                413, f"The upload is larger than {self._most:,} bytes. Split it.", code="request_too_large"
            )  # fmt: skip
        self._digest.update(data)
        filled = data.rstrip()
        if filled:
            upload.lines = self._newlines + filled.count(b"\n") + 1
        self._newlines += data.count(b"\n")
        with durable.storage("The upload can't be stored"):
            self._file.write(data)

    def close(self) -> None:
        self._upload.digest = self._digest.hexdigest()
        with durable.storage("The upload can't be stored"):
            self._file.close()


class _Form:
    """Reads a multipart form as it comes: the part `file` goes into the sink, small fields into the upload."""

    def __init__(self, boundary: bytes, sink: _Sink, upload: Upload) -> None:
        self._sink = sink
        self._upload = upload
        self._parts = 0
        self._name = ""
        self._header = b""
        self._value = b""
        self._disposition = b""
        self._field: bytearray | None = None
        """The field that is being read; None while it is the file."""
        self._ended = False
        self._parser = MultipartParser(boundary, {
            "on_part_begin": self._begin_part,
            "on_header_field": self._add_header,
            "on_header_value": self._add_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._begin_data,
            "on_part_data": self._add_data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        })  # fmt: skip

    def feed(self, data: bytes) -> None:
        """Raises ApiError, StorageError, FormParserError."""
        self._parser.write(data)

    def require_end(self) -> None:
        """Raises ApiError 400 unless all of the form came, and a file in it."""
        if not self._ended:
            raise ApiError(400, "The multipart form ended early.")
        if self._upload.filename is None:
            raise ApiError(400, "The form has no 'file'.", param="file")

    def _begin_part(self) -> None:
        self._parts += 1
        self._header = self._value = self._disposition = b""
        if self._parts > _MOST_PARTS:
            raise ApiError(400, f"The form has more than {_MOST_PARTS} parts.")

    def _add_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _begin_data(self) -> None:
        _, options = parse_options_header(self._disposition.decode("latin-1"))
        self._name = options.get(b"name", b"").decode(errors="replace")
        if self._name == "file":
            if self._upload.filename is not None:
                raise ApiError(400, "Send one 'file' at a time.", param="file")
            if b"filename" not in options:
                raise ApiError(400, "'file' must be a file, with a file name.", param="file")
            self._upload.filename = options[b"filename"].decode(errors="replace")[:255]
            self._field = None
        else:
            self._field = bytearray()

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._field is None:
            self._sink.write(data[start:end])
            return
        self._field += data[start:end]
        if len(self._field) > _MOST_FIELD_BYTES:
            raise ApiError(400, f"A form field has more than {_MOST_FIELD_BYTES} bytes.", param=self._name[:64])

    def _end_part(self) -> None:
        if self._field is not None:
            self._upload.fields[self._name[:64]] = self._field.decode(errors="replace")

    def _end(self) -> None:
        self._ended = True
