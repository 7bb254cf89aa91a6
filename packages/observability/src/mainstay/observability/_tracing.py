"""OpenTelemetry where somebody installed it, nothing where nobody did.

The API without an SDK is not free: a span that nobody records still costs microseconds, and so does reading a header.
So the first question is always whether a real tracer provider is there. The context's `traceparent` travels either way.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from http import HTTPStatus

from opentelemetry import context as ambient
from opentelemetry import propagate, trace
from opentelemetry.propagators.textmap import Getter
from opentelemetry.trace import SpanKind, StatusCode

from mainstay.core import MainstayError
from mainstay.observability._asgi import Scope
from mainstay.observability._redaction import BROKEN, active
from mainstay.observability._tracebacks import traceback_of

_IDLE = (trace.ProxyTracerProvider, trace.NoOpTracerProvider)
_PARTS = 4
# In a scope of a request that one of these frameworks has made a span for.
_FRAMEWORKS = ("fastapi.telemetry", "starlette.opentelemetry")

Headers = Iterable[tuple[bytes, bytes]]


def installed() -> bool:
    """Whether an SDK has installed a tracer provider that records."""
    return not isinstance(trace.get_tracer_provider(), _IDLE)


def current_ids() -> tuple[str, str] | None:
    """Trace id and span id (hexadecimal) of the current span; None outside of any."""
    context = trace.get_current_span().get_span_context()
    return (f"{context.trace_id:032x}", f"{context.span_id:016x}") if context.is_valid else None


def ids_of(traceparent: str | None) -> tuple[str, str] | None:
    """Trace id and span id of a W3C `traceparent`."""
    if traceparent is None:
        return None
    parts = traceparent.split("-")
    return (parts[1], parts[2]) if len(parts) == _PARTS else None


class _Asgi(Getter[Headers]):
    """Reads the headers of an ASGI scope, as the propagators ask for them."""

    def get(self, carrier: Headers, key: str) -> list[str] | None:
        wanted = key.lower().encode()
        found = [value.decode("latin-1") for name, value in carrier if name.lower() == wanted]
        # Of several, the propagators read the first; the baggage of a request is all of them.
        return [",".join(found)] if found and wanted == b"baggage" else found or None

    def keys(self, carrier: Headers) -> list[str]:
        return [name.decode("latin-1") for name, _ in carrier]


_asgi = _Asgi()


def _is_of_request(span: trace.Span, caller: trace.SpanContext, scope: Scope) -> bool:
    """Whether a framework or another middleware has made this span for the request.

    Any other span that is active is one around the server, or the caller's own, where both run in one task.
    """
    context = span.get_span_context()
    if not context.is_valid or context.is_remote:
        return False
    if not span.is_recording():
        # It was not sampled and says no more.
        return context.trace_id == caller.trace_id if caller.is_valid else any(scope.get(each) for each in _FRAMEWORKS)
    parent: trace.SpanContext | None = getattr(span, "parent", None)
    of_caller = caller.span_id if caller.is_valid else None
    return getattr(span, "kind", None) is SpanKind.SERVER and (parent and parent.span_id) == of_caller


@contextmanager
def server_span(scope: Scope, name: str, *, trusted: bool) -> Generator[tuple[trace.Span, bool], None, None]:
    """The span for a request, active, and whether it was made here. Call it only where `installed()`.

    A span that a framework has made for this request is used, or the request would be counted twice. One that is made
    here is a child of the one that the headers name, and of no other: a span around the server is no part of it.

    Never hold it across a `yield` of an async generator: the context may be another one when it resumes.

    Args:
        scope: of the request.
        name: of the span, until the route is known.
        trusted: whether the caller's baggage is taken over.
    """
    headers = scope["headers"]
    if not trusted:
        headers = [pair for pair in headers if pair[0].lower() != b"baggage"]
    caller = propagate.extract(headers, ambient.Context(), _asgi)
    active = trace.get_current_span()
    if _is_of_request(active, trace.get_current_span(caller).get_span_context(), scope):
        yield active, False
        return
    span = trace.get_tracer("mainstay.observability").start_span(name, context=caller, kind=SpanKind.SERVER)
    token = ambient.attach(trace.set_span_in_context(span, caller))
    try:
        yield span, True
    finally:
        span.end()
        ambient.detach(token)


def record(span: trace.Span, error: BaseException) -> None:
    """Note in a span that it failed by an exception, whose text loses its secrets first."""
    if not span.is_recording():
        return
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    attributes = {"exception.type": name}
    try:
        attributes["exception.message"] = active().long_text(str(error))
        attributes["exception.stacktrace"] = active().long_text(traceback_of(error))
    except BROKEN:  # an exception is a user's object, whose text may fail
        attributes["exception.message"] = "[its text fails]"
    span.add_event("exception", attributes)
    span.set_attribute("error.type", name)
    span.set_status(StatusCode.ERROR, error.code if isinstance(error, MainstayError) else name)


def over(span: trace.Span, method: str, route: str, status: int, *, failed: bool) -> None:
    """Note in the span of a request how it ended, and whether its error was noted already."""
    span.set_attribute("http.route", route)
    span.set_attribute("http.response.status_code", status)
    span.update_name(f"{method} {route}")
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR and not failed:
        span.set_attribute("error.type", str(status))
        span.set_status(StatusCode.ERROR)


def traceparent() -> str | None:
    """The W3C `traceparent` of the current span, to hand on; None outside of any."""
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
