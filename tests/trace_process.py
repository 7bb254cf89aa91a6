"""A service that relays and handles, and prints its spans, one a line; configured by the environment. Not a test."""

import json
import os

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

from mainstay.core import App, current
from mainstay.database import DatabaseModule
from mainstay.events import Event, EventRouter, EventsModule

events = EventRouter()


class OrderPlaced(Event, type="trace.placed", version="1.0", key="order_id"):
    """What the request tells of."""

    order_id: str


@events.on(OrderPlaced, group=os.environ.get("TRACE_GROUP", "trace"))
async def handle(event: OrderPlaced) -> None:
    """Say in which trace it is."""
    print(json.dumps({"handled": event.order_id, "traceparent": current().traceparent}), flush=True)


def service() -> App:
    """Build the App of either process."""
    return App(DatabaseModule.for_root(), EventsModule.for_root(), EventsModule.for_feature(events))


def line_of(span: ReadableSpan) -> str:
    """Say what the test looks at, in one line."""
    context, parent = span.get_span_context(), span.parent
    return json.dumps(
        {
            "name": span.name,
            "kind": span.kind.name,
            "trace": context and f"{context.trace_id:032x}",
            "span": context and f"{context.span_id:016x}",
            "parent": parent and f"{parent.span_id:016x}",
            "links": [f"{link.context.span_id:016x}" for link in span.links],
            "attributes": dict(span.attributes or {}),
        }
    ) + "\n"  # fmt: skip


if __name__ == "__main__":
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(formatter=line_of)))
    trace.set_tracer_provider(provider)
    service().run()
