"""Files that clients upload for batches, and the output files of batches: on the disk, and nowhere else.

    DATA/files/<tenant>/<file id>/
      file.json   what is known of it
      content     its bytes; a batch's output has none: its lines are made from the job's results when they are read
    DATA/uploads/<random>/   what is being uploaded; becomes a file by a rename, or is removed
    DATA/trash/<random>/     what is being deleted

Whatever is acknowledged was fsynced before, and its directory too. Raises StorageError, NoSuchFile.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from workers import durable
from workers.batch_lines import batch_line
from workers.errors import NoSuchFile, StorageError
from workers.job import JobSpec, is_id
from workers.store import TRASH, JobFiles

Part = Literal["output", "error"]
Purpose = Literal["batch", "batch_output"]

_ID = re.compile(r"file-[0-9a-f]{32}")
_BLOCK = 256 * 1024
_STALE_SECONDS = 2 * 3600
"""An upload that has got nothing for this long is nobody's any more: its process was killed."""


class File(BaseModel):
    """What is known of a file: written once to file.json."""

    model_config = ConfigDict(frozen=True)

    id: str
    tenant: str
    filename: str
    purpose: Purpose
    bytes: int
    lines: int
    created: int
    """Unix seconds."""
    expires_at: int | None = None
    """Unix seconds from which it is not there any more."""
    digest: str | None = None
    """SHA-256 of an uploaded file's content, hexadecimal."""
    job: str | None = None
    """The batch whose output it is."""
    part: Part | None = None
    """Which of the batch's two outputs."""


def new_id(now: float | None = None) -> str:
    """A random id that sorts by the time of its making (ms) and that nobody can guess."""
    return f"file-{round((time.time() if now is None else now) * 1000):012x}{secrets.token_hex(10)}"


def output_id(job: str, created: float, part: Part) -> str:
    """The id of a batch's output file: always the same, so that finalizing twice makes one file.

    `created` is the batch's own time, in unix seconds.
    """
    seconds = round(created * 1000) // 1000  # as the ledger has it
    return f"file-{seconds * 1000:012x}{hashlib.sha256(f'{job}/{part}'.encode()).hexdigest()[:20]}"


