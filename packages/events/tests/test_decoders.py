"""Topics that others write: plain JSON, Debezium's change events, and what becomes of what cannot be read."""

import json
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, cast

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from pydantic import SecretStr

from mainstay.core import App, ConfigurationError, current
from mainstay.core.testing import eventually
from mainstay.database import DatabaseModule, DatabaseSettings
from mainstay.events import DeadLetters, Event, EventRouter, EventsModule, EventsSettings, Metadata, ParkedKeys
from mainstay.events._members import exact
from mainstay.events.errors import DecodeError
from mainstay.events.foreign import Debezium, Decoded, Decoder, Plain, Received, Schemas
from mainstay.events.testing import Rehearsal, in_memory

customers = Debezium("customer")
DIGITS = "12345678901234567.89"


class StockCounted(Event, type="stock.counted", topic="warehouse.stock", key="item", decoder=Plain("stock.counted")):
    item: str
    value: Decimal


class StockGone(
    Event, type="stock.counted.deleted", topic="warehouse.stock", key="key", decoder=Plain("stock.counted")
):
    key: str


class CustomerChanged(Event, type="customer.changed", topic="shop.public.customers", key="id", decoder=customers):
    id: int
    email: str | None = None
    credit: Decimal = Decimal(0)


class CustomerDeleted(Event, type="customer.deleted", topic="shop.public.customers", key="id", decoder=customers):
    id: int


class CustomersTruncated(Event, type="customer.truncated", topic="shop.public.customers", decoder=customers):
    pass


class Seen:
    """Handlers of all classes of a topic that keep what they were given."""

    def __init__(self, *classes: type[Event], group: str = "seen", **on: Any) -> None:
        self.events = EventRouter()
        self.seen: list[tuple[Event, Metadata]] = []
        self.contexts: list[Any] = []
        self.fails = False

        @self.events.on(*classes, group=group, **on)
        async def see(event: Event, meta: Metadata) -> None:
            if self.fails:
                msg = "not today"
                raise ValueError(msg)
            self.seen.append((event, meta))
            self.contexts.append(current())

    @property
    def all(self) -> list[Event]:
        """The events."""
        return [event for event, _ in self.seen]


def change(op: str, *, before: str = "null", after: str = "null", **more: str) -> str:
    """A change event, as Debezium writes it."""
    rest = "".join(f', "{name}": {text}' for name, text in more.items())
    source = '{"version": "3.0.5.Final", "connector": "postgresql", "name": "shop", "ts_ms": 1740477600000, "lsn": 17}'
    return (
        f'{{"before": {before}, "after": {after}, "source": {source}, "op": "{op}", "ts_ms": 1740477600123, '
        f'"transaction": null{rest}}}'
    )


def connect(payload: str, name: str = "shop.public.customers.Envelope") -> str:
    """The same as Kafka Connect writes it with schemas."""
    schema = {"type": "struct", "fields": [{"type": "int32", "field": "id"}], "name": name}
    return f'{{"schema": {json.dumps(schema)}, "payload": {payload}}}'


async def test_plain_json_is_the_event() -> None:
    """Without any header: it has the place as its id, starts a conversation, and keeps every digit."""
    seen = Seen(StockCounted)
    async with in_memory(seen.events) as rehearsal:
        await rehearsal.receive("warehouse.stock", f'{{"item": "84406", "value": {DIGITS}}}'.encode(), key=b"84406")
        await rehearsal.settled()
        assert await rehearsal.dead_letters() == []
    ((event, meta),) = seen.seen
    assert event == StockCounted(item="84406", value=Decimal(DIGITS))
    assert (meta.type, str(meta.version), meta.source, meta.key) == ("stock.counted", "1.0", "warehouse.stock", "84406")
    assert meta.id.startswith(f"warehouse.stock/{meta.partition}@{meta.offset}:")
    assert (meta.correlation_id, meta.causation_id, meta.tenant, meta.actor) == (meta.id, None, None, None)
    (context,) = seen.contexts
    assert (context.correlation_id, context.causation_id, context.actor, context.tenant) == (
        meta.id,
        meta.id,
        None,
        None,
    )


