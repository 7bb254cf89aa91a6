"""Events that end their process: counted over its ends, given up after some; a kill is held against no healthy one."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from mainstay.core import App, Retry
from mainstay.core.testing import eventually
from mainstay.database import Database, DatabaseModule, DatabaseSettings
from mainstay.events import DeadLetters, EventPublisher, EventsModule, EventsSettings, ParkedKeys, Pause
from mainstay.events._careful import CarefulReading
from mainstay.events._crashes import Crashes, Holding
from mainstay.events._delivery import Assignment, Delivery
from mainstay.events._dispatch import Dispatcher
from mainstay.events._failure import Failures
from mainstay.events._pausing import Pausing
from mainstay.events._routes import Limits, Route
from mainstay.events._transport import LogRecord
from mainstay.events.tables import HOLDERS
from packages.events.tests.test_faults import processes
from packages.events.tests.worker import ENDS, Loose, Step, service

pytestmark = [
    pytest.mark.usefixtures("aiokafka_garbage"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # see the fixture
]


@pytest.fixture
def options(database_url: str, prefix: str, tmp_path: Path) -> dict[str, Any]:
    """A service whose handlers note their calls."""
    return {
        "url": database_url,
        "topic": f"{prefix}-fault",
        "group": f"{prefix}-g",
        "calls": str(tmp_path / "calls"),
        "slow": 3600.0,
        "on": {"on_failure": "park"},
        "events": {"transport": "sql", "lease_seconds": 1.0, "partitions": 1, "crash_attempts": 2},
    }


def calls_of(options: dict[str, Any]) -> list[str]:
    """What was called so far, in order."""
    path = Path(options["calls"])
    return path.read_text().splitlines() if path.exists() else []


async def started_until_one_lives(options: dict[str, Any], done: Callable[[], Any]) -> int:
    """How many processes ended before the one under which `done()` came true."""
    ended = 0
    async with asyncio.timeout(180), processes() as start:
        while True:
            process = await start(options)
            while not process.ended():
                if await done():
                    return ended
                await asyncio.sleep(0.05)
            ended += 1


async def test_an_event_that_ends_its_process_is_parked_after_some_ends(options: dict[str, Any]) -> None:
    """And what follows of other keys is handled, without being repeated at every start."""
    async with service(options) as app:
        good = [Step(key=f"k{number}", number=number) for number in range(20)]
        bad = Step(key=ENDS, number=0)
        await app.get(EventPublisher).publish_batch([*good[:5], bad, *good[5:], Step(key=ENDS, number=1)])

        async def parked() -> bool:
            return [key.waiting for key in await app.get(ParkedKeys).list()] == [2]

        ended = await started_until_one_lives(options, parked)
        (key,) = await app.get(ParkedKeys).list()
        assert key.key == ENDS.encode()
        assert "its process ended 2 times while it was handled" in key.error
        assert ended == 4, "two before it was read carefully, two that are held against the event"
        calls = calls_of(options)
        assert calls.count(f"{ENDS} 0") == 4
        assert f"{ENDS} 1" not in calls
        # A person who has it tried again changes nothing about that: its queue is claimed a few times, and then waits.
        await app.get(ParkedKeys).retry(key.id)

        async def again() -> bool:
            (key,) = await app.get(ParkedKeys).list()
            return key.due is None

        assert await started_until_one_lives(options, again) == 4
        assert "its process ended 2 times" in (await app.get(ParkedKeys).get(key.id)).error
        for event in good:  # those in front of it once more, where its first careful call came before their commit
            most = 4 if event.number < 5 else 3
            assert 1 <= calls.count(f"{event.key} {event.number}") <= most, "not at every start"


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_of_a_batch_the_event_that_ends_its_process_is_found(options: dict[str, Any]) -> None:
    """Read carefully its events are handed over alone, so that it is clear which one is to blame."""
    options["together"] = {"size": 8, "wait_seconds": 0.05}
    async with service(options) as app:
        good = [Step(key=f"k{number}", number=number) for number in range(12)]
        await app.get(EventPublisher).publish_batch([*good[:5], Step(key=ENDS, number=0), *good[5:]])

        async def found() -> bool:
            return bool(await app.get(ParkedKeys).list()) and "k11 11" in calls_of(options)

        assert await started_until_one_lives(options, found) == 4
        (key,) = await app.get(ParkedKeys).list()
        assert key.key == ENDS.encode()
        assert {f"{event.key} {event.number}" for event in good} < set(calls_of(options))


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_without_a_key_it_is_a_dead_letter(options: dict[str, Any]) -> None:
    """There is nothing to park."""
    options["events"]["crash_attempts"] = 1
    async with service(options) as app:
        await app.get(EventPublisher).publish_batch([Loose(key=ENDS, number=0), Loose(key="good", number=1)])

        async def handled() -> bool:
            return "good 1" in calls_of(options) and bool(await app.get(DeadLetters).list())

        await started_until_one_lives(options, handled)
        (letter,) = await app.get(DeadLetters).list()
        assert "its process ended 1 times while it was handled" in letter.error
        assert letter.attempts == 1


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_on_kafka_with_a_database_too(options: dict[str, Any], kafka: str) -> None:
    """Its broker keeps a dead member's partitions for six seconds at least, so once is enough here."""
    options["events"] = {
        "transport": "kafka", "kafka_servers": kafka, "partitions": 1, "lease_seconds": 1.0, "crash_attempts": 1
    }  # fmt: skip
    async with service(options) as app:
        await app.get(EventPublisher).publish_batch([Step(key=ENDS, number=0), Step(key="good", number=1)])

        async def parked() -> bool:
            return "good 1" in calls_of(options) and bool(await app.get(ParkedKeys).list())

        assert await started_until_one_lives(options, parked) == 3


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_slow_event_whose_process_is_killed_again_and_again_is_not_given_up(options: dict[str, Any]) -> None:
    """Kills that do not wait for its call also strike while it is only waited with: then it is not to blame."""
    async with service(options) as app:
        await app.get(EventPublisher).publish(Step(key="slow", number=1))
        database = app.get(Database)

        async def called() -> bool:
            return len(calls_of(options)) > calls

        async def called_for_long() -> bool:
            row = (await database.read(sa.select(HOLDERS)))[0]
            return bool(len(calls_of(options)) > calls and row.called_seconds >= 2 and row.crashes == 0)

        async def waited_with() -> bool:
            row = (await database.read(sa.select(HOLDERS)))[0]
            return bool(row.crashes == 1 and not row.calling)

        async with processes() as start:
            for moment in (called, called, called_for_long, waited_with, called_for_long, waited_with):
                calls = len(calls_of(options))
                process = await start(options)
                await eventually(moment, seconds=90, what=moment.__name__)
                process.kill()
            await start({**options, "slow": 0.0})
            await eventually(lambda: len(calls_of(options)) == 5, what="the last call")

            async def at_rest() -> bool:
                row = (await database.read(sa.select(HOLDERS)))[0]
                return not row.calling and row.crashes == 0

            await eventually(at_rest, what="the end of the call")
        assert await app.get(ParkedKeys).list() == []
        assert await app.get(DeadLetters).list() == []


