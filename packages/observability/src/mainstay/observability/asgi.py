"""What happens around every request, as pure ASGI and outermost.

Pure, because a middleware that runs the application in a task of its own (`BaseHTTPMiddleware`) hides what handlers
bind from those outside it. Outermost, because the error that matters most, the one that nobody handled, must carry the
correlation id too, in its log line, its answer and its headers.

A request gets the context of its headers, as far as a stranger may name one, or a new correlation id; is counted and
timed under the *template* of its route; and where an OpenTelemetry SDK is installed becomes a span.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from http import HTTPStatus
from typing import cast

from mainstay.core import (
    DEADLINE_HEADER,
    SYSTEM_CLOCK,
    App,
    Context,
    DeadlineExceeded,
    NotBoundError,
    cancelled_from_outside,
    current,
    deadline_seconds_of,
    timeout,
    uuid7,
)
from mainstay.observability import _lines, _red, _tracing
from mainstay.observability._answers import DENIAL, answer, noted, refuse
from mainstay.observability._asgi import ASGIApp, Message, Receive, Scope, Send
from mainstay.observability._facts import FACTS, NO_ANSWER, RequestFacts
from mainstay.observability.errors import leaves, problem_of
from mainstay.observability.health import asked
from mainstay.observability.settings import ObservabilitySettings, RequestSettings

__all__ = ["ObservabilityMiddleware", "RequestFacts"]


_SERVER_ERROR = int(HTTPStatus.INTERNAL_SERVER_ERROR)
_CORRELATION = b"x-correlation-id"
_NOTHING = Context()
_WANTED = {
    name.encode(): name
    for name in (
        "x-correlation-id",
        "x-causation-id",
        "x-actor",
        "x-tenant",
        "traceparent",
        "tracestate",
        DEADLINE_HEADER,
    )
}
_LONGEST_HEADER = 4096  # more than any of them may have; what is longer is not looked at
# How frameworks and servers say that the client went away; by name, since none of them need be installed.
_GONE = frozenset({"ClientDisconnect", "ClientDisconnected", "WebSocketDisconnect"})
_ENDS_THE_PROCESS = (KeyboardInterrupt, SystemExit)
_NORMAL, _NO_CODE, _ABNORMAL, _INTERNAL = 1000, 1005, 1006, 1011  # of WebSockets


class ObservabilityMiddleware:
    """Context, lines, metrics, errors and probes around an ASGI application.

    Args:
        asgi: what it wraps.
        app: the Mainstay App whose probes (`/health/live`, `/health/ready`, `/health/startup`) are answered here, under
            any root path, before any authentication or rate limit, and as far as its settings say also its metrics and
            its health with details; None answers none. Its settings say what is told of requests, too.
        trusted: whether callers are services of ours, whose headers may name an actor, a tenant, a cause and a deadline
            (`x-deadline-seconds`), and have baggage. Say so only behind a gateway that removes these headers from what
            strangers send.

    Raises:
        ConfigurationError: requests of this process are counted already in other buckets than the settings name.
    """

    def __init__(self, asgi: ASGIApp, *, app: App | None = None, trusted: bool = False) -> None:
        own = [] if app is None else [each.settings for each in app.modules]
        settings = next((each for each in own if isinstance(each, ObservabilitySettings)), None)
        self._asgi = asgi
        self._app = app
        self._paths = frozenset[str]() if settings is None else settings.paths.all
        self._trusted = trusted
        self._settings = RequestSettings() if settings is None else settings.requests
        self._histograms = _red.histograms(self._settings)
        if self._settings.access_log:
            _lines.instead_of_the_servers()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, as ASGI calls it."""
        kind = scope["type"]
        if kind not in ("http", "websocket"):
            await self._asgi(scope, receive, send)
            return
        outer = scope.get(FACTS)
        if outer is None:
            _lines.begin(access=self._settings.access_log)
        if kind == "http" and self._paths and await self._probed(scope, send):
            return
        if outer is not None:
            # An instrumented application inside of another: one request has one id, one line and one count.
            await self._asgi(scope, receive, send)
            return
        headers = _headers(scope)
        context = Context.from_headers(headers, trusted=self._trusted) if headers else _NOTHING
        correlation_id = context.correlation_id or str(uuid7())
        if context.correlation_id is None:
            context = replace(context, correlation_id=correlation_id) if headers else Context(correlation_id)
        facts = scope[FACTS] = RequestFacts(scope, context, correlation_id)
        if self._trusted:
            facts.seconds_left = deadline_seconds_of(headers)
        with facts:
            if kind == "websocket":
                await self._socket(receive, send, facts)
            elif _tracing.installed():
                await self._traced(receive, send, facts)
            else:
                await self._request(receive, send, facts)

    async def _probed(self, scope: Scope, send: Send) -> bool:
        path = self._probe(scope)
        if path is None or self._app is None or scope["method"] not in ("GET", "HEAD"):
            return False
        try:
            found = await asked(self._app, path, scope)
        except NotBoundError:
            # The App is not running: the path may be the application's.
            return False
        if found is None:
            return False
        facts: RequestFacts = scope.get(FACTS) or RequestFacts(scope, _NOTHING, "")
        facts.route, facts.status, facts.excluded = path, found.status, True
        await found.send(scope, send)
        if self._settings.access_log and self._settings.access_probes:
            facts.response_bytes = len(found.body_for(scope))
            _lines.access(facts, path)
        return True

    def _probe(self, scope: Scope) -> str | None:
        """The path of a probe that a request asks for, wherever the application is served or mounted; or None.

        A proxy strips its prefix or keeps it, and the server that was told of the prefix puts it before every path: so
        it may be there not at all, once, or twice.
        """
        path: str = scope["path"]
        root: str = scope.get("root_path", "").rstrip("/")
        for _ in range(3):
            if path in self._paths:
                return path
            if not root or not path.startswith(f"{root}/"):
                return None
            path = "/" + path[len(root) :].lstrip("/")
        return None

    async def _traced(self, receive: Receive, send: Send, facts: RequestFacts) -> None:
        with _tracing.server_span(facts.scope, facts.method, trusted=self._trusted) as (span, own):
            facts.traceparent = _tracing.traceparent()
            span.set_attribute("mainstay.correlation_id", facts.correlation_id)
            if own:
                span.set_attribute("http.request.method", facts.method)
            noted: BaseException | None = None

            def note_the_error() -> None:
                nonlocal noted
                error = facts.error
                if error is not None and error is not noted and _by_our_fault(error):
                    noted = error
                    _tracing.record(span, error)

            async def observed(message: Message) -> None:
                if message["type"] == "http.response.start":
                    note_the_error()  # now, since a framework's span ends with the answer
                await send(message)

            try:
                await self._request(receive, observed, facts)
            finally:
                note_the_error()
                if own:
                    _tracing.over(span, facts.method, facts.template(), facts.status, failed=noted is not None)

    async def _request(self, receive: Receive, send: Send, facts: RequestFacts) -> None:
        async def received() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect":
                facts.gone = True
            else:
                facts.request_bytes += len(message.get("body") or b"")
            return message

        async def observed(message: Message) -> None:
            kind = message["type"]
            last = False
            if kind == "http.response.body":
                facts.response_bytes += len(message.get("body") or b"")
                last = not message.get("more_body", False)
            elif kind == "http.response.start":
                facts.answered_in(current())
                message = _begun(message, facts)
            elif kind in ("http.response.pathsend", "http.response.zerocopysend"):
                last = not message.get("more_body", False)
            try:
                await send(message)
            except OSError as error:
                facts.gone, facts.lost = True, error
                raise
            if last:
                facts.end()
                if facts.status < _SERVER_ERROR or facts.error is not None:
                    self._over(facts)
                # Or else it may be a framework's answer to an error that follows.

        _red.IN_PROGRESS.inc()
        try:
            if facts.seconds_left is None:
                await self._asgi(facts.scope, received, observed)
            else:
                await self._within(facts.seconds_left, facts, received, observed)
            if facts.ended_at is None and not facts.gone:
                await _unfinished(facts, observed)
        except BaseException as error:
            if not await _survived(error, facts, observed):
                raise
        finally:
            _red.IN_PROGRESS.dec()
            facts.end()
            self._over(facts)

    async def _within(self, seconds: float, facts: RequestFacts, receive: Receive, send: Send) -> None:
        """Call the application within its caller's deadline, which ends when the answer is complete."""
        if seconds <= 0:
            msg = "the caller's deadline had passed when its request came"
            raise DeadlineExceeded(msg, no_effect=True)
        limit = timeout(seconds, clock=SYSTEM_CLOCK if self._app is None else self._app.clock)

        async def answered(message: Message) -> None:
            await send(message)
            if facts.ended_at is not None:
                limit.lift()

        async with limit:
            await self._asgi(facts.scope, receive, answered)

    def _over(self, facts: RequestFacts) -> None:
        """Tell of a request whose answer is complete, or will not be completed; once."""
        if facts.told:
            return
        facts.told = True
        if facts.method == "HEAD":
            facts.response_bytes = 0
        route = facts.template()
        if (facts.status >= _SERVER_ERROR and not facts.excluded) or _by_our_fault(facts.error):
            _lines.failed(facts, route)
        if facts.excluded or route in self._settings.excluded:
            return
        _red.measure(facts, route, self._histograms)
        if self._settings.access_log:
            _lines.access(facts, route)

    async def _socket(self, receive: Receive, send: Send, facts: RequestFacts) -> None:
        accepted = False

        async def received() -> Message:
            message = await receive()
            if message["type"] == "websocket.receive":
                facts.request_bytes += _size(message)
            elif message["type"] == "websocket.disconnect" and facts.ended_at is None:
                facts.gone = True
                facts.end()
                facts.status = message.get("code") or _NO_CODE
            return message

        async def observed(message: Message) -> None:
            nonlocal accepted
            kind = message["type"]
            if kind == "websocket.send":
                facts.response_bytes += _size(message)
            elif kind == "websocket.http.response.start":
                message = _begun(message, facts)
            elif kind == "websocket.close":
                facts.status = (message.get("code") or _NORMAL) if accepted else int(HTTPStatus.FORBIDDEN)
            try:
                await send(message)
            except OSError as error:
                facts.gone, facts.lost = True, error
                raise
            if kind == "websocket.accept":
                accepted = True
                facts.answered_in(current())
                _red.SOCKETS_OPEN.inc()
            elif kind == "websocket.close":
                facts.end()

        try:
            await self._asgi(facts.scope, received, observed)
            if not accepted and _unanswered(facts):
                await _refused(RuntimeError("the application neither accepted nor refused"), facts, observed)
            if not accepted:
                # uvicorn can take what was refused by an answer for a handshake that was left open.
                _lines.failure_is_told()
        except BaseException as error:
            if _went_away(error, facts) and not cancelled_from_outside(error):
                _lines.failure_is_told()  # a handshake that is left open, for one, without a client that waits
            elif cancelled_from_outside(error):
                raise
            else:
                facts.error = error
                # Where nothing was said yet, it can be. Otherwise only the server can break it off, and it would log
                # this, too, but outside of the context.
                silent = not accepted and _unanswered(facts)
                if not (silent and isinstance(error, Exception) and await _refused(error, facts, observed)):
                    raise
        finally:
            if accepted:
                _red.SOCKETS_OPEN.dec()
            self._socket_over(facts, accepted=accepted)

    def _socket_over(self, facts: RequestFacts, *, accepted: bool) -> None:
        facts.end()
        if facts.status == NO_ANSWER and accepted:
            facts.status = _INTERNAL if facts.error is not None else _ABNORMAL
        elif facts.status == NO_ANSWER and facts.error is not None:
            facts.status = _SERVER_ERROR  # which the server makes of it
        route = facts.template()
        ours = facts.status == _INTERNAL or _SERVER_ERROR <= facts.status < _NORMAL
        if ours or _by_our_fault(facts.error):
            _lines.failed(facts, route)
        if facts.excluded or route in self._settings.excluded:
            return
        _red.measure_socket(facts, route, accepted=accepted)
        if self._settings.access_log:
            _lines.access(facts, route)


