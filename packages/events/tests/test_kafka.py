"""What is particular to Kafka: the wire form, topics, stopping, foreign records, dead letters without a database."""

import asyncio
import os
import time
from collections.abc import Callable
from contextvars import Context, copy_context
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete
from aiokafka.consumer import fetcher
from aiokafka.partitioner import DefaultPartitioner
from aiokafka.protocol.metadata import MetadataRequest
from cloudevents.core.bindings.kafka import KafkaMessage, from_binary
from cloudevents.core.formats.json import JSONFormat
from pydantic import SecretStr

from mainstay.core import SYSTEM_CLOCK, App, bind, current
from mainstay.core.testing import eventually
from mainstay.database import DatabaseModule, DatabaseSettings
from mainstay.events import (
    DeadLetters,
    Event,
    EventConsumers,
    EventPublisher,
    EventRouter,
    EventsModule,
    EventsSettings,
    Metadata,
    PublishError,
    RedriveError,
    ScheduledEvents,
)
from mainstay.events._aiokafka import connecting, source
from mainstay.events._aiokafka.admin import asking
from mainstay.events._aiokafka.client import connection
from mainstay.events._delivery import Assignment
from mainstay.events._kafka import KafkaTransport
from mainstay.events._kafka.seam import Contact
from mainstay.events._kafka.topics import MissingTopicError, Topics
from mainstay.events.metadata import Outgoing
from mainstay_servers import Kafka

