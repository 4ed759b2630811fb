"""API keys: made, stored as hashes in the data directory and in Redis, and checked at every request.

A key reads vk_<id>_<secret>_<checksum>: the prefix makes leaks recognisable, the checksum makes typos cheap to reject.
The data directory is the truth; a key that Redis has lost is entered again when it is next used.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
import time
import zlib
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict
from redis.asyncio import Redis

from api.errors import ApiError
from engine.errors import SettingsError
from workers import durable, redis_keys
from workers.errors import StorageError
from workers.job import new_id
from workers.redis import translated

CACHE_SECONDS = 5.0
_CACHE_MOST = 10_000
_ID = re.compile(r"[0-9a-f]{12}")
_UNAUTHORIZED = (b"www-authenticate", b"Bearer")


class Key(BaseModel):
    """What is known of an API key. Not its secret: only its hash is kept."""

    model_config = ConfigDict(frozen=True)

    id: str
    name: str
    tenant: str
    """Owner of jobs and files; several keys may share it."""
    hash: str
    """SHA-256 of the whole key, hexadecimal. The secret has 256 random bits, so a slow hash would add nothing."""
    created: int
    rpm: int | None = None
    """Requests per minute; None is unlimited."""
    enabled: bool = True

    @classmethod
    def issue(cls, name: str, rpm: int | None) -> tuple[Self, str]:
        """A new key for a new tenant, and the text that is shown once."""
        key_id = secrets.token_hex(6)
        text = _with_checksum(f"vk_{key_id}_{secrets.token_hex(32)}")
        key = cls(id=key_id, name=name, tenant=new_id("tenant"), hash=_hash(text), created=int(time.time()), rpm=rpm)
        return key, text


ANYONE = Key(id="open", name="open mode", tenant="tenant_" + "0" * 32, hash="", created=0)
"""Who everybody is in open mode."""


class Keys:
    """The store of keys, and the check at the door."""

    def __init__(self, redis: Redis, data_dir: Path, *, open_mode: bool = False) -> None:
        self._redis = redis
        self._directory = data_dir / "keys"
        self._open = open_mode
        self._cache: dict[str, tuple[float, Key | None]] = {}

    async def create(self, name: str, rpm: int | None) -> tuple[Key, str]:
        """Make a key, durable before it is returned. Raises StorageError or LedgerUnavailable."""
        key, text = Key.issue(name, rpm)
        await self._enter(key)  # if this fails, nothing was made
        await asyncio.to_thread(self._write, key)
        return key, text

    def adopt(self, file: Path, name: str) -> None:
        """Enter a key that was made elsewhere (a bootstrap secret), unless it is known. Raises SettingsError."""
        try:
            text = file.read_text().strip()
        except OSError as error:
            raise SettingsError(f"The bootstrap key file {file} can't be read: {error.strerror}.") from None
        key_id = _parse(text)
        if key_id is None:
            raise SettingsError(f"{file} holds no API key; make one with `velocity keys create`.")
        if not (self._directory / f"{key_id}.json").exists():
            self._write(Key(id=key_id, name=name, tenant=new_id("tenant"), hash=_hash(text), created=int(time.time())))

    async def authenticate(self, authorization: bytes | None) -> Key:
        """Whose request this is. Raises ApiError 401, or LedgerUnavailable when an unknown key can't be looked up."""
        if self._open:
            return ANYONE
        scheme, _, text = (authorization or b"").decode("latin-1").partition(" ")
        text = text.strip()
        if scheme.lower() != "bearer" or not text:
            raise ApiError(
                401,
                "No API key was sent. Send it as 'Authorization: Bearer vk_…' (on the command line: VELOCITY_API_KEY).",
                code="missing_api_key", headers=(_UNAUTHORIZED,),
            )  # fmt: skip
        key_id = _parse(text)
        key = await self._look_up(key_id) if key_id else None
        if key is None or not key.enabled or not hmac.compare_digest(key.hash, _hash(text)):
            raise ApiError(401, "This API key is not valid.", code="invalid_api_key", headers=(_UNAUTHORIZED,))
        return key

    async def _look_up(self, key_id: str) -> Key | None:
        now = time.monotonic()
        cached = self._cache.get(key_id)
        if cached and now - cached[0] < CACHE_SECONDS:
            return cached[1]
        with translated():
            raw = await self._redis.get(redis_keys.api_key(key_id))
        key = Key.model_validate_json(raw) if raw else await self._restore(key_id)
        if len(self._cache) >= _CACHE_MOST:
            self._cache.clear()
        self._cache[key_id] = (now, key)
        return key

    async def _restore(self, key_id: str) -> Key | None:
        """A key that Redis has lost, from the data directory."""
        file = self._directory / f"{key_id}.json"
        try:
            key = Key.model_validate_json(await asyncio.to_thread(file.read_bytes))
        except FileNotFoundError:
            return None
        await self._enter(key)
        return key

    async def _enter(self, key: Key) -> None:
        with translated():
            await self._redis.set(redis_keys.api_key(key.id), key.model_dump_json())
            await self._redis.sadd(redis_keys.API_KEYS, key.id)

    def _write(self, key: Key) -> None:
        try:
            durable.make_directory(self._directory, 0o700)
            durable.replace(self._directory / f"{key.id}.json", key.model_dump_json(indent=2).encode(), 0o600)
        except OSError as error:
            raise StorageError(f"The key can't be stored in {self._directory}: {error.strerror}.") from error


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _with_checksum(text: str) -> str:
    return f"{text}_{zlib.crc32(text.encode()):08x}"


def _parse(text: str) -> str | None:
    """The id in a well-formed key, else None."""
    parts = text.split("_")
    if (
        len(parts) != 4
        or parts[0] != "vk"
        or not _ID.fullmatch(parts[1])
        or _with_checksum(text.rpartition("_")[0]) != text
    ):
        return None
    return parts[1]
