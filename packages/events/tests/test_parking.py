"""Parked keys: what failed waits with all that follows of its key, in order and durably, while other keys go on."""

import asyncio
import json
import os
from collections.abc import Sequence
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from mainstay.cli import main
from mainstay.core import App, FullJitter, Retry
from mainstay.core.testing import eventually
from mainstay.database import Database, DatabaseModule, DatabaseSettings
from mainstay.events import (
    DeadLetters,
    Event,
    EventRouter,
    EventsModule,
    EventsSettings,
    Metadata,
    NotParkedError,
    ParkedKey,
    ParkedKeys,
    _consumer,
)
from mainstay.events._crashes import Crashes
from mainstay.events._delivery import Assignment, Delivery, Verdict
from mainstay.events._dispatch import Dispatcher
from mainstay.events._failure import Failures
from mainstay.events._handled import Handled
from mainstay.events._intake import Intake
from mainstay.events._parking import Parking
from mainstay.events._routes import Route
from mainstay.events._transport import LogRecord
from mainstay.events.errors import NotHeldError
from mainstay.events.tables import PARKED, PARKED_KEYS

pytestmark = [
    pytest.mark.usefixtures("aiokafka_garbage"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # see the fixture
]

ONCE = Retry(attempts=1)


class Moved(Event, type="stock.moved", key="item"):
    item: str
    number: int


class Warehouse:
    """A service whose handler fails for the items that are `broken`."""

    def __init__(self, url: str, prefix: str, **settings: Any) -> None:
        self.url = url
        self.prefix = prefix
        self.settings = settings
        self.retry = ONCE
        self.broken: set[str] = set()
        self.handled: list[tuple[str, int]] = []
        self.attempts: list[tuple[str, int, int]] = []
        self.events = EventRouter()

    def app(self) -> App:
        """A process of this service."""
        events = self.events = EventRouter()

        @events.on(Moved, group=self.prefix, retry=self.retry, on_failure="park")
        async def move(event: Moved, meta: Metadata) -> None:
            self.attempts.append((event.item, event.number, meta.attempt))
            if event.item in self.broken:
                msg = f"no room for {event.item}"
                raise RuntimeError(msg)
            self.handled.append((event.item, event.number))

        settings = EventsSettings(
            topics={"stock.moved": self.prefix},
            **{"partitions": 1, "retry_initial_seconds": 0.01, "retry_max_seconds": 0.02, **self.settings},
        )
        return App(
            DatabaseModule.for_root(DatabaseSettings(url=SecretStr(self.url))),
            EventsModule.for_root(settings),
            EventsModule.for_feature(events),
        )

    async def move(self, item: str, *numbers: int) -> None:
        """Publish moves of an item."""
        await self.events.publish_batch([Moved(item=item, number=number) for number in numbers])

    def numbers(self, item: str) -> list[int]:
        """What was handled of an item, in order."""
        return [number for name, number in self.handled if name == item]


@pytest.fixture(params=["sql", "kafka"])
def warehouse(request: pytest.FixtureRequest, database_url: str, prefix: str) -> Warehouse:
    """On either transport, with either database."""
    if request.param == "sql":
        return Warehouse(database_url, prefix)
    kafka: str = request.getfixturevalue("kafka")
    return Warehouse(database_url, prefix, transport="kafka", kafka_servers=kafka)


async def parked_in(app: App, waiting: int) -> ParkedKey:
    """The one parked key, once so many events wait in its queue."""
    found: Sequence[ParkedKey] = []
    async with asyncio.timeout(30):
        while [each.waiting for each in found] != [waiting]:
            await asyncio.sleep(0.02)
            found = await app.get(ParkedKeys).list()
    return found[0]


async def free(app: App) -> None:
    """Return when no key is parked and nothing waits."""
    async with asyncio.timeout(30):
        while await app.get(ParkedKeys).list() or await app.get(Database).read(sa.select(PARKED.c.id)):  # noqa: ASYNC110  another process or task does it
            await asyncio.sleep(0.02)


async def test_what_follows_of_a_parked_key_waits_in_order_and_other_keys_go_on(warehouse: Warehouse) -> None:
    """Also over a restart; once a person has it tried again, all is handled in order, and the key is free."""
    warehouse.broken = {"piano"}
    async with warehouse.app().running(serve=True) as app:
        await warehouse.move("piano", 1, 2, 3)
        await warehouse.move("chair", 1, 2, 3)
        await eventually(lambda: warehouse.numbers("chair") == [1, 2, 3], what="the other key")
        parked = await parked_in(app, 3)
        assert (parked.group, parked.topic, parked.key) == (warehouse.prefix, warehouse.prefix, b"piano")
        assert "no room for piano" in parked.error
        assert (parked.attempt, parked.due) == (1, None)
        health = await app.health()
        (report,) = (each for each in health.values() if "parked" in each.detail)
        assert report.status == "degraded", "a person may not look for long"
        said = f"group {warehouse.prefix}: 1 parked keys need a person, the oldest since {parked.since:%Y-%m-}"
        assert said in report.detail
        assert "; 3 events wait in all: mainstay events parked list" in report.detail
        assert await app.get(DeadLetters).list() == []
    async with warehouse.app().running(serve=True) as app:
        await warehouse.move("piano", 4)
        await warehouse.move("chair", 4)
        await eventually(lambda: warehouse.numbers("chair") == [1, 2, 3, 4], what="the other key")
        parked = await parked_in(app, 4)
        assert [number for item, number, _ in warehouse.attempts if item == "piano"] == [1], "only the first was tried"
        warehouse.broken = set()
        await app.get(ParkedKeys).retry(parked.id)
        await eventually(lambda: warehouse.numbers("piano") == [1, 2, 3, 4], what="the queue")
        await free(app)
        await warehouse.move("piano", 5)
        await eventually(lambda: warehouse.numbers("piano") == [1, 2, 3, 4, 5], what="the free key")
        with pytest.raises(NotParkedError, match="no parked key"):
            await app.get(ParkedKeys).retry(parked.id)
    assert warehouse.numbers("chair") == [1, 2, 3, 4]


async def test_what_fails_again_stays_parked_with_its_new_error(database_url: str, prefix: str) -> None:
    """Each retry by a person has all the attempts of the policy, and they are kept where a restart finds them."""
    warehouse = Warehouse(database_url, prefix)
    warehouse.retry = Retry(attempts=3, wait=FullJitter(0.01, 0.01))
    warehouse.broken = {"piano"}
    async with warehouse.app().running(serve=True) as app:
        await warehouse.move("piano", 1, 2)
        parked = await parked_in(app, 2)
        assert [attempt for _, _, attempt in warehouse.attempts] == [1, 2, 3]
        await app.get(ParkedKeys).retry(parked.id)
        await eventually(lambda: len(warehouse.attempts) == 6, what="three more attempts")
        async with asyncio.timeout(30):
            while (await app.get(ParkedKeys).get(parked.id)).due is not None:  # noqa: ASYNC110  another task stores it
                await asyncio.sleep(0.02)
        assert [attempt for _, _, attempt in warehouse.attempts] == [1, 2, 3] * 2
        assert warehouse.handled == []


async def test_the_first_of_a_queue_is_skipped_or_the_whole_queue_discarded(database_url: str, prefix: str) -> None:
    """Skipping keeps the event as a dead letter; discarding deletes, and what comes next is handled."""
    warehouse = Warehouse(database_url, prefix)
    warehouse.broken = {"piano"}
    async with warehouse.app().running(serve=True) as app:
        await warehouse.move("piano", 1, 2, 3)
        parked = await parked_in(app, 3)
        await app.get(ParkedKeys).skip(parked.id)
        parked = await parked_in(app, 2)
        letters = await app.get(DeadLetters).list(prefix)
        assert [letter.value for letter in letters] == [b'{"item":"piano","number":1}']
        assert "no room for piano" in letters[0].error
        await eventually(lambda: ("piano", 2, 1) in warehouse.attempts, what="the attempt at the next")
        warehouse.broken = set()
        await app.get(ParkedKeys).discard(parked.id)
        await free(app)
        await warehouse.move("piano", 4)
        await eventually(lambda: ("piano", 4) in warehouse.handled, what="the free key")
        assert warehouse.numbers("piano") == [4]


async def test_two_people_skip_one_event(database_url: str, prefix: str) -> None:
    """The one behind it was never tried, and must not become a dead letter by the second skip."""
    warehouse = Warehouse(database_url, prefix)
    warehouse.broken = {"piano"}
    async with warehouse.app().running(serve=True) as app:
        await warehouse.move("piano", 1, 2, 3)
        parked = await parked_in(app, 3)
    async with warehouse.app() as app:  # it does not serve: what was skipped stays where it is
        keys = app.get(ParkedKeys)
        outcomes = await asyncio.gather(*(keys.skip(parked.id) for _ in range(2)), return_exceptions=True)
        assert sorted(type(outcome).__name__ for outcome in outcomes) == ["NotParkedError", "ParkedKey"]
        with pytest.raises(NotParkedError, match="has not failed"):
            await keys.skip(parked.id)
        letters = await app.get(DeadLetters).list(prefix)
        assert [letter.value for letter in letters] == [b'{"item":"piano","number":1}']
        assert (await keys.get(parked.id)).waiting == 2


async def test_an_event_without_a_key_and_a_record_that_is_none_become_dead_letters(
    database_url: str, prefix: str
) -> None:
    """There is nothing to park; a version that cannot be read is parked, since the next release may read it."""
    events = EventRouter()

    class Counted(Event, type="stock.counted"):
        number: int

    class Newer(Event, type="stock.moved", version="2.0", key="item"):
        item: str

    @events.on(Counted, group=prefix, retry=ONCE, on_failure="park")
    async def count(event: Counted) -> None:
        msg = "no"
        raise RuntimeError(msg)

    @events.on(Moved, group=prefix, on_failure="park")
    async def move(event: Moved) -> None:
        raise AssertionError

    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(database_url)))
    app = App(database, EventsModule.for_root(EventsSettings()), EventsModule.for_feature(events))
    async with app.running(serve=True):
        await events.publish(Counted(number=1))
        await events.publish(Newer(item="piano"))
        parked = await parked_in(app, 1)
        assert "has version '2.0'" in parked.error
        async with asyncio.timeout(30):
            while not (letters := await app.get(DeadLetters).list(prefix)):  # noqa: ASYNC110  another task stores it
                await asyncio.sleep(0.02)
        assert [letter.key for letter in letters] == [None]


