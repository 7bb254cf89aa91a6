"""A topic, a partition or an event that Kafka refuses holds up no other, and a frozen relay keeps the order."""

import asyncio
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from prometheus_client import REGISTRY
from pydantic import SecretStr

from mainstay.core import App
from mainstay.core.testing import eventually
from mainstay.database import Database, DatabaseModule, DatabaseSettings
from mainstay.events import (
    DeadLetters,
    Event,
    EventConsumers,
    EventPublisher,
    EventRouter,
    EventsModule,
    EventsSettings,
    PublishError,
    RefusedError,
    RefusedEvents,
)
from mainstay.events._kafka import KafkaTransport
from mainstay.events._relay import OutboxRelay
from mainstay.events.tables import OUTBOX, REFUSED
from packages.events.tests import worker

pytestmark = [
    pytest.mark.usefixtures("aiokafka_garbage"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # see the fixture
]


TOO_LARGE = "MessageSizeTooLarge|MSG_SIZE_TOO_LARGE"
"""As the clients call it."""


class Good(Event, type="good.happened", key="key"):
    key: str
    number: int
    text: str = ""


class Bad(Event, type="bad.happened", key="key"):
    key: str
    number: int
    text: str = ""


class Keyless(Event, type="bad.keyless"):
    number: int


def service(url: str | None, servers: str, prefix: str, *routers: EventRouter, **settings: Any) -> App:
    """An App on Kafka, behind the outbox where there is a database."""
    topics = {"good.happened": f"{prefix}-good", "bad.happened": f"{prefix}-bad", "bad.keyless": f"{prefix}-bad"}
    events = EventsSettings(transport="kafka", kafka_servers=servers, topics=topics, **settings)
    modules: list[Any] = [EventsModule.for_root(events), EventsModule.for_feature(*routers)]
    if url is not None:
        modules.insert(0, DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url))))
    return App(*modules)


def listening(prefix: str) -> tuple[EventRouter, list[int], list[int]]:
    """A router, and the numbers of the good and the bad events that it has handled."""
    events = EventRouter()
    good: list[int] = []
    bad: list[int] = []

    @events.on(Good, group=f"{prefix}-g")
    async def on_good(event: Good) -> None:
        good.append(event.number)

    @events.on(Bad, group=f"{prefix}-b")
    async def on_bad(event: Bad) -> None:
        bad.append(event.number)

    return events, good, bad


@asynccontextmanager
async def admin_of(servers: str) -> AsyncGenerator[AIOKafkaAdminClient, None]:
    """An admin client."""
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


async def make(servers: str, topic: str, **config: str) -> None:
    """A topic with two partitions."""
    async with admin_of(servers) as admin:
        await admin.create_topics(
            [NewTopic(topic, 2, 1, topic_configs={k.replace("_", "."): v for k, v in config.items()})]
        )


async def configure(servers: str, topic: str, **config: str) -> None:
    """Change settings of a topic."""
    async with admin_of(servers) as admin:
        configs = {name.replace("_", "."): value for name, value in config.items()}
        await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, configs)])


async def is_empty(app: App) -> bool:
    return not await app.get(Database).read(sa.select(OUTBOX.c.position).limit(1))


async def test_a_topic_that_refuses_for_the_time_being_delays_no_other(
    sqlite_url: str, kafka: str, prefix: str, client: str
) -> None:
    """What is refused for the time being waits, in order; the others do not wait for that, and health names it."""
    await make(kafka, f"{prefix}-bad", message_timestamp_before_max_ms="0")  # a producer's stamp is older than that
    events, good, bad = listening(prefix)
    app = service(sqlite_url, kafka, prefix, events, kafka_client=client, partitions=2)
    async with app.running(serve=True):
        for number in range(20):
            await events.publish(Bad(key="a", number=number))
            await events.publish(Good(key=str(number), number=number))
            await eventually(lambda n=number: len(good) > n, seconds=10)
        relay = app.get(OutboxRelay)

        async def named() -> bool:
            health = await relay.health()
            return health.status == "degraded" and f"topic {prefix}-bad, partition" in (health.detail or "")

        await eventually(named)
        await configure(kafka, f"{prefix}-bad", message_timestamp_before_max_ms=str(2**62))
        await eventually(lambda: len(bad) >= 20, seconds=60)
        await eventually(lambda: is_empty(app))
    assert sorted(good) == [*range(20)]
    assert list(dict.fromkeys(bad)) == [*range(20)]


