"""The job model: what a job is, its states, and the one record per finished item.

queued ──► in_progress ──all items finished────► finalizing ──► completed
  │             ├── cancel ──────► cancelling ──► finalizing ──► cancelled   (finished items are kept)
  │             ├── deadline ────► expiring ────► finalizing ──► expired     (the rest fail with batch_expired)
  │             └── many failed ─► failing ─────► finalizing ──► failed
  └── cancel or deadline go the same ways               a batch whose input is not valid is failed from the start

shard:  pending ⇄ leased (epoch) ──► closed
item:   todo ──► completed │ failed
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict

from workers.progress import recent_rate

LANE = "bulk"
QUARANTINE = "quarantine"
"""The lane of shards that took several workers along: one item at a time, each written down before it runs."""
FINAL = "final"
"""The unit of work that merges a job's results, and the lane in which these wait."""
MAX_ITEMS = 50_000
_ID = re.compile(r"[a-z]+_[0-9a-f]{24,64}")


class JobStatus(StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    """Accepted and durable; no item has started."""
    IN_PROGRESS = "in_progress"
    """Workers have claimed some of it."""
    CANCELLING = "cancelling"
    """Its owner cancelled it; what runs is being stopped."""
    EXPIRING = "expiring"
    """Its deadline passed; what runs is being stopped."""
    FAILING = "failing"
    """More of its items failed than its owner allows; what runs is being stopped."""
    FINALIZING = "finalizing"
    """The result files are being written."""
    COMPLETED = "completed"
    """Every item has a result or an error; the counts tell which."""
    CANCELLED = "cancelled"
    """Stopped by its owner; finished items are kept."""
    EXPIRED = "expired"
    """Stopped by its deadline; finished items are kept."""
    FAILED = "failed"
    """Stopped because too many items failed, or (a batch) never begun because its input is not valid."""

    @property
    def terminal(self) -> bool:
        """Whether nothing will change any more."""
        return self in {JobStatus.COMPLETED, JobStatus.CANCELLED, JobStatus.EXPIRED, JobStatus.FAILED}


def new_id(kind: str) -> str:
    """A random id of 128 bits that nobody can guess, such as job_0f…"""
    return f"{kind}_{os.urandom(16).hex()}"


def is_id(text: str) -> bool:
    """Whether `text` has the form of an id, and so can't lead out of a directory."""
    return _ID.fullmatch(text) is not None


class JobSpec(BaseModel):
    """What was asked for: written to job.json before the job is acknowledged, never changed."""

    model_config = ConfigDict(frozen=True)

    id: str
    tenant: str
    name: str | None = None
    endpoint: str
    model: str
    total: int
    shard_items: int
    created: float
    """Unix seconds."""
    deadline: int | None = None
    """Unix seconds after which items that have not finished expire."""
    account: str = "none"
    """Whose usage it is: the API key that submitted it."""
    tokens: int = 0
    """Tokens that it may take at most, input (by length) and output."""
    priority: int = 0
    """Among the jobs of the same account the higher one goes first."""
    max_error_rate: float | None = None
    """Share of the items (0 to 1) that may fail before the job is stopped."""
    webhook: str | None = None
    """Address that is told when the job is over."""
    metadata: dict[str, str] = {}
    completion_window: str | None = None
    """As its owner wrote it, such as 24h; `deadline` is what follows from it."""
    idempotency: str | None = None
    """Digest of the Idempotency-Key: the tenant's later request with the same key gets this job."""
    digest: str | None = None
    """Digest of the request that came with it: another request with the same key is refused."""
    retry_of: str | None = None
    """The job whose failed items these are."""
    input_file: str | None = None
    """A batch's input file."""
    output_expires_after: int | None = None
    """Seconds after which a batch's output files are deleted, from its creation on."""

    @property
    def batch(self) -> bool:
        """Whether it came as an OpenAI batch."""
        return self.id.startswith("batch_")

    @property
    def shards(self) -> int:
        """In how many parts it is worked on."""
        return -(-self.total // self.shard_items)

    @property
    def created_ms(self) -> int:
        """Unix milliseconds."""
        return round(self.created * 1000)


class Outcome(BaseModel):
    """How a job ended: written beside its results before the ledger learns of it, so that it outlives Redis."""

    model_config = ConfigDict(frozen=True)

    status: JobStatus
    at: int
    """Unix seconds."""
    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    times: dict[str, int] = {}
    """Unix seconds of its states so far, such as in_progress_at."""
    errors: list[dict[str, Any]] | None = None
    """What is wrong with a batch's input: code, line, message, param."""


@dataclass(frozen=True, slots=True)
class BulkQuota:
    """What a tenant may have in active jobs; 0 is no limit. Given back when a job ends."""

    jobs: int = 0
    items: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Item:
    """One request of a job: `index` is its place in the input, `id` its owner's name for it."""

    index: int
    id: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Record:
    """The final outcome of one item: a response body, or an error with code and message."""

    index: int
    id: str
    status_code: int
    request_id: str
    body: dict[str, Any] | None = None
    error: dict[str, str] | None = None
    nth: int = 0
    """The how manieth of its shard it was to finish, from 0 on; known in the final files."""

    @property
    def ok(self) -> bool:
        """Whether the item completed."""
        return self.error is None

    @property
    def usage(self) -> tuple[int, int]:
        """Input and output tokens as the engine counted them."""
        usage = (self.body or {}).get("usage")
        if not isinstance(usage, dict):
            return 0, 0
        return (
            usage.get("prompt_tokens") or usage.get("input_tokens") or 0,
            usage.get("completion_tokens") or usage.get("output_tokens") or 0,
        )


@dataclass(frozen=True, slots=True)
class Lease:
    """A unit of work that this process may do until it runs out: a shard, or (`final`) the merging of results."""

    job: str
    tenant: str
    unit: str
    epoch: int
    owner: str
    first: int
    count: int
    done: frozenset[int]
    """Items of the shard that are finished already."""
    account: str = "none"
    endpoint: str = "/v1/chat/completions"
    lane: str = LANE

    @property
    def final(self) -> bool:
        """Whether this is the merging of results."""
        return self.unit == FINAL

    @property
    def flow(self) -> str:
        """Among whom the engine is shared fairly: an account of a tenant."""
        return f"{self.tenant}/{self.account}"

    @property
    def segment(self) -> str:
        """Name of the file that this lease's results go to; nobody else ever writes it."""
        return f"{self.unit}.{self.epoch}.{self.owner}"


@dataclass(frozen=True, slots=True)
class JobState:
    """A job as the ledger knows it now. Times are unix seconds."""

    id: str
    tenant: str
    status: JobStatus
    total: int
    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    shards: int = 0
    shard_size: int = 0
    priority: int = 0
    name: str | None = None
    model: str = ""
    endpoint: str = ""
    outcome: str | None = None
    """While it is being finalized: what it will be then."""
    retry_of: str | None = None
    retried_by: str | None = None
    webhook: str | None = None
    webhook_status: str | None = None
    webhook_attempts: int = 0
    webhook_error: str | None = None
    input_file: str | None = None
    completion_window: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    times: Mapping[str, int] = field(default_factory=dict)
    deadline: int | None = None
    rate: float | None = None
    """Items that it finished per second lately; None if nobody knows."""

    @property
    def left(self) -> int:
        """Items without a result."""
        return self.total - self.completed - self.failed

    @classmethod
    def from_hash(cls, job_id: str, raw: Mapping[bytes, bytes]) -> JobState:
        """From the ledger's hash."""
        text = {key.decode(): value.decode() for key, value in raw.items()}
        counts = (
            "total", "completed", "failed", "input_tokens", "output_tokens", "shards", "shard_size", "priority",
            "webhook_attempts",
        )  # fmt: skip
        texts = (
            "tenant", "name", "model", "endpoint", "retry_of", "retried_by", "webhook", "webhook_status",
            "webhook_error", "input_file", "completion_window", "outcome",
        )  # fmt: skip
        given: dict[str, Any] = {name: int(text[name]) for name in counts if name in text}
        given |= {name: text[name] for name in texts if name in text}
        times = {key: int(value) // 1000 for key, value in text.items() if key.endswith("_at")}
        times.pop("recent_at", None)
        return cls(
            id=job_id,
            status=JobStatus(text["status"]),
            metadata=orjson.loads(text.get("metadata", "{}")),
            times=times,
            deadline=int(text["deadline"]) if "deadline" in text else None,
            rate=recent_rate(text),
            **given,
        )
