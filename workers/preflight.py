"""What Redis and the data directory must be before a process works on them, checked as soon as Redis answers.

The data directory has an identity, DATA/velocity.json, and Redis remembers whose index it is: a volume that is not
mounted, or another one, is noticed before anything is written to it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import orjson
from redis.asyncio import Redis

from engine import log
from workers import durable, redis_keys
from workers.errors import LedgerUnavailable, PreflightError, StorageError
from workers.job import is_id, new_id
from workers.redis import translated
from workers.settings import SUPPORTED_REDIS

IDENTITY = "velocity.json"
_OLDEST = (6, 2)
_UNTIL_CHECKED = 1.0
_AGAIN = 5.0

logger = log.get(__name__)


class Preflight:
    """The checks of one process. An owner (the api) gives a new data directory its identity, and Redis the id."""

    def __init__(self, redis: Redis, data_dir: Path, *, owner: bool) -> None:
        self._redis = redis
        self._data_dir = data_dir
        self._owner = owner
        self._id: str | None = None
        self.passed = False
        """Whether everything was found right once."""

    async def check(self) -> None:
        """Raises PreflightError if a person has to act; LedgerUnavailable or StorageError if it can't be told now."""
        if not self.passed:
            with translated():
                info = await self._redis.info()
            require_supported(info)
            if not int(info.get("aof_enabled", 1)):
                logger.warning("redis_without_aof", advice="Set appendonly yes: now its restart costs a rebuild.")
        await self.require_same_data()
        self.passed = True

    async def run(self) -> None:
        """Check until it has passed, and then every few seconds, until cancelled. Raises PreflightError.

        A Redis that was emptied learns the id again; a volume that has gone is noticed.
        """
        while True:
            try:
                await self.check()
            except LedgerUnavailable:
                pass  # whoever needs Redis says so
            except StorageError as error:
                logger.warning("preflight_failed", reason=str(error))
            await asyncio.sleep(_AGAIN if self.passed else _UNTIL_CHECKED)

    async def require_same_data(self) -> None:
        """Raises PreflightError if the directory and Redis don't belong together; LedgerUnavailable, StorageError."""
        theirs = await self._entered()  # first: whoever entered it had written the file before
        mine = await asyncio.to_thread(read_identity, self._data_dir)
        if self._id is not None and mine != self._id:
            raise _other_directory(self._data_dir, mine, self._id)
        if self._owner and theirs is None:
            if mine is None:
                mine = await asyncio.to_thread(create_identity, self._data_dir)
            with translated():
                await self._redis.set(redis_keys.DATA, mine, nx=True)
            theirs = await self._entered()
        if theirs is not None and mine != theirs:
            raise _other_directory(self._data_dir, mine, theirs)
        self._id = mine

    async def _entered(self) -> str | None:
        with translated():
            raw = cast("bytes | None", await self._redis.get(redis_keys.DATA))
        return raw.decode() if raw else None


def require_supported(info: Mapping[str, Any]) -> None:
    """Raises PreflightError if what Redis says of itself (INFO) is not what velocity can rely on."""
    version = tuple(int(number) for number in re.findall(r"\d+", str(info.get("redis_version", "")))[:2])
    mode, policy = info.get("redis_mode", "standalone"), info.get("maxmemory_policy", "noeviction")
    if mode == "sentinel":
        fault = "is a Sentinel. Name the primary that it watches; after a failover, name the new one"
    elif mode == "cluster" or int(info.get("cluster_enabled", 0)):
        fault = "runs in Cluster mode. Start one with cluster-enabled no"
    elif info.get("role", "master") != "master":
        fault = f"is a replica of {info.get('master_host')}:{info.get('master_port')}. Name that one"
    elif version < _OLDEST:
        fault = f"is of version {info.get('redis_version')}. Use a newer one"
    elif int(info.get("maxmemory", 0)) and policy != "noeviction":
        fault = f"throws data away when its memory is full (maxmemory-policy {policy}). Set it to noeviction"
    else:
        return
    raise PreflightError(f"The Redis at VELOCITY_REDIS_URL {fault}. {SUPPORTED_REDIS}")


def read_identity(data_dir: Path) -> str | None:
    """The data directory's id; None if it has none yet, or is not there. Raises PreflightError, StorageError."""
    path = data_dir / IDENTITY
    try:
        found = orjson.loads(path.read_bytes())["id"]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(data_dir, error) from None
    except (ValueError, KeyError, TypeError):
        found = None
    if not (isinstance(found, str) and is_id(found)):
        raise PreflightError(f'{path} is damaged: it must hold {{"id": "data_…"}}. Take it from a backup.')
    return found


def create_identity(data_dir: Path) -> str:
    """Give the data directory an id, durably, unless it has one; processes that race agree. Raises StorageError."""
    path = data_dir / IDENTITY
    try:
        durable.create_once(path, orjson.dumps({"id": new_id("data")}) + b"\n")
    except OSError as error:
        raise _unusable(data_dir, error) from None
    found = read_identity(data_dir)
    if found is None:
        raise StorageError(f"{path} was taken away while it was made.")
    return found


def _other_directory(data_dir: Path, mine: str | None, theirs: str) -> PreflightError:
    has = f"has the id {mine}" if mine else f"has no {IDENTITY}"
    return PreflightError(
        f"The data directory {data_dir} is not the one that this Redis belongs to: it {has}, and {theirs} is expected. "
        "Mount the right volume there, or correct VELOCITY_DATA_DIR or VELOCITY_REDIS_URL. If velocity has really "
        "moved to this directory, end all its processes, delete the key "
        f"(redis-cli DEL {redis_keys.DATA}) and start the api."
    )


def _unusable(data_dir: Path, error: OSError) -> StorageError:
    return StorageError(f"The data directory {data_dir} can't be used: {error.strerror or error}.")