async def test_a_missing_topic_delays_no_other(sqlite_url: str, kafka: str, prefix: str, client: str) -> None:
    """Neither those who publish nor those who read: what is there is read at once, what comes when it comes."""
    await make(kafka, f"{prefix}-good")
    events = EventRouter()
    seen: list[tuple[str, int]] = []

    @events.on(Good, Bad, group=f"{prefix}-g")
    async def handle(event: Good | Bad) -> None:
        seen.append((type(event).__name__, event.number))

    app = service(sqlite_url, kafka, prefix, events, kafka_client=client, kafka_create_topics=False)
    async with app.running(serve=True):
        await events.publish(Bad(key="a", number=0))
        for number in range(10):
            await events.publish(Good(key="a", number=number))
            await eventually(lambda n=number: ("Good", n) in seen, seconds=10)

        async def named() -> bool:
            reports = [await app.get(OutboxRelay).health(), await app.get(EventConsumers).health()]
            return all(f"{prefix}-bad does not exist" in (report.detail or "") for report in reports)

        await eventually(named)
        await make(kafka, f"{prefix}-bad")
        await eventually(lambda: ("Bad", 0) in seen, seconds=60)

        async def well() -> bool:
            return (await app.get(EventConsumers).health()).status == "ok"

        await eventually(well)


async def test_an_event_that_its_topic_does_not_take_is_put_before_a_person(
    sqlite_url: str, kafka: str, prefix: str, client: str
) -> None:
    """Batches are divided until they fit, the event is kept with the reason, and what is behind it goes on."""
    await make(kafka, f"{prefix}-bad", max_message_bytes="3000")
    events, good, bad = listening(prefix)
    app = service(sqlite_url, kafka, prefix, events, kafka_client=client, partitions=2)
    async with app.running(serve=True):
        incompressible = os.urandom(20_000).hex()
        batch = [Bad(key="a", number=number, text=incompressible[number : number + 100]) for number in range(300)]
        batch.insert(150, Bad(key="a", number=1000, text=incompressible))
        await app.get(EventPublisher).publish_batch(batch)
        await eventually(lambda: len(bad) >= 300, seconds=60)
        await eventually(lambda: is_empty(app))
        (refused,) = await app.get(Database).read(sa.select(REFUSED))
        assert re.search(TOO_LARGE, refused.reason)
        assert refused.topic == f"{prefix}-bad"
        await an_operator_looks(app, kafka, prefix, bad)
        await events.publish(Good(key="a", number=1))
        await eventually(lambda: good == [1])
    assert bad == [*range(300)]


async def test_an_event_without_a_key_on_a_compacted_topic_blocks_nothing(
    sqlite_url: str, kafka: str, prefix: str
) -> None:
    """It is put before a person with the broker's reason; what shared its batch and its partition goes on."""
    await make(kafka, f"{prefix}-bad", cleanup_policy="compact")
    events, _, bad = listening(prefix)
    app = service(sqlite_url, kafka, prefix, events, partitions=2)
    async with app.running(serve=True):
        batch: list[Event] = [Bad(key=str(number % 7), number=number) for number in range(40)]
        batch[20:20] = [Keyless(number=number) for number in range(2)]
        await app.get(EventPublisher).publish_batch(batch)
        await eventually(lambda: len(bad) >= 40, seconds=60)
        await eventually(lambda: is_empty(app))
        refused = await app.get(Database).read(sa.select(REFUSED))
        assert [row.topic for row in refused] == [f"{prefix}-bad"] * 2
        assert all("InvalidRecordError: [Error 87]" in row.reason for row in refused)
        assert not app.get(OutboxRelay)._most_bytes  # and the batches are no smaller than before
    assert sorted(bad) == [*range(40)]


