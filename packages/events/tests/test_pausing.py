"""Pauses by a person: a group, a kind of event or a key handles nothing until it is resumed, and keeps its order."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import sqlalchemy as sa
from prometheus_client import REGISTRY
from pydantic import SecretStr

from mainstay.cli import main
from mainstay.core import App, ConfigurationError, Retry
from mainstay.core.testing import VirtualClock, eventually
from mainstay.database import Database, DatabaseModule, DatabaseSettings, database_now
from mainstay.events import (
    Event,
    EventConsumers,
    EventLog,
    EventRouter,
    EventsModule,
    EventsSettings,
    Metadata,
    ParkedKeys,
    PauseError,
    Pauses,
)
from mainstay.events._delivery import Assignment, Delivery, Verdict
from mainstay.events._handled import Handled
from mainstay.events._parking import Parking
from mainstay.events._transport import LogRecord
from mainstay.events.tables import PARKED_KEYS, PAUSES
from mainstay.events.testing import in_memory
from packages.events.tests.test_faults import (
    effects,
    exactly_once_and_in_order,
    options,
    prepare,
    processes,
    publish,
    until_waiting,
    wait_for,
    with_librdkafka,
)
from packages.events.tests.worker import service

__all__ = ["options"]  # the fixture

pytestmark = [
    pytest.mark.usefixtures("aiokafka_garbage"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # see the fixture
]

WHO: dict[str, str] = {"by": "ann", "reason": "the printer burns"}


class Moved(Event, type="depot.moved", key="item"):
    item: str
    number: int


class Weighed(Event, type="depot.weighed", key="item"):
    item: str
    number: int


class Swept(Event, type="depot.swept"):
    number: int


class Depot:
    """A service of two groups: what one of them handles shows what there was to handle for the other."""

    def __init__(self, prefix: str, url: str, **settings: Any) -> None:
        self.group = f"{prefix}-movers"
        self.prefix = prefix
        self.url = url
        self.settings = settings
        self.events = EventRouter()
        self.handled: list[str] = []
        self.witnessed: list[str] = []
        self.gate = asyncio.Event()

    def app(self) -> App:
        """A process of this service."""
        events = self.events = EventRouter()

        async def handle(event: Moved | Weighed | Swept) -> None:
            if getattr(event, "item", "") == "gate":
                await self.gate.wait()
            self.handled.append(named(event))

        @events.on(Moved, Weighed, group=self.group, on_failure="park")
        async def keyed(event: Moved | Weighed) -> None:
            await handle(event)

        @events.on(Swept, group=self.group)
        async def keyless(event: Swept) -> None:
            await handle(event)

        @events.on(Moved, Weighed, Swept, group=f"{self.prefix}-witness")
        async def witness(event: Moved | Weighed | Swept) -> None:
            self.witnessed.append(named(event))

        topics = dict.fromkeys(("depot.moved", "depot.weighed", "depot.swept"), self.prefix)
        root = EventsSettings(topics=topics, **{"partitions": 2, **self.settings})
        database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(self.url)))
        return App(database, EventsModule.for_root(root), EventsModule.for_feature(events))

    async def publish(self, *published: Event) -> None:
        """Publish, and return when the group that is never paused has handled all."""
        count = len(self.witnessed) + len(published)
        await self.events.publish_batch(published)
        await eventually(lambda: len(self.witnessed) == count, what="the group that is not paused", seconds=60)

    def of(self, item: str) -> list[str]:
        """What was handled of an item, in order; once more after a restart, where something before it had not been."""
        return list(dict.fromkeys(name for name in self.handled if name.split()[0] == item))


def named(event: Any) -> str:
    """An event in few words."""
    return f"{getattr(event, 'item', 'floor')} {type(event).__name__.lower()} {event.number}"


def moves(item: str, *numbers: int) -> list[Event]:
    """Moves of an item."""
    return [Moved(item=item, number=number) for number in numbers]


@pytest.fixture(params=["sql", "kafka by aiokafka", "kafka by confluent"])
def depot(request: pytest.FixtureRequest, prefix: str) -> Depot:
    """On each transport, with SQLite."""
    url: str = request.getfixturevalue("sqlite_url")
    transport, _, client = request.param.partition(" by ")
    if transport == "sql":
        return Depot(prefix, url)
    return Depot(prefix, url, transport=transport, kafka_client=client, kafka_servers=request.getfixturevalue("kafka"))


async def known(app: App, group: str, says: str | None) -> None:
    """Return when the group of this process says so of its pauses."""
    consumer = next(each for each in app.get(EventConsumers).consumers if each.group == group)

    def knows() -> bool:
        return (consumer.paused is None) if says is None else (says in (consumer.paused or ""))

    await eventually(knows, what=f"the group to say {says!r}", seconds=30)


async def test_a_paused_group_handles_nothing_and_keeps_its_partitions(depot: Depot) -> None:
    """Also what it has fetched already, also over a restart; a call that runs ends. Then all is handled, in order."""
    async with depot.app().running(serve=True) as app:
        pauses = app.get(Pauses)
        await depot.publish(*moves("gate", 1, 2), *moves("chair", 1))
        await eventually(lambda: depot.of("chair") == ["chair moved 1"], what="the other key")
        pause = await pauses.pause(depot.group, **WHO)
        assert (pause.by, pause.reason, pause.kind, pause.key) == ("ann", "the printer burns", None, None)
        await known(app, depot.group, "paused by ann")
        (consumer,) = (each for each in app.get(EventConsumers).consumers if each.group == depot.group)
        held = list(consumer._assignments)
        depot.gate.set()
        await eventually(lambda: depot.of("gate") == ["gate moved 1"], what="the call that ran")
        await depot.publish(*moves("gate", 3), *moves("chair", 2, 3))
        assert depot.handled == ["chair moved 1", "gate moved 1"]
        assert list(consumer._assignments) == held != []
        (report,) = (
            each for name, each in (await app.health()).items() if "EventConsumers" in name or name == "events"
        )
        assert report.status == "ok"
        said = f"paused by ann since {pause.since:%Y-%m-%d %H:%M:%S} UTC: the printer burns"
        assert re.search(rf"group {depot.group}: \d+ partitions, {said}", report.detail)
        assert REGISTRY.get_sample_value("mainstay_events_paused", {"group": depot.group}) == 1.0
    async with depot.app().running(serve=True) as app:
        await known(app, depot.group, "paused by ann")
        await depot.publish(*moves("chair", 4))
        assert depot.handled == ["chair moved 1", "gate moved 1"]
        assert await app.get(Pauses).resume(depot.group) == pause
        await eventually(lambda: len(set(depot.handled)) == 7, what="all that waited", seconds=30)
        assert depot.of("gate") == ["gate moved 1", "gate moved 2", "gate moved 3"]
        assert depot.of("chair") == [f"chair moved {number}" for number in (1, 2, 3, 4)]
        await known(app, depot.group, None)
        assert REGISTRY.get_sample_value("mainstay_events_paused", {"group": depot.group}) == 0.0


async def test_a_paused_key_waits_with_all_that_follows_and_others_go_on(depot: Depot) -> None:
    """In the Database, in order and over a restart, with every kind of event."""
    async with depot.app().running(serve=True) as app:
        await app.get(Pauses).pause(depot.group, key="piano", **WHO)
        await known(app, depot.group, "1 keys are paused, the first of them paused by ann")
        await depot.publish(*moves("piano", 1), Weighed(item="piano", number=2), *moves("chair", 1), Swept(number=1))
        await eventually(lambda: len(set(depot.handled)) == 2, what="the others")
    async with depot.app().running(serve=True) as app:
        await depot.publish(*moves("piano", 3), *moves("chair", 2))
        await eventually(lambda: len(set(depot.handled)) == 3, what="the other key")
        assert depot.of("piano") == []
        (key,) = await app.get(ParkedKeys).list()
        assert (key.key, key.paused) == (b"piano", True)
        assert "PausedError: paused by ann" in key.error
        await app.get(ParkedKeys).retry(key.id)  # by another person: it stays paused
        await depot.publish(*moves("piano", 4), *moves("chair", 3))
        await eventually(lambda: len(set(depot.handled)) == 4, what="the other key")
        assert depot.of("piano") == []
        await app.get(Pauses).resume(depot.group, key=b"piano")
        wanted = ["piano moved 1", "piano weighed 2", "piano moved 3", "piano moved 4"]
        await eventually(lambda: depot.of("piano") == wanted, what="the queue", seconds=30)
        await depot.publish(*moves("piano", 5))
        await eventually(lambda: depot.of("piano") == [*wanted, "piano moved 5"], what="the free key", seconds=30)
        assert await app.get(ParkedKeys).list() == []


@pytest.mark.parametrize("depot", ["sql"], indirect=True)
async def test_a_paused_kind_waits_and_so_does_what_follows_of_its_keys(depot: Depot) -> None:
    """Also in front of an event of another kind; keys without such an event go on, and what has no key waits alone."""
    async with depot.app().running(serve=True) as app:
        await app.get(Pauses).pause(depot.group, kind="depot.weighed 1.x", **WHO)
        await app.get(Pauses).pause(depot.group, kind="depot.swept 1.x", **WHO)
        await known(app, depot.group, "depot.swept 1.x is paused by ann")
        await known(app, depot.group, "depot.weighed 1.x is paused by ann")
        await depot.publish(
            *moves("piano", 1), Weighed(item="piano", number=2), *moves("piano", 3), Weighed(item="piano", number=4),
            *moves("chair", 1, 2), Swept(number=1), Swept(number=2),
        )  # fmt: skip
        wanted = ["piano moved 1", "chair moved 1", "chair moved 2"]
        await eventually(lambda: sorted(depot.handled) == sorted(wanted), what="what is not paused")
        await eventually_parked(app, 5)
        await app.get(Pauses).resume(depot.group, kind="depot.swept 1.x")
        await eventually(lambda: len(depot.of("floor")) == 2, what="the kind without a key", seconds=30)
        await app.get(Pauses).resume(depot.group, kind="depot.weighed 1.x")
        piano = ["piano moved 1", "piano weighed 2", "piano moved 3", "piano weighed 4"]
        await eventually(lambda: depot.of("piano") == piano, what="the queue", seconds=30)
        await eventually_parked(app, 0)


@pytest.mark.parametrize("depot", ["sql"], indirect=True)
async def test_a_queue_that_is_worked_on_stops_at_the_kind_that_is_paused(depot: Depot) -> None:
    """What is in front of it in the queue is handled; it and what follows wait on."""
    async with depot.app().running(serve=True) as app:
        await app.get(Pauses).pause(depot.group, key="piano", **WHO)
        await known(app, depot.group, "1 keys are paused")
        await depot.publish(*moves("piano", 1), Weighed(item="piano", number=2), *moves("piano", 3))
        await eventually_parked(app, 3)
        await app.get(Pauses).pause(depot.group, kind="depot.weighed 1.x", **WHO)
        await app.get(Pauses).resume(depot.group, key="piano")
        await eventually(lambda: depot.of("piano") == ["piano moved 1"], what="what is in front")
        await eventually_parked(app, 2)
        await depot.publish(*moves("piano", 4))
        await eventually_parked(app, 3)
        await app.get(Pauses).resume(depot.group, kind="depot.weighed 1.x")
        await eventually(lambda: len(depot.of("piano")) == 4, what="the rest", seconds=30)
        assert depot.of("piano") == ["piano moved 1", "piano weighed 2", "piano moved 3", "piano moved 4"]


async def eventually_parked(app: App, count: int) -> None:
    """Return when so many events wait in queues."""
    await until_waiting(app, lambda waiting: waiting == count, seconds=30)


async def test_a_retry_does_not_age_while_its_group_is_paused(sqlite_url: str, prefix: str) -> None:
    """A policy that gives up after a minute has not given up after a pause of an hour: it is the group that stood."""
    events, clock = EventRouter(), VirtualClock()
    attempts: list[int] = []
    broken = True

    retry = Retry(9, wait=lambda _: 10.0, stop=lambda state: state.seconds_since_start > 60.0)

    @events.on(Moved, group=prefix, retry=retry, on_failure="park")
    async def move(_event: Moved, meta: Metadata) -> None:
        attempts.append(meta.attempt)
        if broken:
            msg = "not yet"
            raise RuntimeError(msg)

    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(sqlite_url)))
    async with in_memory(events, modules=[database], clock=clock) as rehearsal:
        (consumer,) = rehearsal.app.get(EventConsumers).consumers
        await rehearsal.publish(Moved(item="piano", number=1))
        await eventually(lambda: bool(consumer._failures.failing), what="the first failure")
        await rehearsal.app.get(Pauses).pause(prefix, **WHO)
        await known(rehearsal.app, prefix, "paused by ann")
        await clock.advance(3600.0)
        report = await consumer.health()
        assert (report.status, "in flight" in report.detail, consumer.backlog()) == ("ok", False, None)
        assert attempts == [1]
        await rehearsal.app.get(Pauses).resume(prefix)
        await eventually(lambda: attempts == [1, 2], what="the second attempt")
        broken = False
        async with asyncio.timeout(30):
            while attempts != [1, 2, 3]:  # another task sets the timer
                await clock.advance(10.0)
        assert await rehearsal.app.get(ParkedKeys).list() == []


async def test_what_is_gathered_for_a_batch_waits_when_it_is_paused(sqlite_url: str, prefix: str) -> None:
    """Of a kind or a key it goes to the Database, of a group it stays; the others of the batch are handled."""
    events, clock = EventRouter(), VirtualClock()
    handled: list[str] = []

    @events.on_batch(Moved, Weighed, Swept, group=prefix, size=100, wait_seconds=60.0, on_failure="park")
    async def handle(some: list[Moved | Weighed | Swept]) -> None:
        handled.extend(map(named, some))

    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(sqlite_url)))
    async with in_memory(events, modules=[database], clock=clock) as rehearsal:
        app, pauses = rehearsal.app, rehearsal.app.get(Pauses)
        (consumer,) = app.get(EventConsumers).consumers

        async def gathered(*published: Event) -> None:
            for event in published:
                await rehearsal.publish(event)
            await eventually(lambda: sum(len(each.window) for each in consumer._assignments) == len(published))

        async def passes_until(condition: Callable[[], bool]) -> None:
            async with asyncio.timeout(30):
                while not condition():  # timers, some of them of tasks that have not begun
                    await clock.advance(61.0)

        await gathered(*moves("piano", 1), Weighed(item="piano", number=2), *moves("chair", 1), *moves("desk", 1),
                       Swept(number=1))  # fmt: skip
        await pauses.pause(prefix, kind="depot.weighed 1.x", **WHO)
        await pauses.pause(prefix, kind="depot.swept 1.x", **WHO)
        await pauses.pause(prefix, key="desk", **WHO)
        for what in ("depot.weighed 1.x is paused", "depot.swept 1.x is paused", "1 keys are paused"):
            await known(app, prefix, what)
        await passes_until(lambda: sorted(handled) == ["chair moved 1", "piano moved 1"])
        await eventually_parked(app, 3)
        await pauses.pause(prefix, **WHO)
        await known(app, prefix, "paused by ann")
        await eventually(lambda: not any(each.window for each in consumer._assignments), what="an empty window")
        await pauses.resume(prefix, kind="depot.weighed 1.x")
        await pauses.resume(prefix, kind="depot.swept 1.x")
        await pauses.resume(prefix, key="desk")
        await pauses.resume(prefix)
        await passes_until(lambda: len(handled) == 5)
        await eventually_parked(app, 0)
        await gathered(*moves("chair", 2))
        await pauses.pause(prefix, **WHO)
        await known(app, prefix, "paused by ann")
        await clock.advance(61.0)
        assert len(handled) == 5
        await pauses.resume(prefix)
        await passes_until(lambda: handled[5:] == ["chair moved 2"])


async def test_a_batch_that_is_tried_again_leaves_out_what_is_paused_meanwhile(sqlite_url: str, prefix: str) -> None:
    """The others are called in its halves, in their order; one that is alone begins anew."""
    events, clock = EventRouter(), VirtualClock()
    calls: list[tuple[int, list[str]]] = []

    @events.on_batch(
        Moved, Weighed, group=prefix, size=4, on_failure="park", retry=Retry(attempts=3, wait=lambda _: 600.0)
    )
    async def handle(some: list[Moved | Weighed], metas: list[Metadata]) -> None:
        calls.append((metas[0].attempt, list(map(named, some))))
        if len(calls) == 1:
            msg = "not yet"
            raise RuntimeError(msg)

    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(sqlite_url)))
    async with in_memory(events, modules=[database], clock=clock, partitions=1) as rehearsal:
        app, pauses = rehearsal.app, rehearsal.app.get(Pauses)
        await events.publish_batch(
            [*moves("piano", 1), Weighed(item="piano", number=2), *moves("piano", 3), *moves("desk", 1)]
        )
        await eventually(lambda: len(calls) == 1, what="the first attempt")
        await pauses.pause(prefix, kind="depot.weighed 1.x", **WHO)
        await known(app, prefix, "depot.weighed 1.x is paused")
        async with asyncio.timeout(30):
            while len(calls) < 3:  # the halves
                await clock.advance(601.0)
        assert calls[1:] == [(1, ["piano moved 1"]), (1, ["desk moved 1"])]
        await eventually_parked(app, 2)
        await pauses.resume(prefix, kind="depot.weighed 1.x")
        async with asyncio.timeout(30):
            while len(calls) < 5:
                await clock.advance(601.0)
        assert [names for _, names in calls[3:]] == [["piano weighed 2"], ["piano moved 3"]]
        await eventually_parked(app, 0)


async def test_what_is_not_there_cannot_be_paused_and_what_is_not_paused_not_resumed(
    sqlite_url: str, prefix: str
) -> None:
    """A misspelt name is an error that says what there is, and a second pause one that says whose the first is."""
    depot = Depot(prefix, sqlite_url)
    async with depot.app() as app:
        pauses = app.get(Pauses)
        with pytest.raises(PauseError, match=f"groups there are: {depot.group}, {prefix}-witness"):
            await pauses.pause("movers", **WHO)
        with pytest.raises(PauseError, match=r"no handler for 'depot.weighed 2.x'; it handles depot.moved 1.x"):
            await pauses.pause(depot.group, kind="depot.weighed 2.x", **WHO)
        with pytest.raises(PauseError, match="is not paused: list"):
            await pauses.resume(depot.group)
        with pytest.raises(ValueError, match="two pauses"):
            await pauses.pause(depot.group, kind="depot.moved 1.x", key="piano", **WHO)
        with pytest.raises(ValueError, match="say who"):
            await pauses.pause(depot.group, by="ann", reason="")
        await pauses.pause(depot.group, **WHO)
        with pytest.raises(PauseError, match=r"is paused by ann since .*: the printer burns"):
            await pauses.pause(depot.group, by="bob", reason="lunch")
        one = await pauses.pause(depot.group, key="piano", **WHO)
        assert [(each.key, each.by) for each in await pauses.list(depot.group)] == [(None, "ann"), (b"piano", "ann")]
        assert await pauses.list("another") == []
        assert one in await pauses.list()


async def test_without_a_database_nothing_can_be_paused() -> None:
    """A process would know of it alone; the error names the missing line."""
    async with App(EventsModule.for_root(EventsSettings(transport="memory"))) as app:
        with pytest.raises(ConfigurationError, match=r"add DatabaseModule.for_root\(\)"):
            await app.get(Pauses).pause("movers", **WHO)


async def test_the_way_of_a_person_at_the_command_line(
    sqlite_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pause, look, resume; as text and as JSON."""

    async def run(*arguments: str) -> int:
        return await asyncio.to_thread(main, ["events", *arguments])

    monkeypatch.setenv("MAINSTAY_DATABASE_URL", sqlite_url)
    depot = Depot(prefix, sqlite_url)
    async with depot.app().running(serve=True) as app:
        assert await run("paused") == 0
        assert capsys.readouterr().out == "nothing is paused\n"
        assert await run("pause", depot.group, "--reason", "the printer burns", "--by", "ann") == 0
        assert capsys.readouterr().out == f"paused: group {depot.group}\n"
        await known(app, depot.group, "paused by ann")
        assert await run("pause", depot.group, "--reason", "lunch") == 2
        assert "is paused by ann since" in capsys.readouterr().err
        assert await run("pause", depot.group, "--reason", "x", "--key", "piano", "--kind", "a 1.x") == 2
        capsys.readouterr()
        assert await run("pause", depot.group, "--key", "piano", "--reason", "recount", "--by", "bob", "--json") == 0
        assert json.loads(capsys.readouterr().out)["key"] == "piano"
        assert await run("paused", "--group", depot.group) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "the printer burns" in lines[1]
        assert "piano" in lines[2]
        await depot.publish(*moves("chair", 1), *moves("piano", 1))
        assert await run("groups", depot.group) == 0
        assert re.search(r"paused +paused by ann since .*; 1 keys are paused, .* by bob", capsys.readouterr().out)
        assert await run("groups", "--json") == 0
        groups = {each["group"]: each for each in json.loads(capsys.readouterr().out)}
        assert "paused by ann" in groups[depot.group]["paused"]
        why = {each.key: each.why for each in await app.get(EventLog).stuck(depot.group, seconds=0.0)}
        assert why["chair"].startswith("the group is paused by ann since ")
        assert await run("resume", depot.group) == 0
        assert capsys.readouterr().out.startswith(f"resumed: group {depot.group}, paused by ann since ")
        await eventually_parked(app, 1)
        why = {each.key: each.why for each in await app.get(EventLog).stuck(depot.group, seconds=0.0)}
        assert "; waits until what is paused is resumed; " in why["piano"]
        assert await run("resume", depot.group, "--key", "piano") == 0
        assert await run("resume", depot.group) == 2
        assert "is not paused" in capsys.readouterr().err
        await known(app, depot.group, None)


