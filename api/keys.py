"""API keys: what is known of one, and how its text is made and checked.

A key reads vk_<id>_<secret>_<checksum>: the prefix makes leaks recognisable, the checksum makes typos cheap to reject.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
import zlib
from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

_ID = re.compile(r"[0-9a-f]{12}")

Limit = Annotated[int | None, Field(ge=1, le=1_000_000_000, strict=True)]


class Scope(StrEnum):
    """What a key may be used for."""

    CHAT = "chat"
    """Interactive requests."""
    JOBS = "jobs"
    """Bulk jobs, files and batches."""
    ADMIN = "admin"
    """Everybody's keys and usage."""
    METRICS = "metrics"
    """Scraping the metrics port from another machine."""


class Terms(BaseModel):
    """What an operator decides about a key. None is no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=128)
    enabled: bool = True
    expires: int | None = Field(default=None, ge=0, strict=True)
    """Unix seconds from which the key is refused."""
    scopes: tuple[Scope, ...] = (Scope.CHAT, Scope.JOBS)
    models: tuple[str, ...] | None = None
    """Names of the models that it may use."""
    rpm: Limit = None
    """Interactive requests per minute, evenly refilled."""
    burst: Limit = None
    """Requests that may come at once; by default a minute's worth."""
    tpm: Limit = None
    """Tokens per minute, input and output together."""
    concurrency: Limit = None
    """Interactive requests at the same time."""
    max_tokens: Limit = None
    """Most output tokens of one request; more is cut to it."""
    bulk_jobs: Limit = None
    """Active jobs of the key's tenant, beyond which this key submits none."""
    bulk_items: Limit = None
    """Items in active jobs of the tenant."""
    bulk_tokens: Limit = None
    """Tokens reserved by active jobs of the tenant."""


class Key(Terms):
    """What is known of an API key. Not its secret: only its hash is kept."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    tenant: str
    """Owner of jobs and files; several keys may share it."""
    hash: str
    """SHA-256 of the whole key, hexadecimal. The secret has 256 random bits, so a slow hash would add nothing."""
    created: int
    version: int = 1
    """Counts the changes of this record."""
    revoked: int | None = None
    """Unix seconds when it was ended for good."""
    former_hash: str | None = None
    """Hash of the text before the last rotation, which is still accepted until `former_until`."""
    former_until: int = 0

    @property
    def usable(self) -> bool:
        """Whether it opens anything now."""
        return self.enabled and self.revoked is None and (self.expires is None or time.time() < self.expires)

    def opened_by(self, hashed: str) -> bool:
        """Whether the text with this hash is this key; compared in constant time."""
        if hmac.compare_digest(self.hash, hashed):
            return True
        former = self.former_hash or ""
        return hmac.compare_digest(former, hashed) and time.time() < self.former_until

    def may(self, scope: Scope) -> bool:
        """Whether it has the scope."""
        return scope in self.scopes

    def may_use(self, *names: str) -> bool:
        """Whether it may use a model that goes by these names."""
        return self.models is None or any(name in self.models for name in names)


ANYONE = Key(
    id="open", name="open mode", tenant="tenant_" + "0" * 32, hash="", created=0, version=0, scopes=tuple(Scope)
)
"""Who everybody is in open mode."""


def new_text(key_id: str | None = None) -> tuple[str, str]:
    """A new key's id and text, or a new text for an id."""
    key_id = key_id or secrets.token_hex(6)
    return key_id, _with_checksum(f"vk_{key_id}_{secrets.token_hex(32)}")


def hash_of(text: str) -> str:
    """What is kept of a key's text."""
    return hashlib.sha256(text.encode()).hexdigest()


def id_in(text: str) -> str | None:
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


def is_key_id(text: str) -> bool:
    """Whether `text` has the form of a key's id, and so can't lead out of a directory."""
    return _ID.fullmatch(text) is not None


def _with_checksum(text: str) -> str:
    return f"{text}_{zlib.crc32(text.encode()):08x}"
