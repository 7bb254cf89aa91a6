"""One stream of log lines for everybody: structlog's loggers, stdlib `logging`, uvicorn, asyncio, Python's warnings.

Two ways lead into one pipeline. An application's structlog loggers run through it directly. A `logging.LogRecord` of a
library is turned into the same event dictionary by a formatter and runs through the same processors; structlog ships
one for that (`ProcessorFormatter`), which copies the record and wraps the event several times over, and is the slower
by a factor that `benchmarks/observability` states.

Nothing that a line holds can fail the program that writes it, and nothing secret comes out: `redaction` looks at every
value, and at every text, before it is rendered.

The loggers of a process are one, so they follow one configuration at a time: the newest of those that live. When the
last has gone, everything is as it was before the first.
"""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import threading
import traceback
from collections.abc import Callable, Generator, MutableMapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any, TextIO, cast

import structlog
from pydantic_core import to_json

from mainstay.core import MainstayError, current
from mainstay.observability import _tracing
from mainstay.observability._redaction import last_resort, redact
from mainstay.observability.settings import ObservabilitySettings

EventDict = MutableMapping[str, Any]
Processor = Callable[[Any, str, EventDict], Any]

# What a LogRecord always has; everything else on it was passed as `extra`.
_RECORD_LENGTH = len(logging.makeLogRecord({}).__dict__)
_RECORD_FIELDS = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "color_message", "taskName"}

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_CONTROL_IN_LINES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")

_render_stack = structlog.processors.StackInfoRenderer(additional_ignores=["mainstay.observability"])


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
    span = _tracing.current_ids() or _tracing.ids_of(context.traceparent)
    if span is not None:
        event.setdefault("trace_id", span[0])
        event.setdefault("span_id", span[1])
    return event


def add_exception(_logger: object, method: str, event: EventDict) -> EventDict:
    """Processor: the traceback as text, without local variables (they hold secrets), and the code of a domain error."""
    if "stack_info" in event:
        event = _render_stack(None, method, event)
    info: Any = event.pop("exc_info", None)
    if not info:
        return event
    try:
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
    except Exception:  # noqa: BLE001  an exception is a user's object too
        event["exception"] = last_resort(cast("object", info))
    return event


def beside(own: EventDict, event: EventDict) -> EventDict:
    """A line's own fields and `event`'s; one of `event`'s that has the name of an own one gets an underscore."""
    line = {**own, **event}
    if len(line) == len(own) + len(event):
        return line
    return {**own, **{f"{name}_" if name in own else name: value for name, value in event.items()}}


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
        line = beside({"timestamp": _timestamp(), "level": method, "service": self._service}, event)
        try:
            return to_json(line, fallback=last_resort, inf_nan_mode="strings").decode()
        except ValueError:  # half surrogates, which are no UTF-8
            return "{" + ",".join(f"{json.dumps(name)}:{_alone(value)}" for name, value in line.items()) + "}"


def _alone(value: object) -> str:
    try:
        return to_json(value, fallback=last_resort, inf_nan_mode="strings").decode()
    except ValueError:
        return json.dumps(value if isinstance(value, str) else last_resort(value))


class _Console:
    """Last processor of `console`: for a person at a terminal."""

    def __init__(self, colors: bool) -> None:  # noqa: FBT001  private
        # The renderer's own choice of traceback prints local variables where `rich` is installed.
        self._render = structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)

    def __call__(self, logger: object, method: str, event: EventDict) -> str:
        line = beside({"timestamp": _timestamp(), "level": method}, event)
        return self._render(logger, method, {_escaped(name): _shown(name, value) for name, value in line.items()})


def _shown(name: str, value: object) -> object:
    """Without what moves a cursor or begins a line: a terminal would show what nobody wrote."""
    if not isinstance(value, str):
        return value
    return _escaped(value, _CONTROL_IN_LINES if name in ("exception", "stack") else _CONTROL)


def _escaped(text: str, control: re.Pattern[str] = _CONTROL) -> str:
    return control.sub(lambda found: repr(found[0])[1:-1], text)


class _Pipeline:
    """All processors as one, which never raises: whoever writes a line is not to be failed by it."""

    def __init__(self, render: Processor) -> None:
        self._render = render

    def __call__(self, logger: object, method: str, event: EventDict) -> str:
        try:
            # The context comes last, because it is known to be harmless.
            event = add_context(logger, method, redact(logger, method, add_exception(logger, method, event)))
            return cast("str", self._render(logger, method, event))
        except Exception as error:  # noqa: BLE001  see above
            failed = {"event": "a log line could not be made", "error": type(error).__name__}
            return cast("str", self._render(logger, method, failed))