async def test_headers_of_others_are_not_believed() -> None:
    """Not for which tenant, who acted, what the id is, nor that the record cannot be read; others are shown."""
    seen = Seen(StockCounted)
    headers = [
        ("ce_tenant", b"other"), ("ce_actor", b"root"), ("CE_ID", b"1"), ("ce_id", b"1"), ("ce_correlationid", b"c"),
        ("mainstay-first-read", b"1"), ("traceparent", b"00-1"),
    ]  # fmt: skip
    async with in_memory(seen.events) as rehearsal:
        await rehearsal.receive("warehouse.stock", b'{"item": "a", "value": 1}', key=b"a", headers=headers)
        await rehearsal.settled()
    ((_, meta),) = seen.seen
    assert meta.id.startswith("warehouse.stock/")
    assert (meta.tenant, meta.actor, meta.correlation_id) == (None, None, meta.id)
    assert {name for name in meta.headers if not name.startswith("ce_")} == {"traceparent"}
    assert seen.contexts[0].tenant is None


TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    ("headers", "trace"),
    [
        ([("traceparent", TRACE.encode()), ("tracestate", b"vendor=1")], (TRACE, "vendor=1")),
        ([("traceparent", TRACE.encode()), ("tracestate", b"\xff")], (TRACE, None)),
        ([("traceparent", TRACE.upper().encode()), ("tracestate", b"vendor=1")], (None, None)),
        ([("traceparent", f"00-{'0' * 32}-00f067aa0ba902b7-01".encode())], (None, None)),
        ([("traceparent", b"\xff"), ("traceparent", None)], (None, None)),
        ([("tracestate", b"vendor=1"), ("ce_traceparent", TRACE.encode())], (None, None)),
    ],
)
async def test_a_trace_of_others_goes_on(headers: Any, trace: Any) -> None:
    """What they began, by the header of W3C, and what is done here is one; a malformed one is none."""
    seen = Seen(StockCounted)
    async with in_memory(seen.events) as rehearsal:
        await rehearsal.receive("warehouse.stock", b'{"item": "a", "value": 1}', key=b"a", headers=headers)
        await rehearsal.settled()
        assert await rehearsal.dead_letters() == []
    (context,) = seen.contexts
    assert (context.traceparent, context.tracestate) == trace
    assert seen.seen[0][1].traceparent == trace[0]


async def test_a_record_for_another_group_is_not_ours() -> None:
    """A redriven record of a foreign topic is skipped by all groups but the one that failed."""
    seen = Seen(StockCounted)
    async with in_memory(seen.events) as rehearsal:
        await rehearsal.receive(
            "warehouse.stock", b'{"item": "a", "value": 1}', key=b"a", headers=[("ce_onlygroup", b"others")]
        )
        await rehearsal.settled()
    assert seen.all == []


async def test_our_own_event_on_their_topic_is_read_as_one() -> None:
    """What is published is a CloudEvent on every topic: with the context, and an id of its own."""
    seen = Seen(StockCounted)
    async with in_memory(seen.events) as rehearsal:
        id_ = await rehearsal.publish(StockCounted(item="a", value=Decimal(1)))
        await rehearsal.settled()
    ((event, meta),) = seen.seen
    assert (event, meta.id, meta.source) == (StockCounted(item="a", value=Decimal(1)), id_, "mainstay")


