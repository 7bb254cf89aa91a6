"""One stream of log lines for everybody: structlog's loggers, stdlib `logging`, uvicorn, asyncio, Python's warnings.

Two ways lead into one pipeline. An application's structlog loggers run through it directly. A `logging.LogRecord` of a
library is turned into the same event dictionary by a formatter and runs through the same processors; structlog ships
one for that (`ProcessorFormatter`), which copies the record and wraps the event several times over, and is the slower
by a factor that `benchmarks/observability` states.

Secrets are taken out twice, because they come in twice: as values under telling keys (`password=`), before rendering,
and inside prose (`postgresql://user:secret@host`, in a library's message or in a traceback), on the finished line.
"""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TextIO, cast

import structlog
from pydantic_core import to_json

from mainstay.core import MainstayError, current
from mainstay.observability import tracing
from mainstay.observability.settings import ObservabilitySettings

EventDict = MutableMapping[str, Any]
Processor = Callable[[Any, str, EventDict], Any]

_REDACTED = "[redacted]"
_SECRET_KEY = re.compile(
    r"passw(or)?d|passphrase|secret|token|authorization|api_?key|private_?key|signing_?key|cookie|credential",
    re.IGNORECASE,
)
_URL_PASSWORD = re.compile(r"(://[^\s/:@\"']*:)[^\s/@\"']+@")
_WORDS = r"passw(?:or)?d|secret|token|api[_-]?key"
_VALUE = r"""(?!\[redacted)[^\s&,;"'\\}\]]+"""
_ASSIGNMENT = re.compile(
    rf"""((?:{_WORDS})\\?["']?=\\?["']?"""  # token=…, as in a query or a repr
    rf"""|\\?["'](?:{_WORDS})\\?["']:\s?\\?["']"""  # "token": "…", JSON inside of a message
    rf"""|authorization\\?["']?[:=]\s?\\?["']?(?:bearer |basic )?){_VALUE}""",
    re.IGNORECASE,
)
_DEPTH = 6

# What a LogRecord always has; everything else on it was passed as `extra`.
_RECORD_LENGTH = len(logging.makeLogRecord({}).__dict__)
_RECORD_FIELDS = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "color_message", "taskName"}

# Asking whether these are mappings costs more than everything else about them.
_PLAIN = frozenset({str, int, float, bool, type(None)})

_verdicts: dict[str, bool] = {}


def _is_secret(key: object) -> bool:
    """Whether what stands under `key` is a secret; remembered, because a service uses few keys and many lines."""
    if not isinstance(key, str):
        return False
    verdict = _verdicts.get(key)
    if verdict is None:
        verdict = _SECRET_KEY.search(key) is not None
        if len(_verdicts) < 4096:  # noqa: PLR2004  a bound, so that keys made from data cannot fill the memory
            _verdicts[key] = verdict
    return verdict


def _redacted(value: Any, depth: int) -> Any:
    """`value` without the secrets in its mappings, at whatever level; the original is never changed."""
    if depth == 0:
        return "[too deep]" if isinstance(value, (Mapping, list, tuple)) else value
    if isinstance(value, Mapping):
        mapping = cast("Mapping[object, object]", value)
        return {key: _REDACTED if _is_secret(key) else _redacted(inner, depth - 1) for key, inner in mapping.items()}
    if isinstance(value, (list, tuple)):
        sequence = cast("Sequence[object]", value)
        return [_redacted(inner, depth - 1) for inner in sequence]
    return value


