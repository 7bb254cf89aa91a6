"""What OpenTelemetry is told of publishing, relaying and handling, by a real SDK with an exporter in memory."""

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic import SecretStr

from mainstay.core import App, Context, FullJitter, Retry, bind, current
from mainstay.core.testing import eventually
from mainstay.database import DatabaseModule, DatabaseSettings
from mainstay.events import Event, EventConsumers, EventRouter, EventsModule, EventsSettings, Metadata, ParkedKeys
from mainstay.events._memory import MemoryTransport
from mainstay.events.metadata import Outgoing

TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE}-b7ad6b7169203331-01"
SOON = Retry(attempts=3, wait=FullJitter(0.001, 0.001))


class Sold(Event, type="spans.sold", version="1.0", key="item"):
    item: str


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Sequence[ReadableSpan]]]:
    """The finished spans of an operation, of a provider that is installed for this test only."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)

    def named(operation: str) -> list[ReadableSpan]:
        return [span for span in exporter.get_finished_spans() if span.name.startswith(operation)]

    yield named
    provider.shutdown()


def service(*routers: EventRouter, url: str | None = None, **settings: Any) -> App:
    options = {"transport": "memory", "source": "shop"} | settings
    modules: list[Any] = [EventsModule.for_root(EventsSettings(**options)), EventsModule.for_feature(*routers)]
    if url is not None:
        modules.insert(0, DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url))))
    return App(*modules)


def ids(traceparent: str | None) -> tuple[str, str]:
    _, trace_id, span_id, _ = (traceparent or "---").split("-")
    return trace_id, span_id


def own_ids(span: ReadableSpan) -> tuple[str, str]:
    context = span.get_span_context()
    assert context is not None
    return f"{context.trace_id:032x}", f"{context.span_id:016x}"


def parent_of(span: ReadableSpan) -> tuple[str, str] | None:
    return None if span.parent is None else (f"{span.parent.trace_id:032x}", f"{span.parent.span_id:016x}")


def links_of(span: ReadableSpan) -> list[tuple[str, str]]:
    return [(f"{each.context.trace_id:032x}", f"{each.context.span_id:016x}") for each in span.links]


async def test_an_event_is_one_trace_from_its_publisher_to_what_its_handler_publishes(
    exported: Callable[[str], Sequence[ReadableSpan]],
) -> None:
    """Each span continues the one before it, and the context of the code inside names the span that it runs in."""
    router = EventRouter()
    seen: list[tuple[str | None, str, str | None]] = []

    class Mailed(Event, type="spans.mailed", version="1.0"):
        item: str

    @router.on(Sold, group="mail")
    async def mail(event: Sold, meta: Metadata) -> None:
        span = trace.get_current_span().get_span_context()
        seen.append((current().traceparent, f"{span.span_id:016x}", meta.traceparent))
        await router.publish(Mailed(item=event.item))

    @router.on(Mailed, group="archive")
    async def archive(event: Mailed, meta: Metadata) -> None:
        seen.append((current().traceparent, "", meta.traceparent))

    async with service(router).running(serve=True):
        with bind(Context("c-1", traceparent=TRACEPARENT, tracestate="vendor=1")):
            event_id = await router.publish(Sold(item="a"))
        await eventually(lambda: len(exported("process")) == 2)
    sold, mailed = exported("send")
    handled, archived = exported("process")
    assert [each.name for each in (sold, handled, mailed, archived)] == [
        "send spans", "process spans", "send spans", "process spans"
    ]  # fmt: skip
    assert parent_of(sold) == ids(TRACEPARENT)
    assert parent_of(handled) == own_ids(sold)
    assert parent_of(mailed) == own_ids(handled)
    assert parent_of(archived) == own_ids(mailed)
    assert links_of(handled) == [own_ids(sold)]
    assert {own_ids(each)[0] for each in (sold, handled, mailed, archived)} == {TRACE}
    inside, current_span, received = seen[0]
    assert ids(inside) == own_ids(handled)
    assert current_span == own_ids(handled)[1]
    assert ids(received) == own_ids(sold)
    assert sold.kind is trace.SpanKind.PRODUCER
    assert handled.kind is trace.SpanKind.CONSUMER
    assert dict(sold.attributes or {}) == {
        "messaging.system": "memory",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": "spans",
        "messaging.message.id": event_id,
        "messaging.message.conversation_id": "c-1",
    }
    attributes = dict(handled.attributes or {})
    assert attributes.pop("messaging.destination.partition.id") in {"0", "1", "2", "3", "4", "5", "6", "7"}
    assert attributes == {
        "messaging.system": "memory",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "spans",
        "messaging.consumer.group.name": "mail",
        "messaging.message.id": event_id,
        "messaging.message.conversation_id": "c-1",
        "cloudevents.event_type": "spans.sold",
        "mainstay.attempt": 1,
    }


async def test_each_attempt_is_a_span_and_the_last_one_says_what_became_of_the_event(
    exported: Callable[[str], Sequence[ReadableSpan]],
) -> None:
    """The error is recorded on each; a dead letter is an event of the last. A success afterwards is a span without."""
    router = EventRouter()

    @router.on(Sold, group="mail", retry=SOON)
    async def mail(event: Sold) -> None:
        if event.item == "bad":
            msg = "no such place"
            raise ValueError(msg)

    async with service(router, partitions=1).running(serve=True):
        await router.publish_batch([Sold(item="bad"), Sold(item="good")])
        await eventually(lambda: len(exported("process")) == 4)
    failed = [span for span in exported("process") if span.status.status_code is trace.StatusCode.ERROR]
    assert [(span.attributes or {})["mainstay.attempt"] for span in failed] == [1, 2, 3]
    assert {(span.attributes or {})["error.type"] for span in failed} == {"ValueError"}
    assert [[event.name for event in span.events] for span in failed] == [
        ["exception"], ["exception"], ["exception", "mainstay.dead_letter"]
    ]  # fmt: skip
    assert (failed[0].events[0].attributes or {})["exception.message"] == "no such place"
    (sent,) = exported("send")
    assert {parent_of(span) for span in exported("process")} == {own_ids(sent)}
    assert (sent.attributes or {})["messaging.batch.message_count"] == 2
    assert "messaging.message.id" not in (sent.attributes or {})


async def test_an_event_that_cannot_be_read_is_a_span_and_one_that_is_skipped_is_none(
    exported: Callable[[str], Sequence[ReadableSpan]],
) -> None:
    """No handler is called with either; the first is an error that becomes a dead letter."""
    router = EventRouter()

    class Else(Event, type="spans.else", version="1.0"):
        item: str

    @router.on(Sold, group="mail", retry=SOON)
    async def mail(event: Sold) -> None:
        pass

    async with service(router, partitions=1).running(serve=True) as app:
        await router.publish(Sold(item="a"))
        await eventually(lambda: len(exported("process")) == 1)
        headers = [("ce_type", b"spans.sold"), ("ce_dataversion", b"1.0"), ("ce_id", b"x\xff" * 1000)]
        await app.get(MemoryTransport).send([Outgoing("spans", b"a", b"{}", headers)])
        await router.publish(Else(item="b"))
        await router.publish(Sold(item="c"))
        await eventually(lambda: len(exported("process")) == 3)
    _, unread, last = exported("process")
    assert (unread.attributes or {})["error.type"] == "DecodeError"
    assert len(str((unread.attributes or {})["messaging.message.id"])) <= 256
    assert [event.name for event in unread.events] == ["exception", "mainstay.dead_letter"]
    assert parent_of(unread) is None
    assert last.status.is_ok


@pytest.mark.parametrize(
    "traceparent",
    [b"", b"junk", b"\xff\xfe", b"00-" + b"0" * 32 + b"-b7ad6b7169203331-01", TRACEPARENT.encode() + b"-more",
     TRACEPARENT.upper().encode(), b"ff" + TRACEPARENT[2:].encode(), TRACEPARENT.encode() * 1000],
)  # fmt: skip
async def test_a_malformed_trace_of_others_is_dropped(
    exported: Callable[[str], Sequence[ReadableSpan]], traceparent: bytes
) -> None:
    """The event is handled in a trace of its own; nothing is linked to, nothing raised."""
    router = EventRouter()
    seen: list[str] = []

    @router.on(Sold, group="mail", retry=Retry(attempts=1))
    async def mail(event: Sold) -> None:
        seen.append(event.item)

    headers = [("ce_type", b"spans.sold"), ("ce_dataversion", b"1.0"), ("ce_id", b"1"),
               ("ce_traceparent", traceparent), ("ce_tracestate", b"\xff,,=")]  # fmt: skip
    async with service(router).running(serve=True) as app:
        await app.get(MemoryTransport).send([Outgoing("spans", b"a", b'{"item":"a"}', headers)])
        await eventually(lambda: exported("process"))
    (span,) = exported("process")
    assert seen == ["a"]
    assert span.status.is_ok
    assert parent_of(span) is None
    assert links_of(span) == []


async def test_a_parked_key_is_an_event_of_its_attempt_and_what_waits_behind_it_is_none(
    exported: Callable[[str], Sequence[ReadableSpan]], sqlite_url: str
) -> None:
    """An event that joins the queue of a parked key was not handled. When it is, that is a span like any other."""
    router = EventRouter()
    broken = True

    @router.on(Sold, group="mail", retry=SOON, on_failure="park")
    async def mail(event: Sold) -> None:
        if broken:
            msg = "away"
            raise OSError(msg)

    async with service(router, url=sqlite_url, transport="sql", partitions=1).running(serve=True) as app:
        await router.publish_batch([Sold(item="a"), Sold(item="a")])
        parked = app.get(ParkedKeys)

        async def both_wait() -> bool:
            return [each.waiting for each in await parked.list("mail")] == [2]

        await eventually(both_wait)
        before = exported("process")
        broken = False
        (key,) = await parked.list("mail")
        await parked.retry(key.id)
        await eventually(lambda: len(exported("process")) == 5)
    assert [[event.name for event in span.events] for span in before] == [
        ["exception"], ["exception"], ["exception", "mainstay.parked"]
    ]  # fmt: skip
    assert [span.status.is_ok for span in exported("process")[3:]] == [True, True]


async def test_a_batch_is_one_span_that_is_linked_to_all_its_events(
    exported: Callable[[str], Sequence[ReadableSpan]],
) -> None:
    """It has no parent, since it has several."""
    events = EventRouter()

    @events.on_batch(Sold, group="batches", size=2, wait_seconds=60.0)
    async def handle(sold: list[Sold]) -> None:
        assert len(sold) == 2

    async with service(events, partitions=1).running(serve=True):
        for number in range(2):
            await events.publish(Sold(item=f"i{number}"))
        await eventually(lambda: exported("process"))
    (span,) = exported("process")
    assert parent_of(span) is None
    assert sorted(links_of(span)) == sorted(own_ids(each) for each in exported("send"))
    assert (span.attributes or {})["messaging.batch.message_count"] == 2


async def test_an_attempt_that_is_cancelled_says_so(exported: Callable[[str], Sequence[ReadableSpan]]) -> None:
    """A partition is lost while its handler hangs: the span ends, without an error."""
    router = EventRouter()
    began = asyncio.Event()

    @router.on(Sold, group="mail")
    async def mail(event: Sold) -> None:
        began.set()
        await asyncio.Event().wait()

    async with service(router, partitions=1).running(serve=True) as app:
        await router.publish(Sold(item="a"))
        await began.wait()
        (consumer,) = app.get(EventConsumers).consumers
        await consumer.lost(consumer._all())
        await eventually(lambda: exported("process"))
    (span,) = exported("process")
    assert [event.name for event in span.events] == ["mainstay.cancelled"]
    assert span.status.is_unset


async def test_publishing_that_fails_is_recorded(
    exported: Callable[[str], Sequence[ReadableSpan]], sqlite_url: str
) -> None:
    """The span of what was not published is an error, of its kind."""

    class Strange(Event, type="spans.strange", version="1.0"):
        text: str

    router = EventRouter()
    async with service(router, url=sqlite_url, transport="sql"):
        with pytest.raises(TypeError):
            await router.publish(Strange(text="\ud800"))
    assert [(span.attributes or {})["error.type"] for span in exported("send")] == ["TypeError"]


def test_without_a_tracer_provider_opentelemetry_is_not_even_imported() -> None:
    """A service without an SDK pays nothing: neither the import nor a look at each event."""
    code = (
        "import sys, asyncio; from mainstay.core import App;"
        "from mainstay.events import EventsModule, EventsSettings;"
        "app = App(EventsModule.for_root(EventsSettings(transport='memory')))\n"
        "async def main():\n"
        "    async with app.running(serve=True):\n"
        "        assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
        "asyncio.run(main())"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