async def test_a_record_without_a_value_is_a_deletion() -> None:
    """By its key, as text or as an object; without a handler for it, it is skipped."""
    seen = Seen(StockCounted, StockGone)
    async with in_memory(seen.events) as rehearsal:
        await rehearsal.receive("warehouse.stock", None, key=b"84406")
        await rehearsal.receive("warehouse.stock", None, key=b'{"key": "85123"}')
        await rehearsal.settled()
        assert await rehearsal.dead_letters() == []
    assert sorted(event.key for event in seen.all if isinstance(event, StockGone)) == ["84406", "85123"]
    alone = Seen(StockCounted)
    async with in_memory(alone.events) as rehearsal:
        await rehearsal.receive("warehouse.stock", None, key=b"84406")
        await rehearsal.settled()
        assert (alone.all, await rehearsal.dead_letters()) == ([], [])


@pytest.mark.parametrize("wrap", [str, connect], ids=["without schemas", "with schemas"])
async def test_debezium_is_unwrapped(wrap: Any) -> None:
    """New, changed and snapshot rows by what they are now, deletions by what was; a tombstone is skipped."""
    seen = Seen(CustomerChanged, CustomerDeleted, CustomersTruncated)
    row = f'{{"id": 1001, "email": "ann@example.com", "credit": {DIGITS}}}'
    key = wrap('{"id": 1001}').encode()
    async with in_memory(seen.events) as rehearsal:
        for value in (
            change("r", after=row),
            change("u", before=row, after='{"id": 1001, "email": null, "credit": "0.10"}'),
            change("d", before='{"id": 1001, "email": null, "credit": null}'),
            None,
            change("c", after='{"id": 1001, "added": true}'),
        ):
            await rehearsal.receive("shop.public.customers", None if value is None else wrap(value).encode(), key=key)
        await rehearsal.settled()
        await rehearsal.receive("shop.public.customers", wrap(change("t")).encode())
        await rehearsal.settled()
        assert await rehearsal.dead_letters() == []
    assert seen.all == [
        CustomerChanged(id=1001, email="ann@example.com", credit=Decimal(DIGITS)),
        CustomerChanged(id=1001, credit=Decimal("0.10")),
        CustomerDeleted(id=1001),
        CustomerChanged(id=1001),
        CustomersTruncated(),
    ]
    assert [meta.headers["ce_op"] for _, meta in seen.seen] == [b"r", b"u", b"d", b"c", b"t"]
    meta = seen.seen[0][1]
    assert meta.key == "1001"
    assert meta.time == datetime(2025, 2, 25, 10, tzinfo=UTC)


async def test_a_deletion_is_known_by_its_key_where_the_row_is_not() -> None:
    """A database may tell nothing of a row that is gone, or some of it."""
    seen = Seen(CustomerDeleted)
    async with in_memory(seen.events) as rehearsal:
        await rehearsal.receive("shop.public.customers", change("d").encode(), key=b'{"id": 7}')
        await rehearsal.receive("shop.public.customers", change("d", before='{"id": 0}').encode(), key=b'{"id": 8}')
        await rehearsal.settled()
    assert sorted(event.id for event in seen.all if isinstance(event, CustomerDeleted)) == [7, 8]


async def test_a_document_of_mongodb_is_a_row() -> None:
    """It is a text of JSON in the envelope, digit for digit; its key is such a text, too."""
    seen = Seen(CustomerChanged, CustomerDeleted)
    document = json.dumps(f'{{"_id": {{"$oid": "596e"}}, "id": 7, "email": "a\\"b", "credit": {DIGITS}}}')
    key = rb'{"id": "{\"$oid\": \"596e\"}"}'
    update = {"updateDescription": '{"updatedFields": "{\\"email\\": 1}"}'}
    async with in_memory(seen.events) as rehearsal:
        for value in (
            change("c", after=document).encode(),
            change("u", after=document, **update).encode(),
            change("d", before=document).encode(),
            None,
        ):
            await rehearsal.receive("shop.public.customers", value, key=key)
        await rehearsal.receive("shop.public.customers", change("d").encode(), key=b'{"id": "8"}')
        await rehearsal.settled()
        assert await rehearsal.dead_letters() == []
    written = CustomerChanged(id=7, email='a"b', credit=Decimal(DIGITS))
    assert [event for event in seen.all if isinstance(event, CustomerChanged)] == [written, written]
    gone = sorted(event.id for event in seen.all if isinstance(event, CustomerDeleted))
    assert gone == [7, 8], "the document's own id, which is no column of the key"
    assert '{"$oid": "596e"}' in [meta.key for _, meta in seen.seen]


