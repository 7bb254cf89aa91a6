"""The lines that a request has: one for itself, one more for an error of ours; and none of the server's beside them."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

from mainstay.core import bind
from mainstay.observability._facts import RequestFacts

_log = logging.getLogger("mainstay.observability")
_access = logging.getLogger("mainstay.access")

_FIRST_SERVER_ERROR = int(HTTPStatus.INTERNAL_SERVER_ERROR)
_FIRST_CLOSE_CODE, _INTERNAL = 1000, 1011  # of WebSockets
_NOTHING, _LINE, _FAILURE = 0, 1, 2
# What the library `websockets` says by uvicorn's logger of each connection, without its path or address, and in tasks
# of its own, so that nothing tells of which request.
_OF_SOCKETS = frozenset({"connection open", "connection closed", "connection rejected (%d %s)"})

# What this package says itself of the request that the task at hand is for. It is not reset when the middleware ends:
# the server logs an error that comes out of it, in the same task.
_said: ContextVar[int] = ContextVar("mainstay_said_of_request", default=_NOTHING)


class _NotTwice(logging.Filter):
    """Keeps back what uvicorn says of a request of which the same is said here, with its context."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.msg if isinstance(record.msg, str) else ""
        if message in _OF_SOCKETS:
            return False
        said = _said.get()
        if said == _NOTHING:
            return True
        if record.levelno >= logging.ERROR:
            return not said & _FAILURE
        line = record.name == "uvicorn.access" or '"WebSocket %s"' in message
        return not (line and said & _LINE)


_not_twice = _NotTwice()


def instead_of_the_servers() -> None:
    """Let the lines of this package stand in for those that uvicorn has for the same requests."""
    for name in ("uvicorn.access", "uvicorn.error"):
        logging.getLogger(name).addFilter(_not_twice)


def begin(*, access: bool) -> None:
    """A request begins in this task, which has an access line of ours or the server's."""
    _said.set(_LINE if access else _NOTHING)


def failure_is_told() -> None:
    """What the server will say of the request in this task has been said."""
    _said.set(_said.get() | _FAILURE)


def failed(facts: RequestFacts, route: str, how: str = "failed") -> None:
    """Log a request that failed by our fault, with the error where one was raised."""
    extra: dict[str, Any] = {"route": route, "status": facts.status}
    if facts.code is not None:
        extra["code"] = facts.code
    if _log.isEnabledFor(logging.ERROR):
        _write(facts, _log, logging.ERROR, f"%s %s {how}", (facts.method, route), extra=extra, error=facts.error)
    failure_is_told()


def access(facts: RequestFacts, route: str) -> None:
    """Log a request, or a WebSocket, that is over: at WARNING where it failed by our fault, at INFO otherwise."""
    status = facts.status
    socket = status >= _FIRST_CLOSE_CODE
    level = logging.WARNING if (status == _INTERNAL if socket else status >= _FIRST_SERVER_ERROR) else logging.INFO
    if not _access.isEnabledFor(level):
        return
    client = facts.scope.get("client")
    extra = {
        "method": facts.method,
        "route": route,
        "close_code" if socket else "status": status,
        "duration_seconds": round(facts.seconds(), 6),
        "request_bytes": facts.request_bytes,
        "response_bytes": facts.response_bytes,
        "client": client[0] if client else None,
    }
    _write(facts, _access, level, "%s %s %s", (facts.method, route, status), extra=extra)


def _write(
    facts: RequestFacts,
    logger: logging.Logger,
    level: int,
    message: str,
    args: tuple[object, ...],
    *,
    extra: dict[str, Any],
    error: BaseException | None = None,
) -> None:
    info = None if error is None else (type(error), error, error.__traceback__)
    try:
        with bind(facts.of_lines()):
            # Without looking for the caller, which is always the same and costs as much as the rest of the record.
            logger.handle(logger.makeRecord(logger.name, level, __file__, 0, message, args, info, None, extra))
    except Exception as fault:  # noqa: BLE001  a handler of the application's own; the request is not to fail by it
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(f"{logger.name}: a line could not be logged ({type(fault).__name__})\n")
