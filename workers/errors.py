"""Errors of the bulk tier, below the root in engine/errors.py.

VelocityError
├── LedgerUnavailable   Redis did not answer
├── NoSuchJob           no job of that id belongs to the tenant
├── StorageError        the data directory can't be written or read
├── QuotaExceeded       the tenant's bulk quota has no room for a job
└── InputError          a job's input can't be accepted; names the item
"""

from engine.errors import VelocityError


class LedgerUnavailable(VelocityError):
    """Redis did not answer."""


class NoSuchJob(VelocityError):
    """No job of that id belongs to the tenant."""

    quotes = True


class StorageError(VelocityError):
    """The data directory can't be written or read."""


class QuotaExceeded(VelocityError):
    """The tenant's bulk quota has no room: `what` (jobs, items or tokens) is full; `never` if it could never fit."""

    def __init__(self, message: str, what: str, *, never: bool) -> None:
        super().__init__(message)
        self.what = what
        self.never = never


class InputError(VelocityError):
    """A job's input can't be accepted; `param` says where in the body the fault is."""

    quotes = True

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param