async def test_an_update_without_its_document_is_refused_with_what_to_do_or_skipped() -> None:
    """It held back its document's key until a person looked, each time that one was deleted soon after an update."""

    class Kept(Event, type="document.changed", topic="shop.documents", key="id", decoder=Debezium("document")):
        id: int

    lenient = Debezium("paper", partial="skip")

    class Passed(Event, type="paper.changed", topic="shop.papers", key="id", decoder=lenient):
        id: int

    class Gone(Event, type="paper.deleted", topic="shop.papers", key="id", decoder=lenient):
        id: int

    seen = Seen(Kept, Passed, Gone)
    partial = change("u", updateDescription='{"updatedFields": "{\\"id\\": 1}"}').encode()
    async with in_memory(seen.events) as rehearsal:
        for topic in ("shop.documents", "shop.papers"):
            await rehearsal.receive(topic, partial, key=b'{"id": "7"}')
            await rehearsal.receive(topic, change("d").encode(), key=b'{"id": "7"}')
        await rehearsal.settled()
        (letter,) = await rehearsal.dead_letters()
        assert letter.topic == "shop.documents"
        assert "change_streams_update_full" in letter.error
        assert "partial='skip'" in letter.error
    assert seen.all == [Gone(id=7)]


UNREADABLE = [
    ("warehouse.stock", b"\xff", "it is not UTF-8"),
    ("warehouse.stock", b"{", "stock.counted cannot be read"),
    ("warehouse.stock", b"[1]", "stock.counted cannot be read"),
    ("warehouse.stock", b'{"item": "a"}', "value: Field required"),
    ("shop.public.customers", b"17", "the value is no JSON object"),
    ("shop.public.customers", b"[" * 100_000, "the value is no JSON object"),
    ("shop.public.customers", b'{"op": "c"', "the value is no JSON object"),
    ("shop.public.customers", b'{"op": "c"} {}', "the value is no JSON object"),
    ("shop.public.customers", b'{"op" "c"}', "the value is no JSON object"),
    ("shop.public.customers", b'{1: "c"}', "the value is no JSON object"),
    ("shop.public.customers", b"{}", "its op is none of c, u, r, d and t"),
    ("shop.public.customers", b'{"op": ["c"]}', "its op is none of c, u, r, d and t"),
    ("shop.public.customers", b'{"op": "x", "after": {"id": 1}}', "its op is none of c, u, r, d and t"),
    ("shop.public.customers", b'{"id": 1, "email": "x"}', "are read by Plain"),
    ("shop.public.customers", change("u").encode(), "the change event has no row after"),
    ("shop.public.customers", change("u", after="[]").encode(), "the change event has no row after"),
    ("shop.public.customers", change("u", after='"[]"').encode(), "the change event has no row after"),
    ("shop.public.customers", change("u", after='"{1}"').encode(), "the document after is no JSON object"),
    (
        "shop.public.customers",
        change("u", updateDescription='{"updatedFields": "{}"}').encode(),
        "capture.mode=change_streams_update_full",
    ),
    ("shop.public.customers", b'{"ts_ms": 1740477600123}', "heartbeats"),
    ("shop.public.customers", b'{"status": "BEGIN", "id": "571", "event_count": null}', "transaction"),
    ("shop.public.customers", b'{"source": {}, "ddl": "ALTER TABLE c", "tableChanges": []}', "schema changes"),
    ("shop.public.customers", b'{"op": "m", "message": {"prefix": "p", "content": ""}}', "messages"),
    ("shop.public.customers", change("u", after='{"id": "x"}').encode(), "id: Input should be a valid integer"),
]


