"""Logging: silent as a library, readable or JSON in our commands, and never a PIN or a key.

hagroup logs through the standard library under ``hagroup.…``, with structlog in front and without touching structlog's
global configuration, which is the application's. An application that set up nothing sees nothing; one that set up
``logging`` sees ``event key=value …``; our commands call :func:`configure`.

    log = get_logger(__name__)
    log.warning("member failed", member="hsm1", reason="CKR_DEVICE_ERROR")
"""

from __future__ import annotations

import functools
import json
import logging
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import Enum
from pathlib import PurePath
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias, cast

import msgspec

from hagroup.config.pins import Pin

if TYPE_CHECKING:
    from structlog.stdlib import BoundLogger
    from structlog.typing import EventDict, WrappedLogger

Style: TypeAlias = Literal["console", "json"]

ROOT = "hagroup"
FIELDS = "hagroup_fields"
"""Attribute of our log records that holds the masked fields, for formatters."""

_MASK = "***"
_SECRET_WORDS = frozenset({"pin", "pins", "password", "passphrase", "secret", "secrets", "value"})
_PASSED_ON = ("exc_info", "stack_info", "stacklevel")  # to the standard library, not as fields
_BARE = re.compile(r"[^\s\"'=]+")

logging.getLogger(ROOT).addHandler(logging.NullHandler())


def get_logger(name: str) -> BoundLogger:
    """A structured logger below ``hagroup``; ``name`` is a module's ``__name__``."""
    if name != ROOT and not name.startswith(f"{ROOT}."):
        name = f"{ROOT}.{name}"
    return cast("BoundLogger", _Logger(name))


class _Logger:
    """Becomes structlog's logger when something is logged: loading structlog takes as long as loading all of hagroup,
    and a program that signs once waits for that."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        method = getattr(_bound(self._name), name)
        setattr(self, name, method)
        return method


@functools.cache
def _bound(name: str) -> BoundLogger:
    import structlog

    logger: BoundLogger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[
            structlog.stdlib.filter_by_level,
            _format_arguments,
            mask_secrets,
            _to_standard_library,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        context_class=dict,
        cache_logger_on_first_use=True,
    )
    return logger


def prepare() -> None:
    """Load what logging needs, so that the first event does not wait for it."""
    _bound(ROOT)


def configure(style: Style = "console", level: int | str = logging.INFO, stream: IO[str] | None = None) -> None:
    """For our commands: all of ``hagroup`` goes to ``stream`` (default: standard error). A second call replaces it."""
    logger = logging.getLogger(ROOT)
    for handler in list(logger.handlers):
        if isinstance(handler.formatter, _Formatter):
            logger.removeHandler(handler)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_JsonFormatter() if style == "json" else _ConsoleFormatter())
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False  # else an application's handler would show each line a second time


def mask_secrets(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Processor: hides what must not be logged even if somebody logs it.

    That is every :class:`Pin`, every value under a key whose last word is pin, password, secret, value and the like
    (``user_pin``, ``CKA_VALUE``), and the content of all bytes, since nothing tells a UID
    from a key: log ``uid.hex()``.
    """
    return {key: value if key in _PASSED_ON else _masked(key, value) for key, value in event.items()}


def is_secret_key(key: str) -> bool:
    return re.split(r"[^a-z0-9]+", key.lower().strip("_"))[-1] in _SECRET_WORDS


def _masked(key: object, value: object) -> Any:
    if isinstance(key, str) and is_secret_key(key):
        return _MASK
    match value:
        case None | bool() | int() | float() | str():
            return value.value if isinstance(value, Enum) else value
        case Pin():
            return _MASK
        case bytes() | bytearray() | memoryview():
            return f"<{len(value)} bytes>"
        case Mapping():
            return {str(inner): _masked(inner, held) for inner, held in value.items()}
        case msgspec.Struct():
            return {name: _masked(name, getattr(value, name)) for name in value.__struct_fields__}
        case list() | tuple() | set() | frozenset():
            return [_masked(None, held) for held in value]
        case BaseException():
            return f"{type(value).__name__}: {value}"
        case PurePath() | datetime():
            return str(value)
        case _:
            # Others' repr may show anything that they hold.
            return f"<{type(value).__name__}>"


def _format_arguments(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """``log.info("%s of %s", 1, 2)`` as in the standard library; a wrong format never becomes the caller's error."""
    arguments = tuple(_masked(None, argument) for argument in event.pop("positional_args", ()))
    if arguments:
        try:
            event["event"] = event["event"] % arguments
        except (TypeError, ValueError):
            event["event"] = " ".join(map(str, (event["event"], *arguments)))
    return event


def _to_standard_library(_logger: WrappedLogger, _method: str, event: EventDict) -> tuple[tuple[str], dict[str, Any]]:
    passed = {key: event.pop(key) for key in _PASSED_ON if key in event}
    text = str(event.pop("event", ""))
    fields = dict(event)
    message = " ".join([text, *(f"{key}={_shown(value)}" for key, value in fields.items())])
    return (message,), {**passed, "extra": {FIELDS: {"event": text, **fields}}}


def _shown(value: object) -> str:
    if isinstance(value, str) and _BARE.fullmatch(value) and value.isprintable():
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


class _Formatter(logging.Formatter):
    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        ours = getattr(record, FIELDS, None)
        return ours if ours is not None else {"event": record.getMessage()}

    def trace(self, record: logging.LogRecord) -> str | None:
        parts = [self.formatException(record.exc_info)] if record.exc_info and record.exc_info[0] else []
        return "\n".join([*parts, record.stack_info] if record.stack_info else parts) or None


class _JsonFormatter(_Formatter):
    """One JSON object a line, with the time in UTC."""

    def format(self, record: logging.LogRecord) -> str:
        base = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        line = {**base, **self.fields(record), **base}  # a field of the same name does not hide ours
        if trace := self.trace(record):
            line["exception"] = trace
        return json.dumps(line, ensure_ascii=False, default=str)


class _ConsoleFormatter(_Formatter):
    """One line for people, in local time."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        fields = self.fields(record)
        shown = " ".join(f"{key}={_shown(value)}" for key, value in fields.items() if key != "event")
        line = f"{time} {record.levelname.lower():8} {fields['event']}{' ' if shown else ''}{shown}"
        trace = self.trace(record)
        return f"{line}\n{trace}" if trace else line
