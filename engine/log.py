"""structlog, set up once per process: JSON lines for machines, coloured ones for a terminal, on standard error."""

from __future__ import annotations

import logging
import re
import sys
import traceback
from datetime import UTC, datetime
from functools import partial

import orjson
import structlog

from engine.errors import VelocityError
from engine.settings import EngineSettings

_CHAIN_MOST = 8

Logger = structlog.stdlib.BoundLogger

# uvicorn reports an answer that was broken off on purpose as an application error; the access log line says it better.
_EXPECTED = ("ASGI callable returned without completing response.",)


class _DropExpected(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == "asyncio":  # what follows shows tasks and callbacks, with what they were given
            record.msg, record.args = re.split(r"[\n(<]", record.getMessage(), maxsplit=1)[0], ()
        return record.getMessage() not in _EXPECTED


def configure(settings: EngineSettings, process: str, **more: object) -> None:
    """Route structlog and the standard library's loggers through one renderer; every line has process and `more`."""
    as_json = settings.log_json if settings.log_json is not None else not sys.stderr.isatty()
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer(pad_event_to=0)
    )
    final: list[structlog.typing.Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, _traceback]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=[*final, renderer]))
    handler.addFilter(_DropExpected())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log_level)
    for noisy in ("httpx", "httpcore", "asyncio", "uvicorn.access", "rq.worker", "rq.job", "rq.scheduler"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if as_json:  # our own lines go straight to the file: a detour over the standard library costs ten times as much
        level = logging.getLevelNamesMapping()[settings.log_level]
        structlog.configure(
            processors=[partial(_line, {"process": process, **more})],
            logger_factory=structlog.BytesLoggerFactory(sys.stderr.buffer),
            wrapper_class=structlog.make_filtering_bound_logger(level),
            cache_logger_on_first_use=True,
        )
    else:
        structlog.configure(
            processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
            logger_factory=structlog.stdlib.LoggerFactory(),
            wrapper_class=structlog.stdlib.BoundLogger,
            cache_logger_on_first_use=True,
        )
    structlog.contextvars.bind_contextvars(process=process, **more)


def _line(common: dict[str, object], _: object, level: str, event: structlog.typing.EventDict) -> bytes:
    """All that the other way does with a chain of processors."""
    if "exc_info" in event:
        _traceback(None, level, event)
    event.update(common, level=level, timestamp=datetime.now(UTC))
    return orjson.dumps(event, default=str, option=orjson.OPT_UTC_Z | orjson.OPT_NON_STR_KEYS)


def _traceback(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Where it was raised, and which classes. No locals, and no message of an exception that is not ours: it may quote
    what a client wrote.
    """
    given = event.pop("exc_info", None)
    if isinstance(given, tuple):
        given = given[1]
    error: BaseException | None = given if isinstance(given, BaseException) else sys.exc_info()[1] if given else None
    blocks: list[str] = []
    while error is not None and len(blocks) < _CHAIN_MOST:
        message = f": {error}" if isinstance(error, VelocityError) and not error.quotes else ""
        blocks.append("".join(traceback.format_tb(error.__traceback__)) + f"{type(error).__qualname__}{message}")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if blocks:
        event["exception"] = "\nwhich led to:\n".join(reversed(blocks))
    return event


def get(name: str) -> Logger:
    """A named logger; safe to call at import, since nothing is set up by it."""
    logger: Logger = structlog.stdlib.get_logger(name)
    return logger