async def test_what_cannot_be_read_is_a_dead_letter_byte_for_byte() -> None:
    """With the reason and under the name of its topic's event; what follows of its key is handled."""
    seen = Seen(StockCounted, CustomerChanged)
    headers = [("x", b"1"), ("empty", None)]
    async with in_memory(seen.events, partitions=1) as rehearsal:
        for topic, value, _ in UNREADABLE:
            await rehearsal.receive(topic, value, key=b"k", headers=headers)
        await rehearsal.receive("warehouse.stock", b'{"item": "b", "value": 1}', key=b"k")
        await rehearsal.settled(60)
        letters = await rehearsal.dead_letters()
    assert len(seen.all) == 1
    found = {(letter.topic, letter.value): letter for letter in letters}
    assert len(found) == len(letters) == len(UNREADABLE)
    for topic, value, says in UNREADABLE:
        letter = found[topic, value]
        assert says in letter.error, letter.error
        assert (letter.key, list(letter.headers)) == (b"k", headers)
        assert letter.type == ("stock.counted" if topic == "warehouse.stock" else "customer.changed")


async def test_a_key_that_is_all_there_is_must_be_readable() -> None:
    """A deletion of nothing is no deletion."""
    seen = Seen(StockGone)
    async with in_memory(seen.events) as rehearsal:
        await rehearsal.receive("warehouse.stock", None)
        await rehearsal.receive("warehouse.stock", None, key=b"\xff")
        await rehearsal.settled()
        letters = await rehearsal.dead_letters()
    assert len(letters) == 2
    assert all("says by its key alone" in letter.error for letter in letters)
    assert seen.all == []


async def redrive(rehearsal: Rehearsal, *, edit: bytes | None = None) -> None:
    """Have the one dead letter handled after all."""
    (letter,) = await rehearsal.dead_letters()
    dead = rehearsal.app.get(DeadLetters)
    if edit is not None:
        await dead.edit(letter.id, edit, by="ann")
    await dead.redrive(letter.id, by="ann")
    await rehearsal.settled()


async def test_a_redriven_record_is_what_it_was_and_keeps_its_identity() -> None:
    """At another place, and by the same id, so that an inbox recognises it; also through a second failure."""
    seen = Seen(CustomerChanged)
    seen.fails = True
    value, key = change("c", after='{"id": 1}').encode(), b'{"id": 1}'
    async with in_memory(seen.events, retry_attempts=1) as rehearsal:
        await rehearsal.receive("shop.public.customers", value, key=key, headers=[("x", b"1")])
        await rehearsal.settled()
        (first,) = await rehearsal.dead_letters()
        assert (first.type, first.value, first.key) == ("customer.changed", value, key)
        id_ = first.correlation_id
        await redrive(rehearsal)
        (second,) = await rehearsal.dead_letters()
        assert (second.value, second.key, second.correlation_id) == (value, key, id_)
        assert second.offset != first.offset
        seen.fails = False
        assert await rehearsal.app.get(DeadLetters).dry_run(second.id) == CustomerChanged(id=1)
        await redrive(rehearsal, edit=change("c", after='{"id": 1, "email": "b"}').encode())
    ((event, meta),) = seen.seen
    assert event == CustomerChanged(id=1, email="b")
    assert (meta.id, meta.correlation_id) == (id_, id_)


async def test_an_edit_is_read_by_the_topics_decoder() -> None:
    """A person corrects what was written, in the form that the topic has."""
    seen = Seen(CustomerChanged)
    async with in_memory(seen.events) as rehearsal:
        await rehearsal.receive("shop.public.customers", b'{"op": "?"}', key=b'{"id": 1}')
        await rehearsal.settled()
        (letter,) = await rehearsal.dead_letters()
        dead = rehearsal.app.get(DeadLetters)
        with pytest.raises(DecodeError, match="its op is none of"):
            await dead.dry_run(letter.id)
        with pytest.raises(DecodeError, match="its op is none of"):
            await dead.edit(letter.id, b'{"id": 1}')
        await redrive(rehearsal, edit=change("c", after='{"id": 1}').encode())
    assert seen.all == [CustomerChanged(id=1)]