async def test_publishing_what_a_topic_does_not_take_is_an_error_that_says_so(kafka: str, prefix: str) -> None:
    """Without an outbox the publisher learns that another attempt is of no use."""
    await make(kafka, f"{prefix}-bad", cleanup_policy="compact")
    async with service(None, kafka, prefix, EventRouter(), outbox=False, partitions=2) as app:
        with pytest.raises(PublishError, match="it is compacted and there is no key") as caught:
            await app.get(EventPublisher).publish(Keyless(number=1))
        assert (caught.value.retryable, caught.value.no_effect) == (False, True)
        await app.get(EventPublisher).publish(Bad(key="a", number=1))


async def an_operator_looks(app: App, servers: str, prefix: str, bad: list[int]) -> None:
    """The event is shown, tried again once its topic takes it, and gone."""
    events = app.get(RefusedEvents)
    (event,) = await events.list()
    assert (event.type, event.topic, event.key) == ("bad.happened", f"{prefix}-bad", b"a")
    assert abs((datetime.now(UTC) - event.published_at).total_seconds()) < 600
    await configure(servers, f"{prefix}-bad", max_message_bytes="100000")
    await events.retry(event.id)
    await eventually(lambda: bad[-1] == 1000, seconds=60)
    assert await events.list() == []
    for gone in (events.retry, events.discard):
        with pytest.raises(RefusedError, match=f"no refused event {event.id}"):
            await gone(event.id)
    del bad[-1]


async def test_a_topic_that_is_deleted_is_made_again(sqlite_url: str, kafka: str, prefix: str, client: str) -> None:
    """Also while others are sent to, who do not wait for it."""
    events, good, _ = listening(prefix)
    app = service(sqlite_url, kafka, prefix, events, kafka_client=client, partitions=2)
    async with app.running(serve=True):
        await events.publish(Bad(key="a", number=0))
        await eventually(lambda: is_empty(app))
        async with admin_of(kafka) as admin:
            await admin.delete_topics([f"{prefix}-bad"])
        await events.publish(Bad(key="a", number=1))
        for number in range(5):
            await events.publish(Good(key="a", number=number))
            await eventually(lambda n=number: len(good) > n, seconds=10)
        for number in range(2, 50):  # a broker may take some into the topic that it is about to delete
            await eventually(lambda: is_empty(app), seconds=120)
            with suppress(TimeoutError):
                if b'"number":0' not in (await values(kafka, f"{prefix}-bad", 1, seconds=2.0))[0]:
                    break
            await events.publish(Bad(key="a", number=number))
        else:
            pytest.fail("the topic was not made again")


async def test_publishing_without_outbox_what_is_refused_stops_nobody_else(
    kafka: str, prefix: str, client: str
) -> None:
    """The refused topic's publishers have their errors; the others share a producer that is never replaced."""
    await make(kafka, f"{prefix}-bad", max_message_bytes="1000")
    app = service(None, kafka, prefix, EventRouter(), kafka_client=client, outbox=False, partitions=2)
    async with app:
        publisher = app.get(EventPublisher)
        producer: Any = app.get(KafkaTransport).producer

        async def refused(number: int) -> None:
            with pytest.raises(PublishError, match=TOO_LARGE):
                await publisher.publish(Bad(key=str(number), number=number, text=os.urandom(5000).hex()))

        async def taken(number: int) -> None:
            await publisher.publish(Good(key=str(number), number=number))

        await taken(0)
        shared = producer._shared
        await asyncio.gather(*(work(number) for number in range(20) for work in (refused, taken)))
        await publisher.publish(Bad(key="a", number=1))
        assert producer._shared is shared
    assert len(await values(kafka, f"{prefix}-good", 21)) == 21


async def values(servers: str, topic: str, count: int, seconds: float = 60.0) -> list[bytes]:
    """The first records of a topic, and what else is there within a second after them."""
    consumer = AIOKafkaConsumer(
        topic, bootstrap_servers=servers, auto_offset_reset="earliest", enable_auto_commit=False
    )
    await consumer.start()
    found: list[bytes] = []
    try:
        async with asyncio.timeout(seconds):
            while len(found) < count:
                found += [each.value for some in (await consumer.getmany(timeout_ms=500)).values() for each in some]
        found += [each.value for some in (await consumer.getmany(timeout_ms=1000)).values() for each in some]
    finally:
        await consumer.stop()
    return found