async def _unfinished(facts: RequestFacts, send: Send) -> None:
    """See to an application that has returned without an answer, or in the middle of one."""
    if facts.begun:
        facts.status = _SERVER_ERROR  # the server breaks the connection off
    else:
        facts.error = RuntimeError("the application returned without an answer")
        await answer(facts.error, facts.scope, send)


def _unanswered(facts: RequestFacts) -> bool:
    """Whether a WebSocket that was not accepted was not refused either, and its client still waits."""
    return not facts.begun and not facts.gone and facts.ended_at is None


async def _refused(error: Exception, facts: RequestFacts, send: Send) -> bool:
    """Refuse a WebSocket with the problem that an error is, where the server can say one; whether that was done.

    Where it cannot, it is left to the server, which answers 500: it would make a 403 of a close.
    """
    problem = problem_of(error)
    noted(facts.scope, error, problem)
    if DENIAL not in (facts.scope.get("extensions") or {}):
        return False
    with suppress(OSError):  # the client is gone
        await refuse(problem, facts.scope, send, accepted=False)
    return True


async def _survived(error: BaseException, facts: RequestFacts, send: Send) -> bool:
    """See to an exception that has left the application; whether it is not to be raised to the server."""
    if isinstance(error, GeneratorExit) or cancelled_from_outside(error):
        return False
    if _went_away(error, facts):
        return True
    begun = facts.begun
    facts.error = error
    if facts.told:
        # The client has its answer; what runs in the background failed.
        _lines.failed(facts, facts.template(), "failed after its answer")
    elif begun or isinstance(error, _ENDS_THE_PROCESS):
        # It breaks off; or it was complete, and a framework answered its own error and raises it to be logged.
        facts.status = _SERVER_ERROR
    else:
        # Answered here and not raised again, or the server would log it a second time, without its context.
        with suppress(OSError):  # the client is gone
            await answer(cast("Exception", error), facts.scope, send)
    # Once an answer has begun, only the server can break it off. What is no Exception is not for us to end.
    ends = begun or not isinstance(error, Exception | asyncio.CancelledError)
    if ends:
        _lines.failure_is_told()
    return not ends


