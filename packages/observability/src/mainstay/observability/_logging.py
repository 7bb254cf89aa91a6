"""One stream of log lines for everybody: structlog's loggers, stdlib `logging`, uvicorn, asyncio, Python's warnings.

Two ways lead into one pipeline. An application's structlog loggers run through it directly. A `logging.LogRecord` of a
library is turned into the same event dictionary by a formatter and runs through the same processors; structlog ships
one for that (`ProcessorFormatter`), which copies the record and wraps the event several times over, and is the slower
by a factor that `benchmarks/observability` states.

Nothing that a line holds can fail the program that writes it, and nothing secret comes out: `_redaction` looks at every
value, and at every text, before it is rendered.

The loggers of a process are one, so they follow one configuration at a time: the newest of those that live. When the
last has gone, everything is as it was before the first.
"""

from __future__ import annotations

import io
import logging
import sys
import threading
from collections.abc import Callable, Generator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from random import random
from time import time_ns
from typing import Any, TextIO, cast
from zlib import crc32

import structlog
from structlog.contextvars import merge_contextvars

from mainstay.core import MainstayError, current
from mainstay.observability import _tracing
from mainstay.observability._formats import Console, Fields, Format, ecs, journal, plain_json
from mainstay.observability._redaction import BROKEN, Redactor, activate, active, cut, redact_text
from mainstay.observability._secrets import Secrets
from mainstay.observability._sink import COUNTS, Sink
from mainstay.observability._tracebacks import traceback_of
from mainstay.observability.settings import ObservabilitySettings

EventDict = MutableMapping[str, Any]

# What a LogRecord always has, and what formatters put on it; everything else on it was passed as `extra`.
_RECORD_LENGTH = len(logging.makeLogRecord({}).__dict__)
_RECORD_FIELDS = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}

_UNMADE = "a log line could not be made"

_render_stack = structlog.processors.StackInfoRenderer(additional_ignores=["mainstay.observability"])


def line_of(level: str, logger: str | None, event: EventDict) -> tuple[Fields, Fields]:
    """The parts of a line: its own fields, and the caller's without secrets.

    Consumes `event`, which holds the caller's fields beside what the line is to say.
    """
    own: Fields = {"timestamp": _timestamp(), "level": level}
    if logger is not None:
        own["logger"] = logger
    redactor = active()
    said = event.pop("event", "")
    own["event"] = redactor.text(said) if type(said) is str else redactor.fields({"event": said})["event"]
    merge_contextvars(None, level, event)  # what existing code bound by structlog's own means
    if "exc_info" in event or "stack_info" in event:
        _add_trace(level, event, own, redactor)
    _add_context(own)
    return own, redactor.fields(event)


def _add_context(own: Fields) -> None:
    """Who, for whom and as part of what, from `current()`, and the trace where there is one."""
    context = current()
    if context.correlation_id is not None:
        own["correlation_id"] = context.correlation_id
    if context.causation_id is not None:
        own["causation_id"] = context.causation_id
    if context.actor is not None:
        own["actor"] = context.actor
    if context.tenant is not None:
        own["tenant"] = context.tenant
    span = _tracing.current_ids() or _tracing.ids_of(context.traceparent)
    if span is not None:
        own["trace_id"], own["span_id"] = span


def _add_trace(level: str, event: EventDict, own: Fields, redactor: Redactor) -> None:
    """The traceback as text, the stack, and the code of a domain error."""
    if "stack_info" in event:
        stack: Any = event.pop("stack_info")
        if stack and not isinstance(stack, str):  # structlog's: make it now
            stack = _render_stack(None, level, {"stack_info": stack})["stack"]
        if stack:
            own["stack"] = redactor.long_text(stack)
    info: Any = event.pop("exc_info", None)
    if not info:
        return
    try:
        if isinstance(info, BaseException):
            error: BaseException | None = info
        elif isinstance(info, tuple):
            error = cast("tuple[Any, BaseException | None, Any]", info)[1]
        else:
            error = sys.exc_info()[1]
        if error is not None:
            own["exception"] = redactor.long_text(traceback_of(error))
            if isinstance(error, MainstayError) and "code" not in event:
                own["code"] = error.code
    except BROKEN:  # an exception is a user's object too
        own["exception"] = redactor.last_resort(cast("object", info))


_second: tuple[int, str] = (0, "1970-01-01T00:00:00.")