async def test_a_relay_that_freezes_with_a_batch_in_its_hands_does_not_send_it_late(
    postgres_url: str, kafka: str, prefix: str, client: str
) -> None:
    """Its successor has sent it with what came after: sent now, it would arrive behind that."""
    options = {
        "url": postgres_url,
        "topic": f"{prefix}-fault",
        "relay only": True,
        "hang": "before sending",
        "events": {
            "transport": "kafka",
            "kafka_client": client,
            "kafka_servers": kafka,
            "lease_seconds": 2.0 if client == "aiokafka" else 4.0,
            "partitions": 1,
        },
    }
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=worker.run, args=(options, there), daemon=True)
    process.start()
    try:
        assert await asyncio.to_thread(here.recv) == "serving"
        app = worker.service(options)
        async with app:  # it publishes only
            await app.get(EventPublisher).publish_batch([worker.Step(key="k", number=number) for number in (1, 2)])
            assert await asyncio.to_thread(here.recv) == "handed over"
            await app.get(EventPublisher).publish_batch([worker.Step(key="k", number=number) for number in (3, 4)])
        successor = worker.service(options)
        async with successor.running(serve=True):
            await eventually(lambda: is_empty(successor), seconds=60)
            os.kill(process.pid or 0, signal.SIGCONT)
            # It comes to itself: without a lease it takes lanes again, as soon as the successor gives them up.
            await successor.get(EventPublisher).publish(worker.Step(key="k", number=5))
            await eventually(lambda: is_empty(successor), seconds=60)
        await asyncio.sleep(1.0)  # what it would send late, it would send at once
        sent = await values(kafka, f"{prefix}-fault", 5)
    finally:
        process.kill()
        process.join()
    assert [value[-2:-1] for value in sent] == [b"1", b"2", b"3", b"4", b"5"]


async def test_what_retention_deletes_before_it_is_read_is_counted_and_said(
    sqlite_url: str, kafka: str, prefix: str, caplog: pytest.LogCaptureFixture, client: str
) -> None:
    """The group goes on with what is there; without a word nobody would know that events are missing."""
    events, good, _ = listening(prefix)
    app = service(sqlite_url, kafka, prefix, events, kafka_client=client, partitions=1)
    async with app.running(serve=True):
        await events.publish(Good(key="a", number=0))
        await eventually(lambda: good == [0])
    relay = service(sqlite_url, kafka, prefix, kafka_client=client, partitions=1)
    async with relay.running(serve=True):
        await relay.get(EventPublisher).publish_batch([Good(key="a", number=number) for number in range(1, 11)])
        await eventually(lambda: is_empty(relay))
        async with admin_of(kafka) as admin:
            await admin.delete_records({TopicPartition(f"{prefix}-good", 0): RecordsToDelete(8)})
    async with app.running(serve=True):
        await events.publish(Good(key="a", number=11))
        await eventually(lambda: good == [0, 8, 9, 10, 11])
    assert REGISTRY.get_sample_value("mainstay_events_missed_total", {"group": f"{prefix}-g"}) == 7
    said = [record.getMessage() for record in caplog.records if "deleted before they were read" in record.getMessage()]
    assert [line.partition(": ")[2] for line in said] == ["up to 7 records were deleted before they were read"]
    assert f"group {prefix}-g was to go on at 1 in {prefix}-good/0, which begins at 8" in said[0]


def missed(group: str) -> float:
    """How many records of a group were counted as missed."""
    return REGISTRY.get_sample_value("mainstay_events_missed_total", {"group": group}) or 0.0