class _Sink:
    """Where finished lines go: whole lines only, also when threads write at the same time."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        # A signal's handler, or a `__del__` that the collector calls, writes its line in the middle of another one's.
        self._lock = threading.RLock()

    def msg(self, line: str) -> None:
        with self._lock:
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError, RuntimeError):
                # Nobody reads any more (a closed pipe, a closed stream), or the stream was just being written to by
                # whom this interrupts: no reason for the service to fail.
                pass

    debug = info = warning = warn = error = critical = fatal = failure = exception = log = err = msg


def event_of(record: logging.LogRecord) -> EventDict:
    """The event dictionary of a `LogRecord`."""
    try:
        message = record.getMessage()
    except Exception as error:  # noqa: BLE001  users' objects and users' mistakes
        # Without the arguments, which may be secret, and which stdlib would print.
        place = f"{record.pathname}:{record.lineno}"
        said = record.msg if type(record.msg) is str else last_resort(record.msg)
        message = f"{said} [{type(error).__name__}: its arguments do not fit, {place}]"
    event: dict[str, Any] = {"event": message, "logger": record.name}
    if len(record.__dict__) > _RECORD_LENGTH:
        for name, value in list(record.__dict__.items()):
            if name not in _RECORD_FIELDS:
                event.setdefault(name, value)
    if record.exc_info:
        event["exc_info"] = record.exc_info
    if record.stack_info:
        event["stack"] = record.stack_info
    return event


class _Handler(logging.Handler):
    def __init__(self, sink: _Sink, pipeline: _Pipeline) -> None:
        super().__init__()
        self._sink = sink
        self._pipeline = pipeline

    def handle(self, record: logging.LogRecord) -> bool:
        """Make and write the line without stdlib's lock around both: the sink has the one that is needed."""
        kept: Any = self.filter(record)  # from Python 3.12 on a record, maybe another
        if kept:
            self.emit(record if kept is True else kept)
        return bool(kept)

    def emit(self, record: logging.LogRecord) -> None:
        self._sink.msg(self._pipeline(None, record.levelname.lower(), event_of(record)))


class _Configuration:
    def __init__(self, settings: ObservabilitySettings, stream: TextIO) -> None:
        self.sink = _Sink(stream)
        self.level = logging.getLevelNamesMapping()[settings.log_level]
        self.pipeline = _Pipeline(
            _Json(settings.service_name) if settings.log_format == "json" else _Console(_is_terminal(stream))
        )
        self.handler = _Handler(self.sink, self.pipeline)

    def activate(self) -> None:
        """Give everybody's loggers this pipeline."""
        root = logging.getLogger()
        for other in _live:
            root.removeHandler(other.handler)
        root.addHandler(self.handler)
        root.setLevel(self.level)
        # Not cached on first use: a cached logger would go on writing to this configuration after it is undone.
        structlog.configure(
            processors=[cast("structlog.typing.Processor", self.pipeline)],
            wrapper_class=structlog.make_filtering_bound_logger(self.level),
            logger_factory=lambda *_names: self.sink,
            context_class=dict,
            cache_logger_on_first_use=False,
        )


_live: list[_Configuration] = []  # the newest last: it is the active one
_undo = ExitStack()  # puts back what was there before the first
_changing = threading.RLock()


@contextmanager
def configured(settings: ObservabilitySettings, stream: TextIO | None = None) -> Generator[None, None, None]:
    """Send everybody's log lines through one pipeline, to `stream` (standard error by default), until the block ends.

    Replaced are plain `StreamHandler`s wherever they sit, which is how uvicorn, gunicorn and `logging.basicConfig`
    write to the terminal. Other handlers (files, error trackers, pytest's own) stay. Blocks may overlap in any order.
    """
    mine = _Configuration(settings, sys.stderr if stream is None else stream)
    with _changing:
        if not _live:
            _take_over()
        _live.append(mine)
        _take_terminals()
        mine.activate()
    try:
        yield
    finally:
        with _changing:
            logging.getLogger().removeHandler(mine.handler)
            _live.remove(mine)
            if _live:
                _live[-1].activate()
            else:
                _undo.close()


def _take_over() -> None:
    before = structlog.get_config()
    _undo.callback(partial(structlog.configure, **before) if structlog.is_configured() else structlog.reset_defaults)
    # A logger that is bound already, as by `structlog.get_logger().bind(…)` in a module, keeps its list of processors:
    # so it is the list that is changed, and for good, since such a logger outlives Apps.
    processors: Any = before["processors"]
    if isinstance(processors, list) and _divert not in processors:
        cast("list[object]", processors).insert(0, _divert)
    root = logging.getLogger()
    _undo.callback(root.setLevel, root.level)
    logging.captureWarnings(True)
    _undo.callback(logging.captureWarnings, False)


def _divert(_logger: object, method: str, event: EventDict) -> EventDict:
    """Processor of loggers that were bound before: to the active configuration, where there is one, and no further."""
    if not _live:
        return event
    active = _live[-1]
    if logging.getLevelNamesMapping().get(method.upper(), logging.CRITICAL) >= active.level:
        active.sink.msg(active.pipeline(None, method, event))
    raise structlog.DropEvent


def _take_terminals() -> None:
    root = logging.getLogger()
    for logger in [root, *(known for known in root.manager.loggerDict.values() if isinstance(known, logging.Logger))]:
        plain: list[logging.Handler] = [known for known in logger.handlers if type(known) is logging.StreamHandler]
        if plain:
            _undo.callback(_give_back, logger, plain, logger.propagate)
            for known in plain:
                logger.removeHandler(known)
            # Its own handlers are gone: propagating prints nothing twice, and not propagating would print nothing.
            logger.propagate = True


def _give_back(logger: logging.Logger, plain: list[logging.Handler], propagate: bool) -> None:  # noqa: FBT001  private
    for known in plain:
        logger.addHandler(known)
    logger.propagate = propagate


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError, io.UnsupportedOperation):
        return False
