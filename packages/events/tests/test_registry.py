"""Topics in Avro and Protocol Buffers: by schemas of a registry, which may be away, slow or wrong."""

import json
import logging
import ssl
from base64 import b64encode
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from confluent_kafka.schema_registry import Schema, SchemaReference, SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroSerializer
from confluent_kafka.schema_registry.protobuf import ProtobufSerializer
from confluent_kafka.serialization import MessageField, SerializationContext
from google.protobuf import descriptor_pool, timestamp_pb2
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.message_factory import GetMessageClass
from pydantic import SecretStr, ValidationError

from mainstay.core import App, ConfigurationError, Retry, spawn
from mainstay.core.drain import Drain
from mainstay.core.testing import VirtualClock, eventually
from mainstay.database import DatabaseModule, DatabaseSettings
from mainstay.events import (
    DeadLetters,
    Event,
    EventRouter,
    EventsModule,
    EventsSettings,
    Metadata,
    ParkedKeys,
    SchemaError,
)
from mainstay.events import _registry as registry_file
from mainstay.events._registry import SchemaRegistry
from mainstay.events.errors import DecodeError
from mainstay.events.foreign import Debezium, Plain
from mainstay.events.testing import in_memory
from mainstay_servers.secure import Authority

from .registry import Registry, registry

AVRO = Plain(format="avro")


class OrderPlaced(Event, type="com.acme.OrderPlaced", topic="orders", key="id", decoder=AVRO):
    id: int
    amount: Decimal
    at: datetime
    day: date
    ref: UUID
    raw: bytes
    share: float
    note: str | None
    lines: list[dict[str, int]]


class OrderNoted(Event, type="com.acme.OrderNoted", topic="orders", key="id", decoder=AVRO):
    id: int
    by: dict[str, str]


class RowChanged(Event, type="row.changed", topic="shop.rows", key="id", decoder=Debezium("row", format="avro")):
    id: int
    name: str


class RowDeleted(Event, type="row.deleted", topic="shop.rows", key="id", decoder=Debezium("row", format="avro")):
    id: int


class Sent(Event, type="acme.Outer.Sent", topic="sent", key="id", decoder=Plain(format="protobuf")):
    id: int
    amount: str
    raw: bytes
    at: datetime
    address: dict[str, str]
    count: int


class PlainSeen(Event, type="plain.seen", topic="plain", key="n", decoder=Plain("plain.seen")):
    n: int


ORDER = {
    "type": "record",
    "name": "OrderPlaced",
    "namespace": "com.acme",
    "fields": [
        {"name": "id", "type": "long"},
        {"name": "amount", "type": {"type": "bytes", "logicalType": "decimal", "precision": 30, "scale": 2}},
        {"name": "at", "type": {"type": "long", "logicalType": "timestamp-micros"}},
        {"name": "day", "type": {"type": "int", "logicalType": "date"}},
        {"name": "ref", "type": {"type": "string", "logicalType": "uuid"}},
        {"name": "raw", "type": "bytes"},
        {"name": "share", "type": "double"},
        {"name": "note", "type": ["null", "string"]},
        {"name": "lines", "type": {"type": "array", "items": {"type": "map", "values": "int"}}},
    ],
}
PERSON = {"type": "record", "name": "Person", "namespace": "com.acme", "fields": [{"name": "name", "type": "string"}]}
NOTED = {
    "type": "record",
    "name": "OrderNoted",
    "namespace": "com.acme",
    "fields": [{"name": "id", "type": "long"}, {"name": "by", "type": "com.acme.Person"}],
}
ROW = {"type": "record", "name": "Row", "fields": [{"name": "id", "type": "int"}, {"name": "name", "type": "string"}]}
CHANGE = {
    "type": "record",
    "name": "Envelope",
    "namespace": "shop.rows",
    "fields": [
        {"name": "before", "type": ["null", ROW]},
        {"name": "after", "type": ["null", "Row"]},
        {
            "name": "source",
            "type": {"type": "record", "name": "Source", "fields": [{"name": "ts_ms", "type": "long"}]},
        },
        {"name": "op", "type": "string"},
    ],
}
KEY = {"type": "record", "name": "Key", "namespace": "shop.rows", "fields": [{"name": "id", "type": "int"}]}


@pytest.fixture
def server() -> Iterator[Registry]:
    """A registry."""
    with registry() as running:
        yield running


def serializer(
    server: Registry, schema: dict[str, Any], topic: str, *references: SchemaReference
) -> Callable[[Any], bytes]:
    """What others write Avro with."""
    client = SchemaRegistryClient({"url": server.url})
    write = AvroSerializer(client, Schema(json.dumps(schema), "AVRO", list(references)))
    context = SerializationContext(topic, MessageField.VALUE)

    def written(value: Any) -> bytes:
        text = write(value, context)
        assert isinstance(text, bytes)
        return text

    return written