@with_librdkafka
async def test_pauses_and_kills_lose_double_and_reorder_nothing(options: dict[str, Any]) -> None:
    """Workers are killed while a key, the kind or the whole group is paused, and while all that goes on again."""
    publisher = service(options)

    async def stands(counted: Callable[[], Awaitable[int]]) -> int:
        """The number, once it has not changed for as long as a pause takes to be known everywhere, and then some."""
        count, since = await counted(), 0
        async with asyncio.timeout(60):
            while since < 30:
                await asyncio.sleep(0.1)
                before, count = count, await counted()
                since = since + 1 if count == before else 0
        return count

    async def done() -> int:
        return len(await effects(publisher))

    async with publisher, processes() as start:
        pauses = publisher.get(Pauses)
        await prepare(publisher)
        first, second = await start(options), await start(options)
        await pauses.pause(options["group"], key="k0", **WHO)
        await publish(publisher, keys=6, each=20)
        await wait_for(publisher, 30)
        await pauses.pause(options["group"], **WHO)
        first.kill()
        count = await stands(done)
        await publish(publisher, keys=6, each=25, start=20)
        await start(options)
        await pauses.resume(options["group"])
        await wait_for(publisher, count + 5)
        await pauses.pause(options["group"], kind="fault.step 1.x", **WHO)
        second.kill()
        await stands(done)
        await start(options)
        await publish(publisher, keys=6, each=28, start=25)
        await pauses.resume(options["group"], kind="fault.step 1.x")
        await pauses.resume(options["group"], key="k0")
        exactly_once_and_in_order(await wait_for(publisher, 168), keys=6, each=28)

        async def all_free() -> bool:
            return not await publisher.get(ParkedKeys).list()

        await eventually(all_free, what="keys without queues")


