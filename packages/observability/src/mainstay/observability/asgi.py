"""What happens around every request, as pure ASGI and outermost.

Pure, because a middleware that runs the application in a task of its own (`BaseHTTPMiddleware`) hides what handlers
bind from those outside it. Outermost, because the error that matters most, the one that nobody handled, must carry the
correlation id too, in its log line, its answer and its headers.

A request gets the context of its headers, as far as a stranger may name one, or a new correlation id; is counted and
timed under the *template* of its route; and where an OpenTelemetry SDK is installed becomes a span.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import replace
from http import HTTPStatus
from time import perf_counter
from typing import Any, cast

from opentelemetry.trace import StatusCode
from prometheus_client import Counter, Gauge, Histogram

from mainstay.core import App, Context, NotBoundError, bind, uuid7
from mainstay.observability import _tracing
from mainstay.observability._answers import answer
from mainstay.observability.health import HealthWatch, probe_paths
from mainstay.observability.metrics import CappedLabels

__all__ = ["ObservabilityMiddleware"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

_log = logging.getLogger("mainstay.observability")

REQUESTS = Counter("mainstay_http_requests", "Requests answered.", ["method", "route", "status"])
SECONDS = Histogram(
    "mainstay_http_request_seconds",
    "From the request's first byte to its answer's last; what runs in the background afterwards is not in it.",
    ["method", "route"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
IN_PROGRESS = Gauge("mainstay_http_requests_in_progress", "Requests being answered.", multiprocess_mode="livesum")

# Templates are as many as the application has routes; the bound is for applications that make routes from data.
_count = CappedLabels(REQUESTS, 2000)
_seconds = CappedLabels(SECONDS, 500)

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})
_UNMATCHED = "unmatched"
_CORRELATION = b"x-correlation-id"
_NOTHING = Context()
_WANTED = {
    name.encode(): name
    for name in ("x-correlation-id", "x-causation-id", "x-actor", "x-tenant", "traceparent", "tracestate")
}
_NO_ANSWER = 499  # nobody was there to be answered: the client went away, or the handler was cancelled
# How frameworks and servers say that the client went away; by name, since none of them need be installed.
_GONE = frozenset({"ClientDisconnect", "ClientDisconnected", "WebSocketDisconnect"})
_OBSERVED = "mainstay.observability"  # in a scope: a middleware further out has this request already


class ObservabilityMiddleware:
    """Context, metrics, errors and probes around an ASGI application.

    Args:
        asgi: what it wraps.
        app: the Mainstay App whose probes (`/health/live`, `/health/ready`, `/health/startup`) are answered here,
            before any authentication or rate limit, and as far as its settings say also its metrics and its health with
            details; None answers none.
        trusted: whether callers are services of ours, whose headers may name an actor, a tenant and a cause. Say so
            only behind a gateway that removes these headers from what strangers send.
    """

    def __init__(self, asgi: ASGIApp, *, app: App | None = None, trusted: bool = False) -> None:
        self._asgi = asgi
        self._app = app
        self._paths = frozenset[str]() if app is None else probe_paths(app.modules)
        self._trusted = trusted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, as ASGI calls it."""
        if scope["type"] not in ("http", "websocket"):
            await self._asgi(scope, receive, send)
            return
        if self._app is not None and scope["path"] in self._paths and await self._probed(self._app, scope, send):
            return
        if scope.get(_OBSERVED):
            # An instrumented application inside of another: one request has one id, one line and one count.
            await self._asgi(scope, receive, send)
            return
        scope[_OBSERVED] = True
        headers = _headers(scope)
        context = Context.from_headers(headers, trusted=self._trusted) if headers else _NOTHING
        correlation_id = context.correlation_id or str(uuid7())
        if context.correlation_id is None:
            context = replace(context, correlation_id=correlation_id) if headers else Context(correlation_id)
        with bind(context):
            if scope["type"] == "websocket":
                await self._socket(scope, receive, send)
            elif _tracing.installed():
                await self._traced(scope, receive, send, headers, correlation_id)
            else:
                await self._request(scope, receive, send, correlation_id)

    async def _probed(self, app: App, scope: Scope, send: Send) -> bool:
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            return False
        try:
            watch = app.get(HealthWatch)
        except NotBoundError:
            # No ObservabilityModule in the App, or the App is not running: the path may be the application's.
            return False
        said = {name: value.decode("latin-1") for name, value in scope["headers"]}
        answer = await watch.answer(
            scope["path"], said.get(b"accept", ""), authorization=said.get(b"authorization", "")
        )
        if answer is None:
            return False
        body = answer.body if scope["method"] == "GET" else b""
        headers = [
            (b"content-type", answer.content_type.encode()),
            (b"content-length", str(len(answer.body)).encode()),
            (b"cache-control", b"no-store"),
        ]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        return True

    async def _traced(
        self, scope: Scope, receive: Receive, send: Send, headers: Mapping[str, str], correlation_id: str
    ) -> None:
        around = _tracing.traceparent()
        if around is not None:
            # The framework or another middleware has made this request's span: a second one would count it twice.
            with bind(traceparent=around):
                await self._request(scope, receive, send, correlation_id)
            return
        attributes = {"http.request.method": _method(scope), "mainstay.correlation_id": correlation_id}
        with _tracing.server_span(_method(scope), headers, attributes) as span:
            # What is called from here on continues this span, not the caller's.
            with bind(traceparent=_tracing.traceparent()):
                status = await self._request(scope, receive, send, correlation_id)
            span.set_attribute("http.route", route := route_template(scope))
            span.set_attribute("http.response.status_code", status)
            span.update_name(f"{_method(scope)} {route}")
            if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                span.set_status(StatusCode.ERROR)

    async def _socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._asgi(scope, receive, send)
        except Exception as error:
            if type(error).__name__ not in _GONE:
                # Only the server can break it off, and it logs this too, but outside of the context.
                _log.exception("websocket %s failed", route_template(scope))
            raise

    async def _request(self, scope: Scope, receive: Receive, send: Send, correlation_id: str) -> int:
        status = _NO_ANSWER
        started = gone = False
        end: float | None = None

        async def received() -> Message:
            nonlocal gone
            message = await receive()
            if message["type"] == "http.disconnect":
                gone = True
            return message

        async def observed(message: Message) -> None:
            nonlocal status, started, end
            if message["type"] == "http.response.body":
                if not message.get("more_body", False):
                    await send(message)
                    end = perf_counter()
                    return
            elif message["type"] == "http.response.start":
                started = True
                status = _NO_ANSWER if gone else message["status"]
                headers = [pair for pair in message.get("headers", ()) if not _names_the_correlation(pair[0])]
                headers.append((_CORRELATION, correlation_id.encode()))
                message["headers"] = headers
            await send(message)

        begin = perf_counter()
        IN_PROGRESS.inc()
        try:
            await self._asgi(scope, received, observed)
        except Exception as error:
            if gone and type(error).__name__ in _GONE:
                if started:
                    raise
                _log.info("%s %s: the client went away", _method(scope), route_template(scope))
                return status
            # Logged here, inside the context. Answered here and not raised again, or the server would log it a second
            # time, without its context; but once an answer has begun, only the server can break it off.
            _log.exception("%s %s failed", _method(scope), route_template(scope))
            if started:
                raise
            await answer(error, scope, observed)
        finally:
            IN_PROGRESS.dec()
            method, route = _method(scope), route_template(scope)
            _count(method, route, str(status)).inc()
            _seconds(method, route).observe((perf_counter() if end is None else end) - begin)
        return status