def _went_away(error: BaseException, facts: RequestFacts) -> bool:
    """Whether an exception says that the client went away, and nothing else."""
    if not facts.gone:
        return False
    try:
        return all(
            each is facts.lost or type(each).__name__ in _GONE or isinstance(each, asyncio.CancelledError)
            for each in leaves(error)
        )
    except Exception:  # noqa: BLE001  a group is code of others, and may fail when it is asked what is in it
        return False


def _by_our_fault(error: BaseException | None) -> bool:
    return error is not None and problem_of(error).status >= _SERVER_ERROR


def _begun(message: Message, facts: RequestFacts) -> Message:
    """The beginning of an answer, with the correlation id in its headers."""
    if facts.begun:
        return message  # a second one, for the server to refuse
    facts.begun = True
    if not facts.gone:
        status = message.get("status")
        facts.status = int(status) if isinstance(status, int) else _SERVER_ERROR
    headers = [pair for pair in message.get("headers", ()) if not _names_the_correlation(pair[0])]
    headers.append((_CORRELATION, facts.correlation_id.encode()))
    return {**message, "headers": headers}


def _size(message: Message) -> int:
    """How many bytes a message of a WebSocket has."""
    text: str | None = message.get("text")
    if text is None:
        return len(message.get("bytes") or b"")
    return len(text) if text.isascii() else len(text.encode(errors="replace"))


def _headers(scope: Scope) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        known = _WANTED.get(name)
        if known is not None and len(value) <= _LONGEST_HEADER:
            found[known] = value.decode("latin-1")
    return found


def _names_the_correlation(header: bytes) -> bool:
    return len(header) == len(_CORRELATION) and header.lower() == _CORRELATION
