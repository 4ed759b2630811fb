"""The store of API keys, and the check at the door. The data directory is the truth, Redis what every process reads.

A key that Redis has lost is entered again when it is next used. Changes are made under a lock on the directory.
"""

from __future__ import annotations

import asyncio
import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from api.errors import ApiError
from api.fast_redis import FastRedis
from api.keys import ANYONE, Key, Scope, Terms, hash_of, id_in, is_key_id, new_text
from engine.errors import SettingsError
from workers import durable, redis_keys
from workers.errors import LedgerUnavailable, StorageError
from workers.job import is_id, new_id

CACHE_SECONDS = 5.0
KNOWN_SECONDS = 300.0
"""For how long after it was last seen a key is still known when Redis does not answer."""
_CACHE_MOST = 10_000
M = TypeVar("M", bound=BaseModel)

_UNAUTHORIZED = (b"www-authenticate", b"Bearer")


class Keys:
    """API keys: made, changed, ended, and checked at every request."""

    def __init__(self, redis: FastRedis, data_dir: Path, *, open_mode: bool = False) -> None:
        self._redis = redis
        self._directory = data_dir / "keys"
        self._open = open_mode
        self._cache: dict[str, tuple[float, Key | None]] = {}
        self._seen: dict[str, str] = {}
        """Ids of keys by the hash of their text, for those that were right once."""

    async def create(self, terms: Terms, tenant: str | None = None) -> tuple[Key, str]:
        """A new key and its text, which is shown this once; for a new tenant unless one is named.

        Durable when this returns. Raises ApiError 400, StorageError or LedgerUnavailable.
        """
        if tenant is not None and not (tenant.startswith("tenant_") and is_id(tenant)):
            raise ApiError(400, f"{tenant!r} is no tenant: it must read tenant_…, as a key shows it.", param="tenant")
        key_id, text = new_text()
        key = Key(
            **terms.model_dump(), id=key_id, tenant=tenant or new_id("tenant"), hash=hash_of(text),
            created=int(time.time()),
        )  # fmt: skip
        await self._enter(key)  # if this fails, nothing was made
        await asyncio.to_thread(self._write, key)
        return key, text

    async def all(self) -> list[Key]:
        """Every key that was made, oldest first."""
        return await asyncio.to_thread(self._read_all)

    async def get(self, key_id: str) -> Key:
        """One key. Raises ApiError 404."""
        return await asyncio.to_thread(self._read, key_id)

    async def update(self, key_id: str, **changes: Any) -> Key:
        """Change some of a key's terms (names of Terms's fields). Raises ApiError 400, 404, 409."""

        def changed(key: Key) -> Key:
            if key.revoked is not None and changes.get("enabled"):
                raise ApiError(
                    409, "A revoked key stays revoked; make a new one.", headers=((b"x-should-retry", b"false"),)
                )
            terms = {name: getattr(key, name) for name in Terms.model_fields}
            after = checked(Terms, {**terms, **changes})
            return key.model_copy(update=after.model_dump())

        return await self._change(key_id, changed)

    async def revoke(self, key_id: str) -> Key:
        """End a key for good."""
        return await self._change(
            key_id, lambda key: key.model_copy(update={"enabled": False, "revoked": key.revoked or int(time.time())})
        )

    async def rotate(self, key_id: str, grace_seconds: int) -> tuple[Key, str]:
        """A new text for the same key (limits, usage and tenant stay); the old one is accepted for the grace time."""
        _, text = new_text(key_id)
        in_force = await self.reload(key_id)  # what clients hold, also if a rotation before this one failed half-way

        def rotated(key: Key) -> Key:
            if key.revoked is not None:
                raise ApiError(409, "A revoked key can't be rotated.", headers=((b"x-should-retry", b"false"),))
            return key.model_copy(
                update={
                    "hash": hash_of(text),
                    "former_hash": (in_force or key).hash,
                    "former_until": int(time.time()) + grace_seconds,
                }
            )

        return await self._change(key_id, rotated), text

    def adopt(self, file: Path, name: str) -> None:
        """Enter a key that was made elsewhere (a bootstrap secret) with every scope, unless it is known.

        Raises SettingsError.
        """
        try:
            text = file.read_text().strip()
        except OSError as error:
            raise SettingsError(f"The bootstrap key file {file} can't be read: {error.strerror}.") from None
        key_id = id_in(text)
        if key_id is None:
            raise SettingsError(f"{file} holds no API key; make one with `velocity keys create`.")
        with self._locked():  # several processes may start at once
            if not self._file(key_id).exists():
                terms = Terms(name=name, scopes=tuple(Scope))
                now, tenant = int(time.time()), new_id("tenant")
                self._write(Key(**terms.model_dump(), id=key_id, tenant=tenant, hash=hash_of(text), created=now))

    async def authenticate(
        self, authorization: bytes | None, *, without_redis: bool = False, cached: bool = False
    ) -> Key:
        """Whose request this is. `without_redis` takes a key seen lately when Redis does not answer; `cached` one that
        is up to five seconds old, where the limiter will notice that it has changed.

        Raises ApiError 401, or LedgerUnavailable when the key can't be looked up.
        """
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
        hashed = hash_of(text)
        key_id = self._seen.get(hashed) or id_in(text)
        key = await self._look_up(key_id, without_redis, CACHE_SECONDS if cached else 0) if key_id else None
        if key is None or not key.opened_by(hashed):
            raise ApiError(401, "This API key is not valid.", code="invalid_api_key", headers=(_UNAUTHORIZED,))
        require_usable(key)
        if len(self._seen) >= _CACHE_MOST:
            self._seen.clear()
        self._seen[hashed] = key.id
        return key

    async def reload(self, key_id: str) -> Key | None:
        """The key's record as it is now. Raises LedgerUnavailable."""
        self._cache.pop(key_id, None)
        return await self._look_up(key_id)

    def forget(self, key: Key) -> None:
        """It has changed: look it up anew."""
        self._cache.pop(key.id, None)

    async def _look_up(self, key_id: str, without_redis: bool = False, seconds: float = 0) -> Key | None:
        now = time.monotonic()
        cached = self._cache.get(key_id)
        if cached and now - cached[0] < seconds:
            return cached[1]
        try:
            raw = await self._redis.call("key", "HGET", redis_keys.api_key(key_id), "record")
        except LedgerUnavailable:
            if without_redis and cached and cached[1] and now - cached[0] < KNOWN_SECONDS:
                return cached[1]
            raise
        key = Key.model_validate_json(raw) if raw else await self._restore(key_id)
        if len(self._cache) >= _CACHE_MOST:
            self._cache.clear()
        self._cache[key_id] = (now, key)
        return key

    async def _restore(self, key_id: str) -> Key | None:
        """A key that Redis has lost, from the data directory."""
        try:
            key = await asyncio.to_thread(self._read, key_id)
        except ApiError:
            return None
        await self._enter(key)
        return key

    async def _change(self, key_id: str, change: Callable[[Key], Key]) -> Key:
        """Durable first: a key that was ended must not come back with a Redis that lost the news."""

        def apply() -> Key:
            with self._locked():
                before = self._read(key_id)
                after = change(before).model_copy(update={"version": before.version + 1})
                self._write(after)
                return after

        key = await asyncio.to_thread(apply)
        try:
            await self._enter(key)
        except LedgerUnavailable as error:
            raise LedgerUnavailable(f"{error} The change is stored but not yet in force: repeat it.") from None
        self._cache.pop(key_id, None)
        return key

    async def _enter(self, key: Key) -> None:
        await self._redis.run("enter", key.id, key.model_dump_json(), key.version)

    async def enter_all(self) -> None:
        """Enter every key: a Redis that came back with older data learns what has changed since."""
        for key in await self.all():
            await self._enter(key)

    def _file(self, key_id: str) -> Path:
        return self._directory / f"{key_id}.json"

    def _read(self, key_id: str) -> Key:
        try:
            if not is_key_id(key_id):
                raise FileNotFoundError
            return Key.model_validate_json(self._file(key_id).read_bytes())
        except ValidationError:
            raise StorageError(f"{self._file(key_id)} does not hold a key's record.") from None
        except FileNotFoundError:
            raise ApiError(404, f"There is no key {key_id!r}.", code="not_found") from None
        except OSError as error:
            raise StorageError(f"The key can't be read from {self._directory}: {error.strerror}.") from None

    def _read_all(self) -> list[Key]:
        keys = [self._read(file.stem) for file in self._directory.glob("*.json")]
        return sorted(keys, key=lambda key: (key.created, key.id))

    def _write(self, key: Key) -> None:
        with self._storing():
            durable.make_directory(self._directory, 0o700)
            durable.replace(self._file(key.id), key.model_dump_json(indent=2).encode(), 0o600)

    def _storing(self) -> AbstractContextManager[None]:
        return durable.storage(f"The key can't be stored in {self._directory}")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._storing():
            durable.make_directory(self._directory, 0o700)
            lock = (self._directory / ".lock").open("w")
            fcntl.flock(lock, fcntl.LOCK_EX)
        with lock:
            yield


def checked(kind: type[M], given: dict[str, Any]) -> M:
    """What an operator asks for, as a `kind`. Raises ApiError 400 that names what is wrong."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = ".".join(str(part) for part in first["loc"])
        raise ApiError(400, f"{param}: {first['msg']}.", param=param) from None


def require_usable(key: Key) -> None:
    """Raises ApiError 401 that says why a right key opens nothing."""
    if key.usable:
        return
    if key.revoked is not None:
        why = "has been revoked"
    elif not key.enabled:
        why = "is disabled"
    else:
        why = f"expired on {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(key.expires))}"
    raise ApiError(401, f"This API key {why}.", code="invalid_api_key", headers=(_UNAUTHORIZED,))