def test_the_classes_of_a_topic_agree() -> None:
    """A topic is read in one way; the message names both classes."""

    class Other(Event, type="stock.moved", topic="warehouse.stock", key="item"):
        item: str

    seen = Seen(StockCounted, Other)
    with pytest.raises(ConfigurationError, match=r"StockCounted and Other share topic warehouse\.stock"):
        App(EventsModule.for_root(EventsSettings(transport="memory")), EventsModule.for_feature(seen.events))


def test_a_version_that_no_decoder_finds_is_refused() -> None:
    """Records of others have none."""

    class Newer(Event, type="stock.counted", version="2.0", topic="warehouse.stock", decoder=Plain("stock.counted")):
        item: str

    seen = Seen(Newer)
    with pytest.raises(ConfigurationError, match=r"Newer is version 2\.0"):
        App(EventsModule.for_root(EventsSettings(transport="memory")), EventsModule.for_feature(seen.events))


def test_json_needs_a_type() -> None:
    """A value in JSON does not say what it is; an abstract class reads nothing."""
    with pytest.raises(ValueError, match="needs a type"):
        Plain()
    with pytest.raises(TypeError, match="decoder= but no type="):
        type("Bad", (Event,), {}, decoder=customers)


async def test_a_topic_may_be_named_by_the_settings() -> None:
    """The same code reads the topics of another environment."""
    seen = Seen(StockCounted)
    async with in_memory(seen.events, topics={"stock.counted": "staging.stock"}) as rehearsal:
        await rehearsal.receive("staging.stock", b'{"item": "a", "value": 1}')
        await rehearsal.settled()
    assert len(seen.all) == 1


NO_EVENTS: dict[str, Any] = {
    "no type": Decoded(None, "{}"),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  as a decoder may
    "a dict": {"type": "line.read"},
    "half a character": Decoded("line.read\ud800", "{}"),
    "a number": Decoded("line.read", "{}", attributes={"place": 1}),  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType]  as above
    "bytes": Decoded("line.read", b"{}"),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  as above
}


class Lines:
    """A decoder of one's own: `item=value`, and comments."""

    def decode(self, record: Received, schemas: Schemas) -> Decoded | None:
        """See `Decoder`."""
        text = (record.value or b"").decode()
        if text.startswith("#"):
            return None
        item, _, value = text.partition("=")
        if item == "broken":
            raise KeyError(item)
        if item in NO_EVENTS:
            return cast("Decoded", NO_EVENTS[item])
        fields = json.dumps({"item": item, "value": value})
        return Decoded("line.read", fields, version="1.4", attributes={"place": str(record.offset), "Bad-Name": "x"})


lines: Decoder = Lines()


class LineRead(Event, type="line.read", topic="lines", key="item", decoder=lines):
    item: str
    value: Decimal


async def test_a_decoder_of_ones_own() -> None:
    """Anything with `decode` is one: what it skips is skipped, and what it raises says that it cannot be read."""
    seen = Seen(LineRead)
    async with in_memory(seen.events) as rehearsal:
        for value in (b"# a comment", b"a=1.5", b"broken=1"):
            await rehearsal.receive("lines", value, key=b"k")
        await rehearsal.settled()
        (letter,) = await rehearsal.dead_letters()
    assert "its decoder raised KeyError" in letter.error
    ((event, meta),) = seen.seen
    assert event == LineRead(item="a", value=Decimal("1.5"))
    assert str(meta.version) == "1.4"
    assert (meta.headers["ce_place"], meta.key) == (b"1", "k")
    assert not any("Bad" in name for name in meta.headers)