def order(n: int) -> dict[str, Any]:
    """What is written."""
    return {
        "id": n,
        "amount": Decimal("12345678901234567.89"),
        "at": datetime(2026, 3, 1, 10, 0, 0, 123456, tzinfo=UTC),
        "day": date(2026, 3, 1),
        "ref": UUID(int=n),
        "raw": b"\xff\xfe\x00",
        "share": 0.1,
        "note": None,
        "lines": [{"a": 1}, {}],
    }


class Seen:
    """Handlers that keep what they were given."""

    def __init__(self, *classes: type[Event]) -> None:
        self.events = EventRouter()
        self.seen: list[tuple[Any, Metadata]] = []

        @self.events.on(*classes, group="seen")
        async def see(event: Event, meta: Metadata) -> None:
            self.seen.append((event, meta))

    @property
    def all(self) -> list[Any]:
        """The events."""
        return [event for event, _ in self.seen]


async def known(reading: Callable[[], Any], *, clock: VirtualClock | None = None, seconds: float = 30) -> Any:
    """What is read once its schema is known; on `clock`, it is tried again each second, as an event is."""
    found: list[Any] = []

    async def there() -> bool:
        try:
            found.append(reading())
        except SchemaError:
            if clock is not None:
                await clock.advance(1)
            return False
        return True

    await eventually(there, seconds=seconds)
    return found[0]


class Asking:
    """A registry's client with its worker, without an App."""

    def __init__(self, server: Registry, clock: Any = None, **settings: Any) -> None:
        self.settings = EventsSettings(transport="memory", registry_url=server.url, **settings)
        self.clock = VirtualClock() if clock is None else clock
        self.schemas = SchemaRegistry(self.settings, self.clock)
        self._drain = Drain()

    async def __aenter__(self) -> SchemaRegistry:
        self._task = spawn(self.schemas.run(self._drain), name="registry")
        return self.schemas

    async def __aexit__(self, *_: object) -> None:
        self._drain.begin()
        await self._task


async def test_avro_is_read_by_the_schema_it_was_written_by(server: Registry) -> None:
    """Written by another's serializer: decimals, times and bytes come back as they were; its name is the type."""
    write = serializer(server, ORDER, "orders")
    seen = Seen(OrderPlaced)
    async with in_memory(seen.events, registry_url=server.url) as rehearsal:
        for n in range(100):
            await rehearsal.receive("orders", write(order(n)), key=b"%d" % n)
        await rehearsal.settled(60)
        assert await rehearsal.dead_letters() == []
        health = await rehearsal.app.get(SchemaRegistry).health()
    assert sorted(event.id for event in seen.all) == list(range(100))
    event, meta = next((event, meta) for event, meta in seen.seen if event.id == 7)
    assert event.amount == Decimal("12345678901234567.89")
    assert event.at == datetime(2026, 3, 1, 10, 0, 0, 123456, tzinfo=UTC)
    assert (event.day, event.ref, event.share, event.note) == (date(2026, 3, 1), UUID(int=7), 0.1, None)
    assert event.lines == [{"a": 1}, {}]
    assert (meta.type, meta.key) == ("com.acme.OrderPlaced", "7")
    assert [path for path in server.asked if path.startswith("/schemas/")] == ["/schemas/ids/1"]
    assert health.detail.startswith("1 schemas")


async def test_avro_schemas_may_name_others(server: Registry) -> None:
    """A schema of another subject, and the tombstone of a topic whose type is not named is skipped."""
    person = server.add("person", {"schema": json.dumps(PERSON), "schemaType": "AVRO"})
    assert person == 1
    write = serializer(server, NOTED, "orders", SchemaReference("com.acme.Person", "person", 1))
    seen = Seen(OrderNoted)
    async with in_memory(seen.events, registry_url=server.url) as rehearsal:
        await rehearsal.receive("orders", write({"id": 1, "by": {"name": "ann"}}), key=b"1")
        await rehearsal.receive("orders", None, key=b"1")
        await rehearsal.settled(60)
        assert await rehearsal.dead_letters() == []
    assert seen.all == [OrderNoted(id=1, by={"name": "ann"})]


async def test_debezium_in_avro(server: Registry) -> None:
    """With keys in Avro, which order and name the rows."""
    write, write_key = serializer(server, CHANGE, "shop.rows"), serializer(server, KEY, "shop.rows-key")
    seen = Seen(RowChanged, RowDeleted)
    source = {"ts_ms": 1740477600000}
    async with in_memory(seen.events, registry_url=server.url) as rehearsal:
        for value in (
            {"before": None, "after": {"id": 5, "name": "ann"}, "source": source, "op": "c"},
            {"before": {"id": 5, "name": "ann"}, "after": None, "source": source, "op": "d"},
        ):
            await rehearsal.receive("shop.rows", write(value), key=write_key({"id": 5}))
        await rehearsal.receive("shop.rows", None, key=write_key({"id": 5}))
        await rehearsal.settled(60)
        assert await rehearsal.dead_letters() == []
    assert seen.all == [RowChanged(id=5, name="ann"), RowDeleted(id=5)]
    assert [meta.key for _, meta in seen.seen] == ["5", "5"]
    assert seen.seen[0][1].time == datetime(2025, 2, 25, 10, tzinfo=UTC)


