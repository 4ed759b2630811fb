"""Errors of the bulk tier, below the root in engine/errors.py.

VelocityError
├── LedgerUnavailable   Redis did not answer
│   └── LedgerFull      Redis has no memory left: nothing was written
├── NoSuchJob           no job of that id belongs to the tenant
├── NoSuchFile          no file of that id belongs to the tenant
├── StorageError        the data directory can't be written or read
│   └── DiskFull        it has too little free space for what is asked for
├── Overloaded          so much bulk work waits that no more is accepted now
├── PreflightError      Redis or the data directory is not one that velocity can work on
├── QuotaExceeded       the tenant's bulk quota has no room for a job
├── IdempotencyConflict an Idempotency-Key came again with another request
└── InputError          a job's input can't be accepted; names the item
"""

from engine.errors import VelocityError


class LedgerUnavailable(VelocityError):
    """Redis did not answer."""


class LedgerFull(LedgerUnavailable):
    """Redis has no memory left: nothing was written."""


class NoSuchJob(VelocityError):
    """No job of that id belongs to the tenant."""

    quotes = True


class NoSuchFile(VelocityError):
    """No file of that id belongs to the tenant."""

    quotes = True


class StorageError(VelocityError):
    """The data directory can't be written or read."""


class DiskFull(StorageError):
    """The data directory has too little free space for what is asked for."""


class Overloaded(VelocityError):
    """So much bulk work waits that no more is accepted now."""


class PreflightError(VelocityError):
    """Redis or the data directory is not one that velocity can work on: a person has to act."""


class QuotaExceeded(VelocityError):
    """The tenant's bulk quota has no room: `what` (jobs, items or tokens) is full; `never` if it could never fit."""

    def __init__(self, message: str, what: str, *, never: bool) -> None:
        super().__init__(message)
        self.what = what
        self.never = never
        self.seconds = 60.0
        """When to ask again: room is made when a job ends."""


class IdempotencyConflict(VelocityError):
    """An Idempotency-Key came again with another request."""


class InputError(VelocityError):
    """A job's input can't be accepted; `param` says where in the body the fault is."""

    quotes = True

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param