def _timestamp() -> str:
    # A third of the cost of making all of it anew, and a sixth of that of strftime.
    global _second  # noqa: PLW0603  one value, replaced as a whole
    now = time_ns()
    seconds, rest = divmod(now, 1_000_000_000)
    known = _second
    if known[0] != seconds:
        known = _second = (seconds, datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S."))
    return f"{known[1]}{rest // 1000:06d}Z"


class _Pipeline:
    """All processors as one, which never raises: no caller is to be failed by its line."""

    def __init__(self, settings: ObservabilitySettings, write: Format) -> None:
        self._service = settings.service_name
        self._limit = settings.log_limits.line_chars
        self._sampling = _Sampling(settings.log_sampling) if settings.log_sampling else None
        self._write = write

    def __call__(self, logger: object, method: str, event: EventDict) -> str:
        """As structlog calls a processor: the last one, whose line goes to the logger.

        Raises:
            DropEvent: the line is not among those that are written of its kind.
        """
        name = logger.name if isinstance(logger, _Out) else None
        if self._sampling is not None and not self._sampling.keeps(method, name):
            raise structlog.DropEvent
        return self.line(method, name, event)

    def wants(self, record: logging.LogRecord) -> bool:
        """Whether the line of `record` is written, as far as sampling goes."""
        return (
            self._sampling is None
            or record.levelno >= logging.ERROR
            or self._sampling.keeps(record.levelname.lower(), record.name)
        )

    def line(self, level: str, logger: str | None, event: EventDict) -> str:
        """The finished line."""
        try:
            own, fields = line_of(level, logger, event)
            own["service"] = self._service
            line = self._write(own, fields)
            return line if len(line) <= self._limit else self._shortened(own, fields)
        except BROKEN as error:  # see above
            COUNTS.change("unmade")
            own = {"timestamp": _timestamp(), "level": level, "service": self._service, "event": _UNMADE}
            return self._write(own, {"error": type(error).__name__})

    def _shortened(self, own: Fields, fields: Fields) -> str:
        """The line with its longest values cut, and their names in `cut`."""
        COUNTS.change("cut")
        share = max(64, self._limit // (3 * (len(own) + len(fields) + 1)))
        names: list[str] = []
        for part in (fields, own):
            for name, value in part.items():
                text = value if isinstance(value, str) else plain_json({}, {"": value})[4:-1]
                if len(plain_json({}, {"": text})) > share + 6:
                    # What JSON writes with six characters each is six times as long as it seems.
                    fits = len(plain_json({}, {"": text[:share]})) <= 2 * share
                    part[name] = cut(text, share if fits else share // 6)
                    names.append(str(name))
        line = self._write({**own, "cut": names}, fields)
        if len(line) <= self._limit:
            return line
        return self._write({**own, "cut": ["all fields"]}, {})


class _Sampling:
    """Which lines are written, of loggers or levels that write too many."""

    def __init__(self, shares: dict[str, float]) -> None:
        self._shares = shares
        self._longest_first = sorted(shares, key=len, reverse=True)

    def keeps(self, level: str, logger: str | None) -> bool:
        """Decide; for all lines of a correlation id alike, so that what is written of a request is whole."""
        if level in ("error", "critical"):
            return True
        share = self._share(level, logger)
        if share >= 1:
            return True
        named = current().correlation_id
        place = random() if named is None else crc32(named.encode(errors="replace")) / 2**32  # noqa: S311  no secret
        if place < share:
            return True
        COUNTS.lose("sampled_out")
        return False

    def _share(self, level: str, logger: str | None) -> float:
        if logger is not None:
            for name in self._longest_first:
                if logger == name or logger.startswith(f"{name}."):
                    return self._shares[name]
        return self._shares.get(level.upper(), 1.0)


class _Out:
    """What structlog's loggers write to: the newest configuration's sink, whichever that is when they do."""

    __slots__ = ("name",)

    def __init__(self, name: str | None) -> None:
        self.name = name

    def msg(self, line: str) -> None:
        """Write the line."""
        if _live:
            _live[-1].sink.msg(line)

    debug = info = warning = warn = error = critical = fatal = failure = exception = log = err = msg


def _out(*names: object) -> _Out:
    return _Out(names[0] if names and isinstance(names[0], str) else None)


# A logger that was used keeps its class and its list of processors, since making it anew for each line costs as much as
# the line below the level should. So there is one class and one list, and what they do follows the configuration.


class _Bound(structlog.make_filtering_bound_logger(logging.NOTSET)):  # type: ignore[misc]  # made by a function
    """The class of structlog's loggers; its methods are those of the level."""


_processors: list[structlog.typing.Processor] = []


def _follow(processor: structlog.typing.Processor, level: int) -> None:
    _processors[:] = [processor]
    for name, method in vars(structlog.make_filtering_bound_logger(level)).items():
        if not name.startswith("__"):
            setattr(_Bound, name, method)


def _resume(logger: object, method: str, event: EventDict) -> EventDict:
    """Processor of loggers whose configuration is undone: to the one that structlog has now, and no further."""
    config = structlog.get_config()
    name = logger.name if isinstance(logger, _Out) else None
    if config["processors"] is _processors:  # put back by code that remembered it for longer than the App lived
        level = logging.getLevelNamesMapping().get(method.upper(), logging.CRITICAL)
        logging.getLogger(name).log(level, "%s", redact_text(str(event.get("event"))))
        raise structlog.DropEvent
    made = config["logger_factory"](*(() if name is None else (name,)))
    getattr(config["wrapper_class"](made, config["processors"], {}), method)(**event)
    raise structlog.DropEvent


@contextmanager
def suspended() -> Generator[None, None, None]:
    """Let structlog's loggers follow what the block configures, and then the App's configuration again."""
    _follow(_resume, logging.NOTSET)
    try:
        yield
    finally:
        if _live:
            _live[-1].follow()


def event_of(record: logging.LogRecord) -> EventDict:
    """The event dictionary of a `LogRecord`: what it says, and its `extra`."""
    try:
        message = record.getMessage()
    except BROKEN as error:  # users' objects and users' mistakes
        # Without the arguments, which may be secret, and which stdlib would print.
        place = f"{record.pathname}:{record.lineno}"
        said = record.msg if type(record.msg) is str else active().last_resort(record.msg)
        message = f"{said} [{type(error).__name__}: its arguments do not fit, {place}]"
    event: dict[str, Any] = {}
    if len(record.__dict__) > _RECORD_LENGTH:
        for name, value in list(record.__dict__.items()):
            if name not in _RECORD_FIELDS:
                free = name
                while free == "event" or (free != name and free in record.__dict__):
                    free += "_"
                event[free] = value
    server = _OF_SERVERS.get(record.name)
    if server is not None:
        server(record, event)
    event["event"] = message
    if record.exc_info:
        event["exc_info"] = record.exc_info
    if record.stack_info:
        event["stack_info"] = record.stack_info
    return event


def _without_colors(_record: logging.LogRecord, event: EventDict) -> None:
    event.pop("color_message", None)  # uvicorn's message again, for a terminal


def _uvicorn_access(record: logging.LogRecord, event: EventDict) -> None:
    args = record.args
    if isinstance(args, tuple) and len(args) == len(_ACCESS):
        for name, value in zip(_ACCESS, args, strict=True):
            event.setdefault(name, value)


def _gunicorn_access(record: logging.LogRecord, event: EventDict) -> None:
    args = record.args
    if isinstance(args, Mapping):
        for atom, name in _ATOMS.items():
            if atom in args:
                event.setdefault(name, args[atom])


_ACCESS = ("client", "method", "path", "http_version", "status")
_ATOMS = {"h": "client", "m": "method", "U": "path", "H": "http_version", "s": "status", "B": "bytes", "L": "seconds"}
_OF_SERVERS: dict[str, Callable[[logging.LogRecord, EventDict], None]] = {
    "uvicorn": _without_colors,
    "uvicorn.error": _without_colors,
    "uvicorn.access": _uvicorn_access,
    "gunicorn.access": _gunicorn_access,
}


class _Handler(logging.Handler):
    def __init__(self, sink: Sink, pipeline: _Pipeline) -> None:
        super().__init__()
        self._sink = sink
        self._pipeline = pipeline

    def handle(self, record: logging.LogRecord) -> bool:
        """Make and write the line without stdlib's lock around both: the sink needs none."""
        try:
            kept: Any = self.filter(record)  # from Python 3.12 on a record, maybe another
        except BROKEN:  # a filter's mistake: a line too many is better than one too few
            kept = True
        if kept:
            self.emit(record if kept is True else kept)
        return bool(kept)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self._pipeline.wants(record):
                self._sink.msg(self._pipeline.line(record.levelname.lower(), record.name, event_of(record)))
        except BROKEN:  # at the end of the stack, where even the line in its place cannot be made
            COUNTS.lose("unmade")


class _Configuration:
    def __init__(self, settings: ObservabilitySettings, stream: TextIO) -> None:
        self.sink = Sink(stream, self._told)
        self.level = logging.getLevelNamesMapping()[settings.log_level]
        formats: dict[str, Format] = {"json": plain_json, "ecs": ecs, "journal": journal}
        self.pipeline = _Pipeline(settings, formats.get(settings.log_format) or Console(colors=_is_terminal(stream)))
        self.redactor = Redactor(Secrets(settings.secret_keys, settings.plain_keys), settings.log_limits)
        self.handler = _Handler(self.sink, self.pipeline)

    def _told(self, lost: int) -> str:
        event = {"event": "log lines were lost: they could not be written, or not for too long", "lines": lost}
        return self.pipeline.line("error", __name__, event)

    def follow(self) -> None:
        """Let structlog's loggers, used ones too, follow this configuration."""
        _follow(self.pipeline, self.level)

    def activate(self) -> None:
        """Give everybody's loggers this pipeline."""
        root = logging.getLogger()
        for other in _live:
            root.removeHandler(other.handler)
        root.addHandler(self.handler)
        root.setLevel(self.level)
        activate(self.redactor)
        self.follow()
        structlog.configure(
            processors=_processors,
            wrapper_class=_Bound,
            logger_factory=_out,
            context_class=dict,
            cache_logger_on_first_use=True,
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
                activate(None)
                _undo.close()
                _follow(_resume, logging.NOTSET)
        mine.sink.flush()


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


def _divert(logger: object, method: str, event: EventDict) -> EventDict:
    """Processor of loggers that were bound before: to the active configuration, where there is one, and no further."""
    if not _live:
        return event
    newest = _live[-1]
    if logging.getLevelNamesMapping().get(method.upper(), logging.CRITICAL) >= newest.level:
        newest.sink.msg(newest.pipeline(logger, method, event))
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