@pytest.mark.parametrize("fault", ["closes", "hangs"])
async def test_a_registry_that_is_away_kills_no_event_and_delays_no_other(
    server: Registry, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What needs it waits in order, other topics of the group go on, health says why, and all is handled in the end."""
    write = serializer(server, ORDER, "orders")
    values = [write(order(n)) for n in range(20)]
    seen = Seen(OrderPlaced, PlainSeen)
    if fault == "hangs":
        server.waits.clear()
    elif fault != "away":
        server.fails = {"closes": 0, "refuses": 401, "redirects": 302}[fault]
    url = "http://127.0.0.1:1" if fault == "away" else server.url
    async with in_memory(seen.events, partitions=1, concurrency=4, registry_url=url, registry_seconds=0.5) as rehearsal:
        schemas = rehearsal.app.get(SchemaRegistry)
        for n, value in enumerate(values):
            await rehearsal.receive("orders", value, key=b"%d" % (n % 8))
            await rehearsal.receive("plain", b'{"n": %d}' % n, key=b"%d" % n)
        await eventually(lambda: len(seen.seen) == 20, seconds=60)  # more keys wait than there are handlers
        assert {type(event) for event in seen.all} == {PlainSeen}

        async def degraded() -> bool:
            return any("does not answer as one" in each.detail for each in (await rehearsal.app.health()).values())

        await eventually(degraded, seconds=60)
        assert await rehearsal.dead_letters() == []
        server.waits.set()
        server.fails = None
        await rehearsal.settled(60)
        assert await rehearsal.dead_letters() == []
        assert (await schemas.health()).status == "ok"
    orders = [event.id for event in seen.all if isinstance(event, OrderPlaced)]
    assert sorted(orders) == list(range(20))
    for key in range(8):
        assert [n for n in orders if n % 8 == key] == list(range(key, 20, 8))
    lines = [each for each in caplog.records if each.levelno >= logging.WARNING and "schema" in each.getMessage()]
    assert 1 <= len(lines) <= 5


async def test_parked_keys_that_wait_for_a_schema_delay_no_others(server: Registry, sqlite_url: str) -> None:
    """More of them than a process works on at once, and another key that needs no schema."""
    write = serializer(server, ORDER, "orders")
    values = [write(order(n)) for n in range(20)]
    fails = True
    seen: list[Any] = []

    def router() -> EventRouter:
        events = EventRouter()

        @events.on(OrderPlaced, PlainSeen, group="seen", on_failure="park", retry=Retry(attempts=1))
        async def see(event: Event) -> None:
            if fails:
                msg = "not today"
                raise ValueError(msg)
            seen.append(event)

        return events

    settings = DatabaseSettings(url=SecretStr(sqlite_url))
    async with in_memory(router(), modules=[DatabaseModule.for_root(settings)], registry_url=server.url) as rehearsal:
        for n, value in enumerate(values):
            await rehearsal.receive("orders", value, key=b"%d" % n)
        await rehearsal.receive("plain", b'{"n": 1}', key=b"last")
        parked = rehearsal.app.get(ParkedKeys)

        async def all_wait() -> bool:
            return len(await parked.list()) == 21

        await eventually(all_wait, seconds=60)
    server.fails = 0
    fails = False
    async with in_memory(router(), modules=[DatabaseModule.for_root(settings)], registry_url=server.url) as rehearsal:
        parked = rehearsal.app.get(ParkedKeys)
        *orders, plain = sorted(await parked.list(), key=lambda key: key.topic)
        for key in orders:
            await parked.retry(key.id)
        asked = len(server.asked)
        await eventually(lambda: len(server.asked) >= asked + 1, seconds=60)  # by now as many as may be are worked on
        await parked.retry(plain.id)
        await eventually(lambda: seen == [PlainSeen(n=1)], seconds=60)
        server.fails = None
        await eventually(lambda: len(seen) == 21, seconds=60)

        async def none_waits() -> bool:
            return not await parked.list()

        await eventually(none_waits, seconds=60)
        assert await rehearsal.dead_letters() == []


async def test_a_schema_that_the_registry_does_not_know_is_not_given_up_at_once(
    server: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may not have heard of it yet; after half a minute the record is a dead letter, which can be redriven."""
    write = serializer(server, ORDER, "orders")
    value = write(order(1))
    server.hides.add(1)
    seen = Seen(OrderPlaced)
    async with in_memory(seen.events, registry_url=server.url) as rehearsal:
        await rehearsal.receive("orders", value, key=b"1")
        await eventually(lambda: sum(path.startswith("/schemas/") for path in server.asked) >= 2, seconds=60)
        assert await rehearsal.dead_letters() == []
        monkeypatch.setattr(registry_file, "_PATIENCE_SECONDS", 0.0)
        await rehearsal.settled(60)
        (letter,) = await rehearsal.dead_letters()
        assert f"the schema registry at {server.url} has no schema 1" in letter.error
        assert (letter.type, letter.value) == ("com.acme.OrderPlaced", value)
        server.hides.clear()
        monkeypatch.setattr(registry_file, "_REFUSED_SECONDS", 0.0)
        rehearsal.app.get(SchemaRegistry)._useless.clear()
        event = await rehearsal.app.get(DeadLetters).dry_run(letter.id)
        assert isinstance(event, OrderPlaced)
        await rehearsal.app.get(DeadLetters).redrive(letter.id)
        await rehearsal.settled(60)
    assert [event.id for event in seen.all] == [1]


async def test_values_that_are_not_what_they_say_are_dead_letters(server: Registry) -> None:
    """Each with its reason, byte for byte, and what follows is handled."""
    write = serializer(server, ORDER, "orders")
    good = write(order(1))
    foreign = server.add("other", {"schema": "message A {}", "schemaType": "PROTOBUF"})
    broken = server.add("broken", {"schema": '{"type": "nothing"}', "schemaType": "AVRO"})
    hole = server.add("hole", {"schema": json.dumps(NOTED), "schemaType": "AVRO"})
    number = server.add("number", {"schema": '"int"', "schemaType": "AVRO"})
    bad = {
        b"{}": "was not written through a schema registry",
        b"\x00\x00": "was not written through a schema registry",
        good[:9]: "the value is no com.acme.OrderPlaced as its schema says",
        good + b"x": "the value is longer than a com.acme.OrderPlaced of its schema",
        b"\0" + foreign.to_bytes(4, "big"): "it is PROTOBUF, and the topic is said to hold avro",
        b"\0" + broken.to_bytes(4, "big"): "it cannot be used",
        b"\0" + hole.to_bytes(4, "big"): "it cannot be used",
        b"\0" + number.to_bytes(4, "big") + b"\x02": "the record has no header ce_type",
    }
    seen = Seen(OrderPlaced)
    async with in_memory(seen.events, registry_url=server.url) as rehearsal:
        for value in (*bad, good):
            await rehearsal.receive("orders", value, key=b"1")
        await rehearsal.settled(60)
        letters = {letter.value: letter.error for letter in await rehearsal.dead_letters()}
        assert (await rehearsal.app.get(SchemaRegistry).health()).status == "ok"
    assert letters.keys() == bad.keys()
    for value, says in bad.items():
        assert says in letters[value], (value, letters[value])
    assert [event.id for event in seen.all] == [1]


@pytest.mark.parametrize(
    ("settings", "header"),
    [
        ({"registry_username": "ann", "registry_password": SecretStr("s3cret")}, "Basic YW5uOnMzY3JldA=="),
        ({"registry_token": SecretStr("s3cret-token")}, "Bearer s3cret-token"),
    ],
)
async def test_an_account_is_shown_and_never_told(
    server: Registry, settings: dict[str, Any], header: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As basic authentication or a bearer's token; a refusal says neither."""
    value = serializer(server, ORDER, "orders")(order(1))
    server.wants = header
    async with Asking(server, **settings) as schemas:
        assert (await known(lambda: schemas.read("avro", value))).name == "com.acme.OrderPlaced"
        assert await schemas.wrong() == []
        server.wants = "Bearer another"
        (wrong,) = await schemas.wrong()
        assert "401" in wrong
        other = b"\0\0\0\0\x63" + value[5:]

        async def degraded() -> bool:
            with pytest.raises(SchemaError):
                schemas.read("avro", other)
            return (await schemas.health()).status == "degraded"

        await eventually(degraded)
        told = f"{(await schemas.health()).detail} {wrong} {caplog.text} {vars(schemas)} {schemas._settings}"
    assert "401" in told
    assert "s3cret" not in told
    assert "YW5uOnMzY3JldA" not in told


async def test_a_registry_by_tls(tmp_path: Path) -> None:
    """Trusted by the authority that the settings name, and by no other."""
    authority, stranger = Authority(tmp_path, "authority"), Authority(tmp_path, "stranger")
    certificate, key = authority.sign("registry")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    with registry(tls) as server:
        server.add("number", {"schema": '{"type": "record", "name": "N", "fields": []}'})
        async with Asking(server, registry_ca_file=str(authority.file)) as schemas:
            assert (await known(lambda: schemas.read("avro", b"\0\0\0\0\1"))) == ("N", "{}")
        async with Asking(server, registry_ca_file=str(stranger.file)) as schemas:
            (wrong,) = await schemas.wrong()
            assert "certificate verify failed" in wrong.lower()


async def test_what_is_known_is_asked_for_once_and_bounded(server: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest schema makes place for a new one, and is asked for again when it is needed."""
    monkeypatch.setattr(registry_file, "_MOST", 2)
    schema = {"type": "record", "name": "N", "fields": []}
    ids = [server.add("n", {"schema": json.dumps({**schema, "name": f"N{n}"})}) for n in range(3)]
    async with Asking(server) as schemas:
        for id_ in (*ids, ids[2], ids[0]):
            value = b"\0" + id_.to_bytes(4, "big")
            assert (await known(partial(schemas.read, "avro", value))).name == f"N{id_ - 1}"
        assert len(schemas._known) == 2
    assert server.asked == [f"/schemas/ids/{id_}" for id_ in (1, 2, 3, 1)]


async def test_an_answer_of_another_server_is_no_verdict(server: Registry) -> None:
    """A wrong address, a redirect, or JSON of another kind: the events wait, and no other server is asked."""
    value = b"\0\0\0\0\1"
    answers: list[tuple[int, Any]] = [
        (302, {}),
        (404, {"error_code": 404}),
        (200, []),
        (200, {"id": 1}),
        (200, {"schema": "{}", "references": 7}),
    ]
    for told in answers:
        server.says = told
        async with Asking(server) as schemas:

            async def degraded(schemas: SchemaRegistry = schemas) -> bool:
                with pytest.raises(SchemaError):
                    schemas.read("avro", value)
                return (await schemas.health()).status == "degraded"

            await eventually(degraded)
    assert set(server.asked) == {"/schemas/ids/1"}


OUTER = FileDescriptorProto(name="outer.proto", package="acme", syntax="proto3")
OUTER.dependency.extend(["address.proto", "google/protobuf/timestamp.proto"])
_first, _outer = OUTER.message_type.add(name="First"), OUTER.message_type.add(name="Outer")
_first.field.add(name="n", number=1, type="TYPE_INT32", label="LABEL_OPTIONAL")
_outer.nested_type.add(name="Unused")
_sent = _outer.nested_type.add(name="Sent")
_sent.field.add(name="id", number=1, type="TYPE_INT64", label="LABEL_OPTIONAL")
_sent.field.add(name="amount", number=2, type="TYPE_STRING", label="LABEL_OPTIONAL")
_sent.field.add(name="raw", number=3, type="TYPE_BYTES", label="LABEL_OPTIONAL")
_sent.field.add(
    name="at", number=4, type="TYPE_MESSAGE", type_name=".google.protobuf.Timestamp", label="LABEL_OPTIONAL"
)
_sent.field.add(name="address", number=5, type="TYPE_MESSAGE", type_name=".acme.Address", label="LABEL_OPTIONAL")
_sent.field.add(name="count", number=6, type="TYPE_INT32", label="LABEL_OPTIONAL")
ADDRESS = FileDescriptorProto(name="address.proto", package="acme", syntax="proto3")
ADDRESS.message_type.add(name="Address").field.add(name="street", number=1, type="TYPE_STRING", label="LABEL_OPTIONAL")


@pytest.fixture(scope="module")
def messages() -> dict[str, Any]:
    """The classes of the messages that others write."""
    pool = descriptor_pool.DescriptorPool()
    timestamp = FileDescriptorProto()
    timestamp_pb2.DESCRIPTOR.CopyToProto(timestamp)
    for file in (timestamp, ADDRESS, OUTER):
        pool.Add(file)
    return {
        name: GetMessageClass(pool.FindMessageTypeByName(name))
        for name in ("acme.First", "acme.Outer.Sent", "acme.Address", "google.protobuf.Timestamp")
    }


def write_protobuf(server: Registry, message: Any) -> bytes:
    """As another's serializer does."""
    write = ProtobufSerializer(type(message), SchemaRegistryClient({"url": server.url}))
    text = write(message, SerializationContext("sent", MessageField.VALUE))
    assert isinstance(text, bytes)
    return text


async def test_protocol_buffers_are_read_by_their_schema(server: Registry, messages: dict[str, Any]) -> None:
    """A nested message of a file that imports others: no generated code is needed here."""
    sent = messages["acme.Outer.Sent"](
        id=2**60,
        amount="12345678901234567.89",
        raw=b"\xff\xfe\x00",
        at=messages["google.protobuf.Timestamp"](seconds=1740477600),
        address=messages["acme.Address"](street="Kreuzstraße"),
    )
    value = write_protobuf(server, sent)
    first = write_protobuf(server, messages["acme.First"](n=1))
    seen = Seen(Sent)
    async with in_memory(seen.events, registry_url=server.url) as rehearsal:
        for each in (value, first):
            await rehearsal.receive("sent", each, key=b"k")
        await rehearsal.settled(60)
        assert await rehearsal.dead_letters() == []  # a message that is not handled is skipped, as every such type is
        bad = {
            value[:5]: "does not say which message",
            value[:5] + b"\x01": "does not say which message",
            value[:5] + b"\xff\xff\xff\xff\xff\x01": "does not say which message",
            value[:5] + b"\x02\x01": "does not say which message",
            value[:5] + b"\x02\x10": "which has none there",
            value[:8] + b"\xff": "the value is no acme.Outer.Sent as its schema says",
        }
        for each in bad:
            await rehearsal.receive("sent", each, key=b"k")
        await rehearsal.settled(60)
        letters = {letter.value: letter.error for letter in await rehearsal.dead_letters()}
    assert seen.all == [
        Sent(
            id=2**60,
            amount="12345678901234567.89",
            raw=b"\xff\xfe\x00",
            at=datetime(2025, 2, 25, 10, tzinfo=UTC),
            address={"street": "Kreuzstraße"},
            count=0,
        )
    ]
    assert letters.keys() == bad.keys()
    for each, says in bad.items():
        assert says in letters[each], (each, letters[each])


async def test_a_file_that_is_not_referred_to_is_missed(server: Registry) -> None:
    """And a text that is no descriptor is named, too: the registry is one that cannot tell it as one."""
    file = FileDescriptorProto(name="a.proto", dependency=["b.proto"])
    text = b64encode(file.SerializeToString()).decode()
    ids = [
        server.add("a", {"schema": text, "schemaType": "PROTOBUF"}),
        server.add("b", {"schema": "message A {}", "schemaType": "PROTOBUF"}),
    ]
    async with Asking(server) as schemas:
        for id_, says in zip(ids, ("imports b.proto", "cannot be used"), strict=True):
            value = b"\0" + id_.to_bytes(4, "big") + b"\0"
            with pytest.raises(DecodeError, match=says):
                await known(partial(schemas.read, "protobuf", value))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"registry_url": "registry:8081"}, "no address of a schema registry"),
        ({"registry_url": "ftp://registry"}, "no address of a schema registry"),
        ({"registry_url": "http://"}, "no address of a schema registry"),
        ({"registry_url": "http://a:99999"}, "no address of a schema registry"),
        ({"registry_url": "http://ann:s3cret@registry"}, "no address of a schema registry"),
        ({"registry_token": SecretStr("s3cret")}, "registry_token needs registry_url"),
        ({"registry_url": "http://r", "registry_username": "ann"}, "need each other"),
        (
            {
                "registry_url": "http://r",
                "registry_username": "ann",
                "registry_password": SecretStr("s3cret"),
                "registry_token": SecretStr("s3cret"),
            },
            "exclude each other",
        ),
        ({"registry_url": "http://r", "registry_ca_file": "ca.pem"}, "begins with https:"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], says: str) -> None:
    """By name, and without what is secret in them."""
    with pytest.raises((ConfigurationError, ValidationError), match=says) as refused:
        EventsSettings(transport="memory", **settings)
    assert "s3cret" not in str(refused.value)