async def test_what_is_given_up_before_its_end_counts_for_nothing(sqlite_url: str) -> None:
    """A deploy notes that before it drains, so a drain that is cut short by a kill is held against no event."""
    record = LogRecord("t", 0, 7, b"k", b"", [])
    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(sqlite_url)))
    async with App(database, EventsModule.for_root(EventsSettings())) as app:
        crashes = [Crashes(app.get(Database), 3) for _process in range(6)]

        async def hold(number: int, record: LogRecord = record) -> Holding:
            (holding,) = (await crashes[number].take("g", [Assignment("t", 0)])).values()
            await crashes[number].begin({holding: record})
            return holding

        await hold(0)
        assert not (await hold(1)).careful, "one end says nothing"
        careful = await hold(2)
        assert careful.careful
        await careful.calls(record)
        await crashes[2].give_up([careful])
        after = await hold(3)
        assert after.suspicion(record) is None
        await after.calls(record)
        assert (await hold(4)).suspicion(record) is not None
        beyond = LogRecord("t", 0, 8, b"k", b"", [])
        last = await hold(5, beyond)
        assert last.suspicion(record) is None, "its process ended while it was not called"
        assert not last.careful, "and there was progress"


async def test_a_call_that_is_over_is_noted_before_another_partition_calls(sqlite_url: str) -> None:
    """The other one may end the process, and what was handled here is not to blame for that."""

    async def handle(event: Step) -> None:
        calling.set()
        await asyncio.wait((asking,))  # for the turn behind this call

    async def bury(_delivery: Delivery, _error: Exception) -> None:
        raise AssertionError

    noted: list[bool] = []

    async def note() -> None:
        row = (await app.get(Database).read(sa.select(HOLDERS)))[0]
        noted.append(bool(row.calling))

    async def another() -> None:
        with crashes.turn(clock) as turn:
            await turn.begin(note)

    calling = asyncio.Event()
    route = Route("fault.step", "g")
    route.reads(Step, handle, wants_metadata=False, retry=Retry())
    clock = App().clock
    failures = Failures("g", bury=bury, clock=clock)
    dispatcher = Dispatcher("g", {"fault.step": route}, concurrency=1, failures=failures, clock=clock)
    records = [
        LogRecord("t", 0, number, b"k", b'{"key":"k","number":%d}' % number, [("ce_type", b"fault.step")])
        for number in range(2)
    ]
    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(sqlite_url)))
    async with App(database, EventsModule.for_root(EventsSettings())) as app:
        crashes, partition = Crashes(app.get(Database), 3), Assignment("t", 0)
        (holding,) = (await crashes.take("g", [partition])).values()
        await crashes.begin({holding: records[0]})
        reading = CarefulReading(
            "g", holding, crashes=crashes, dispatcher=dispatcher, events=2, ended=lambda: None, clock=clock
        )
        asking = asyncio.get_running_loop().create_future()
        reading.add(records)
        await calling.wait()
        asked = asyncio.create_task(another())
        await asyncio.sleep(0)  # it has asked for its turn
        asking.set_result(None)
        await asked
        assert noted == [False]
        await reading.task
        await dispatcher.stop()