async def test_what_a_decoder_returns_that_is_no_event_stops_nothing() -> None:
    """It is a dead letter, with the reason, and what follows in the partition is handled."""
    seen = Seen(LineRead)
    async with in_memory(seen.events, partitions=1) as rehearsal:
        for value in (*NO_EVENTS, "a=1"):
            await rehearsal.receive("lines", value.encode(), key=b"k")
        await rehearsal.settled()
        letters = {letter.value: letter.error for letter in await rehearsal.dead_letters()}
    assert letters.keys() == {value.encode() for value in NO_EVENTS}
    assert all("what its decoder found is no event" in error for error in letters.values())
    assert seen.all == [LineRead(item="a", value=Decimal(1))]


async def test_neither_half_a_character_nor_an_endless_exponent_stops_a_partition() -> None:
    """JSON may hold both: in a key the first is shown as such, and a number too large to hold is a dead letter."""
    seen = Seen(StockCounted, CustomerChanged)
    number = b'{"item": "a", "value": 1.000000000000000e99999999999999999999}'
    async with in_memory(seen.events, partitions=1) as rehearsal:
        await rehearsal.receive("warehouse.stock", number, key=b"a")
        await rehearsal.receive("warehouse.stock", b'{"item": "a", "value": 1}', key=b'{"item": "\\ud800"}')
        await rehearsal.receive(
            "shop.public.customers", change("c", after='{"id": 1}').encode(), key=b'{"a":"\\udfff"}'
        )
        await rehearsal.settled()
        (letter,) = await rehearsal.dead_letters()
    assert letter.value == number
    assert sorted(map(repr, seen.all)) == sorted(
        map(repr, [CustomerChanged(id=1), StockCounted(item="a", value=Decimal(1))])
    )
    assert all("\ufffd" in (meta.key or "") for _, meta in seen.seen)


async def test_a_text_that_does_not_end_costs_no_more_than_its_length() -> None:
    """A hostile value is looked at once, and not again for each sign in it."""
    value = b'{"item": "' + b'\\"' * 200_000 + b"1234567890123456789"
    seen = Seen(StockCounted)
    async with in_memory(seen.events) as rehearsal:
        await rehearsal.receive("warehouse.stock", value)
        await rehearsal.settled(60)  # from each quote anew it would be 40 billion steps
        assert len(await rehearsal.dead_letters()) == 1


async def test_numbers_stay_numbers_where_a_float_holds_them() -> None:
    """Only what it would round becomes a text, and a whole number never does."""
    assert exact('{"a": 12345678901234567890123, "b": 0.1, "c": [1e2, "1.00000000000000000001"]}') == (
        '{"a": 12345678901234567890123, "b": 0.1, "c": [1e2, "1.00000000000000000001"]}'
    )
    assert exact('{"a": -1.00000000000000000001, "b\\"1.00000000000000000002": 1.50000000000000000000e2}') == (
        '{"a": "-1.00000000000000000001", "b\\"1.00000000000000000002": 1.50000000000000000000e2}'
    )


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_record_that_cannot_be_read_is_parked_where_its_handler_parks(database_url: str) -> None:
    """With all that follows of its key; skipped by a person, it is a dead letter and the others go on."""
    seen = Seen(CustomerChanged, on_failure="park")
    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(database_url)))
    async with in_memory(seen.events, modules=[database]) as rehearsal:
        for value in (b"{}", change("c", after='{"id": 1}').encode()):
            await rehearsal.receive("shop.public.customers", value, key=b'{"id": 1}')
        await rehearsal.receive("shop.public.customers", change("c", after='{"id": 2}').encode(), key=b'{"id": 2}')
        parked = rehearsal.app.get(ParkedKeys)

        async def waits() -> bool:
            return [key.waiting for key in await parked.list()] == [2]

        await eventually(waits)
        await eventually(lambda: seen.all == [CustomerChanged(id=2)])
        (key,) = await parked.list()
        assert "its op is none of" in key.error
        await parked.skip(key.id)
        await eventually(lambda: CustomerChanged(id=1) in seen.all)
        (letter,) = await rehearsal.dead_letters()
        assert letter.value == b"{}"


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_new_type_of_a_foreign_topic_waits_for_the_process_that_handles_it(database_url: str) -> None:
    """While a release is rolled out, the old process reads deletions that only the new one has a handler for."""
    old, new = Seen(CustomerChanged, on_failure="park"), Seen(CustomerChanged, CustomerDeleted, on_failure="park")
    settings = DatabaseSettings(url=SecretStr(database_url))
    async with (
        in_memory(new.events, modules=[DatabaseModule.for_root(settings)]) as later,
        in_memory(old.events, modules=[DatabaseModule.for_root(settings)]) as rehearsal,
    ):
        await rehearsal.receive("shop.public.customers", change("d").encode(), key=b'{"id": 1}')
        await eventually(lambda: new.all == [CustomerDeleted(id=1)])
        assert (old.all, await rehearsal.dead_letters(), await later.dead_letters()) == ([], [], [])


