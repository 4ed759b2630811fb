"""Errors of the bulk tier, below the root in engine/errors.py.

VelocityError
├── LedgerUnavailable   Redis did not answer
├── NoSuchJob           no job of that id belongs to the tenant
├── StorageError        the data directory can't be written or read
└── InputError          a job's input can't be accepted; names the item
"""

from engine.errors import VelocityError


class LedgerUnavailable(VelocityError):
    """Redis did not answer."""


class NoSuchJob(VelocityError):
    """No job of that id belongs to the tenant."""


class StorageError(VelocityError):
    """The data directory can't be written or read."""


class InputError(VelocityError):
    """A job's input can't be accepted; `param` says where in the body the fault is."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param
