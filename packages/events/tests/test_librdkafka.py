"""What is particular to the second client: its threads, its ways to move partitions, and what it cannot honour."""

import asyncio
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.group import LeaveGroupRequest
from confluent_kafka import TopicPartition
from pydantic import SecretStr

from mainstay.core import SYSTEM_CLOCK, App, ConfigurationError
from mainstay.core.testing import eventually
from mainstay.database import DatabaseModule, DatabaseSettings
from mainstay.events import (
    Event,
    EventConsumers,
    EventPublisher,
    EventRouter,
    EventsModule,
    EventsSettings,
    KafkaToken,
    PublishError,
)
from mainstay.events._confluent.client import KafkaFault, connection
from mainstay.events._confluent.member import Place
from mainstay.events._confluent.source import ConfluentSource
from mainstay.events._delivery import Assignment
from mainstay.events._kafka import KafkaTransport
from mainstay.events._kafka.seam import Contact
from mainstay.events._relay import OutboxRelay
from mainstay_servers.secure import SecureKafka


class Counted(Event, type="count.counted", key="key"):
    key: str
    number: int


OWN_PROTOCOL = 45.0
"""A lease that is no shorter than the session that a broker has by default for members by Kafka 4's own protocol."""


def service(servers: str, topic: str, *routers: EventRouter, **settings: Any) -> App:
    """An App straight on Kafka by librdkafka."""
    root = EventsSettings(
        **{"transport": "kafka", "outbox": False, **settings},
        kafka_client="confluent",
        kafka_servers=servers,
        topics={"count.counted": topic},
    )
    return App(EventsModule.for_root(root), EventsModule.for_feature(*routers))


class Reading:
    """The side of a consumer, by hand."""

    def __init__(self) -> None:
        self.held: list[Assignment] = []
        self.moved: list[int] = []

    def assigned(self, topic: str, partition: int) -> Assignment:
        self.held.append(Assignment(topic, partition))
        return self.held[-1]

    async def revoked(self, assignments: Any) -> None:
        self.moved += [each.number for each in assignments]
        self.held = [held for held in self.held if held not in assignments]

    async def lost(self, assignments: Any) -> None:
        await self.revoked(assignments)


@asynccontextmanager
async def reading(app: App, topic: str, reader: Reading) -> AsyncGenerator[ConfluentSource]:
    """A member of a group, that fetches nothing by itself."""
    async with app.get(KafkaTransport).source(topic, [topic], reader) as source:
        assert isinstance(source, ConfluentSource)
        yield source


async def fetched(source: ConfluentSource, reader: Reading, count: int) -> list[Any]:
    """So many records."""
    records: list[Any] = []
    async with asyncio.timeout(60):
        while len(records) < count:
            for some in (await source.fetch(reader.held)).values():
                records += some
    return records


@pytest.mark.parametrize("lease_seconds", [10.0, OWN_PROTOCOL], ids=["cooperative", "kafka 4"])
async def test_only_the_partitions_that_move_are_given_up(kafka: str, prefix: str, lease_seconds: float) -> None:
    """The others are read on, by the assignment that they had; a member that leaves gives its own back at once."""
    async with service(kafka, prefix, partitions=4, lease_seconds=lease_seconds) as app:
        first, second = Reading(), Reading()
        async with reading(app, prefix, first) as source:
            options = source._member._options
            assert (options["group.protocol"] == "consumer") == (lease_seconds == OWN_PROTOCOL)

            async def both(other: ConfluentSource | None) -> None:
                await source.fetch(first.held)
                if other is not None:
                    await other.fetch(second.held)

            async with asyncio.timeout(60):
                while len(first.held) < 4:
                    await both(None)
                before = list(first.held)
                async with reading(app, prefix, second) as other:
                    while len(second.held) < 2 or len(first.held) > 2:
                        await both(other)
                    assert len(first.moved) == 2
                    assert all(each in before for each in first.held)
                    assert {each.number for each in first.held + second.held} == {0, 1, 2, 3}
                while len(first.held) < 4:
                    await both(None)
            assert len(first.moved) == 2