async def test_a_few_keys_that_wait_for_a_retry_do_not_hold_back_a_full_window(database_url: str, prefix: str) -> None:
    """A window behind one event that waits for an hour is committed, and goes on; that one waits in the table."""
    warehouse = Warehouse(database_url, prefix)
    warehouse.retry = Retry(attempts=5, wait=lambda _: 3600.0)
    warehouse.broken = {"piano"}
    async with warehouse.app().running(serve=True) as app:
        await warehouse.move("piano", 1, 2)
        for start in range(0, 3000, 500):
            await warehouse.events.publish_batch(
                [Moved(item=f"chair {number}", number=number) for number in range(start, start + 500)]
            )
        await eventually(lambda: len(warehouse.handled) == 3000, what="the other keys")
        parked = await parked_in(app, 2)
        assert parked.attempt == 2
        assert parked.due is not None
        assert (parked.due - parked.since).total_seconds() <= 3601.0
        warehouse.broken = set()
        await app.get(Database).write(sa.update(PARKED_KEYS).values(due_at=0.0), {})
        await eventually(lambda: warehouse.numbers("piano") == [1, 2], what="the queue")
        assert ("piano", 1, 2) in warehouse.attempts
        await free(app)


async def test_parked_keys_are_listed_shown_and_dealt_with_from_the_command_line(
    database_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way of a person on call."""

    async def run(*arguments: str) -> int:
        return await asyncio.to_thread(main, ["events", "parked", *arguments])

    monkeypatch.setenv("MAINSTAY_DATABASE_URL", database_url)
    warehouse = Warehouse(database_url, prefix)
    warehouse.broken = {"piano"}
    async with warehouse.app().running(serve=True) as app:
        assert await run("list") == 0
        assert capsys.readouterr().out == "no parked keys\n"
        await warehouse.move("piano", 1, 2, 3)
        one = str((await parked_in(app, 3)).id)
        assert await run("list", "--group", prefix) == 0
        line = capsys.readouterr().out.splitlines()[1]
        assert "piano" in line
        assert "RuntimeError: no room for piano" in line
        assert await run("show", one) == 0
        page = capsys.readouterr().out
        assert f"read from {prefix}/0" in page
        assert "again     when told to, attempt 1" in page
        assert await run("skip", one) == 0
        assert "without its first event, tried again" in capsys.readouterr().out
        await eventually(lambda: ("piano", 2, 1) in warehouse.attempts, what="the attempt at the next")
        warehouse.broken = set()
        assert await run("retry", "--json", one) == 0
        assert json.loads(capsys.readouterr().out) == [{"id": one, "group": prefix, "key": "piano"}]
        await eventually(lambda: warehouse.numbers("piano") == [2, 3], what="the queue")
        await free(app)
        assert await run("discard", one) == 2
        assert "no parked key" in capsys.readouterr().err


async def test_what_is_read_once_more_is_not_appended_behind_what_followed_it(database_url: str, prefix: str) -> None:
    """A partition is read again from what was committed: its events before and behind the parked one stay in order."""
    calls: list[int] = []
    gate = asyncio.Event()

    async def handle(event: Moved) -> None:
        if event.item == "slow":
            await gate.wait()
        calls.append(event.number)
        if event.number == 3:
            msg = "no room"
            raise RuntimeError(msg)

    route = Route("stock.moved", prefix)
    route.reads(Moved, handle, wants_metadata=False, retry=ONCE, on_failure="park")
    clock = App().clock
    items = ["slow", "piano", "piano", "piano", "piano"]
    records = [
        LogRecord(
            "stock", 0, number, item.encode(), b'{"item":"%b","number":%d}' % (item.encode(), number),
            [("ce_type", b"stock.moved")],
        )
        for number, item in enumerate(items)
    ]  # fmt: skip

    async def bury(delivery: Delivery, error: Exception) -> None:
        raise AssertionError

    async def commit(partition: Assignment) -> None:
        assert partition.finished is None

    async with App(
        DatabaseModule.for_root(DatabaseSettings(url=SecretStr(database_url))),
        EventsModule.for_root(EventsSettings()),
    ) as app:
        parking = Parking(app.get(Database), prefix, Handled(app.get(Database), prefix, ["stock.moved 1.x"]), 10.0)
        for _process in range(2):
            failures = Failures(prefix, bury=bury, commit=commit, parking=parking, clock=clock)
            dispatcher = Dispatcher(prefix, {"stock.moved": route}, concurrency=4, failures=failures, clock=clock)
            partition = Assignment("stock", 0)
            partition.parked |= await parking.keys_of("stock")
            dispatcher.feed(partition, records)
            await eventually(lambda partition=partition: len(partition.behind) == 4 == len(partition.window) - 1)
            await dispatcher.stop()
        assert calls == [1, 2, 3]
        waiting = sa.select(PARKED.c.offset).where(~PARKED.c.handled).order_by(PARKED.c.position)
        assert [row.offset for row in await app.get(Database).read(waiting)] == [3, 4]


async def test_records_that_come_with_their_partition_wait_for_its_parked_keys(database_url: str, prefix: str) -> None:
    """A fetch may return what it has of a partition that was dealt out in the middle of it."""
    calls: list[int] = []

    async def handle(event: Moved) -> None:
        calls.append(event.number)

    route = Route("stock.moved", prefix)
    route.reads(Moved, handle, wants_metadata=False, retry=ONCE, on_failure="park")
    records = [
        LogRecord(
            "stock", 0, number, item, b'{"item":"%b","number":%d}' % (item, number), [("ce_type", b"stock.moved")]
        )
        for number, item in enumerate([b"piano", b"piano", b"stool"])
    ]
    clock = App().clock

    async def bury(delivery: Delivery, error: Exception) -> None:
        raise AssertionError

    async def commit(partition: Assignment) -> None:
        """Nothing is noted here."""

    async with App(
        DatabaseModule.for_root(DatabaseSettings(url=SecretStr(database_url))),
        EventsModule.for_root(EventsSettings()),
    ) as app:
        database = app.get(Database)
        parking = Parking(database, prefix, Handled(database, prefix, ["stock.moved 1.x"]), 10.0)
        await parking.park(Delivery(Assignment("stock", 0), records[0]), Verdict(RuntimeError(), "park"), 0.0, [])
        failures = Failures(prefix, bury=bury, commit=commit, parking=parking, clock=clock)
        dispatcher = Dispatcher(prefix, {"stock.moved": route}, concurrency=4, failures=failures, clock=clock)
        intake = Intake(
            prefix, dispatcher, parking=parking, crashes=Crashes(database, 3), window=1000, clock=clock
        )  # fmt: skip
        partition = Assignment("stock", 0)
        intake.assigned(partition)
        await intake.take({partition: records[1:]})
        assert await dispatcher.settle([partition], 30)
        assert calls == [2]
        waiting = sa.select(PARKED.c.offset).order_by(PARKED.c.position)
        assert [row.offset for row in await database.read(waiting)] == [0, 1]
        await intake.stop()
        await dispatcher.stop()


async def test_a_partition_that_another_has_taken_parks_nothing_and_appends_nothing(
    database_url: str, prefix: str
) -> None:
    """A process that stood still in between finds out in the very commit."""
    record = LogRecord("stock", 0, 7, b"piano", b"{}", [])
    async with App(
        DatabaseModule.for_root(DatabaseSettings(url=SecretStr(database_url))),
        EventsModule.for_root(EventsSettings()),
    ) as app:
        database = app.get(Database)
        parking = Parking(database, prefix, Handled(database, prefix, []), 10.0)
        before, after = Assignment("stock", 0), Assignment("stock", 0)
        await Crashes(database, 3).take(prefix, [before])
        await Crashes(database, 3).take(prefix, [after])
        verdict = Verdict(RuntimeError("no room"), "park")
        with pytest.raises(NotHeldError, match="stock/0 is another process' now"):
            await parking.park(Delivery(before, record), verdict, 0.0, [])
        assert await parking.keys_of("stock") == set()
        await parking.park(Delivery(after, record), verdict, 0.0, [])
        later = LogRecord("stock", 0, 8, b"piano", b"{}", [])
        with pytest.raises(NotHeldError):
            await parking.append(before, later)
        assert await parking.append(after, later)
        assert [row.offset for row in await database.read(sa.select(PARKED.c.offset))] == [7, 8]


async def test_what_keeps_no_order_gives_way_without_its_key(
    sqlite_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One event that waits for an hour fills the window; the others of its key are handled, also those that come."""
    monkeypatch.setattr(_consumer, "_WINDOW", 20)
    events = EventRouter()
    handled: list[int] = []

    @events.on(Moved, group=prefix, order="none", retry=Retry(attempts=9, wait=lambda _state: 3600.0))
    async def move(event: Moved) -> None:
        if event.number == 0:
            msg = "not for an hour"
            raise RuntimeError(msg)
        handled.append(event.number)

    settings = EventsSettings(topics={"stock.moved": prefix}, partitions=1)
    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(sqlite_url)))
    app = App(database, EventsModule.for_root(settings), EventsModule.for_feature(events))
    async with app.running(serve=True):
        await events.publish_batch([Moved(item="a", number=number) for number in range(60)])
        rows: Sequence[Any] = []

        async def set_aside() -> bool:
            nonlocal rows
            rows = await app.get(Database).read(sa.select(PARKED.c.offset, PARKED.c.handled))
            return bool(rows)

        await eventually(set_aside)
        assert [row.handled for row in rows] == [False]
        await events.publish_batch([Moved(item="a", number=number) for number in range(60, 80)])
        await eventually(lambda: sorted(handled) == list(range(1, 80)), what="the others")


