"""What OpenTelemetry is told: a span of publishing, of each batch that is relayed, of each attempt to handle.

Only where an SDK has installed a tracer provider before the App starts: a span that is not recorded costs microseconds,
too. So this file is imported by `spans_of` only, when there is one.

Names, kinds and attributes follow the semantic conventions for messaging spans, version 1.37, whose status is
"development":

- Publishing is `send` of kind PRODUCER. Its context travels in the events' headers: it is what they were created in.
- The relay's `send` is of kind CLIENT, since nothing was created in it, and is linked to what it carries.
- An attempt to handle is `process` of kind CONSUMER. It has one event, and no other span is around it, so that the
  conventions allow the event's context as its parent: request and handler are one trace. It is linked to it, too. A
  batch of events has no parent, and a link for each.

A key is never told, since it may be a person's name.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from opentelemetry import trace
from opentelemetry.context import Context as Ambient
from opentelemetry.context import attach
from opentelemetry.trace import Link, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from mainstay.core import Context, current, rebind
from mainstay.events._delivery import Delivery
from mainstay.events.errors import KeyIsParkedError, NotHandledHereError
from mainstay.events.metadata import Metadata, Outgoing, Record, context_of

_IDLE = (trace.ProxyTracerProvider, trace.NoOpTracerProvider)
_W3C = TraceContextTextMapPropagator()
_MOST_LINKS = 128
"""Of one span: what the SDK keeps unless it is told otherwise."""
_LONGEST = 256
"""Characters of a text that a record says of itself."""


class Attempt:
    """The span of one attempt to handle an event, or a batch of them.

    Args:
        span: begun.
    """

    __slots__ = ("_span",)

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    def failed(self, error: BaseException) -> None:
        """Note why."""
        _note(self._span, error)

    def end(self, fate: str | None = None) -> None:
        """End it, with a last word on what became of the event."""
        if fate is not None:
            self._span.add_event(f"mainstay.{fate}")
        self._span.end()


class Spans:
    """The spans of one App.

    Args:
        system: which transport, as `messaging.system`.
    """

    def __init__(self, system: str) -> None:
        self._system = system
        self._tracer = trace.get_tracer("mainstay.events")

    @contextmanager
    def publishing(self, topics: Collection[str], ids: Sequence[object]) -> Generator[Context, None, None]:
        """A span around the publishing of events; yields the context that they are published in.

        It continues the span that is current. Without one, it continues the trace that the context names.
        """
        context = current()
        around = None if trace.get_current_span().get_span_context().is_valid else _parent(context, Ambient())
        attributes = self._attributes("send", topics, len(ids))
        if len(ids) == 1:
            attributes["messaging.message.id"] = str(ids[0])
        if context.correlation_id is not None:
            attributes["messaging.message.conversation_id"] = context.correlation_id
        with self._span(attributes, around, kind=SpanKind.PRODUCER) as span:
            yield _within(span, context)

    async def relaying(
        self,
        send: Callable[[str, int, Sequence[Outgoing]], Awaitable[None]],
        topic: str,
        partition: int,
        events: Sequence[Outgoing],
    ) -> None:
        """Send a batch, in a span that is linked to what the events were published in."""
        attributes = self._attributes("send", (topic,), len(events))
        attributes["messaging.destination.partition.id"] = str(partition)
        attributes["messaging.batch.message_count"] = len(events)  # also of one: a relay sends batches
        links = _links(dict(event.headers) for event in events)
        with self._span(attributes, Ambient(), kind=SpanKind.CLIENT, links=links):
            await send(topic, partition, events)

    def handling(self, records: Sequence[Record], group: str, attempt: int) -> Attempt:
        """Begin the span of an attempt, and have it current: until the next one, as the event's context is."""
        first = Metadata(records[0], group=group)
        attributes = self._attributes("process", (first.topic,), len(records))
        attributes["messaging.destination.partition.id"] = str(first.partition)
        attributes["messaging.consumer.group.name"] = group
        attributes["mainstay.attempt"] = attempt
        context, parent = current(), Ambient()
        if len(records) == 1:
            context = first.context()
            parent = _parent(context, parent)
            attributes["messaging.message.id"] = first.id[:_LONGEST]
            attributes["cloudevents.event_type"] = first.type[:_LONGEST]
            if context.correlation_id is not None:
                attributes["messaging.message.conversation_id"] = context.correlation_id
            if self._system == "kafka":
                attributes["messaging.kafka.offset"] = first.offset
        span = self._tracer.start_span(
            _name(attributes),
            context=parent,
            kind=SpanKind.CONSUMER,
            attributes=attributes,
            links=_links(dict(record.headers) for record in records),
        )
        attach(trace.set_span_in_context(span, parent))
        rebind(_within(span, context))
        return Attempt(span)

    def failed(self, attempt: Attempt | None, delivery: Delivery, group: str, error: Exception) -> Attempt | None:
        """Note why an event could not be handled; begin the span of one that no handler was called with.

        None for what only waits for others: behind a parked key, or for a process that handles it.
        """
        if attempt is None and isinstance(error, KeyIsParkedError | NotHandledHereError):
            attach(Ambient())  # or it would be taken for part of the one before it
            return None
        attempt = attempt or self.handling((delivery.record,), group, delivery.attempt)
        attempt.failed(error)
        return attempt

    def fate(self, name: str) -> None:
        """Note what became of the event that is in hand: an event of its span."""
        trace.get_current_span().add_event(f"mainstay.{name}")

    def _attributes(self, operation: str, topics: Collection[str], count: int) -> dict[str, str | int]:
        attributes: dict[str, str | int] = {
            "messaging.system": self._system,
            "messaging.operation.name": operation,
            "messaging.operation.type": operation,
        }
        if len(topics) == 1:
            (attributes["messaging.destination.name"],) = topics
        if count != 1:
            attributes["messaging.batch.message_count"] = count
        return attributes

    @contextmanager
    def _span(
        self,
        attributes: Mapping[str, str | int],
        around: Ambient | None,
        *,
        kind: SpanKind,
        links: Sequence[Link] = (),
    ) -> Generator[trace.Span, None, None]:
        with self._tracer.start_as_current_span(
            _name(attributes),
            context=around,
            kind=kind,
            attributes=attributes,
            links=links,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield span
            except BaseException as error:
                _note(span, error)
                raise


def spans_of(system: str) -> Spans | None:
    """The spans of an App; None where no SDK has installed a tracer provider."""
    return None if isinstance(trace.get_tracer_provider(), _IDLE) else Spans(system)


def _name(attributes: Mapping[str, str | int]) -> str:
    topic = attributes.get("messaging.destination.name")
    operation = str(attributes["messaging.operation.name"])
    return operation if topic is None else f"{operation} {topic}"


def _note(span: trace.Span, error: BaseException) -> None:
    kind = type(error).__qualname__
    span.record_exception(error)
    span.set_attribute("error.type", kind)
    span.set_status(StatusCode.ERROR, kind)


def _parent(context: Context, around: Ambient) -> Ambient:
    """The span that a context names, as one of another process; what is malformed is none."""
    carrier = {"traceparent": context.traceparent or "", "tracestate": context.tracestate or ""}
    return _W3C.extract(carrier, around)


def _within(span: trace.Span, context: Context) -> Context:
    """The same context, in this span."""
    of_span = span.get_span_context()
    if not of_span.is_valid:
        return context
    return replace(
        context,
        traceparent=f"00-{of_span.trace_id:032x}-{of_span.span_id:016x}-{of_span.trace_flags:02x}",
        tracestate=of_span.trace_state.to_header() or None,
    )


def _links(headers: Iterable[Mapping[str, bytes | None]]) -> list[Link]:
    """Links to what events were published in, each once."""
    found: dict[str, Link] = {}
    for each in headers:
        if not each.get("ce_traceparent"):
            continue
        context = context_of(each)
        if context.traceparent is not None and context.traceparent not in found:
            span = trace.get_current_span(_parent(context, Ambient())).get_span_context()
            if span.is_valid:
                found[context.traceparent] = Link(span)
        if len(found) == _MOST_LINKS:
            break
    return list(found.values())