async def test_a_topic_of_others_on_kafka(kafka: str, prefix: str, client: str, sqlite_url: str) -> None:
    """It is theirs to create, is read as soon as it is there, and its dead letters go back to it, each handled once."""
    seen = Seen(CustomerChanged, CustomerDeleted, group=prefix, inbox=True, on_failure="dead-letter")
    topics = dict.fromkeys(("customer.changed", "customer.deleted"), prefix)
    settings = EventsSettings(
        transport="kafka", outbox=False, kafka_client=client, kafka_servers=kafka, topics=topics, source=prefix
    )
    app = App(
        DatabaseModule.for_root(DatabaseSettings(url=SecretStr(sqlite_url))),
        EventsModule.for_root(settings),
        EventsModule.for_feature(seen.events),
    )
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    producer = AIOKafkaProducer(bootstrap_servers=kafka)
    await producer.start()
    try:
        async with app.running(serve=True):

            async def named() -> bool:
                health = await app.health()
                return any("others write it" in part.detail for part in health.values())

            await eventually(named, seconds=60)
            assert prefix not in await admin.list_topics()
            found = [line for module in app.modules if module.name == "events" for line in await module.inspect(app)]
            assert [line for line in found if prefix in line] == [
                f"topic {prefix} does not exist: others write it, so it is theirs to create"
            ]
            await admin.create_topics([NewTopic(prefix, 1, 1)])
            row = '{"id": 1, "email": "ann@example.com"}'
            for value in (change("c", after=row), "{}", change("d", before='{"id": 1}'), None):
                sent = value and value.encode()
                await producer.send_and_wait(prefix, sent, key=b'{"id": 1}', headers=[("ce_tenant", b"other")])
            await eventually(lambda: CustomerDeleted(id=1) in seen.all, seconds=60)
            dead = app.get(DeadLetters)
            (letter,) = await dead.list(prefix)
            assert (letter.value, letter.type) == (b"{}", "customer.changed")
            await dead.edit(letter.id, change("u", after='{"id": 1}').encode(), by="ann")
            await dead.redrive(letter.id, by="ann")
            await eventually(lambda: len(seen.all) == 3, seconds=60)
            assert await dead.list(prefix) == []
    finally:
        await producer.stop()
        await admin.close()
    assert seen.all == [
        CustomerChanged(id=1, email="ann@example.com"), CustomerDeleted(id=1), CustomerChanged(id=1),
    ]  # fmt: skip
    assert {meta.tenant for _, meta in seen.seen} == {None}
    assert [meta.offset for _, meta in seen.seen] == [0, 2, 4]
    assert seen.seen[2][1].id.startswith(f"{prefix}/0@1:")
