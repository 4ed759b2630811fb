"""The error tree of velocity. Messages are sentences for people; the class is the contract.

VelocityError
├── SettingsError            a setting is missing, contradictory or unusable
├── ProfileError             no such engine profile, or the profile can't be served here
├── StartError               a process that velocity starts did not come up
├── EngineError              the engine could not give an answer
│   ├── EngineUnreachable    no connection: nothing of the request was acted upon
│   ├── EngineLost           the connection broke after the request was sent
│   ├── EngineTimeout        no answer, or no further byte, in time
│   └── EngineProtocolError  what came back is not the HTTP or JSON that was expected
└── (workers.errors and api.errors add theirs below VelocityError)
"""


class VelocityError(Exception):
    """Root of every error that velocity raises on purpose."""

    quotes = False
    """Whether the message may quote what a client wrote: then it is for that client, and for no log."""


class SettingsError(VelocityError):
    """A setting is missing, contradictory or unusable."""


class ProfileError(VelocityError):
    """No such engine profile, or the profile can't be served here."""


class StartError(VelocityError):
    """A process that velocity starts did not come up."""


class EngineError(VelocityError):
    """The engine could not give an answer."""


class EngineUnreachable(EngineError):
    """No connection could be made: nothing of the request was acted upon."""


class EngineLost(EngineError):
    """The connection broke after the request was sent, before the answer was complete."""


class EngineTimeout(EngineError):
    """No answer, or no further byte of it, came in time."""


class EngineProtocolError(EngineError):
    """What came back is not the HTTP or JSON that was expected."""
