"""OpenTelemetry where somebody installed it, nothing where nobody did.

The API without an SDK is not free: a span that nobody records still costs microseconds, and so does reading a header.
So the first question is always whether a real tracer provider is there. The context's `traceparent` travels either way.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from opentelemetry import propagate, trace

_IDLE = (trace.ProxyTracerProvider, trace.NoOpTracerProvider)
_PARTS = 4


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


@contextmanager
def server_span(
    name: str, headers: Mapping[str, str], attributes: Mapping[str, Any]
) -> Generator[trace.Span, None, None]:
    """A span for a request, a child of the one that `headers` name. Call it only where `installed()`.

    Never hold it across a `yield` of an async generator: the context may be another one when it resumes.
    """
    tracer = trace.get_tracer("mainstay.observability")
    with tracer.start_as_current_span(
        name,
        context=propagate.extract(dict(headers)),
        kind=trace.SpanKind.SERVER,
        attributes=dict(attributes),
        record_exception=True,
    ) as span:
        yield span


def traceparent() -> str | None:
    """The W3C `traceparent` of the current span, to hand on; None outside of any."""
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