async def test_what_was_deleted_is_counted_once_although_nothing_is_handled_before_the_next_start(
    sqlite_url: str, kafka: str, prefix: str, client: str
) -> None:
    """That the group goes on behind it is durable at once."""
    events, good, _ = listening(prefix)
    app = service(sqlite_url, kafka, prefix, events, kafka_client=client, partitions=1)
    publisher = service(sqlite_url, kafka, prefix, kafka_client=client, partitions=1)
    async with app.running(serve=True):
        await events.publish(Good(key="a", number=0))
        await eventually(lambda: good == [0])
    async with publisher.running(serve=True):
        await publisher.get(EventPublisher).publish_batch([Good(key="a", number=number) for number in (1, 2, 3)])
        await eventually(lambda: is_empty(publisher))
    async with admin_of(kafka) as admin:
        await admin.delete_records({TopicPartition(f"{prefix}-good", 0): RecordsToDelete(4)})  # to the end
    async with app.running(serve=True):
        await eventually(lambda: missed(f"{prefix}-g") == 3)
    async with app.running(serve=True):
        await events.publish(Good(key="a", number=4))
        await eventually(lambda: good == [0, 4])
    assert missed(f"{prefix}-g") == 3


async def test_what_is_deleted_behind_what_is_in_hand_is_counted_once(
    sqlite_url: str, kafka: str, prefix: str, client: str
) -> None:
    """The place goes on behind it with the last that was in hand, and not before."""
    events, gate = EventRouter(), asyncio.Event()
    good: list[int] = []

    @events.on(Good, group=f"{prefix}-g")
    async def on_good(event: Good) -> None:
        good.append(event.number)
        await gate.wait()

    small = {"window_bytes": 1_048_576, "lease_seconds": 30.0}
    app = service(sqlite_url, kafka, prefix, events, kafka_client=client, partitions=1, **small)
    publisher = service(sqlite_url, kafka, prefix, kafka_client=client, partitions=1)
    async with publisher.running(serve=True):
        for number in range(20):
            await publisher.get(EventPublisher).publish(Good(key="a", number=number, text=os.urandom(200_000).hex()))
        await eventually(lambda: is_empty(publisher), seconds=60)
    async with app.running(serve=True):
        await eventually(lambda: good == [0])
        async with admin_of(kafka) as admin:
            await admin.delete_records({TopicPartition(f"{prefix}-good", 0): RecordsToDelete(20)})
        gate.set()
        await eventually(lambda: missed(f"{prefix}-g") == 20 - len(good) > 0)
    handled = len(good)
    assert good == list(range(handled))
    async with app.running(serve=True):
        await events.publish(Good(key="a", number=20))
        await eventually(lambda: good[-1] == 20)
    assert (good, missed(f"{prefix}-g")) == ([*range(handled), 20], 20 - handled)


_LATIN_1 = """
import asyncio, sys
from aiokafka import AIOKafkaProducer

class Name(str):
    def encode(self, *_):
        return b"\\xe9"

async def main(servers, topic):
    producer = AIOKafkaProducer(bootstrap_servers=servers)
    await producer.start()
    await producer.send_and_wait(topic, b"{}", partition=0, headers=[(Name("coffee"), b"x")])
    await producer.stop()

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_record_whose_header_has_no_name_in_utf_8_stops_nothing(
    sqlite_url: str, kafka: str, prefix: str, client: str
) -> None:
    """No client of ours can read it: a dead letter says where it is, and what is around it is handled once."""
    events, good, bad = listening(prefix)
    app = service(sqlite_url, kafka, prefix, events, kafka_client=client, partitions=2)
    async with app:
        for number in range(50):
            await events.publish(Bad(key=str(number), number=number))
        await app.get(EventPublisher).publish_batch([Good(key=str(number), number=number) for number in range(50)])
    async with app.running(serve=True):
        await eventually(lambda: is_empty(app))
    for _ in range(2):
        odd = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _LATIN_1, kafka, f"{prefix}-bad", env=os.environ | {"AIOKAFKA_NO_EXTENSIONS": "1"}
        )
        assert await odd.wait() == 0
    again = service(sqlite_url, kafka, prefix, events, kafka_client=client, partitions=2)
    async with again.running(serve=True):
        for number in range(50, 100):
            await events.publish(Bad(key=str(number), number=number))
            await events.publish(Good(key=str(number), number=number))
        await eventually(lambda: (len(good), len(bad)) == (100, 100), seconds=60)

        async def buried() -> bool:
            letters = await again.get(DeadLetters).list()
            return len(letters) == 2 and all("not UTF-8" in letter.error for letter in letters)

        await eventually(buried)
    assert sorted(good) == sorted(bad) == [*range(100)]