async def test_what_waits_for_its_first_call_does_not_age(sqlite_url: str, prefix: str) -> None:
    """Neither while it is paused nor behind what is: a policy that gives up after a minute begins with that call."""
    events, attempts = EventRouter(), list[tuple[int, int]]()

    retry = Retry(3, wait=lambda _: 0.0, stop=lambda state: state.seconds_since_start > 60.0)

    @events.on(Moved, group=prefix, retry=retry, on_failure="skip")
    async def move(event: Moved, meta: Metadata) -> None:
        attempts.append((event.number, meta.attempt))
        if meta.attempt == 1:
            msg = "not yet"
            raise RuntimeError(msg)

    settings = EventsSettings(topics={"depot.moved": prefix}, partitions=1)
    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(sqlite_url)))
    app = App(database, EventsModule.for_root(settings), EventsModule.for_feature(events))
    async with app.running(serve=True):
        await app.get(Pauses).pause(prefix, key="piano", **WHO)
        await known(app, prefix, "1 keys are paused")
        await events.publish_batch(moves("piano", 1, 2))
        await eventually_parked(app, 2)
        an_hour_ago = sa.update(PARKED_KEYS).values(failing_since=PARKED_KEYS.c.failing_since - 3600.0)
        await app.get(Database).write(an_hour_ago, {})
        await app.get(Pauses).resume(prefix, key="piano")
        await eventually_parked(app, 0)
        assert attempts == [(1, 1), (1, 2), (2, 1), (2, 2)]


