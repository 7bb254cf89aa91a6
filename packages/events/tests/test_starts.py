"""Where a new group begins: at the oldest event, at the next one, or at a time; chosen once, and kept."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, NewTopic
from aiokafka.errors import GroupCoordinatorNotAvailableError, NotCoordinatorForGroupError
from pydantic import SecretStr

from mainstay.core import App, ConfigurationError, Retry
from mainstay.core.testing import eventually
from mainstay.database import Database, DatabaseModule, DatabaseSettings
from mainstay.events import Event, EventConsumers, EventRouter, EventsModule, EventsSettings
from mainstay.events._aiokafka import source as aiokafka_source
from mainstay.events._confluent import source as confluent_source
from mainstay.events._kafka.starts import Starts
from mainstay.events._snapshot import START, Place
from mainstay.events._starts import Start, begin
from mainstay.events.tables import LOG, OFFSETS
from mainstay_servers import Kafka

pytestmark = [
    pytest.mark.usefixtures("aiokafka_garbage"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # see the fixture
]


class Told(Event, type="tale.told", key="to"):
    to: str
    number: int


class Heard(Event, type="tale.heard", key="to"):
    to: str
    number: int


class Teller:
    """A service with one group."""

    def __init__(self, url: str, prefix: str, **settings: Any) -> None:
        self.url = url
        self.prefix = prefix
        self.settings = settings if settings.get("kafka_create_topics") is False else {"partitions": 4, **settings}
        self.seen: list[int] = []
        self.broken = False
        self.failed: list[int] = []
        self.events = EventRouter()

    def _app(self, more: dict[str, Any]) -> App:
        settings = EventsSettings(topics={"tale.told": self.prefix}, **{**self.settings, **more})
        database = [DatabaseModule.for_root(DatabaseSettings(url=SecretStr(self.url)))] if self.url else []
        return App(*database, EventsModule.for_root(settings), EventsModule.for_feature(self.events))

    @asynccontextmanager
    async def running(self, start: Start = "earliest", **more: Any) -> AsyncGenerator[App]:
        """A process of the service."""
        events = self.events = EventRouter()

        @events.on(Told, group=self.prefix, start=start, retry=Retry(9, wait=lambda _: 3600.0))
        async def hear(event: Told) -> None:
            if self.broken:
                self.failed.append(event.number)
                raise RuntimeError
            self.seen.append(event.number)

        async with self._app(more).running(serve=True) as app:
            yield app

    @asynccontextmanager
    async def publishing(self, **more: Any) -> AsyncGenerator[App]:
        """A process that only publishes."""
        self.events = EventRouter()
        async with self._app(more) as app:
            yield app

    async def tell(self, *numbers: int) -> None:
        """Publish to as many keys."""
        await self.events.publish_batch([Told(to=f"k{number}", number=number) for number in numbers])


async def placed(app: App, group: str, partitions: int) -> list[Place]:
    """The group's places, once it has all."""
    rows: Any = []
    async with asyncio.timeout(30):
        while len(rows) < partitions:
            rows = await app.get(Database).read(sa.select(OFFSETS).where(OFFSETS.c.group_name == group))
            await asyncio.sleep(0.02)
    return [Place.of(row) for row in rows]


