"""What is particular to Kafka: the wire form, topics, stopping, foreign records, dead letters without a database."""

import asyncio
import time
from typing import Any
from uuid import UUID, uuid4

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient

from mainstay.core import App, bind
from mainstay.events import (
    DeadLetters,
    Event,
    EventConsumers,
    EventPublisher,
    EventRouter,
    EventsModule,
    EventsSettings,
    PublishError,
    RedriveError,
)
from mainstay.events.kafka import KafkaTransport
from mainstay.events.testing import eventually
from mainstay_servers import Kafka

pytestmark = [
    pytest.mark.usefixtures("aiokafka_garbage"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # see the fixture
]


class Shipped(Event, type="parcel.shipped", version="1.1", key="parcel"):
    parcel: str
    number: int = 0


def service(servers: str, topic: str, *routers: EventRouter, **settings: Any) -> App:
    """An App straight on Kafka."""
    root = EventsSettings(
        transport="kafka", outbox=False, kafka_servers=servers, topics={"parcel.shipped": topic}, **settings
    )
    return App(EventsModule.for_root(root), EventsModule.for_feature(*routers))


async def test_the_wire_form_is_cloudevents_in_binary_mode(kafka: str, prefix: str) -> None:
    """The value is the event as JSON; everything about it is in headers that any CloudEvents reader knows."""
    async with service(kafka, prefix, source="shop", partitions=3) as app:
        with bind(correlation_id="c-1", traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"):
            await app.get(EventPublisher).publish(Shipped(parcel="p1", number=7))
    consumer = AIOKafkaConsumer(prefix, bootstrap_servers=kafka, auto_offset_reset="earliest", enable_auto_commit=False)
    await consumer.start()
    try:
        record = await asyncio.wait_for(consumer.getone(), 10)
        assert len(consumer.partitions_for_topic(prefix) or ()) == 3
    finally:
        await consumer.stop()
    headers = dict(record.headers)
    assert record.value == b'{"parcel":"p1","number":7}'
    assert record.key == b"p1"
    assert headers["ce_specversion"] == b"1.0"
    assert headers["ce_type"] == b"parcel.shipped"
    assert headers["ce_source"] == b"shop"
    assert headers["ce_eventversion"] == b"1.1"
    assert headers["content-type"] == b"application/json"
    assert headers["ce_correlationid"] == b"c-1"
    assert headers["ce_traceparent"].startswith(b"00-0af7")
    assert UUID(headers["ce_id"].decode()).version == 7


async def test_a_batch_keeps_keys_on_their_partitions(kafka: str, prefix: str) -> None:
    """The same key lands on the same partition alone, in a batch, and by any client with the default partitioner."""
    producer = AIOKafkaProducer(bootstrap_servers=kafka)
    async with service(kafka, prefix, partitions=5) as app:
        publisher = app.get(EventPublisher)
        for number in range(2):
            await publisher.publish_batch([Shipped(parcel=f"p{key}", number=number) for key in range(20)])
        await publisher.publish(Shipped(parcel="p3", number=2))
        transport = app.get(KafkaTransport)
        from mainstay.events.metadata import Outgoing

        wave = [Outgoing(prefix, f"p{key}".encode(), b"{}", []) for key in range(20)]
        assert (await transport.send_wave(wave)).confirmed == set(range(20))
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


async def test_records_of_others_on_the_topic_stop_nothing(kafka: str, prefix: str) -> None:
    """A tombstone and a record without our headers become dead letters; a type nobody handles is skipped."""
    events = EventRouter()
    seen: list[int] = []

    @events.on(Shipped, group=prefix)
    async def handle(event: Shipped) -> None:
        seen.append(event.number)

    async with service(kafka, prefix, events, partitions=1).running(serve=True) as app:
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


async def test_offsets_are_committed_only_for_what_is_finished(kafka: str, prefix: str) -> None:
    """A slow first event holds the committed offset back although all after it are done: position is not processed."""
    events = EventRouter()
    gate = asyncio.Event()
    seen: list[int] = []

    @events.on(Shipped, group=prefix)
    async def handle(event: Shipped) -> None:
        if event.number == 0:
            await gate.wait()
        seen.append(event.number)

    async with service(kafka, prefix, events, partitions=1).running(serve=True):
        await events.publish_batch([Shipped(parcel=f"p{number}", number=number) for number in range(10)])
        await eventually(lambda: len(seen) == 9)
        await asyncio.sleep(0.6)  # two rounds of commits
        assert await committed(kafka, prefix) in {None, 0}
        gate.set()
        end = time.monotonic() + 10
        while await committed(kafka, prefix) != 10:
            assert time.monotonic() < end
            await asyncio.sleep(0.05)


async def committed(servers: str, group: str) -> int | None:
    """The group's offset on the only partition of its topic."""
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        offsets = await admin.list_consumer_group_offsets(group)
        return next((place.offset for place in offsets.values()), None)
    finally:
        await admin.close()


async def test_stopping_is_bounded_also_with_the_broker_away(broker: Kafka, prefix: str) -> None:
    """A consumer and a producer whose broker died are gone within seconds, and publishing says so."""
    events = EventRouter()
    seen: list[int] = []

    @events.on(Shipped, group=prefix)
    async def handle(event: Shipped) -> None:
        seen.append(event.number)

    app = service(broker.address, prefix, events, partitions=1, send_seconds=2.0)
    async with app.running(serve=True):
        await events.publish(Shipped(parcel="a", number=1))
        await eventually(lambda: seen == [1])
        await asyncio.to_thread(broker.kill)
        with pytest.raises(PublishError, match="did not confirm") as caught:
            await events.publish(Shipped(parcel="a", number=2))
        assert caught.value.retryable
        assert (await app.get(KafkaTransport).health()).status == "degraded"
        before = time.monotonic()
    assert time.monotonic() - before < 30


async def test_a_topic_is_not_made_where_the_settings_say_so(kafka: str, prefix: str) -> None:
    """With kafka_create_topics=False creating them is the operators' business."""
    transport = KafkaTransport(
        EventsSettings(transport="kafka", kafka_servers=kafka, kafka_create_topics=False), App().clock
    )
    await transport.ensure_topic(prefix)
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    try:
        assert prefix not in await admin.list_topics()
    finally:
        await admin.close()


async def test_lag_is_what_was_not_handed_out(kafka: str, prefix: str) -> None:
    """It is zero when everything was read, and known to the consumer."""
    events = EventRouter()
    seen: list[int] = []

    @events.on(Shipped, group=prefix)
    async def handle(event: Shipped) -> None:
        seen.append(event.number)

    async with service(kafka, prefix, events, partitions=2).running(serve=True) as app:
        await events.publish_batch([Shipped(parcel=f"p{number}", number=number) for number in range(50)])
        consumer = app.get(EventConsumers).consumers[0]
        await eventually(lambda: len(seen) == 50)
        await eventually(lambda: consumer.idle)


def test_secure_connections_are_configured_whole() -> None:
    """Protocol, mechanism, account and certificate authority reach the client."""
    settings = EventsSettings(
        transport="kafka",
        kafka_servers="x:1",
        kafka_protocol="SASL_SSL",
        kafka_username="ann",
        kafka_password="hunter2",
        kafka_mechanism="SCRAM-SHA-256",
    )
    options = KafkaTransport(settings, App().clock)._connection()
    assert options["security_protocol"] == "SASL_SSL"
    assert options["sasl_mechanism"] == "SCRAM-SHA-256"
    assert (options["sasl_plain_username"], options["sasl_plain_password"]) == ("ann", "hunter2")
    assert options["ssl_context"].check_hostname
