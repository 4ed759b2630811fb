"""/v1/files: what batches are made from, and what they give; as OpenAI has it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import StreamingResponse

from api.errors import ApiError
from api.gateway import Gateway
from api.intake_batch import Expiry, check_file
from api.intake_lines import Lines, checked
from api.keys import Key
from api.routes.caller import caller, page
from api.submission import require_capacity
from api.upload import receive_form
from workers.files import File, Files, Purpose, new_id

router = APIRouter(prefix="/v1/files")

FileId = Annotated[str, Path(pattern=r"^file-[0-9a-f]{32}$")]
_MOST_LISTED = 10_000


@router.post("")
async def upload_file(request: Request) -> dict[str, Any]:
    """Take a file of requests for a batch: one JSON object a line. It is checked and on the disk when this answers."""
    gateway, key, files = _context(request)
    settings, kind = gateway.settings, request.headers.get("content-type", "")
    await require_capacity(gateway, request, settings.max_file_bytes)
    async with receive_form(request.receive, files, settings, kind) as upload:
        if upload.fields.get("purpose") != "batch":
            raise ApiError(400, "'purpose' must be 'batch': other files are not used here.", param="purpose")
        expires_after = _expiry(upload.fields)
        await gateway.intake.run(upload.size, check_file, Lines(upload.content, upload.lines, settings.max_body_bytes))
        now = time.time()
        file = File(
            id=new_id(now), tenant=key.tenant, filename=upload.filename or "", purpose="batch", bytes=upload.size,
            lines=upload.lines, created=int(now), digest=upload.digest,
            expires_at=None if expires_after is None else int(now) + expires_after.seconds,
        )  # fmt: skip
        await asyncio.to_thread(files.publish, upload.directory, file)
    return file_view(file)


@router.get("")
async def list_files(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=_MOST_LISTED)] = _MOST_LISTED,
    after: str | None = None,
    order: Literal["asc", "desc"] = "desc",
    purpose: Purpose | None = None,
) -> dict[str, Any]:
    """The caller's files, newest first; `after` is the id of the last file of the page before."""
    _, key, files = _context(request)
    found, more = await asyncio.to_thread(
        files.page, key.tenant, limit, after=after, oldest_first=order == "asc", purpose=purpose
    )
    return page([file_view(file) for file in found], more=more)


@router.get("/{file_id}")
async def show_file(request: Request, file_id: FileId) -> dict[str, Any]:
    """One file."""
    _, key, files = _context(request)
    return file_view(await asyncio.to_thread(files.get, key.tenant, file_id))


@router.get("/{file_id}/content")
async def file_content(request: Request, file_id: FileId) -> StreamingResponse:
    """A file's bytes."""
    _, key, files = _context(request)
    file = await asyncio.to_thread(files.get, key.tenant, file_id)
    source = files.content(file)
    first = await asyncio.to_thread(next, source, b"")  # what can't be read is told before the answer begins
    headers = {"content-length": str(file.bytes)}
    return StreamingResponse(_blocks(first, source), media_type="application/jsonl", headers=headers)


@router.delete("/{file_id}")
async def delete_file(request: Request, file_id: FileId) -> dict[str, Any]:
    """Make a file go away. Batches that were made from it have their own copy."""
    _, key, files = _context(request)
    await asyncio.to_thread(files.delete, key.tenant, file_id)
    return {"id": file_id, "object": "file", "deleted": True}


def file_view(file: File) -> dict[str, Any]:
    """A file as clients see it. Times are unix seconds or null."""
    return {
        "id": file.id, "object": "file", "bytes": file.bytes, "created_at": file.created,
        "expires_at": file.expires_at, "filename": file.filename, "purpose": file.purpose, "status": "processed",
        "status_details": None,
    }  # fmt: skip


async def _blocks(first: bytes, source: Iterator[bytes]) -> AsyncIterator[bytes]:
    block = first
    while block:
        yield block
        block = await asyncio.to_thread(next, source, b"")


def _expiry(fields: dict[str, str]) -> Expiry | None:
    """The form's expires_after[anchor] and expires_after[seconds]. Raises InputError."""
    given = {
        name: fields[f"expires_after[{name}]"] for name in Expiry.model_fields if f"expires_after[{name}]" in fields
    }
    return checked(Expiry, given, "expires_after", "expires_after") if given else None


def _context(request: Request) -> tuple[Gateway, Key, Files]:
    gateway, key = caller(request)
    return gateway, key, Files(gateway.settings.data_dir)