@pytest.mark.parametrize("lease_seconds", [10.0, OWN_PROTOCOL], ids=["cooperative", "kafka 4"])
async def test_a_full_partition_that_goes_and_comes_back_is_read_on(
    kafka: str, prefix: str, lease_seconds: float
) -> None:
    """It had been paused when it went, which librdkafka kept: no member read it any more, and no lag was seen."""
    async with service(kafka, prefix, partitions=4, lease_seconds=lease_seconds, window_bytes=4096) as app:
        for start in range(0, 4000, 1000):
            numbers = range(start, start + 1000)
            await app.get(EventPublisher).publish_batch([Counted(key=f"{each % 16}", number=each) for each in numbers])
        first, second = Reading(), Reading()
        async with reading(app, prefix, first) as source, asyncio.timeout(60):
            while len(source._held) < 4 or not all(each.paused for each in source._held.values()):
                await source.fetch([])
                for each in first.held:
                    each.record_bytes = 100  # as its consumer would note
            async with reading(app, prefix, second) as other:
                while len(first.held) > 2:
                    await asyncio.gather(source.fetch([]), other.fetch([]))
            while len(first.held) < 4:
                await source.fetch([])
            records = await fetched(source, first, 4000)
            assert len({(each.partition, each.offset) for each in records}) == 4000


async def test_trap_03_a_member_that_the_broker_has_given_up_commits_nothing(kafka: str, prefix: str) -> None:
    """To a group that all have left, a broker lets anybody commit: it would rewind what others have committed."""
    async with service(kafka, prefix, partitions=1, lease_seconds=1.0) as app:
        await app.get(EventPublisher).publish_batch([Counted(key="a", number=number) for number in range(10)])
        reader = Reading()
        async with reading(app, prefix, reader) as source:
            records = await fetched(source, reader, 10)
            (held,) = reader.held
            await source.commit({held: records[9]})
            consumer: Any = source._member._consumer

            async def member() -> str:
                name: str = await source._member._caller.run(consumer.memberid)
                return name

            name = await member()
            admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
            await admin.start()
            await admin._send_request(LeaveGroupRequest(prefix, name))  # as a broker has it after the session's end
            await admin.close()
            async with asyncio.timeout(60):  # the consumer learns of it by itself, and we do not ask
                while await member() == name:  # noqa: ASYNC110  a thread of librdkafka does it
                    await asyncio.sleep(0.05)
            with suppress(KafkaFault):
                await source.commit({held: records[4]})
            assert await place_of_group(kafka, prefix) == 10
            # It comes back, and what is left of the time before does not count.
            async with asyncio.timeout(60):
                while reader.held in ([held], []):
                    await source.fetch(reader.held)
            await source.commit({held: records[4]})
            assert await place_of_group(kafka, prefix) == 10


async def test_what_is_read_while_commits_are_waited_for_is_bounded(kafka: str, prefix: str) -> None:
    """Their answers come with records, which wait for who fetches: of a partition with many, no more are asked for."""
    async with service(kafka, prefix, partitions=1) as app:
        for start in range(0, 12_000, 1000):
            numbers = range(start, start + 1000)
            await app.get(EventPublisher).publish_batch([Counted(key="a", number=number) for number in numbers])
        reader = Reading()
        async with reading(app, prefix, reader) as source:
            records = await fetched(source, reader, 10)
            (held,) = reader.held
            for _ in range(20):
                await source.commit({held: records[9]})
            assert max(len(each.waiting) for each in source._held.values()) <= 2000


