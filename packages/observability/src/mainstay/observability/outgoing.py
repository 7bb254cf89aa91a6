"""Calls to other services by httpx: the context and the deadline go along, and each call has a span.

    client = httpx.AsyncClient(transport=AsyncOutgoingTransport("stock", "*.shop.svc"))

A transport and no event hook, since httpx copies the headers of a request into that of a redirect: what a hook adds for
a service of ours would follow to any host that it redirects to. Here each request is sent as a copy, which has what is
meant for its host.

With a policy of mainstay-circuit-breaker around it, each attempt has its own span and says what remains of the time:

    AsyncPolicyTransport(policy, AsyncOutgoingTransport("stock"))
"""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager

import httpx
from opentelemetry import propagate, trace
from opentelemetry.trace import SpanKind, StatusCode

from mainstay.core import DEADLINE_HEADER, DeadlineExceeded, outbound_headers, remaining_seconds
from mainstay.observability import _tracing

__all__ = ["AsyncOutgoingTransport", "OutgoingTransport"]

_HOST = re.compile(r"(?:\*\.)?[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|[0-9a-f:.]*:[0-9a-f:.]*", re.ASCII)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})
# They are as of this moment; anything else that the request has already was written on purpose.
_OF_THE_MOMENT = frozenset({"traceparent", "tracestate", DEADLINE_HEADER})
_FIRST_ERROR = 400


class _Ours:
    """The hosts that are ours.

    Args:
        hosts: names or addresses, without scheme and port; `*.shop.svc` for every host under `shop.svc`.
    """

    def __init__(self, hosts: tuple[str, ...]) -> None:
        if not hosts:
            msg = 'name the hosts of your services, as in AsyncOutgoingTransport("stock", "*.shop.svc")'
            raise ValueError(msg)
        for each in hosts:
            if not _HOST.fullmatch(each):
                msg = f"{each!r} is no host: write its name or address in lower case, without scheme, port and path"
                raise ValueError(msg)
        self._hosts = frozenset(each for each in hosts if not each.startswith("*"))
        self._under = tuple(each[1:] for each in hosts if each.startswith("*"))

    def has(self, host: str) -> bool:
        """Whether a host is one of them."""
        return host in self._hosts or host.endswith(self._under)

    def sent(self, request: httpx.Request) -> httpx.Request:
        """The request as it is sent: a copy, with what its host may know."""
        headers = request.headers
        if self.has(request.url.host):
            headers = httpx.Headers(headers)
            told = outbound_headers()
            if _tracing.installed():
                propagate.inject(told)  # baggage, and what other propagators the service has
            for name, value in told.items():
                if name in _OF_THE_MOMENT or name not in headers:
                    headers[name] = value
        return httpx.Request(
            request.method, request.url, headers=headers, stream=request.stream, extensions=request.extensions
        )


class OutgoingTransport(httpx.BaseTransport):
    """Makes the requests of an `httpx.Client`, as `AsyncOutgoingTransport` makes those of an `httpx.AsyncClient`.

    Args:
        ours: the hosts of your own services.
        inner: makes the requests; by default `httpx.HTTPTransport()`.

    Raises:
        ValueError: no host is named, or something that is none.
    """

    def __init__(self, *ours: str, inner: httpx.BaseTransport | None = None) -> None:
        self._ours = _Ours(ours)
        self._inner = httpx.HTTPTransport() if inner is None else inner

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Make the request.

        Raises:
            DeadlineExceeded: the deadline has passed; nothing was sent.
        """
        _refuse_what_is_late(request)
        if not _tracing.installed():
            return self._inner.handle_request(self._ours.sent(request))
        with _calling(request) as span:
            response = self._inner.handle_request(self._ours.sent(request))
            _answered(span, response)
            return response

    def close(self) -> None:
        """Close the inner transport."""
        self._inner.close()


class AsyncOutgoingTransport(httpx.AsyncBaseTransport):
    """Makes the requests of an `httpx.AsyncClient`, with the context and the deadline of the work around them.

    A service of yours is told correlation id, cause, actor, tenant, trace context (baggage included) and the seconds
    that remain (`x-deadline-seconds`). Any other host is told nothing, also after a redirect. A header that the request
    has already stays, but for trace context and deadline, which are those of the moment. Where an OpenTelemetry SDK is
    installed, each request is a span of kind CLIENT, which ends when the head of the response is there.

    Args:
        ours: the hosts of your own services, without scheme and port; `*.shop.svc` for every host under `shop.svc`.
        inner: makes the requests; by default `httpx.AsyncHTTPTransport()`.

    Raises:
        ValueError: no host is named, or something that is none.
    """

    def __init__(self, *ours: str, inner: httpx.AsyncBaseTransport | None = None) -> None:
        self._ours = _Ours(ours)
        self._inner = httpx.AsyncHTTPTransport() if inner is None else inner

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Make the request.

        Raises:
            DeadlineExceeded: the deadline has passed; nothing was sent.
        """
        _refuse_what_is_late(request)
        if not _tracing.installed():
            return await self._inner.handle_async_request(self._ours.sent(request))
        with _calling(request) as span:
            response = await self._inner.handle_async_request(self._ours.sent(request))
            _answered(span, response)
            return response

    async def aclose(self) -> None:
        """Close the inner transport."""
        await self._inner.aclose()


def _refuse_what_is_late(request: httpx.Request) -> None:
    remaining = remaining_seconds()
    if remaining is not None and remaining <= 0:
        msg = f"the deadline had passed before {request.method} {request.url.host} was called"
        raise DeadlineExceeded(msg, no_effect=True)


@contextmanager
def _calling(request: httpx.Request) -> Generator[trace.Span, None, None]:
    method = request.method if request.method in _METHODS else "_OTHER"
    # Neither path nor query: they hold names and tokens.
    attributes: dict[str, str | int] = {
        "http.request.method": method,
        "server.address": request.url.host,
        "url.scheme": request.url.scheme,
    }
    if request.url.port is not None:
        attributes["server.port"] = request.url.port
    name = "HTTP" if method == "_OTHER" else method
    tracer = trace.get_tracer("mainstay.observability")
    with tracer.start_as_current_span(
        name, kind=SpanKind.CLIENT, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as span:
        try:
            yield span
        except BaseException as error:
            _tracing.record(span, error)
            raise


def _answered(span: trace.Span, response: httpx.Response) -> None:
    span.set_attribute("http.response.status_code", response.status_code)
    if response.status_code >= _FIRST_ERROR:
        span.set_attribute("error.type", str(response.status_code))
        span.set_status(StatusCode.ERROR)