def _headers(scope: Scope) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        known = _WANTED.get(name)
        if known is not None:
            found[known] = value.decode("latin-1")
    return found


def _names_the_correlation(header: bytes) -> bool:
    return len(header) == len(_CORRELATION) and header.lower() == _CORRELATION


def _method(scope: Scope) -> str:
    method: str = scope["method"]
    return method if method in _METHODS else "other"


def route_template(scope: Scope) -> str:
    """The template of the route that answers, such as `/orders/{id}`, prefixes of routers and mounts included.

    The route's own path lacks the prefixes, and frameworks have moved them about; so they are taken from the path that
    was asked for: what remains of it before the part that the route describes, with the values of mount parameters put
    back into their names. Where that is not certain, as with a parameter that was converted or spans several parts, the
    route's own path has to do: what a stranger wrote must never be a label. A request that no route answers is
    `unmatched`, whatever its path.
    """
    route = scope.get("route")
    template: str | None = getattr(route, "path_format", None) or getattr(route, "path", None)
    if template is None:
        return _UNMATCHED
    path: str = scope["path"]
    if template == path:
        return template
    values = cast("dict[str, Any]", scope.get("path_params") or {})
    described, rest = template, dict(values)
    for name, value in values.items():
        marker = f"{{{name}}}"
        if marker in described:
            described = described.replace(marker, str(value))
            del rest[name]
    if described == path or not path.endswith(described):
        return template
    prefix = path[: len(path) - len(described)]
    parts = prefix.split("/")
    for name, value in rest.items():
        if not isinstance(value, str) or not value or value not in parts:
            return template
        parts = [f"{{{name}}}" if part == value else part for part in parts]
    return "/".join(parts) + template