async def test_commits_at_the_same_time_are_all_answered(kafka: str, prefix: str) -> None:
    """A group that begins in one partition commits its place there, while what it finished in others is committed."""
    async with service(kafka, prefix, partitions=2) as app:
        reader = Reading()
        async with reading(app, prefix, reader) as source:
            async with asyncio.timeout(60):
                while len(reader.held) < 2:
                    await source.fetch([])
            member, look = source._member, source._look
            async with asyncio.timeout(60):
                for offset in range(5):
                    places = [{Place(prefix, number): offset} for number in (0, 1, 0)]
                    assert all(await asyncio.gather(*(member.commit(place, look) for place in places)))
            assert await member.committed_in([Place(prefix, 0), Place(prefix, 1)]) == {
                Place(prefix, 0): 4,
                Place(prefix, 1): 4,
            }


async def place_of_group(servers: str, group: str) -> int:
    """What the group has committed on the only partition of its topic."""
    from confluent_kafka import Consumer

    def look() -> int:
        consumer = Consumer({"bootstrap.servers": servers, "group.id": f"mainstay.{group}"})
        (place,) = consumer.committed([TopicPartition(group, 0)], 10)
        consumer.close()
        return int(place.offset)

    return await asyncio.to_thread(look)


async def test_a_fetch_that_is_cancelled_loses_nothing(kafka: str, prefix: str) -> None:
    """What the thread has read meanwhile is there for the next one."""
    async with service(kafka, prefix, partitions=1) as app:
        publisher = app.get(EventPublisher)
        reader = Reading()
        async with reading(app, prefix, reader) as source:
            async with asyncio.timeout(60):
                while not reader.held:
                    await source.fetch([])
            records: list[Any] = []
            for number in range(40):
                waiting = asyncio.create_task(source.fetch(reader.held))
                await publisher.publish(Counted(key="a", number=number))
                waiting.cancel()
                for result in await asyncio.gather(waiting, return_exceptions=True):
                    if isinstance(result, dict):
                        for some in result.values():
                            records += some
            records += await fetched(source, reader, 40 - len(records))
        assert [record.offset for record in records] == list(range(40))


async def test_trap_13_back_pressure_is_by_partition(kafka: str, prefix: str) -> None:
    """A full partition holds up no other, memory is bounded, nothing is lost or doubled; lag tells the rest."""
    each, stop_at = 6000, 3000
    publisher = service(kafka, prefix, partitions=2)
    events = EventRouter()
    gate = asyncio.Event()
    seen: dict[int, list[int]] = {0: [], 1: []}
    slow = 0

    @events.on(Counted, group=prefix)
    async def handle(event: Counted) -> None:
        place = int(event.key[0])
        if event.number == (0 if place == slow else stop_at):
            await gate.wait()
        seen[place].append(event.number)

    async with publisher:
        carrier = await publisher.get(KafkaTransport).carrier()
        await publisher.get(KafkaTransport).topics.ensure(prefix)
        keys = [key_on(carrier, partition) for partition in range(2)]
        carrier.close()
        for start in range(0, each, 1000):
            await publisher.get(EventPublisher).publish_batch(
                [Counted(key=key, number=number) for number in range(start, start + 1000) for key in keys]
            )
    app = service(kafka, prefix, events, partitions=2)
    app._drain_seconds = 1.0  # should it fail, its handlers would use all of the usual time
    async with app.running(serve=True):
        consumer = app.get(EventConsumers).consumers[0]
        await eventually(lambda: len(seen[1]) == stop_at, what="the fast one, past the slow one's full window")

        def windows() -> list[int]:
            return [len(assignment.window) for assignment in consumer._assignments]

        await eventually(lambda: min(windows()) >= 1000, what="both windows")
        source = consumer._source
        assert isinstance(source, ConfluentSource)
        await eventually(lambda: all(held.paused for held in source._held.values()), what="both at a halt")
        assert max(windows()) <= 1500
        assert max(len(held.waiting) for held in source._held.values()) <= 2000
        await eventually(lambda: source.lag() == 2 * each - stop_at - sum(windows()), what="the lag")
        gate.set()
        await eventually(lambda: consumer.idle and len(seen[0] + seen[1]) == 2 * each, what="the rest")
        assert source.lag() == 0
    assert seen == {0: list(range(each)), 1: list(range(each))}


