"""Files that are on the disk when these functions return: written, fsynced, renamed, their directory fsynced."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from workers.errors import StorageError


@contextmanager
def new_file(path: Path, mode: int = 0o640) -> Iterator[int]:
    """A new (or emptied) file's descriptor; what was written is fsynced on the way out. Raises OSError."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        yield file
        os.fsync(file)
    finally:
        os.close(file)


def write_all(file: int, data: bytes) -> None:
    """Write all of `data`, also where the system takes only a part at a time. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def replace(path: Path, data: bytes, mode: int = 0o640) -> None:
    """The file `path` with this content: after a crash either whole or as it was. Raises OSError."""
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}.draft")  # others may replace it at the same time
    try:
        with new_file(draft, mode) as file:
            write_all(file, data)
        draft.rename(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def create_once(path: Path, data: bytes, mode: int = 0o640) -> None:
    """The file `path` with this content, unless it is there: processes that race agree. Raises OSError."""
    make_directory(path.parent)
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}.draft")
    try:
        with new_file(draft, mode) as file:
            write_all(file, data)
        with suppress(FileExistsError):
            path.hardlink_to(draft)  # unlike a rename it never replaces another's
    finally:
        draft.unlink(missing_ok=True)
    sync_directory(path.parent)


def discard(path: Path, trash: Path) -> bool:
    """Delete a directory by way of `trash`: gone at once for everybody, then from the disk.

    False if it was not there. Raises OSError.
    """
    make_directory(trash)
    rest = trash / f"{path.name}.{secrets.token_hex(4)}"
    try:
        path.rename(rest)
    except FileNotFoundError:
        return False
    sync_directory(path.parent)
    shutil.rmtree(rest, ignore_errors=True)
    return True


def make_directory(path: Path, mode: int = 0o750) -> None:
    """A directory and its parents, durable. Raises OSError."""
    missing = [parent for parent in (path, *path.parents) if not parent.exists()]
    path.mkdir(parents=True, exist_ok=True, mode=mode)
    for made in missing:
        sync_directory(made.parent)


def sync_directory(path: Path) -> None:
    """Make renames and new names in a directory durable. Raises OSError."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextmanager
def storage(what: str) -> Iterator[None]:
    """The operating system's errors leave here as StorageError, which says what could not be done."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{what}: {error.strerror or error}.") from error