class Wards:
    """A partition that is read carefully, by a dispatcher whose handler has one place."""

    def __init__(self, app: App, crashes: Crashes, partition: Assignment) -> None:
        self.database = app.get(Database)
        self.noted_at_the_call: list[bool] = []
        self.gates = {"other": asyncio.Event()}
        route = Route("fault.step", "g")
        route.reads(Step, self._handle, wants_metadata=False, retry=Retry(), limits=Limits(1, in_order=True))
        clock = App().clock
        failures = Failures("g", bury=self._bury, clock=clock)
        self.dispatcher = Dispatcher("g", {"fault.step": route}, concurrency=4, failures=failures, clock=clock)
        self.partition = partition
        self.reading: CarefulReading | None = None
        self._crashes, self._clock = crashes, clock

    async def _handle(self, event: Step) -> None:
        if event.key in self.gates:
            await self.gates[event.key].wait()
        else:
            self.noted_at_the_call.append(await self.is_noted())

    async def _bury(self, _delivery: Delivery, _error: Exception) -> None:
        raise AssertionError

    async def is_noted(self) -> bool:
        """Whether an event is noted as called."""
        row = (await self.database.read(sa.select(HOLDERS)))[0]
        return bool(row.calling)

    async def another_calls(self) -> None:
        """Have the turn of a careful call in another group of the process, soon."""
        with self._crashes.turn(self._clock) as turn:
            await asyncio.wait_for(turn.begin(self.is_noted), 10)

    async def read_carefully(self) -> CarefulReading:
        """Begin to read one event of the partition."""
        (holding,) = (await self._crashes.take("g", [self.partition])).values()
        await self._crashes.begin({holding: step(0, "k", 0)})
        self.reading = CarefulReading(
            "g", holding, crashes=self._crashes, dispatcher=self.dispatcher, events=1, ended=lambda: None,
            clock=self._clock,
        )  # fmt: skip
        return self.reading


def step(partition: int, key: str, number: int) -> LogRecord:
    """An event."""
    value = b'{"key":"%b","number":%d}' % (key.encode(), number)
    return LogRecord("t", partition, number, key.encode(), value, [("ce_type", b"fault.step")])


@pytest.fixture
async def wards(sqlite_url: str) -> AsyncGenerator[Wards]:
    """One of them."""
    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(sqlite_url)))
    async with App(database, EventsModule.for_root(EventsSettings())) as app:
        made = Wards(app, Crashes(app.get(Database), 3), Assignment("t", 0))
        yield made
        if made.reading is not None:
            made.reading.task.cancel()
            await asyncio.wait((made.reading.task,))
        await made.dispatcher.stop()


async def test_what_waits_for_a_place_is_not_noted_as_called(wards: Wards) -> None:
    """A process that ends meanwhile ends of something else, and an event that was not called is not to blame."""
    wards.dispatcher.feed(Assignment("t", 1), [step(1, "other", 0)])
    reading = await wards.read_carefully()
    reading.add([step(0, "k", 0)])
    await eventually(lambda: len(wards.partition.window) == 1, what="the event to wait for the place")
    await wards.another_calls()
    assert not await wards.is_noted()
    wards.gates["other"].set()
    await reading.task
    assert wards.noted_at_the_call == [True]
    assert not await wards.is_noted()


async def test_what_a_pause_holds_back_is_not_noted_as_called_and_holds_up_no_other_group(wards: Wards) -> None:
    """A person pauses the group in the moment in which the event is handed out."""
    reading = await wards.read_carefully()
    paused = Pausing(wards.database, "g")
    reading.add([step(0, "k", 0)])
    while not wards.partition.window:  # noqa: ASYNC110  it is handed out, and no caller has looked at it yet
        await asyncio.sleep(0)
    paused.whole = Pause("g", None, None, "ann", "it burns", datetime.now(UTC))
    wards.dispatcher.heed(paused)
    await wards.another_calls()
    assert not await wards.is_noted()
    paused.whole = None
    wards.dispatcher.heed(paused)
    await reading.task
    assert wards.noted_at_the_call == [True]