async def test_a_retry_in_a_queue_does_not_age_while_it_is_paused(database_url: str, prefix: str) -> None:
    """As long as before the pause it has been failing when that ends; what waits for a person has all the time."""
    headers: list[tuple[str, bytes | None]] = [("ce_type", b"depot.moved"), ("ce_dataversion", b"1.0")]
    depot = Depot(prefix, database_url)
    async with depot.app() as app:
        database = app.get(Database)
        parking = Parking(database, depot.group, Handled(database, depot.group, ["depot.moved 1.x"]), 30.0)
        for key, due in ((b"piano", 3600.0), (b"chair", 3600.0), (b"lamp", None)):
            delivery = Delivery(Assignment(prefix, 0), LogRecord(prefix, 0, 1, key, key, headers))
            delivery.attempt = 2
            await parking.park(delivery, Verdict(RuntimeError("not yet"), "park", due), 100.0, [])
        pauses = app.get(Pauses)
        await pauses.pause(depot.group, key="piano", **WHO)
        await database.write(sa.update(PARKED_KEYS).values(failing_since=PARKED_KEYS.c.failing_since - 5000.0), {})
        await database.write(sa.update(PAUSES).values(paused_at=PAUSES.c.paused_at - 5000.0), {})
        await pauses.resume(depot.group, key="piano")
        ages = await ages_of(database)
        assert 100.0 <= ages[b"piano"] < 1000.0
        assert ages[b"chair"] >= 5100.0
        await pauses.pause(depot.group, **WHO)
        await pauses.resume(depot.group)
        assert (await ages_of(database))[b"lamp"] >= 5100.0


async def ages_of(database: Database) -> dict[bytes, float]:
    """For how many seconds the parked keys have been failing."""
    rows = await database.read(sa.select(PARKED_KEYS.c.key, database_now() - PARKED_KEYS.c.failing_since))
    return {key: age for key, age in rows}  # noqa: C416  rows are no pairs to a type checker