def test_what_a_decoder_needs_is_looked_at_first(tmp_path: Path) -> None:
    """The registry's address, and the file of certificates."""
    events = Seen(OrderPlaced).events
    feature = EventsModule.for_feature(events)
    with pytest.raises(
        ConfigurationError, match=r"Plain\(.*\) asks a schema registry: set MAINSTAY_EVENTS_REGISTRY_URL="
    ):
        App(EventsModule.for_root(EventsSettings(transport="memory")), feature)
    for file in (tmp_path / "missing.pem", tmp_path / "empty.pem"):
        if file.name == "empty.pem":
            file.write_text("")
        settings = EventsSettings(transport="memory", registry_url="https://r", registry_ca_file=str(file))
        with pytest.raises(ConfigurationError, match="MAINSTAY_EVENTS_REGISTRY_CA_FILE"):
            App(EventsModule.for_root(settings), EventsModule.for_feature(Seen(OrderPlaced).events))


@pytest.mark.parametrize(("format_", "package"), [("avro", "fastavro"), ("protobuf", "google")])
def test_an_extra_that_is_not_installed_is_named(format_: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that installs it."""

    def missing(name: str) -> Any:
        error = ModuleNotFoundError(f"No module named {package!r}")
        error.name = f"{package}.x"
        raise error

    monkeypatch.setattr(registry_file, "import_module", missing)
    with pytest.raises(ConfigurationError, match=rf"pip install 'mainstay-events\[{format_}\]'"):
        registry_file.check_format(format_)


async def test_files_that_a_registry_has_by_itself_are_there(server: Registry) -> None:
    """Kafka Connect's converter imports them, and refers to none of them."""
    file = FileDescriptorProto(name="bill.proto", package="acme", syntax="proto3")
    file.dependency.extend(["confluent/meta.proto", "confluent/type/decimal.proto"])
    bill = file.message_type.add(name="Bill")
    bill.field.add(name="id", number=1, type="TYPE_INT32", label="LABEL_OPTIONAL")
    bill.field.add(
        name="amount", number=2, type="TYPE_MESSAGE", type_name=".confluent.type.Decimal", label="LABEL_OPTIONAL"
    )
    server.add("bill", {"schema": b64encode(file.SerializeToString()).decode(), "schemaType": "PROTOBUF"})
    async with Asking(server) as schemas:
        value = b"\0\0\0\0\1\0" + b"\x08\x07\x12\x08\x0a\x02\x04\xd2\x10\x04\x18\x02"
        data = await known(lambda: schemas.read("protobuf", value))
    assert data.name == "acme.Bill"
    assert json.loads(data.json) == {"id": 7, "amount": {"value": "BNI=", "precision": 4, "scale": 2}}


NOT_MEANT: dict[str, Any] = {
    "type": "record",
    "name": "Meant",
    "namespace": "acme",
    "fields": [
        {"name": "id", "type": "int"},
        {"name": "small", "type": {"type": "bytes", "logicalType": "decimal", "precision": 4, "scale": 2}},
        {"name": "fixed", "type": {"type": "fixed", "name": "F", "size": 4, "logicalType": "decimal", "precision": 2}},
        {
            "name": "any",
            "type": [
                "null",
                {
                    "type": "record",
                    "name": "VariableScaleDecimal",
                    "namespace": "io.debezium.data",
                    "connect.name": "io.debezium.data.VariableScaleDecimal",
                    "fields": [{"name": "scale", "type": "int"}, {"name": "value", "type": "bytes"}],
                },
            ],
        },
        {"name": "again", "type": ["null", "io.debezium.data.VariableScaleDecimal"], "default": "of no type"},
        {"name": "born", "type": {"type": "int", "connect.name": "io.debezium.time.Date"}},
        {"name": "at", "type": {"type": "long", "connect.name": "io.debezium.time.MicroTimestamp"}},
        {"name": "nanos", "type": {"type": "long", "logicalType": "timestamp-nanos"}},
        {"name": "ref", "type": {"type": "fixed", "name": "U", "size": 16, "logicalType": "uuid"}},
    ],
}


async def test_avro_is_read_as_it_is_meant(server: Registry) -> None:
    """No amount is rounded to the precision that its schema says, and what Connect means by a number is known."""
    server.add("meant", {"schema": json.dumps(NOT_MEANT)})
    value = b"".join(
        (
            b"\0\0\0\0\1\x0e",
            b"\x06" + (1234567).to_bytes(3, "big"),
            (123456).to_bytes(4, "big"),
            b"\x02\x28\x02\x7b",
            b"\x02\x02\x02\xff",
            b"\x76",
            b"\x02",
            b"\x02",
            UUID(int=7).bytes,
        )
    )
    async with Asking(server) as schemas:
        data = await known(lambda: schemas.read("avro", value))
    assert data.name == "acme.Meant"
    assert json.loads(data.json) == {
        "id": 7,
        "small": "12345.67",
        "fixed": "123456",
        "any": "1.23E-18",
        "again": "-0.1",
        "born": "1970-03-01",
        "at": "1970-01-01T00:00:00.000001Z",
        "nanos": "1970-01-01T00:00:00.000000001Z",
        "ref": str(UUID(int=7)),
    }


async def test_a_value_that_holds_itself_without_end_is_a_dead_letter(server: Registry) -> None:
    """Read level by level in C it would end the process, with a few thousand bytes."""
    chain = {"type": "record", "name": "Chain", "fields": [{"name": "next", "type": ["null", "Chain"]}]}
    server.add("chain", {"schema": json.dumps(chain)})
    forest = {"type": "record", "name": "Tree", "fields": [{"name": "c", "type": {"type": "map", "values": "Tree"}}]}
    server.add("forest", {"schema": json.dumps([{"type": "array", "items": forest}])})
    async with Asking(server) as schemas:
        short = b"\0\0\0\0\1" + b"\2" * 50 + b"\0"
        assert (await known(lambda: schemas.read("avro", short))).json.count("next") == 51
        for level, id_, begin in ((b"\2", 1, b""), (b"\2\2a", 2, b"\0\2")):
            value = b"\0\0\0\0" + bytes([id_]) + begin + level * 100_000 + b"\0"
            with pytest.raises(DecodeError, match="as its schema says: RecursionError"):
                await known(partial(schemas.read, "avro", value))


class AddressSeen(Event, type="com.acme.Person", topic="mixed", key="name", decoder=AVRO):
    name: str


class NotedSeen(Event, type="com.acme.OrderNoted", topic="mixed", key="id", decoder=AVRO):
    id: int


async def test_a_topic_of_several_types_by_a_union_of_schemas(server: Registry) -> None:
    """Which one a value is stands before it, and each has the name of its own."""
    person = server.add("person", {"schema": json.dumps(PERSON)})
    reference = {"name": "com.acme.Person", "subject": "person", "version": person}
    server.add("noted", {"schema": json.dumps(NOTED), "references": [reference]})
    both = {"name": "com.acme.OrderNoted", "subject": "noted", "version": 1}
    union = json.dumps(["null", "com.acme.Person", "com.acme.OrderNoted"])
    id_ = server.add("mixed", {"schema": union, "references": [reference, both]})
    begin = b"\0" + id_.to_bytes(4, "big")
    seen = Seen(AddressSeen, NotedSeen)
    async with in_memory(seen.events, partitions=1, registry_url=server.url) as rehearsal:
        for payload in (b"\2\6ann", b"\4\x0e\6ann", b"\0", b"\6\6ann", b"\1\6ann"):
            await rehearsal.receive("mixed", begin + payload, key=b"k")
        await rehearsal.settled(60)
        letters = await rehearsal.dead_letters()
    assert seen.all == [AddressSeen(name="ann"), NotedSeen(id=7)]  # and null is skipped, as no value is
    assert [letter.value for letter in letters] == [begin + b"\6\6ann", begin + b"\1\6ann"]


async def test_keys_that_no_serializer_of_a_registry_wrote(server: Registry) -> None:
    """The bytes of a number begin with 0, too, and may name a schema: the value says what the event is."""
    write = serializer(server, ORDER, "orders")
    keys = [(7).to_bytes(8, "big"), (7).to_bytes(4, "big"), (2**24 + 7).to_bytes(8, "big"), b"7"]
    seen = Seen(OrderPlaced)
    async with in_memory(seen.events, registry_url=server.url) as rehearsal:
        for n, key in enumerate(keys):
            await rehearsal.receive("orders", write(order(n)), key=key)
        await rehearsal.settled(60)
        assert await rehearsal.dead_letters() == []
    assert {event.id: meta.key for event, meta in seen.seen} == {n: key.decode() for n, key in enumerate(keys)}
    assert {path for path in server.asked if path.startswith("/schemas/")} == {"/schemas/ids/1"}


async def test_a_schema_that_was_deleted_is_still_what_others_were_written_by(server: Registry) -> None:
    """One that another names is found all the same; one that is gone is said by its name, once it is believed."""
    server.add("person", {"schema": json.dumps(PERSON)})
    reference = {"name": "com.acme.Person", "subject": "person", "version": 1}
    id_ = server.add("noted", {"schema": json.dumps(NOTED), "references": [reference]})
    other = server.add("other", {"schema": json.dumps(NOTED), "references": [{**reference, "version": 2}]})
    server.deleted.add(("person", 1))
    clock = VirtualClock()
    async with Asking(server, clock) as schemas:
        value = b"\0" + id_.to_bytes(4, "big") + b"\x0e\6ann"
        assert (await known(lambda: schemas.read("avro", value))).name == "com.acme.OrderNoted"
        value = b"\0" + other.to_bytes(4, "big") + b"\x0e\6ann"
        with pytest.raises(DecodeError, match=f"has no /subjects/person/versions/2, which it names in schema {other}"):
            await known(lambda: schemas.read("avro", value), clock=clock)
        assert clock.monotonic() >= 30


async def test_what_was_given_up_is_not_waited_for_once_more(server: Registry) -> None:
    """It is asked for again after some seconds, and the first answer counts: no half minute for each."""
    clock = VirtualClock()
    value = b"\0\0\0\0\x63x"
    async with Asking(server, clock) as schemas:
        with pytest.raises(DecodeError, match="has no schema 99"):
            await known(lambda: schemas.read("avro", value), clock=clock)
        assert clock.monotonic() >= 30
        asked = len(server.asked)
        await clock.advance(6)
        with pytest.raises(DecodeError, match="has no schema 99"):
            await known(lambda: schemas.read("avro", value), clock=clock)
        assert len(server.asked) == asked + 1


async def test_an_answer_without_an_end_keeps_no_thread(server: Registry) -> None:
    """Byte by byte it would never be late by the measure of a socket; the thread ends when the question does."""
    server.drips = True
    async with Asking(server, registry_seconds=0.2) as schemas:

        async def degraded() -> bool:
            with pytest.raises(SchemaError):
                schemas.read("avro", b"\0\0\0\0\1")
            return (await schemas.health()).status == "degraded"

        await eventually(degraded, seconds=60)
        await eventually(lambda: server.dripping == 0, seconds=60)