def key_on(carrier: Any, partition: int) -> str:
    """A key that begins with the number of the partition where Kafka's own partitioner places it."""
    from mainstay.events.metadata import Outgoing

    keys = (f"{partition}{more}" for more in range(1000))
    return next(key for key in keys if carrier.place(Outgoing("", key.encode(), None, []), 2) == partition)


async def test_no_thread_is_left_behind(kafka: str, prefix: str, sqlite_url: str) -> None:
    """Neither of consumers, nor of producers and relays, nor of questions to the cluster."""

    def ours() -> set[str]:
        names = {thread.name for thread in threading.enumerate()}
        return {name for name in names if name.startswith(("events.", f"events.{prefix}"))}

    before = ours()
    events = EventRouter()
    seen: list[int] = []

    @events.on(Counted, group=prefix)
    async def handle(event: Counted) -> None:
        seen.append(event.number)

    settings = EventsSettings(
        transport="kafka", kafka_client="confluent", kafka_servers=kafka, topics={"count.counted": prefix}
    )
    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(sqlite_url)))
    app = App(database, EventsModule.for_root(settings), EventsModule.for_feature(events))
    async with app.running(serve=True):
        await events.publish(Counted(key="a", number=1))
        await eventually(lambda: seen == [1])
        assert {"events.carrier", f"events.{prefix}"} <= ours()
        assert (await app.get(OutboxRelay).health()).status == "ok"
    await eventually(lambda: ours() <= before, what="their ends")


async def test_another_loop_may_not_publish_by_the_same_app(kafka: str, prefix: str) -> None:
    """The answer would come to the loop that the App was started in."""
    async with service(kafka, prefix, partitions=1) as app:
        publisher = app.get(EventPublisher)
        await publisher.publish(Counted(key="a", number=1))

        def elsewhere() -> None:
            with pytest.raises(PublishError, match="another process or event loop") as caught:
                asyncio.run(publisher.publish(Counted(key="a", number=2)))
            assert caught.value.no_effect

        await asyncio.to_thread(elsewhere)
        await publisher.publish(Counted(key="a", number=3))


def test_what_this_client_cannot_honour_is_named() -> None:
    """It looks once a second for what has timed out: a relay whose leases are as short could send behind another."""
    settings = EventsSettings(transport="kafka", kafka_client="confluent", kafka_servers="h:1", lease_seconds=2.0)
    with pytest.raises(ConfigurationError, match=r"'confluent' cannot honour MAINSTAY_EVENTS_LEASE_SECONDS=2.*4 or"):
        App(DatabaseModule.for_root(), EventsModule.for_root(settings))
    service("h:1", "t", lease_seconds=2.0)