async def test_a_key_that_is_too_long_for_an_index_is_parked_like_any_other(postgres_url: str, prefix: str) -> None:
    """PostgreSQL refused its row, so that its event was neither parked nor finished, and held back its partition."""
    long, longer = (os.urandom(size).hex() for size in (600, 20_000))
    warehouse = Warehouse(postgres_url, prefix)
    warehouse.broken = {long, longer}
    async with warehouse.app().running(serve=True) as app:
        for item in (long, longer):
            await warehouse.move(item, 1, 2)
        await warehouse.move("small", 3)
        await eventually(lambda: warehouse.numbers("small") == [3])
        keys = app.get(ParkedKeys)

        async def both() -> bool:
            return sorted((len(each.key or b""), each.waiting) for each in await keys.list()) == [
                (1200, 2),
                (40_000, 2),
            ]

        await eventually(both, what="both with their queues")
        warehouse.broken.clear()
    async with warehouse.app().running(serve=True) as app:  # it knows them by what it finds in the table
        await warehouse.move(long, 4)
        for each in await app.get(ParkedKeys).list():
            await app.get(ParkedKeys).retry(each.id)
        await eventually(lambda: warehouse.numbers(long) == [1, 2, 4])
        await eventually(lambda: warehouse.numbers(longer) == [1, 2])