pytestmark = [
    pytest.mark.usefixtures("aiokafka_garbage"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # see the fixture
]


class Shipped(Event, type="parcel.shipped", version="1.1", key="parcel"):
    parcel: str
    number: int = 0
    note: str = ""


def service(servers: str, topic: str, *routers: EventRouter, **settings: Any) -> App:
    """An App straight on Kafka."""
    root = EventsSettings(
        transport="kafka", outbox=False, kafka_servers=servers, topics={"parcel.shipped": topic}, **settings
    )
    return App(EventsModule.for_root(root), EventsModule.for_feature(*routers))


async def test_the_wire_form_is_cloudevents_in_binary_mode(kafka: str, prefix: str, client: str) -> None:
    """The value is the event as JSON; everything about it is in headers that any CloudEvents reader knows."""
    async with service(kafka, prefix, kafka_client=client, source="shop", partitions=3) as app:
        with bind(correlation_id="c-1", traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"):
            published = await app.get(EventPublisher).publish(Shipped(parcel="p1", number=7))
    consumer = AIOKafkaConsumer(prefix, bootstrap_servers=kafka, auto_offset_reset="earliest", enable_auto_commit=False)
    await consumer.start()
    try:
        record = await asyncio.wait_for(consumer.getone(), 60)
        assert len(consumer.partitions_for_topic(prefix) or ()) == 3
    finally:
        await consumer.stop()
    headers = dict(record.headers)
    assert record.value == b'{"parcel":"p1","number":7,"note":""}'
    assert record.key == b"p1"
    assert headers["ce_specversion"] == b"1.0"
    assert headers["ce_type"] == b"parcel.shipped"
    assert headers["ce_source"] == b"shop"
    assert headers["ce_dataversion"] == b"1.1"
    assert headers["content-type"] == b"application/json"
    assert headers["ce_correlationid"] == b"c-1"
    assert headers["ce_traceparent"].startswith(b"00-0af7")
    assert UUID(headers["ce_id"].decode()).version == 7

    message = KafkaMessage({name: value or b"" for name, value in record.headers}, record.key, record.value)
    others = from_binary(message, JSONFormat())
    assert others.get_data() == {"parcel": "p1", "number": 7, "note": ""}
    assert (others.get_id(), others.get_type(), others.get_source()) == (published, "parcel.shipped", "shop")
    assert others.get_datacontenttype() == "application/json"
    when = others.get_time()
    assert when is not None
    assert abs(datetime.now(UTC) - when) < timedelta(minutes=10)
    assert others.get_extension("dataversion") == "1.1"
    assert others.get_extension("correlationid") == "c-1"
    assert others.get_extension("partitionkey") == "p1"


async def test_trap_07_a_batch_keeps_keys_on_their_partitions(kafka: str, prefix: str, client: str) -> None:
    """The same key lands on the same partition alone, in a batch, and by any client with the default partitioner."""
    producer = AIOKafkaProducer(bootstrap_servers=kafka)
    async with service(kafka, prefix, kafka_client=client, partitions=5) as app:
        publisher = app.get(EventPublisher)
        for number in range(2):
            await publisher.publish_batch([Shipped(parcel=f"p{key}", number=number) for key in range(20)])
        await publisher.publish(Shipped(parcel="p3", number=2))
        carrier = await app.get(KafkaTransport).carrier()
        for event in [Outgoing(prefix, f"p{key}".encode(), b"{}", []) for key in range(20)]:
            await carrier.send(prefix, carrier.place(event, await carrier.partitions(prefix)), [event])
        carrier.close()
        await producer.start()
        for key in range(20):
            await producer.send_and_wait(prefix, b"{}", key=f"p{key}".encode())
        await producer.stop()
    consumer = AIOKafkaConsumer(prefix, bootstrap_servers=kafka, auto_offset_reset="earliest", enable_auto_commit=False)
    await consumer.start()
    places: dict[bytes, set[int]] = {}
    count = 0
    while count < 81:
        for place, records in (await consumer.getmany(timeout_ms=500)).items():
            count += len(records)
            for record in records:
                places.setdefault(record.key, set()).add(place.partition)
    await consumer.stop()
    assert all(len(numbers) == 1 for numbers in places.values())
    assert len(places) == 20


async def test_trap_06_records_of_others_on_the_topic_stop_nothing(kafka: str, prefix: str, client: str) -> None:
    """A tombstone and a record without our headers become dead letters; a type nobody handles is skipped."""
    events = EventRouter()
    seen: list[int] = []

    @events.on(Shipped, group=prefix)
    async def handle(event: Shipped) -> None:
        seen.append(event.number)

    async with service(kafka, prefix, events, kafka_client=client, partitions=1).running(serve=True) as app:
        await events.publish(Shipped(parcel="a", number=1))
        producer = AIOKafkaProducer(bootstrap_servers=kafka)
        await producer.start()
        await producer.send_and_wait(prefix, b"hello", key=b"a")
        await producer.send_and_wait(prefix, None, key=b"a", headers=[("ce_type", b"parcel.shipped")])
        await producer.send_and_wait(prefix, b"{}", key=b"a", headers=[("ce_type", b"parcel.lost")])
        await producer.stop()
        await events.publish(Shipped(parcel="a", number=2))
        await eventually(lambda: seen == [1, 2])
        letters = await app.get(DeadLetters).list(prefix)
        assert [letter.value for letter in letters] == [b"hello", None]
        assert letters[0].type == ""
        again = await app.get(DeadLetters).redrive(letters[0].id)
        assert again.id == letters[0].id
        with pytest.raises(RedriveError, match="no dead letter"):
            await app.get(DeadLetters).get(uuid4())
        health = await app.health()
        assert {report.status for report in health.values()} == {"ok"}


@pytest.mark.parametrize("outbox", [True, False])
async def test_a_record_of_nearly_a_mebibyte_is_redriven_byte_for_byte(
    kafka: str, prefix: str, sqlite_url: str, outbox: bool
) -> None:
    """The broker has taken it once: what this service may publish at most is no measure for what it sends again."""
    events = EventRouter()

    @events.on(Shipped, group=prefix, on_failure="dead-letter")
    async def handle(event: Shipped) -> None:
        raise AssertionError

    value, headers = os.urandom(950_000), [("ce_type", b"parcel.shipped"), ("x", bytes(range(256))), ("null", None)]
    settings = EventsSettings(
        transport="kafka", kafka_servers=kafka, outbox=outbox, partitions=1, topics={"parcel.shipped": prefix}
    )
    modules: list[Any] = [DatabaseModule.for_root(DatabaseSettings(url=SecretStr(sqlite_url)))] if outbox else []
    app = App(*modules, EventsModule.for_root(settings), EventsModule.for_feature(events))
    producer = AIOKafkaProducer(bootstrap_servers=kafka)
    await producer.start()
    async with app.running(serve=True):
        await producer.send_and_wait(prefix, value, key=b"a", headers=headers)
        await producer.stop()
        store = app.get(DeadLetters)
        async with asyncio.timeout(60):
            while not (letters := await store.list(prefix)):  # noqa: ASYNC110  another task stores it
                await asyncio.sleep(0.05)
            await store.redrive(letters[0].id)
            while (again := await store.list(prefix)) in ([], letters):  # noqa: ASYNC110  it fails once more
                await asyncio.sleep(0.05)
    consumer = AIOKafkaConsumer(prefix, bootstrap_servers=kafka, auto_offset_reset="earliest", enable_auto_commit=False)
    await consumer.start()
    first, second = [await asyncio.wait_for(consumer.getone(), 60) for _ in range(2)]
    await consumer.stop()
    assert (second.key, second.value) == (first.key, first.value) == (b"a", value)
    assert list(first.headers) == headers
    assert list(second.headers) == [("ce_onlygroup", prefix.encode()), *headers]
    assert [letter.value for letter in again] == [value]


async def test_a_letter_that_is_too_large_blocks_nothing_and_is_found_where_its_record_is(
    kafka: str, prefix: str, client: str
) -> None:
    """A record just below the broker's limit is no letter beside its error; one that compresses well is one."""
    events = EventRouter()
    seen: list[int] = []

    @events.on(Shipped, group=prefix)
    async def handle(event: Shipped) -> None:
        seen.append(event.number)

    value, compressible, headers = (
        os.urandom(1_048_300),
        b"x" * 2_000_000,
        [("ce_type", b"parcel.shipped"), ("n", None)],
    )
    producer = AIOKafkaProducer(bootstrap_servers=kafka, compression_type="lz4", max_request_size=10_000_000)
    await producer.start()
    async with service(kafka, prefix, events, kafka_client=client, partitions=1, source=prefix).running(
        serve=True
    ) as app:
        await producer.send_and_wait(prefix, value, key=b"a", headers=headers)
        await producer.send_and_wait(prefix, compressible, key=b"a", headers=headers)
        await producer.stop()
        await events.publish(Shipped(parcel="a", number=1))
        await eventually(lambda: seen == [1], what="what follows")
        letters = app.get(DeadLetters)
        listed = await letters.list(prefix)
        assert [(letter.type, letter.value) for letter in listed] == [
            ("parcel.shipped", None),
            ("parcel.shipped", compressible),
        ]
        found = await letters.get(listed[0].id)
        assert (found.key, found.value, list(found.headers)) == (b"a", value, headers)
        for letter in listed:
            await letters.redrive(letter.id)
        async with asyncio.timeout(60):
            again = listed
            while len(again) < 2 or {each.id for each in again} & {each.id for each in listed}:
                await asyncio.sleep(0.05)
                again = await letters.list(prefix)
        assert [(await letters.get(each.id)).value for each in again] == [value, compressible]
        health = await app.health()
        assert {report.status for report in health.values()} == {"ok"}


async def test_a_letter_whose_record_is_gone_is_not_sent_again(kafka: str, prefix: str, client: str) -> None:
    """Where the topic has deleted the record meanwhile, nothing is sent in its place."""
    events = EventRouter()

    @events.on(Shipped, group=prefix)
    async def handle(event: Shipped) -> None:
        raise AssertionError

    producer = AIOKafkaProducer(bootstrap_servers=kafka, max_request_size=10_000_000)
    await producer.start()
    async with service(kafka, prefix, events, kafka_client=client, partitions=1, source=prefix).running(
        serve=True
    ) as app:
        await producer.send_and_wait(prefix, os.urandom(1_048_300), key=b"a", headers=[("ce_type", b"parcel.shipped")])
        letters = app.get(DeadLetters)
        async with asyncio.timeout(60):
            while not (listed := await letters.list(prefix)):  # noqa: ASYNC110  another task stores it
                await asyncio.sleep(0.05)
        admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
        await admin.start()
        await admin.delete_records({TopicPartition(prefix, 0): RecordsToDelete(1)})
        await admin.close()
        assert (await letters.get(listed[0].id)).value is None
        with pytest.raises(RedriveError, match="no longer in"):
            await letters.redrive(listed[0].id)
        assert len(await letters.list(prefix)) == 1
    await producer.stop()


async def test_dead_letters_are_in_a_topic_of_the_service_and_foreign_records_there_are_passed_over(
    kafka: str, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Another service's are in another topic; a record that is no letter is named, and the letters are listed."""
    events = EventRouter()

    @events.on(Shipped, group=prefix)
    async def handle(event: Shipped) -> None:
        raise AssertionError

    producer = AIOKafkaProducer(bootstrap_servers=kafka)
    await producer.start()
    async with service(kafka, prefix, events, partitions=1, source=f"{prefix}/shop").running(serve=True) as app:
        await app.get(DeadLetters).list()
        for key in (None, b"short", bytes(16)):
            await producer.send_and_wait(f"{prefix}-shop.dead-letters", b"hello", key=key or b"x")
        await producer.send_and_wait(prefix, b"{}", key=b"a", headers=[("ce_type", b"parcel.shipped")])
        async with asyncio.timeout(60):
            while not (listed := await app.get(DeadLetters).list()):  # noqa: ASYNC110  another task stores it
                await asyncio.sleep(0.05)
        assert [letter.value for letter in listed] == [b"{}"]
        assert f"topic {prefix}-shop.dead-letters holds a record at 0 that is no dead letter" in caplog.text
        async with service(kafka, prefix, source=f"{prefix}-other") as other:
            assert await other.get(DeadLetters).list() == []
    await producer.stop()


async def test_a_record_that_is_refused_takes_no_other_of_its_topic_along(kafka: str, prefix: str, client: str) -> None:
    """Sent by the same producer, just behind it: aiokafka has given both their numbers by then."""
    async with service(kafka, prefix, kafka_client=client, partitions=1) as app:
        producer = app.get(KafkaTransport).producer
        await producer.send(prefix, [(b"a", b"first", [])])
        sent = [
            asyncio.create_task(producer.send(prefix, [(b"a", value, [])]))
            for value in (os.urandom(1_048_576), *(b"%d" % number for number in range(20)))
        ]
        refused, *taken = await asyncio.gather(*sent, return_exceptions=True)
        assert isinstance(refused, PublishError)
        assert taken == [None] * 20


async def test_events_of_others_have_ids_and_times_of_their_own(kafka: str, prefix: str, sqlite_url: str) -> None:
    """An id is any text, and one of its source; a time without a zone is UTC, wherever this process is."""
    events, got = EventRouter(), list[tuple[str, str, datetime | None]]()

    @events.on(Shipped, group=prefix, inbox=True)
    async def handle(event: Shipped, meta: Metadata) -> None:
        got.append((meta.source, meta.id, meta.time))

    root = EventsSettings(
        transport="kafka", outbox=False, kafka_servers=kafka, topics={"parcel.shipped": prefix}, partitions=1
    )
    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(sqlite_url)))
    app = App(database, EventsModule.for_root(root), EventsModule.for_feature(events))
    sent = [
        (b"/shop", b"100", b"2026-03-01T10:00:00"),
        (b"/store", b"100", b"2026-03-01T10:00:00.123456789Z"),
        (b"/shop", b"100", b"2026-03-01T10:00:00"),
        (b"/shop", b"a\0b", b"2026-03-01T10:00:00+02:00"),
        (b"/shop", "é☃".encode(), b"yesterday"),
    ]
    async with app.running(serve=True):
        producer = AIOKafkaProducer(bootstrap_servers=kafka)
        await producer.start()
        try:
            for source, id_, time_ in sent:
                headers = [
                    ("ce_type", b"parcel.shipped"), ("ce_source", source), ("ce_id", id_), ("ce_time", time_)
                ]  # fmt: skip
                await producer.send_and_wait(prefix, b'{"parcel": "p"}', key=b"p", headers=headers)
        finally:
            await producer.stop()
        await eventually(lambda: len(got) >= len(sent) - 1, seconds=60)
    ten = datetime(2026, 3, 1, 10, tzinfo=UTC)
    assert got == [
        ("/shop", "100", ten),
        ("/store", "100", ten.replace(microsecond=123456)),
        ("/shop", "a\0b", ten.replace(hour=8)),
        ("/shop", "é☃", None),
    ]


async def test_events_of_kafka_transactions_count_once_they_are_committed(kafka: str, prefix: str, client: str) -> None:
    """What was aborted is never handled, and what is open not before its commit; what comes behind it waits for it."""
    events, got = EventRouter(), list[str]()

    @events.on(Shipped, group=prefix)
    async def handle(event: Shipped) -> None:
        got.append(event.parcel)

    app = service(kafka, prefix, events, kafka_client=client, partitions=1)
    foreign = AIOKafkaProducer(bootstrap_servers=kafka, transactional_id=f"{prefix}-foreign")
    async with app.running(serve=True):
        await app.get(EventPublisher).publish(Shipped(parcel="ours"))
        await foreign.start()
        try:
            headers = [("ce_type", b"parcel.shipped"), ("ce_id", str(uuid4()).encode())]

            async def send(parcel: str) -> None:
                value = f'{{"parcel": "{parcel}"}}'.encode()
                await foreign.send_and_wait(prefix, value, key=parcel.encode(), headers=headers)

            async with foreign.transaction():
                await send("committed")
            await foreign.begin_transaction()
            await send("aborted")
            await foreign.abort_transaction()
            await foreign.begin_transaction()
            await send("open")
            await eventually(lambda: "committed" in got, seconds=60)
            await app.get(EventPublisher).publish(Shipped(parcel="behind"))
            assert got == ["ours", "committed"]
            await foreign.commit_transaction()
            await eventually(lambda: "behind" in got, seconds=60)
        finally:
            await foreign.stop()
    assert got == ["ours", "committed", "open", "behind"]


async def test_trap_01_offsets_are_committed_only_for_what_is_finished(kafka: str, prefix: str, client: str) -> None:
    """A stop with the first event still at work commits nothing, although all after it were handed out and handled."""
    gate = asyncio.Event()
    seen: list[int] = []

    def feature() -> EventRouter:
        events = EventRouter()

        @events.on(Shipped, group=prefix)
        async def handle(event: Shipped) -> None:
            if event.number == 0:
                await gate.wait()
            seen.append(event.number)

        return events

    events = feature()
    app = service(kafka, prefix, events, kafka_client=client, partitions=1, drain_seconds=0.1)
    app._drain_seconds = 0.1  # it has a handler that would use all of the usual time
    async with app.running(serve=True):
        await events.publish_batch([Shipped(parcel=f"p{number}", number=number) for number in range(10)])
        await eventually(lambda: len(seen) == 9)
    assert await committed(kafka, prefix) in {None, 0}
    gate.set()
    seen.clear()
    async with service(kafka, prefix, feature(), kafka_client=client, partitions=1).running(serve=True):
        await eventually(lambda: len(seen) == 10)
    assert sorted(seen) == list(range(10))
    assert await committed(kafka, prefix) == 10


async def committed(servers: str, group: str) -> int | None:
    """The group's offset on the only partition of its topic."""
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        offsets = await admin.list_consumer_group_offsets(f"mainstay.{group}")
        return next((place.offset for place in offsets.values()), None)
    finally:
        await admin.close()


@pytest.mark.parametrize("end", [Kafka.kill, Kafka.pause])
@pytest.mark.usefixtures("soon_abandoned")
async def test_stopping_is_bounded_also_with_the_broker_away(
    broker: Kafka, prefix: str, client: str, end: Callable[[Kafka], None]
) -> None:
    """A consumer and a producer whose broker died are gone within seconds, with all their tasks."""
    events = EventRouter()
    seen: list[int] = []

    @events.on(Shipped, group=prefix)
    async def handle(event: Shipped) -> None:
        seen.append(event.number)

    app = service(broker.address, prefix, events, kafka_client=client, partitions=1, send_seconds=2.0)
    async with app.running(serve=True):
        await events.publish(Shipped(parcel="a", number=1))
        await eventually(lambda: seen == [1])
        await asyncio.to_thread(end, broker)
        with pytest.raises(PublishError, match="did not confirm") as caught:
            await events.publish(Shipped(parcel="a", number=2))
        assert caught.value.retryable
        assert (await app.get(KafkaTransport).health()).status == "degraded"
        before = time.monotonic()
    assert time.monotonic() - before < 60
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    if end is Kafka.pause:
        broker.resume()


async def test_a_topic_is_not_made_where_the_settings_say_so(kafka: str, prefix: str, client: str) -> None:
    """With kafka_create_topics=False creating them is the operators' business."""
    transport = KafkaTransport(
        EventsSettings(transport="kafka", kafka_client=client, kafka_servers=kafka, kafka_create_topics=False),
        App().clock,
    )
    with pytest.raises(MissingTopicError, match="MAINSTAY_EVENTS_KAFKA_CREATE_TOPICS"):
        await transport.topics.ensure(prefix)
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    try:
        assert prefix not in await admin.list_topics()
        await admin.create_topics([NewTopic(prefix, 1, 1)])

        async def known() -> bool:
            return prefix in await admin.list_topics()

        await eventually(known, what="the topic, which the controller knows before the broker does")
        await transport.topics.ensure(prefix)
    finally:
        await admin.close()


def test_options_reach_the_clients_that_know_them() -> None:
    """Each under its name there, over what we would choose ourselves."""
    options: dict[str, int | str] = {
        "linger.ms": 20,
        "compression.type": "none",
        "fetch.min.bytes": 7,
        "retry.backoff.ms": 50,
    }
    contact = Contact(EventsSettings(transport="kafka", kafka_servers="x:1", kafka_options=options), SYSTEM_CLOCK)
    every = {"bootstrap_servers", "client_id", "request_timeout_ms", "security_protocol", "retry_backoff_ms"}
    assert set(connection(contact)) == every
    consumer = connection(contact, "consumer", fetch_min_bytes=1, fetch_max_wait_ms=2)
    assert consumer.items() >= {"fetch_min_bytes": 7, "fetch_max_wait_ms": 2, "retry_backoff_ms": 50}.items()
    producer = connection(contact, "producer", "direct", linger_ms=5, compression_type="lz4")
    assert producer.items() >= {"linger_ms": 20, "compression_type": None}.items()


class Reading:
    """The side of a consumer, by hand."""

    def __init__(self) -> None:
        self.held: list[Assignment] = []

    def assigned(self, topic: str, partition: int) -> Assignment:
        self.held.append(Assignment(topic, partition))
        return self.held[-1]

    async def revoked(self, assignments: Any) -> None:
        self.held = [held for held in self.held if held not in assignments]

    async def lost(self, assignments: Any) -> None:
        raise AssertionError


async def test_a_topic_that_the_first_broker_asked_knows_nothing_of_yet_is_read_soon(
    kafka: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group has been dealt out without it, and the client would not ask again by itself."""

    async def there(*_arguments: object) -> None:
        """Say that it is there, as the broker does that has made it."""

    def never(*arguments: Any, **options: Any) -> Any:
        return connection(*arguments, **{**options, "metadata_max_age_ms": 10**8})

    monkeypatch.setattr(Topics, "ensure", there)
    monkeypatch.setattr(source, "connection", never)
    async with service(kafka, prefix, partitions=1) as app:
        reading = Reading()
        async with app.get(KafkaTransport).source(prefix, [prefix], reading) as consumer:
            inside: Any = consumer
            await eventually(lambda: prefix in inside._consumer.subscription())
            admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
            await admin.start()
            try:
                await admin.create_topics([NewTopic(prefix, 1, 1)])
            finally:
                await admin.close()
            await eventually(lambda: bool(reading.held), what="the partition")


async def test_an_error_that_no_client_should_raise_keeps_no_group_from_reading(
    kafka: str, prefix: str, client: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look at its topics goes on: without that it subscribes to nothing."""
    original, looks = Topics.ensure, 0

    async def ensure(self: Topics, topic: str, **options: Any) -> None:
        nonlocal looks
        looks += 1
        if looks == 1:
            raise AttributeError
        await original(self, topic, **options)

    monkeypatch.setattr(Topics, "ensure", ensure)
    async with service(kafka, prefix, partitions=1, kafka_client=client) as app:
        reading = Reading()
        async with app.get(KafkaTransport).source(prefix, [prefix], reading) as consumer:

            async def held() -> bool:
                await consumer.fetch(reading.held)
                return bool(reading.held)

            await eventually(held, what="the partition", seconds=60)


async def test_a_cluster_that_names_no_broker_is_not_ready(kafka: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So answers one that had stood still; aiokafka would begin with it, and fail without a word that says why."""
    original = connecting._Connection.send

    async def send(self: Any, request: Any, **options: Any) -> Any:
        answer = await original(self, request, **options)
        if isinstance(request, MetadataRequest):
            answer.brokers = []
        return answer

    monkeypatch.setattr(connecting._Connection, "send", send)
    contact = Contact(EventsSettings(transport="kafka", kafka_servers=kafka), SYSTEM_CLOCK)
    with pytest.raises(connecting.UnreachableError, match=f"{kafka} knows of no broker that is ready"):
        async with asking(contact):
            pass
    assert "no broker that is ready" in str(contact.trouble)


async def test_trap_03_a_commit_of_an_older_assignment_is_none(kafka: str, prefix: str) -> None:
    """The partition went and came back: what is left of the time before neither commits nor rewinds."""
    async with service(kafka, prefix, partitions=1) as app:
        await app.get(EventPublisher).publish_batch([Shipped(parcel="a", number=number) for number in range(10)])
        reading = Reading()
        async with app.get(KafkaTransport).source(prefix, [prefix], reading) as source:
            inside: Any = source
            await eventually(lambda: bool(reading.held), what="the partition")
            records: list[Any] = []
            while len(records) < 10:
                for fetched in (await source.fetch(reading.held)).values():
                    records += fetched
            old = reading.held[0]
            await inside.revoke()
            inside.assign([TopicPartition(prefix, 0)])
            new = reading.held[0]
            assert new is not old
            await source.commit({old: records[9]})
            assert await committed(kafka, prefix) == 0, "where the group has begun"
            await source.commit({new: records[5]})
            await source.commit({old: records[2]})
            assert await committed(kafka, prefix) == 6


async def test_trap_03_whoever_the_broker_has_given_up_commits_nothing(kafka: str, prefix: str) -> None:
    """To a group that all others have left, too, a broker lets anybody commit: it would rewind what they committed."""
    async with service(kafka, prefix, partitions=1) as app:
        await app.get(EventPublisher).publish_batch([Shipped(parcel="a", number=number) for number in range(10)])
        reading = Reading()
        async with app.get(KafkaTransport).source(prefix, [prefix], reading) as source:
            inside: Any = source
            await eventually(lambda: bool(reading.held), what="the partition")
            records: list[Any] = []
            while len(records) < 10:
                for fetched in (await source.fetch(reading.held)).values():
                    records += fetched
            (held,) = reading.held
            await source.commit({held: records[9]})
            await inside._consumer._coordinator._maybe_leave_group()  # as a broker has it after the session's end
            await source.commit({held: records[4]})
            assert await committed(kafka, prefix) == 10


async def test_trap_04_and_05_the_broker_waits_for_a_drain_and_takes_no_slow_handler_for_dead(
    kafka: str, prefix: str
) -> None:
    """A rebalance may last for a whole drain, by default it would be the session; no poll interval evicts anybody."""
    async with (
        service(kafka, prefix, drain_seconds=40.0) as app,
        app.get(KafkaTransport).source(prefix, [prefix], Reading()) as source,
    ):
        inside: Any = source
        coordinator: Any = inside._consumer._coordinator
        assert coordinator._rebalance_timeout_ms >= 40_000
        assert coordinator._session_timeout_ms < 40_000
        assert coordinator._max_poll_interval >= 86_400
        assert not coordinator._enable_auto_commit


async def test_trap_13_back_pressure_keeps_what_was_prefetched(
    kafka: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full partition holds up no other, memory is bounded, nothing prefetched is thrown away; lag tells the rest."""
    thrown_away: list[TopicPartition] = []
    check = fetcher.FetchResult.check_assignment

    def noting(self: Any, place: TopicPartition) -> bool:
        kept: bool = check(self, place)
        if not kept:
            thrown_away.append(place)
        return kept

    monkeypatch.setattr(fetcher.FetchResult, "check_assignment", noting)
    each, stop_at = 3000, 1200
    slow, fast = (_key_of(partition) for partition in range(2))
    publisher = service(kafka, prefix, partitions=2)
    async with publisher:
        await publisher.get(EventPublisher).publish_batch(
            [Shipped(parcel=key, number=number) for number in range(each) for key in (slow, fast)]
        )
    events = EventRouter()
    gate = asyncio.Event()
    seen: dict[str, list[int]] = {slow: [], fast: []}

    @events.on(Shipped, group=prefix)
    async def handle(event: Shipped) -> None:
        if event.number == (0 if event.parcel == slow else stop_at):
            await gate.wait()
        seen[event.parcel].append(event.number)

    app = service(kafka, prefix, events, partitions=2)
    app._drain_seconds = 1.0  # should it fail, its handlers would use all of the usual time
    async with app.running(serve=True):
        consumer = app.get(EventConsumers).consumers[0]

        def windows() -> list[int]:
            return [len(assignment.window) for assignment in consumer._assignments]

        await eventually(lambda: len(seen[fast]) == stop_at, what="the fast one, past the slow one's full window")
        await eventually(lambda: min(windows()) >= 1000, what="both windows")
        source = consumer._source
        assert source is not None
        turns = 0
        fetch = source.fetch

        async def counting(ready: Any) -> Any:
            nonlocal turns
            turns += 1
            return await fetch(ready)

        source.fetch = counting  # type: ignore[method-assign]  # what the broker is asked, counted
        await eventually(lambda: turns == 5, what="turns in which nothing has room")
        assert max(windows()) <= 1500
        assert source.lag() == 2 * each - stop_at - sum(windows())
        gate.set()
        await eventually(lambda: consumer.idle and len(seen[slow] + seen[fast]) == 2 * each, what="the rest")
        assert source.lag() == 0
        assert thrown_away == []
    assert seen == {slow: list(range(each)), fast: list(range(each))}


async def test_what_is_in_memory_is_bounded_in_bytes(kafka: str, prefix: str, client: str) -> None:
    """However large the events are: a group has no more of them in hand than the setting, and what came with them."""
    publisher = service(kafka, prefix, kafka_client=client, partitions=2)
    async with publisher:
        for _ in range(10):
            await publisher.get(EventPublisher).publish_batch(
                [Shipped(parcel=_key_of(partition), note="x" * 100_000) for partition in (0, 1) for _ in range(5)]
            )
    events = EventRouter()
    gate = asyncio.Event()
    handled = 0

    @events.on(Shipped, group=prefix)
    async def handle(_: Shipped) -> None:
        nonlocal handled
        await gate.wait()
        handled += 1

    app = service(kafka, prefix, events, kafka_client=client, partitions=2, window_bytes=1_000_000)
    app._drain_seconds = 1.0
    async with app.running(serve=True):
        consumer = app.get(EventConsumers).consumers[0]
        await eventually(lambda: len(consumer._assignments) == 2 and all(each.window for each in consumer._assignments))
        fetched = 0
        source = consumer._source
        assert source is not None
        fetch = source.fetch

        async def counting(ready: Any) -> Any:
            nonlocal fetched
            fetched += not ready
            return await fetch(ready)

        source.fetch = counting  # type: ignore[method-assign]
        await eventually(lambda: fetched >= 3, what="turns in which nothing has room")
        # Half a million bytes to each partition, and as much as the broker sends at a time.
        assert max(len(each.window) for each in consumer._assignments) <= 5 + 11
        gate.set()
        await eventually(lambda: handled == 100)


def _key_of(partition: int, of: int = 2) -> str:
    """A key that Kafka's own partitioner places on this partition."""
    place, numbers = DefaultPartitioner(), list(range(of))
    return next(key for key in map(str, range(100)) if place(key.encode(), numbers, numbers) == partition)


async def test_prototype_05_a_producer_does_not_carry_its_first_publisher_for_ever(kafka: str, prefix: str) -> None:
    """A producer that replaces a broken one is made while somebody publishes; what it logs later is not his."""
    async with service(kafka, prefix, partitions=1) as app:
        producer: Any = app.get(KafkaTransport).producer
        broken, producer._shared = producer._shared, None
        assert broken is not None
        began_with: dict[asyncio.Task[Any], str | None] = {}
        loop = asyncio.get_running_loop()

        def factory(loop: asyncio.AbstractEventLoop, work: Any, *, context: Context | None = None) -> asyncio.Task[Any]:
            task = asyncio.Task(work, loop=loop, context=context)
            began_with[task] = (copy_context() if context is None else context).run(lambda: current().correlation_id)
            return task

        loop.set_task_factory(factory)
        try:
            with bind(correlation_id="c-first"):
                await app.get(EventPublisher).publish(Shipped(parcel="a"))
        finally:
            loop.set_task_factory(None)
        await broken.stop()
        living = [began_with[task] for task in asyncio.all_tasks() if task in began_with]
        assert len(living) > 1
        assert set(living) == {None}


async def test_an_event_for_later_goes_through_the_outbox_when_its_time_has_come(
    kafka: str, prefix: str, sqlite_url: str
) -> None:
    """Once and not before; one that the broker would refuse then is refused now."""
    events = EventRouter()
    seen: list[tuple[int, float]] = []

    @events.on(Shipped, group=prefix)
    async def handle(event: Shipped) -> None:
        seen.append((event.number, time.time()))

    root = EventsSettings(transport="kafka", kafka_servers=kafka, partitions=1, topics={"parcel.shipped": prefix})
    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(sqlite_url)))
    app = App(database, EventsModule.for_root(root), EventsModule.for_feature(events))
    async with app.running(serve=True):
        with pytest.raises(PublishError, match="at most 900000 are taken"):
            await events.publish(Shipped(parcel="p", note="x" * 1_000_000), delay_seconds=1)
        began = time.time()
        await events.publish(Shipped(parcel="p", number=2), delay_seconds=1)
        await events.publish(Shipped(parcel="p", number=1))
        gone = await events.publish(Shipped(parcel="p", number=0), delay_seconds=3600)
        await app.get(ScheduledEvents).cancel(gone)
        await eventually(lambda: len(seen) == 2, seconds=60)
        assert await app.get(ScheduledEvents).list() == []
    assert sorted(number for number, _ in seen) == [1, 2]
    assert dict(seen)[2] >= began + 0.999