@pytest.mark.parametrize(("client", "extra"), [("aiokafka", "kafka"), ("confluent", "confluent")])
def test_a_client_that_is_not_installed_is_named_with_its_extra(
    client: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the App is constructed."""
    for name in list(sys.modules):
        if name.startswith((f"mainstay.events._{client}", "aiokafka", "confluent_kafka")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "aiokafka" if client == "aiokafka" else "confluent_kafka", None)
    settings = EventsSettings(transport="kafka", kafka_servers="h:1", outbox=False, kafka_client=client)
    with pytest.raises(ConfigurationError, match=rf"{client!r}.*pip install 'mainstay-events\[{extra}\]'"):
        App(EventsModule.for_root(settings))


def way_in(kafka: SecureKafka, way: str) -> dict[str, Any]:
    """Settings for a listener."""
    if way == "mutual TLS":
        certificate, key = map(str, kafka.locked_client_files)
        return {
            "servers": kafka.address_of("MTLS"), "kafka_protocol": "SSL", "kafka_ca_file": str(kafka.ca_file),
            "kafka_certificate_file": certificate, "kafka_key_file": key, "kafka_key_password": kafka.key_password,
        }  # fmt: skip
    settings: dict[str, Any] = {
        "servers": kafka.address_of("SASL_SSL"), "kafka_protocol": "SASL_SSL", "kafka_ca_file": str(kafka.ca_file)
    }  # fmt: skip
    if way == "tokens":

        async def fetch() -> KafkaToken:
            return KafkaToken(SecretStr(kafka.token(60)), 60)

        return settings | {"kafka_mechanism": "OAUTHBEARER", "kafka_token": fetch}
    return settings | {
        "kafka_mechanism": "SCRAM-SHA-512", "kafka_username": kafka.user, "kafka_password": kafka.password
    }  # fmt: skip


@pytest.mark.parametrize("way", ["mutual TLS", "an account", "tokens"])
async def test_events_travel_however_the_listener_asks(secure_kafka: SecureKafka, prefix: str, way: str) -> None:
    """With certificates of both sides, with an account, and with tokens that a function of the service gets."""
    settings = way_in(secure_kafka, way)
    events = EventRouter()
    seen: list[int] = []

    @events.on(Counted, group=prefix)
    async def handle(event: Counted) -> None:
        seen.append(event.number)

    async with service(settings.pop("servers"), prefix, events, partitions=2, **settings).running(serve=True):
        await events.publish(Counted(key="a", number=1))
        await eventually(lambda: seen == [1], seconds=60)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda _: {"kafka_password": "hunter2"}, "[Aa]uthentication failed.*; see .*MAINSTAY_EVENTS_KAFKA_PASSWORD"),
        (lambda kafka: {"kafka_ca_file": str(kafka.other_ca_file)}, "certificate.*MAINSTAY_EVENTS_KAFKA_CA_FILE"),
    ],
    ids=["password", "authority"],
)
async def test_what_is_wrong_with_a_connection_is_named(
    secure_kafka: SecureKafka, prefix: str, wrong: Callable[[SecureKafka], dict[str, Any]], message: str
) -> None:
    """With the settings that mend it, and without a secret."""
    settings = way_in(secure_kafka, "an account") | wrong(secure_kafka)
    with pytest.raises(ConfigurationError, match=message) as caught:
        async with service(settings.pop("servers"), prefix, send_seconds=2.0, **settings):
            pass
    assert "hunter2" not in str(caught.value)
    assert secure_kafka.password not in str(caught.value)


async def test_secure_connections_are_configured_whole() -> None:
    """Protocol, mechanism, account, certificates and options reach the client by its own names."""
    settings = EventsSettings(
        transport="kafka",
        kafka_servers="x:1",
        kafka_client="confluent",
        kafka_protocol="SASL_SSL",
        kafka_username="ann",
        kafka_password="hunter2",
        kafka_mechanism="SCRAM-SHA-256",
        kafka_certificate_file="/c.pem",
        kafka_key_password="hunter3",
        kafka_options={"fetch.max.wait.ms": 7, "metadata.max.age.ms": 1000, "linger.ms": 3},
    )
    options = connection(Contact(settings, SYSTEM_CLOCK), "consumer", fetch_wait_max_ms=100)
    assert options["security.protocol"] == "SASL_SSL"
    assert options["sasl.mechanism"] == "SCRAM-SHA-256"
    assert (options["sasl.username"], options["sasl.password"]) == ("ann", "hunter2")
    assert options["ssl.ca.location"] == "probe"
    assert options["ssl.key.location"] == options["ssl.certificate.location"] == "/c.pem"
    assert options["ssl.key.password"] == "hunter3"
    assert (options["fetch.wait.max.ms"], options["topic.metadata.refresh.interval.ms"]) == (7, 1000)
    assert "linger.ms" not in options