async def test_latest_is_chosen_once_for_all_partitions_and_outlives_a_crash_before_the_first_event(
    database_url: str, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What comes while no process is there is handled by the next one, and the log says what was passed over."""
    teller = Teller(database_url, prefix)
    async with teller.publishing():
        await teller.tell(*range(20))
    with caplog.at_level(logging.INFO, logger="mainstay.events"):
        async with teller.running("latest") as app:
            await placed(app, prefix, 4)
    said = [record.getMessage() for record in caplog.records if "has no place in topic" in record.getMessage()]
    begins = "it begins with what comes from now on, and passes over about 20 events"
    assert said == [f"group {prefix} has no place in topic {prefix}: {begins}"]
    assert teller.seen == []
    async with teller.publishing():
        await teller.tell(*range(20, 40))
    async with teller.running("latest"):
        await eventually(lambda: len(teller.seen) >= 20, what="what came meanwhile", seconds=30)
    assert sorted(teller.seen) == list(range(20, 40))
    async with teller.running("earliest"):  # by now it has a place
        await teller.tell(40)
        await eventually(lambda: 40 in teller.seen, what="the next")
    assert sorted(teller.seen) == list(range(20, 41))


async def test_of_two_processes_that_choose_at_once_only_the_one_whose_choice_stands_says_it(
    database_url: str, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """They are of two releases, which say different starts; all partitions have the places of one."""
    teller = Teller(database_url, prefix)
    async with teller.publishing() as app:
        await teller.tell(*range(20))
        with caplog.at_level(logging.INFO, logger="mainstay.events"):
            await asyncio.gather(
                *(begin(app.get(Database), prefix, prefix, each, 4) for each in ("latest", "earliest"))
            )
        places = await placed(app, prefix, 4)
    said = [record.getMessage() for record in caplog.records if "has no place in topic" in record.getMessage()]
    assert len(set(places)) == len(said) == 1
    assert ("from now on" in said[0]) == (places[0] != START)


async def test_a_partition_that_comes_later_is_read_from_its_beginning(database_url: str, prefix: str) -> None:
    """What is published there before the group looks is not what it was to pass over."""
    teller = Teller(database_url, prefix, partitions=1)
    async with teller.publishing():
        await teller.tell(*range(10))
    async with teller.running("latest") as app:
        await placed(app, prefix, 1)
    async with teller.publishing(partitions=8):
        await teller.tell(*range(10, 40))
    async with teller.running("latest", partitions=8):
        await eventually(lambda: len(teller.seen) >= 30, what="all that came later", seconds=30)
    assert sorted(teller.seen) == list(range(10, 40))


async def test_earliest_is_chosen_once_too_although_nothing_is_finished_yet(database_url: str, prefix: str) -> None:
    """A release that says another start finds that the group has begun, also in partitions in which nothing was."""
    await begins_once(Teller(database_url, prefix))


async def begins_once(teller: Teller) -> None:
    """Begin with all, finish nothing, and go on with a release that says `latest`."""
    async with teller.publishing():
        await teller.tell(0)
    teller.broken = True
    async with teller.running("earliest"):
        await eventually(lambda: teller.failed == [0], what="the call that fails", seconds=60)
    async with teller.publishing():
        await teller.tell(*range(1, 20))
    teller.broken = False
    async with teller.running("latest"):
        await eventually(lambda: len(teller.seen) >= 20, what="all that there is", seconds=60)
    assert sorted(teller.seen) == list(range(20))


async def test_a_time_passes_over_what_was_written_before_it(database_url: str, prefix: str) -> None:
    """And over nothing that was written from then on, also by a transaction that is open at the choice."""
    teller = Teller(database_url, prefix)
    async with teller.publishing() as app:
        await teller.tell(*range(10))
        await app.get(Database).write(sa.update(LOG).values(created_at=LOG.c.created_at - 3600))
        await teller.tell(*range(10, 20))
    start = datetime.now(UTC) - timedelta(minutes=30)
    async with teller.running(start) as app:
        await eventually(lambda: len(teller.seen) >= 10, what="what was written from then on", seconds=30)
        await teller.tell(20)
        await eventually(lambda: 20 in teller.seen, what="the next")
    assert sorted(teller.seen) == list(range(10, 21))


async def test_latest_does_not_pass_over_what_an_open_transaction_publishes(postgres_url: str, prefix: str) -> None:
    """It was begun before the group, with a lower position than what is passed over, and commits after."""
    teller = Teller(postgres_url, prefix, partitions=1)
    async with teller.publishing() as app:
        publisher = teller.events
        async with app.get(Database).transaction():
            await publisher.publish(Told(to="a", number=1))
            other = Teller(postgres_url, prefix, partitions=1)

            async def begin() -> None:
                async with other.publishing():
                    await other.tell(0)
                async with other.running("latest") as later:
                    await placed(later, prefix, 1)

            task = asyncio.get_running_loop().create_task(begin(), context=Context())
            await asyncio.wait_for(task, 60)
    async with other.running("latest"):
        await eventually(lambda: other.seen == [1], what="what was committed later", seconds=30)


def test_a_start_that_is_none_is_refused_and_two_starts_of_a_group_are_an_error_of_the_app() -> None:
    """Where they are written."""
    events = EventRouter()
    for start, why in (
        ("newest", "it is 'earliest', 'latest' or a datetime"),
        (datetime(2026, 1, 1), "has no zone"),  # noqa: DTZ001  which is the mistake
        (datetime.now(UTC) + timedelta(days=1), "is yet to come"),
    ):
        with pytest.raises(ValueError, match=why):
            events.on(Told, group="ears", start=start)  # type: ignore[arg-type]  # which is the mistake

    @events.on(Told, group="ears", start="latest")
    async def told(event: Told) -> None:
        raise AssertionError

    @events.on(Heard, group="ears")
    async def heard(event: Heard) -> None:
        raise AssertionError

    with pytest.raises(
        ConfigurationError, match=r"'ears' is told two things about where it begins, by .*told \(latest"
    ):
        App(EventsModule.for_root(EventsSettings(transport="memory")), EventsModule.for_feature(events))


class Cluster:
    """A topic with two partitions, each of them with 10 records of which 4 are old."""

    def __init__(self) -> None:
        self.places: dict[int, int | None] = {0: None, 1: None}
        self.end = 10
        self.deposed = False
        self.answers = True

    async def committed(self, topic: str) -> dict[int, int | None]:
        assert topic == "tale"
        return dict(self.places)

    async def first_offsets(self, topic: str, partitions: Any, start: Start) -> dict[int, int]:
        assert topic == "tale"
        return dict.fromkeys(partitions, {"earliest": 0, "latest": self.end}.get(str(start), 4))

    async def commit_first(self, topic: str, offsets: Any) -> bool:
        assert topic == "tale"
        if not self.deposed:
            self.places.update(offsets)
        if not self.answers:
            raise TimeoutError
        return not self.deposed


async def test_on_kafka_one_member_chooses_for_all_partitions() -> None:
    """The one that holds the first of them; the others wait, and begin where it has said."""
    cluster, starts = Cluster(), Starts("ears", "latest", ())
    assert await starts.place_in("tale", 1, {1}, cluster) is None
    cluster.deposed = True
    assert await starts.place_in("tale", 0, {0}, cluster) is None
    assert cluster.places == {0: None, 1: None}
    cluster.deposed = False
    assert await starts.place_in("tale", 0, {0}, cluster) == 10
    assert cluster.places == {0: 10, 1: 10}
    assert await starts.place_in("tale", 1, {1}, cluster) == 10
    cluster.places[2] = None  # the topic has grown
    assert await starts.place_in("tale", 2, {2}, cluster) == cluster.places[2] == 0
    at_a_time = Cluster()
    assert await Starts("ears", datetime.now(UTC), ()).place_in("tale", 0, {0, 1}, at_a_time) == 4
    assert at_a_time.places == {0: 4, 1: 4}
    came_later = Cluster()
    assert await Starts("ears", "latest", {"tale"}).place_in("tale", 0, {0}, came_later) == 0
    assert await Starts("ears", "latest", ()).place_in("tale", 1, {1}, came_later) == 0
    assert came_later.places == {0: 0, 1: 0}
    by_itself = Cluster()
    assert await Starts("ears", "earliest", ()).place_in("tale", 1, {1}, by_itself) == 0
    assert by_itself.places == {0: None, 1: 0}


async def test_on_kafka_each_member_keeps_its_choice_until_the_group_has_a_place(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whichever of them commits one: nothing is passed over that came after it had begun."""
    cluster, first, second = Cluster(), Starts("ears", "latest", ()), Starts("ears", "latest", ())
    cluster.deposed = True
    assert await first.place_in("tale", 0, {0}, cluster) is None
    assert await second.place_in("tale", 1, {1}, cluster) is None
    cluster.end, cluster.deposed = 15, False
    assert await second.place_in("tale", 0, {0, 1}, cluster) == 10  # it holds the first partition by now
    cluster.places = {0: 12, 1: 13}
    assert await first.place_in("tale", 1, {1}, cluster) == 13
    await first.give_up([("tale", 0)], cluster)  # what it had kept counts no more
    assert cluster.places == {0: 12, 1: 13}
    caplog.clear()
    cluster, third = Cluster(), Starts("ears", "latest", ())
    cluster.answers = False  # and yet it has committed
    with caplog.at_level(logging.INFO, logger="mainstay.events"):
        with pytest.raises(TimeoutError):
            await third.place_in("tale", 0, {0}, cluster)
        assert "has no place" not in caplog.text
        assert await third.place_in("tale", 0, {0}, cluster) == 10
    assert "it begins with what comes from now on, and passes over about 20 events" in caplog.text


async def test_on_kafka_a_choice_that_is_kept_is_committed_before_its_partition_is_given_up() -> None:
    """The next holder of the topic's first partition may have come later, and would choose later."""
    cluster, starts = Cluster(), Starts("ears", "latest", ())
    cluster.deposed = True
    assert await starts.place_in("tale", 0, {0, 1}, cluster) is None
    cluster.end, cluster.deposed = 15, False
    await starts.give_up([("tale", 1), ("other", 0)], cluster)
    assert cluster.places == {0: None, 1: None}, "that is for the holder of the first"
    await starts.give_up([("tale", 0), ("tale", 1)], cluster)
    assert cluster.places == {0: 10, 1: 10}
    assert await Starts("ears", "latest", ()).place_in("tale", 1, {1}, cluster) == 10


@asynccontextmanager
async def asking(kafka: str) -> AsyncGenerator[AIOKafkaAdminClient]:
    """An admin client."""
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


async def committed(admin: AIOKafkaAdminClient, group: str, partitions: int) -> list[int]:
    """The group's offsets, by partition, once it has one in each."""
    found: Any = {}
    async with asyncio.timeout(60):
        while len(found) < partitions:
            with suppress(
                GroupCoordinatorNotAvailableError, NotCoordinatorForGroupError
            ):  # of the first group there is
                found = await admin.list_consumer_group_offsets(f"mainstay.{group}")
            await asyncio.sleep(0.05)
    return [found[place].offset for place in sorted(found)]


def on(kafka: str, prefix: str, client: str, **settings: Any) -> Teller:
    """The service on a cluster, without a Database."""
    where = {"transport": "kafka", "outbox": False, "kafka_servers": kafka, "kafka_client": client}
    return Teller("", prefix, lease_seconds=6.0, **where, **settings)


async def test_on_a_broker_latest_is_committed_at_once_and_a_grown_topic_is_read_whole(
    kafka: str, prefix: str, client: str
) -> None:
    """By two members that start at the same time, and by one after them that finds more partitions."""
    teller = on(kafka, prefix, client)
    async with teller.publishing():
        await teller.tell(*range(20))
    async with asking(kafka) as admin:
        other = on(kafka, prefix, client)
        async with teller.running("latest"), other.running("latest"):
            offsets = await committed(admin, prefix, 4)
            assert sum(offsets) == 20
        assert teller.seen == other.seen == []
        async with teller.publishing():
            await teller.tell(*range(20, 40))
        await admin.create_partitions({prefix: NewPartitions(total_count=12)})
        assert await committed(admin, prefix, 4) == offsets
        async with teller.publishing(partitions=12):
            await teller.tell(*range(40, 80))
        async with teller.running("latest", partitions=12):
            await eventually(lambda: len(teller.seen) >= 60, what="all that came later", seconds=60)
            assert sorted(teller.seen) == list(range(20, 80))


async def test_on_a_broker_earliest_is_committed_although_nothing_is_finished_yet(
    kafka: str, prefix: str, client: str
) -> None:
    """As in the log of the Database."""
    await begins_once(on(kafka, prefix, client))


async def test_on_a_broker_a_time_passes_over_what_was_written_before_it(kafka: str, prefix: str, client: str) -> None:
    """Partitions in which nothing was written since begin at their ends."""
    teller = on(kafka, prefix, client)
    async with teller.publishing():
        await teller.tell(*range(10))
        await asyncio.sleep(0.01)  # times of records are in milliseconds
        start = datetime.now(UTC)
        await asyncio.sleep(0.01)
        await teller.tell(10)
    async with asking(kafka) as admin, teller.running(start):
        await eventually(lambda: teller.seen == [10], what="what was written from then on", seconds=60)
        assert sum(await committed(admin, prefix, 4)) in {10, 11}
        await teller.tell(*range(11, 20))
        await eventually(lambda: len(teller.seen) >= 10, what="the next", seconds=60)
    assert sorted(teller.seen) == list(range(10, 20))


async def test_on_a_broker_a_topic_that_was_missing_is_read_whole(kafka: str, prefix: str, client: str) -> None:
    """The group was there first: what is published before it sees the topic is nothing that it passes over."""
    teller = on(kafka, prefix, client, kafka_create_topics=False)
    async with asking(kafka) as admin, teller.running("latest") as app:
        (consumer,) = app.get(EventConsumers).consumers
        await eventually(
            lambda: consumer._source is not None and "MissingTopic" in str(consumer._source.absent),
            what="the missing topic to be noticed",
            seconds=60,
        )
        await admin.create_topics([NewTopic(prefix, num_partitions=4, replication_factor=1)])
        publisher = on(kafka, prefix, client, kafka_create_topics=False)
        async with publisher.publishing():
            await publisher.tell(*range(10))
        await eventually(lambda: len(teller.seen) >= 10, what="all of it", seconds=60)
        assert sorted(teller.seen) == list(range(10))
        assert len(await committed(admin, prefix, 4)) == 4


async def test_on_a_broker_a_topic_that_the_group_makes_is_read_whole(kafka: str, prefix: str, client: str) -> None:
    """What is published while the group is still being dealt out came after the group."""
    teller, publisher = on(kafka, prefix, client), on(kafka, prefix, client, kafka_create_topics=False)
    async with asking(kafka) as admin, publisher.publishing(), teller.running("latest"):

        async def is_there() -> bool:
            return prefix in await admin.list_topics()

        await eventually(is_there, what="the topic", seconds=60, every_seconds=0.001)
        await publisher.tell(*range(10))
        await eventually(lambda: len(teller.seen) >= 10, what="all of it", seconds=30)
        assert sorted(teller.seen) == list(range(10))


class Unlucky:
    """The way of one process to the places of its group, on which the broker freezes before the first commit.

    Attributes:
        lost: set when that was given up.
        goes_on: until this is set, nothing more is asked.
    """

    def __init__(self, patch: pytest.MonkeyPatch, client: str, broker: Kafka) -> None:
        self.lost = asyncio.Event()
        self.goes_on = asyncio.Event()
        places = {"aiokafka": aiokafka_source, "confluent": confluent_source}[client]._Places
        committed, commit_first = places.committed, places.commit_first

        async def ask(of: Any, topic: str) -> Any:
            if self.lost.is_set():
                await self.goes_on.wait()
            return await committed(of, topic)

        async def commit(of: Any, topic: str, offsets: Any) -> Any:
            if self.lost.is_set():
                return await commit_first(of, topic, offsets)
            await asyncio.to_thread(broker.pause)
            try:
                return await commit_first(of, topic, offsets)
            finally:
                self.lost.set()

        patch.setattr(places, "committed", ask)
        patch.setattr(places, "commit_first", commit)


@pytest.mark.usefixtures("soon_abandoned")
async def test_on_a_broker_a_choice_stands_although_its_commit_was_lost(
    broker: Kafka, prefix: str, client: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker freezes before it, and is killed: what comes until it is repeated is nothing to pass over."""
    teller, publisher = on(broker.address, prefix, client, send_seconds=2.0), on(broker.address, prefix, client)
    async with publisher.publishing():
        await publisher.tell(*range(20))
    way = Unlucky(monkeypatch, client, broker)
    async with teller.running("latest"):
        await asyncio.wait_for(way.lost.wait(), 60)
        await asyncio.to_thread(broker.kill)
        await asyncio.to_thread(broker.start)
        async with publisher.publishing():
            await publisher.tell(*range(20, 30))
        way.goes_on.set()
        await eventually(lambda: len(teller.seen) >= 10, what="what came since the choice", seconds=60)
        assert sorted(teller.seen) == list(range(20, 30))