def redact(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Processor: replace what stands under a telling key."""
    for key, value in event.items():
        if _is_secret(key):
            event[key] = _REDACTED
        elif type(value) not in _PLAIN and isinstance(value, (Mapping, list, tuple)):
            event[key] = _redacted(value, _DEPTH)
    return event


def redact_text(line: str) -> str:
    """`line` without passwords in addresses and without `token=…` and its like. Cheap where there are none."""
    if "://" in line:
        line = _URL_PASSWORD.sub(rf"\1{_REDACTED}@", line)
    if "=" in line or "': '" in line or '": ' in line or "uthorization" in line:
        line = _ASSIGNMENT.sub(rf"\1{_REDACTED}", line)
    return line


def add_context(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Processor: add who, for whom and as part of what, from `current()`, and the trace where there is one."""
    context = current()
    if context.correlation_id is not None:
        event.setdefault("correlation_id", context.correlation_id)
    if context.causation_id is not None:
        event.setdefault("causation_id", context.causation_id)
    if context.actor is not None:
        event.setdefault("actor", context.actor)
    if context.tenant is not None:
        event.setdefault("tenant", context.tenant)
    span = tracing.current_ids() or tracing.ids_of(context.traceparent)
    if span is not None:
        event.setdefault("trace_id", span[0])
        event.setdefault("span_id", span[1])
    return event


def add_exception(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Processor: the traceback as text, without local variables (they hold secrets), and the code of a domain error."""
    info = event.pop("exc_info", None)
    if not info:
        return event
    if isinstance(info, BaseException):
        error: BaseException | None = info
    elif isinstance(info, tuple):
        error = cast("tuple[Any, BaseException | None, Any]", info)[1]
    else:
        error = sys.exc_info()[1]
    if error is not None:
        if isinstance(error, MainstayError):
            event.setdefault("code", error.code)
        event["exception"] = "".join(traceback.format_exception(error)).rstrip()
    return event


def _timestamp() -> str:
    # Less than half the cost of strftime.
    return datetime.now(UTC).isoformat(timespec="microseconds")[:-6] + "Z"


class _Json:
    """Last processor of `json`: one object a line.

    What JSON does not know becomes its `repr`, never an error.
    """

    def __init__(self, service: str) -> None:
        self._service = service

    def __call__(self, _logger: object, method: str, event: EventDict) -> str:
        line = {
            "timestamp": _timestamp(),
            "level": event.pop("level", method),
            "service": self._service,
            **event,
        }
        try:
            text = to_json(line, fallback=_last_resort, inf_nan_mode="strings").decode()
        except ValueError:  # bytes and half surrogates that are no UTF-8
            text = json.dumps(line, default=_last_resort, skipkeys=True)
        return redact_text(text)


def _last_resort(value: object) -> str:
    try:
        return repr(value)
    except Exception:  # noqa: BLE001  a line with a broken object in it is better than no line
        return f"<{type(value).__name__}, whose repr fails>"


class _Console:
    """Last processor of `console`: for a person at a terminal."""

    def __init__(self, colors: bool) -> None:  # noqa: FBT001  private
        # The renderer's own choice of traceback prints local variables where `rich` is installed.
        self._render = structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)

    def __call__(self, logger: object, method: str, event: EventDict) -> str:
        event["timestamp"] = _timestamp()
        event.setdefault("level", method)
        return redact_text(self._render(logger, method, event))


class _Sink:
    """Where finished lines go: whole lines only, also when threads write at the same time."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def msg(self, line: str) -> None:
        with self._lock:
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):
                # Nobody reads any more (a closed pipe, a closed stream): no reason for the service to fail.
                pass

    debug = info = warning = warn = error = critical = fatal = failure = exception = log = err = msg


class _Formatter(logging.Formatter):
    """Turns a `LogRecord` into an event dictionary and runs the same processors over it."""

    def __init__(self, processors: list[Processor]) -> None:
        super().__init__()
        self._processors = processors

    def format(self, record: logging.LogRecord) -> str:
        event: Any = {"event": record.getMessage(), "level": record.levelname.lower(), "logger": record.name}
        if len(record.__dict__) > _RECORD_LENGTH:
            for name, value in record.__dict__.items():
                if name not in _RECORD_FIELDS:
                    event.setdefault(name, value)
        if record.exc_info:
            event["exc_info"] = record.exc_info
        if record.stack_info:
            event["stack"] = record.stack_info
        for process in self._processors:
            event = process(None, record.levelname.lower(), event)
        return cast("str", event)


class _Handler(logging.Handler):
    def __init__(self, sink: _Sink, processors: list[Processor]) -> None:
        super().__init__()
        self._sink = sink
        self.setFormatter(_Formatter(processors))

    def createLock(self) -> None:  # noqa: N802  stdlib's name
        """The sink has the one lock that is needed; stdlib's would be held while the line is made."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._sink.msg(self.format(record))
        except Exception:  # noqa: BLE001  stdlib's own rule: logging never raises into the program
            self.handleError(record)


@contextmanager
def configured(settings: ObservabilitySettings, stream: TextIO | None = None) -> Generator[None, None, None]:
    """Send everybody's log lines through one pipeline, to `stream` (standard error by default), until the block ends.

    Replaced are plain `StreamHandler`s wherever they sit, which is how uvicorn, gunicorn and `logging.basicConfig`
    write to the terminal. Other handlers (files, error trackers, pytest's own) stay.
    """
    target: TextIO = sys.stderr if stream is None else stream
    sink = _Sink(target)
    render: Processor = (
        _Json(settings.service_name) if settings.log_format == "json" else _Console(_is_terminal(target))
    )
    processors: list[Processor] = [add_context, add_exception, redact, render]
    level = logging.getLevelNamesMapping()[settings.log_level]
    before = structlog.get_config() if structlog.is_configured() else None
    with _stdlib_routed(_Handler(sink, processors), level):
        # Not cached on first use: a cached logger would go on writing to this configuration after it is undone.
        structlog.configure(
            processors=cast("list[structlog.typing.Processor]", processors),
            wrapper_class=structlog.make_filtering_bound_logger(level),
            logger_factory=lambda *_names: sink,
            context_class=dict,
            cache_logger_on_first_use=False,
        )
        try:
            yield
        finally:
            if before is None:
                structlog.reset_defaults()
            else:
                structlog.configure(**before)


@contextmanager
def _stdlib_routed(handler: logging.Handler, level: int) -> Generator[None, None, None]:
    root = logging.getLogger()
    loggers = [root, *(known for known in root.manager.loggerDict.values() if isinstance(known, logging.Logger))]
    undo: list[tuple[logging.Logger, list[logging.Handler], bool]] = []
    for logger in loggers:
        plain: list[logging.Handler] = [known for known in logger.handlers if type(known) is logging.StreamHandler]
        if plain:
            undo.append((logger, plain, logger.propagate))
            for known in plain:
                logger.removeHandler(known)
            # Its own handlers are gone: propagating prints nothing twice, and not propagating would print nothing.
            logger.propagate = True
    root_level = root.level
    root.setLevel(level)
    root.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        root.setLevel(root_level)
        for logger, plain, propagate in undo:
            for known in plain:
                logger.addHandler(known)
            logger.propagate = propagate


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError, io.UnsupportedOperation):
        return False