class Files:
    """The files of all tenants below a data directory."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def begin(self) -> Path:
        """A new directory for an upload. Its `content` is there for `publish`, or it is to be removed."""
        path = self._root / "uploads" / secrets.token_hex(16)
        with durable.storage("The upload can't be stored"):
            path.mkdir(parents=True, mode=0o750)
        return path

    def publish(self, upload: Path, file: File) -> None:
        """Make an upload durable and appear as a file, whole."""
        with durable.storage("The file can't be stored"):
            content = os.open(upload / "content", os.O_RDONLY)
            try:
                os.fsync(content)
            finally:
                os.close(content)
            self._appear(upload, file)

    def add_output(self, spec: JobSpec, part: Part, size: int, lines: int) -> str | None:
        """Make a batch's output file appear; its id, or None if it would be empty. The second time changes nothing.

        `size` is the sum of the lengths of its lines as `batch_line` makes them.
        """
        if not lines:
            return None
        file_id, now = output_id(spec.id, spec.created, part), int(time.time())
        if self._path(spec.tenant, file_id).exists():
            return file_id
        expires = None if spec.output_expires_after is None else now + spec.output_expires_after
        file = File(
            id=file_id, tenant=spec.tenant, filename=f"{spec.id}_{part}.jsonl", purpose="batch_output", bytes=size,
            lines=lines, created=now, expires_at=expires, job=spec.id, part=part,
        )  # fmt: skip
        draft = self.begin()
        try:
            with durable.storage("The output file can't be stored"):
                self._appear(draft, file)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return file_id

    def get(self, tenant: str, file_id: str) -> File:
        """A tenant's file. Raises NoSuchFile, also for another tenant's and for one that has expired."""
        file = self._read(tenant, file_id)
        if file is None or (file.expires_at is not None and file.expires_at <= time.time()):
            raise NoSuchFile(f"There is no file {file_id!r}.")
        return file

    def page(
        self, tenant: str, limit: int, *, after: str | None = None, oldest_first: bool = False,
        purpose: str | None = None,
    ) -> tuple[list[File], bool]:  # fmt: skip
        """Files by the time of their making, from the one after `after` on, and whether there are more."""
        names = sorted(self._names(tenant), reverse=not oldest_first)
        if after is not None:
            self._path(tenant, after)
            names = [name for name in names if (name > after if oldest_first else name < after)]
        found: list[File] = []
        now = time.time()
        for name in names:
            file = self._read(tenant, name)  # None if it was deleted just now
            if file is None or (file.expires_at or now + 1) <= now or purpose not in {None, file.purpose}:
                continue
            if len(found) == limit:
                return found, True
            found.append(file)
        return found, False

    def content(self, file: File) -> Iterator[bytes]:
        """Its bytes in blocks; reads files, so each step belongs into a thread."""
        if file.job is not None:
            yield from self._lines(file, file.job)
            return
        with durable.storage("The file can't be read"):
            try:
                content = self.source(file).open("rb")
            except FileNotFoundError:
                raise NoSuchFile(f"There is no file {file.id!r}.") from None
            with content:
                while block := content.read(_BLOCK):
                    yield block

    def source(self, file: File) -> Path:
        """Where an uploaded file's bytes are."""
        return self._path(file.tenant, file.id) / "content"

    def delete(self, tenant: str, file_id: str) -> None:
        """Make a file go away; those who read it go on. Raises NoSuchFile."""
        path = self._path(tenant, file_id)
        with durable.storage("The file can't be deleted"):
            if not durable.discard(path, self._root / TRASH):
                raise NoSuchFile(f"There is no file {file_id!r}.")

    def delete_outputs(self, spec: JobSpec) -> None:
        """A batch's results are gone, and so are its output files."""
        for part in ("output", "error"):
            with suppress(NoSuchFile):
                self.delete(spec.tenant, output_id(spec.id, spec.created, part))

    def expired(self, now: float) -> Iterator[tuple[str, str]]:
        """Tenant and id of every file whose time is over, for `delete`. Reads all of them."""
        folder = self._root / "files"
        for tenant in sorted(os.listdir(folder)) if folder.exists() else ():  # noqa: PTH208 - names are all that is needed
            for name in self._names(tenant) if is_id(tenant) else ():
                file = self._read(tenant, name)
                if file is not None and file.expires_at is not None and file.expires_at <= now:
                    yield tenant, name

    def tidy(self) -> None:
        """Delete what has expired, and what killed processes have left: to be done from time to time."""
        now = time.time()
        for tenant, file_id in self.expired(now):
            with suppress(NoSuchFile):  # its owner was faster
                self.delete(tenant, file_id)
        self.clear_uploads(now)

    def clear_uploads(self, now: float) -> int:
        """Remove what killed processes have left of uploads; how many there were."""
        removed = 0
        folder = self._root / "uploads"
        for path in folder.iterdir() if folder.exists() else ():
            content = path / "content"
            try:
                touched = (content if content.exists() else path).stat().st_mtime
            except FileNotFoundError:  # it has become a file
                continue
            if touched + _STALE_SECONDS <= now:
                shutil.rmtree(path, ignore_errors=True)
                removed += 1
        return removed

    def _appear(self, draft: Path, file: File) -> None:
        """Rename a directory to where the file belongs; a file that is there already stays. Raises OSError."""
        target = self._path(file.tenant, file.id)
        durable.make_directory(target.parent)
        durable.replace(draft / "file.json", file.model_dump_json().encode())
        try:
            draft.rename(target)
        except OSError:
            if not target.exists():
                raise
        durable.sync_directory(target.parent)

    def _lines(self, file: File, job: str) -> Iterator[bytes]:
        """The lines of a batch's output, several at a time."""
        block = bytearray()
        for record in JobFiles(self._root, file.tenant, job).results(-1):
            if record.ok is (file.part == "output"):
                block += batch_line(record, job)
                if len(block) >= _BLOCK:
                    yield bytes(block)
                    block.clear()
        if block:
            yield bytes(block)

    def _names(self, tenant: str) -> list[str]:
        with durable.storage("The files can't be read"):
            try:
                return [name for name in os.listdir(self._folder(tenant)) if _ID.fullmatch(name)]  # noqa: PTH208 - names are all that is needed
            except FileNotFoundError:
                return []

    def _read(self, tenant: str, file_id: str) -> File | None:
        with durable.storage("The file can't be read"):
            try:
                return File.model_validate_json((self._path(tenant, file_id) / "file.json").read_bytes())
            except FileNotFoundError:
                return None
            except ValidationError as error:
                raise StorageError(f"file.json of {file_id} is damaged.") from error

    def _folder(self, tenant: str) -> Path:
        if not is_id(tenant):
            raise NoSuchFile(f"There is no tenant {tenant!r}.")
        return self._root / "files" / tenant

    def _path(self, tenant: str, file_id: str) -> Path:
        if not _ID.fullmatch(file_id):
            raise NoSuchFile(f"There is no file {file_id!r}.")
        return self._folder(tenant) / file_id
