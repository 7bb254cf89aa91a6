"""What must survive: killed processes, a broker or a database that goes away, partitions that move."""

import asyncio
import multiprocessing
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from aiokafka import AIOKafkaConsumer

from mainstay.core import App, ConfigurationError, Retry
from mainstay.core.testing import eventually
from mainstay.database import Database, upgrade
from mainstay.database.schema import SCHEMA
from mainstay.events import DeadLetters, EventConsumers, EventPublisher, EventRouter, ParkedKeys, RetryLater
from mainstay.events._relay import OutboxRelay
from mainstay.events.tables import LOG, OUTBOX, PARKED, SCHEDULED
from mainstay.events.tables import SCHEMA as EVENTS
from mainstay_servers import Kafka, Postgres, fresh_database
from mainstay_servers.frozen import frozen
from mainstay_servers.process import free_port
from packages.events.tests import worker
from packages.events.tests.worker import EFFECTS, REPAIRED, Step, service

pytestmark = [
    pytest.mark.usefixtures("aiokafka_garbage"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # see the fixture
]


# Its children are there at once: the imports, seconds of them, are made once in the server that they are forked from.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["pytest", "packages.events.tests.worker"])


class Process:
    """A worker of its own process."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._tells, told = _FORKS.Pipe(duplex=False)
        self._process = _FORKS.Process(target=worker.run, args=(options, told))
        self._process.start()
        told.close()

    def says(self, word: str) -> None:
        """Wait until it says so."""
        try:
            while self._tells.recv() != word:
                pass
        except EOFError:
            self._process.join()
            pytest.fail(f"the worker ended with status {self._process.exitcode}")

    def ended(self) -> bool:
        """Whether it is gone by itself."""
        return self._process.exitcode is not None

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.join()
        self._tells.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid


@asynccontextmanager
async def processes() -> AsyncIterator[Callable[..., Any]]:
    """Yields what starts workers; none survives the block."""
    started: list[Process] = []

    async def start(options: dict[str, Any], *, until: str = "serving") -> Process:
        process = Process(options)
        started.append(process)
        await asyncio.to_thread(process.says, until)
        return process

    try:
        yield start
    finally:
        for process in started:
            process.kill()


async def effects(app: App) -> list[tuple[str, int]]:
    """What the handlers have written, in order."""
    rows = await app.get(Database).read(sa.select(EFFECTS.c.key, EFFECTS.c.number).order_by(EFFECTS.c.id))
    return [(row.key, row.number) for row in rows]


async def prepare(app: App) -> None:
    """Create the table of effects."""
    async with app.get(Database).transaction() as session:
        await session.execute(sa.schema.CreateTable(EFFECTS, if_not_exists=True))


async def until_waiting(app: App, many: Callable[[int], bool], seconds: float = 60.0) -> None:
    """Return once so many events are in queues as is asked for."""
    waiting = sa.select(sa.func.count()).select_from(PARKED).where(~PARKED.c.handled)

    async def are_there() -> bool:
        return many((await app.get(Database).read(waiting))[0][0])

    await eventually(are_there, what="the events in queues", seconds=seconds)


async def wait_for(app: App, count: int, seconds: float = 60.0) -> list[tuple[str, int]]:
    """The effects, once there are so many."""
    end = time.monotonic() + seconds
    while len(done := await effects(app)) < count:
        assert time.monotonic() < end, f"{len(done)} of {count} after {seconds} s"
        await asyncio.sleep(0.05)
    return done


def exactly_once_and_in_order(done: list[tuple[str, int]], keys: int, each: int) -> None:
    """Assert that every key has its numbers once, in order."""
    by_key: dict[str, list[int]] = {}
    for key, number in done:
        by_key.setdefault(key, []).append(number)
    assert by_key == {f"k{key}": list(range(each)) for key in range(keys)}


async def publish(app: App, keys: int, each: int, start: int = 0) -> None:
    """Publish `each` numbers for every key."""
    for number in range(start, each):
        await app.get(EventPublisher).publish_batch([Step(key=f"k{key}", number=number) for key in range(keys)])


_SERVICES = ["sql on sqlite", "sql on postgres", "kafka with postgres"]
_LIBRDKAFKA = "librdkafka with postgres"
_SHORTEST_SECONDS = {"aiokafka": 1.5, "confluent": 4.0}  # leases; by librdkafka none is shorter

with_librdkafka = pytest.mark.parametrize("options", [*_SERVICES, _LIBRDKAFKA], indirect=True)
"""For those in which the client of Kafka decides."""


@pytest.fixture(params=_SERVICES)
def options(request: pytest.FixtureRequest, prefix: str) -> dict[str, Any]:
    """A service on either transport and either database."""
    transport, _, database = request.param.split()
    client = "confluent" if request.param == _LIBRDKAFKA else "aiokafka"
    events: dict[str, Any] = {"lease_seconds": _SHORTEST_SECONDS[client], "partitions": 4, "transport": "sql"}
    if transport != "sql":
        events |= {
            "transport": "kafka", "kafka_client": client, "kafka_servers": request.getfixturevalue("kafka")
        }  # fmt: skip
    url = request.getfixturevalue(f"{database}_url")
    return {"url": url, "topic": f"{prefix}-fault", "group": f"{prefix}-g", "events": events}


@with_librdkafka
async def test_a_consumer_killed_in_its_handler_loses_nothing_and_doubles_no_effect(options: dict[str, Any]) -> None:
    """A worker is killed twice while handlers run; every event has its effect once, in the order of its key."""
    publisher = service(options)
    async with publisher, processes() as start:
        await prepare(publisher)
        await publish(publisher, keys=8, each=20)
        for kills in range(2):
            process = await start(options)
            await wait_for(publisher, 25 * (kills + 1))
            process.kill()
        await start(options)
        done = await wait_for(publisher, 160)
        exactly_once_and_in_order(done, keys=8, each=20)


async def test_workers_killed_while_keys_are_parked_and_worked_on_keep_each_keys_order(options: dict[str, Any]) -> None:
    """Killed while keys are parked, and while their queues are worked on: all once, in order, and none is left."""
    publisher = service(options)
    options = {**options, "fails at": 5, "on": {"on_failure": "park", "retry": Retry(attempts=1)}}

    async with publisher, processes() as start:
        await prepare(publisher)
        await publish(publisher, keys=8, each=15)
        process = await start(options)
        await until_waiting(publisher, lambda waiting: waiting >= 20)
        process.kill()
        process = await start(options)
        await until_waiting(publisher, lambda waiting: waiting == 80)
        assert len(await effects(publisher)) == 40
        await publisher.get(Database).write(sa.insert(EFFECTS), {"key": REPAIRED, "number": 0, "pid": 0})
        for key in await publisher.get(ParkedKeys).list():
            await publisher.get(ParkedKeys).retry(key.id)
        await until_waiting(publisher, lambda waiting: waiting <= 60)
        process.kill()
        await start(options)
        await until_waiting(publisher, lambda waiting: waiting == 0)
        await publish(publisher, keys=8, each=16, start=15)
        done = [(key, number) for key, number in await wait_for(publisher, 129) if key != REPAIRED]
        exactly_once_and_in_order(done, keys=8, each=16)
        assert await publisher.get(ParkedKeys).list() == []


@pytest.mark.parametrize(
    ("options", "by"),
    [*((each, "partition") for each in _SERVICES), ("sql on sqlite", "key")],
    indirect=["options"],
)
async def test_workers_killed_in_the_middle_of_batches_double_no_effect_and_keep_the_poison_apart(
    options: dict[str, Any], by: str
) -> None:
    """Each event once, in the order of its key, also where one of each key fails for long and parks it."""
    publisher = service(options)
    together = {"size": 10, "wait_seconds": 0.05, "by": by}
    options = {
        **options,
        "together": together,
        "fails at": 15,
        "on": {"on_failure": "park", "retry": Retry(attempts=1)},
    }
    async with publisher, processes() as start:
        await prepare(publisher)
        await publish(publisher, keys=4, each=20)
        for kills in range(2):
            process = await start(options)
            await wait_for(publisher, 20 * (kills + 1))
            process.kill()
        await start(options)
        parked = sa.select(sa.func.count()).select_from(PARKED).where(~PARKED.c.handled)

        async def all_parked() -> bool:
            return bool((await publisher.get(Database).read(parked))[0][0] == 4 * 5)

        await eventually(all_parked, seconds=60)
        exactly_once_and_in_order(await effects(publisher), keys=4, each=15)
        await publisher.get(Database).write(sa.insert(EFFECTS), {"key": REPAIRED, "number": 0, "pid": 0})
        for key in await publisher.get(ParkedKeys).list():
            await publisher.get(ParkedKeys).retry(key.id)
        done = [(key, number) for key, number in await wait_for(publisher, 81) if key != REPAIRED]
        exactly_once_and_in_order(done, keys=4, each=20)


async def test_workers_killed_while_events_are_set_aside_and_tried_later_lose_and_double_none(
    options: dict[str, Any],
) -> None:
    """Killed while events are set aside, and while two processes try them again: all once, the others in order."""
    publisher = service(options)
    later = RetryLater(delays_seconds=[0.05] * 500)  # as long as the test may take
    options = {**options, "fails at": 5, "on": {"on_failure": later, "retry": Retry(attempts=1)}}

    async with publisher, processes() as start:
        await prepare(publisher)
        await publish(publisher, keys=8, each=15)
        first = await start(options)
        await until_waiting(publisher, lambda waiting: waiting >= 2, seconds=180)
        first.kill()
        second = await start(options)
        await start(options)
        await wait_for(publisher, 8 * 14, seconds=180)
        await until_waiting(publisher, lambda waiting: waiting == 8, seconds=180)
        await publisher.get(Database).write(sa.insert(EFFECTS), {"key": REPAIRED, "number": 0, "pid": 0})
        await until_waiting(publisher, lambda waiting: waiting <= 6, seconds=180)
        second.kill()
        await until_waiting(publisher, lambda waiting: waiting == 0, seconds=180)
        done = [(key, number) for key, number in await effects(publisher) if key != REPAIRED]
        assert sorted(each for each in done if each[1] == 5) == [(f"k{key}", 5) for key in range(8)]
        in_turn = [(key, number - (number > 5)) for key, number in done if number != 5]
        exactly_once_and_in_order(in_turn, keys=8, each=14)
        assert await publisher.get(ParkedKeys).list() == []
        assert await publisher.get(DeadLetters).list() == []


@pytest.mark.parametrize("options", ["sql on sqlite", "sql on postgres"], indirect=True)
async def test_who_was_frozen_while_it_parked_parks_nothing_that_another_has_handled(options: dict[str, Any]) -> None:
    """Its partition has moved: what it would park was handled there, and the key goes on."""
    options["events"]["partitions"] = 1
    options = {**options, "fails at": 2, "on": {"on_failure": "park", "retry": Retry(attempts=1)}}
    publisher = service(options)
    async with publisher, processes() as start:
        await prepare(publisher)
        await publish(publisher, keys=1, each=4)
        first = await start({**options, "hang": "before parking"}, until="parks")
        await publisher.get(Database).write(sa.insert(EFFECTS), {"key": REPAIRED, "number": 0, "pid": 0})
        await start(options)
        await wait_for(publisher, 5)
        os.kill(first.pid, signal.SIGCONT)
        await asyncio.to_thread(first.says, "refused")
        await publish(publisher, keys=1, each=6, start=4)
        done = [(key, number) for key, number in await wait_for(publisher, 7) if key != REPAIRED]
        exactly_once_and_in_order(done, keys=1, each=6)
        assert await publisher.get(ParkedKeys).list() == []


async def scheduled(app: App, count: int) -> None:
    """Publish events that are due."""
    for number in range(count):
        await app.get(EventPublisher).publish(Step(key="a", number=number), delay_seconds=0)


async def handed_on(app: App, count: int) -> None:
    """Wait until so many are in the log, and nothing waits; each is there once, in order."""
    database = app.get(Database)

    async def there() -> bool:
        return not await database.read(sa.select(SCHEDULED.c.position))

    await eventually(there, seconds=120)
    values = [row.value for row in await database.read(sa.select(LOG.c.value).order_by(LOG.c.position))]
    assert values == [Step(key="a", number=number).model_dump_json().encode() for number in range(count)]


@pytest.mark.parametrize("options", ["sql on sqlite", "sql on postgres"], indirect=True)
async def test_what_was_due_when_its_mover_was_killed_is_handed_on_once(options: dict[str, Any]) -> None:
    """It dies with a page taken and written, and not committed: the next process begins with that page."""
    publisher = service(options)
    async with publisher, processes() as start:
        await scheduled(publisher, 700)
        process = await start({**options, "relay only": True, "hang": "handing on"}, until="hands on")
        process.kill()
        await start({**options, "relay only": True})
        await handed_on(publisher, 700)


async def test_a_mover_that_is_frozen_in_a_page_delays_and_doubles_nothing(postgres_url: str, prefix: str) -> None:
    """The server ends its transaction and others go on; when it wakes up, what it still does is refused."""
    options: dict[str, Any] = {
        "url": postgres_url,
        "topic": f"{prefix}-fault",
        "events": {"transport": "sql", "lease_seconds": 1.5, "partitions": 4},
        "database": {"idle_transaction_seconds": 2.0},
        "relay only": True,
    }
    publisher = service(options)
    async with publisher, processes() as start:
        await scheduled(publisher, 700)
        first = await start({**options, "hang": "handing on"}, until="hands on")
        await start(options)
        await handed_on(publisher, 700)
        os.kill(first.pid, signal.SIGCONT)
        await asyncio.to_thread(first.says, "refused")
        await handed_on(publisher, 700)


@pytest.mark.parametrize("options", ["sql on sqlite", "sql on postgres"], indirect=True)
async def test_a_mover_that_was_frozen_before_a_page_hands_on_nothing(options: dict[str, Any]) -> None:
    """Its lease was over meanwhile, and another has done it."""
    options = {**options, "relay only": True}
    publisher = service(options)
    async with publisher, processes() as start:
        await scheduled(publisher, 700)
        first = await start({**options, "hang": "before handing on"}, until="hands on")
        await start(options)
        await handed_on(publisher, 700)
        os.kill(first.pid, signal.SIGCONT)
        await asyncio.to_thread(first.says, "refused")
        await handed_on(publisher, 700)


@with_librdkafka
async def test_trap_08_a_stopped_consumer_that_wakes_up_doubles_no_effect(options: dict[str, Any]) -> None:
    """A worker that was frozen past its lease wakes up among others: what it still does is refused or a duplicate."""
    lease_seconds = 7.0 if options["events"]["transport"] == "kafka" else 2.5  # a broker's sessions are longer
    publisher = service(options)
    async with publisher, processes() as start:
        await prepare(publisher)
        await publish(publisher, keys=8, each=15)
        first = await start(options)
        await wait_for(publisher, 10)
        async with frozen(first.pid, options["url"]):
            await start(options)
            await asyncio.sleep(lease_seconds)  # the lease runs out: the time is what is tested
        done = await wait_for(publisher, 120)
        await publish(publisher, keys=8, each=20, start=15)
        done = await wait_for(publisher, 160)
        exactly_once_and_in_order(done, keys=8, each=20)


async def test_a_consumer_frozen_inside_its_handlers_holds_up_their_keys_only(postgres_url: str, prefix: str) -> None:
    """Survivors wait for none of its locks, the server ends its transactions, and what it does on waking is refused."""
    options: dict[str, Any] = {
        "url": postgres_url,
        "topic": f"{prefix}-fault",
        "group": f"{prefix}-g",
        "events": {"transport": "sql", "lease_seconds": 1.5, "partitions": 4, "retry_max_seconds": 0.5},
        "database": {"idle_transaction_seconds": 4.0},
    }
    waiting = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'transactionid' AND query LIKE '%events_inbox%' "
        "AND datname = current_database()"
    )
    idle = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%' AND datname = current_database()"
    )
    publisher = service(options)
    async with publisher, processes() as start:
        database = publisher.get(Database)
        await prepare(publisher)
        await publish(publisher, keys=24, each=6)
        first = await start({**options, "pause": 1.0})
        async with asyncio.timeout(180):
            while (await database.read(idle))[0][0] < 4:  # noqa: ASYNC110  another process does it
                await asyncio.sleep(0.02)
        async with frozen(first.pid, options["url"]):
            await start(options)
            async with asyncio.timeout(180):
                while len(await effects(publisher)) < 24 * 6:
                    assert (await database.read(waiting))[0][0] == 0, "a survivor waits for what is frozen"
                    await asyncio.sleep(0.02)
        await publish(publisher, keys=24, each=8, start=6)
        exactly_once_and_in_order(await wait_for(publisher, 24 * 8, seconds=180), keys=24, each=8)


async def test_consumers_killed_and_frozen_with_batches_in_their_hands_double_no_effect(
    database_url: str, prefix: str
) -> None:
    """What handlers have collected is there with its note or not at all, also where a process dies or hangs."""
    options: dict[str, Any] = {
        "url": database_url,
        "topic": f"{prefix}-fault",
        "group": f"{prefix}-g",
        "events": {"transport": "sql", "lease_seconds": 1.5, "partitions": 4},
        "inbox": "batch",
    }
    publisher = service(options)
    async with publisher, processes() as start:
        await prepare(publisher)
        await publish(publisher, keys=16, each=15)
        first = await start(options)
        await wait_for(publisher, 40)
        first.kill()
        second = await start(options)
        await wait_for(publisher, 100)
        async with frozen(second.pid, options["url"]):
            await start(options)
            await wait_for(publisher, 16 * 15)
        await publish(publisher, keys=16, each=17, start=15)
        exactly_once_and_in_order(await wait_for(publisher, 16 * 17), keys=16, each=17)


@with_librdkafka
async def test_two_processes_share_the_partitions(options: dict[str, Any]) -> None:
    """A second worker takes its share while the first works, and neither repeats or reorders anything."""
    publisher = service(options)
    async with publisher, processes() as start:
        await prepare(publisher)
        await start(options)
        await publish(publisher, keys=12, each=10)
        await start(options)
        await publish(publisher, keys=12, each=40, start=10)
        done = await wait_for(publisher, 480)
        exactly_once_and_in_order(done, keys=12, each=40)

        async def handlers() -> int:
            rows = await publisher.get(Database).read(sa.select(sa.func.count(sa.distinct(EFFECTS.c.pid))))
            return int(rows[0][0])

        number = 40
        end = time.monotonic() + 60
        while await handlers() < 2:
            assert time.monotonic() < end, "the second worker never took a share"
            await publish(publisher, keys=12, each=number + 1, start=number)
            number += 1
            await wait_for(publisher, 12 * number)
        exactly_once_and_in_order(await effects(publisher), keys=12, each=number)


async def test_trap_10_a_relay_killed_between_sending_and_deleting_repeats_in_order(
    postgres_url: str, kafka: str, prefix: str
) -> None:
    """What the broker has and the outbox still holds is sent again: duplicates, in order, and each effect once."""
    events = {"transport": "kafka", "kafka_servers": kafka, "lease_seconds": 1.5, "partitions": 4}
    options: dict[str, Any] = {
        "url": postgres_url,
        "topic": f"{prefix}-fault",
        "group": f"{prefix}-g",
        "events": events,
    }
    publisher = service(options)
    async with publisher, processes() as start:
        await prepare(publisher)
        await publish(publisher, keys=5, each=10)
        relay = await start({**options, "relay only": True, "hang": "after sending"}, until="sent")
        relay.kill()
        left = await publisher.get(Database).read(sa.select(sa.func.count()).select_from(OUTBOX))
        assert left[0][0] == 50
        await publish(publisher, keys=5, each=12, start=10)
        await start(options)
        done = await wait_for(publisher, 60)
        exactly_once_and_in_order(done, keys=5, each=12)
    sent = await everything_on(kafka, options["topic"])
    assert len(sent) > 60
    for key in range(5):
        numbers = [number for other, number in sent if other == f"k{key}"]
        # 0…9 from the first relay, then 0…11 from the second: each run of numbers goes up by one.
        assert numbers == [*range(10), *range(12)]


async def everything_on(servers: str, topic: str) -> list[tuple[str, int]]:
    """All records of a topic, each partition in its order."""
    consumer = AIOKafkaConsumer(
        topic, bootstrap_servers=servers, auto_offset_reset="earliest", enable_auto_commit=False
    )
    await consumer.start()
    try:
        found: list[tuple[str, int]] = []
        ends = await consumer.end_offsets(consumer.assignment())
        while any([await consumer.position(place) < end for place, end in ends.items()]):
            for records in (await consumer.getmany(timeout_ms=200)).values():
                found += [(step.key, step.number) for step in map(Step.model_validate_json, (r.value for r in records))]
        return found
    finally:
        await consumer.stop()


def _power_cut(broker: Kafka) -> None:
    broker.kill()
    broker.start()


@pytest.fixture
def own_options(broker: Kafka, sqlite_url: str, prefix: str, client: str) -> dict[str, Any]:
    """A service on a broker of the test's own."""
    events = {
        "transport": "kafka", "kafka_client": client, "kafka_servers": broker.address, "partitions": 4,
        "lease_seconds": max(2.0, _SHORTEST_SECONDS[client]),
    }  # fmt: skip
    return {"url": sqlite_url, "topic": f"{prefix}-fault", "group": f"{prefix}-g", "events": events, "pause": 0}


async def test_a_broker_restart_under_load_loses_and_reorders_nothing(
    broker: Kafka, own_options: dict[str, Any]
) -> None:
    """The broker is killed and started again while events are published and handled."""
    holder: list[App] = []
    app = service(own_options, worker.recorder(own_options, holder))
    holder.append(app)
    async with app.running(serve=True):
        await prepare(app)
        await publish(app, keys=6, each=10)
        await wait_for(app, 30)
        restarting = asyncio.create_task(asyncio.to_thread(_power_cut, broker))
        number = 10
        while not restarting.done():
            if number < 40:  # as much as there is to do afterwards must not grow with the time that a start takes
                await publish(app, keys=6, each=number + 1, start=number)
                number += 1
            await asyncio.sleep(0.05)
        await restarting
        done = await wait_for(app, 6 * number)
        exactly_once_and_in_order(done, keys=6, each=number)


async def test_a_broker_that_comes_back_at_another_address_of_the_settings_is_found(
    broker: Kafka, own_options: dict[str, Any]
) -> None:
    """As after a replacement of all brokers: none of those that the clients have learnt is there any more."""
    other = free_port()
    own_options["events"]["kafka_servers"] += f",127.0.0.1:{other}"
    holder: list[App] = []
    app = service(own_options, worker.recorder(own_options, holder))
    holder.append(app)
    async with app.running(serve=True):
        await prepare(app)
        await publish(app, keys=4, each=5)
        await wait_for(app, 20)
        await asyncio.to_thread(broker.kill)
        broker.move(other)
        await asyncio.to_thread(broker.start)
        await publish(app, keys=4, each=10, start=5)
        exactly_once_and_in_order(await wait_for(app, 40), keys=4, each=10)


@pytest.mark.usefixtures("soon_abandoned")
async def test_a_broker_that_hangs_delays_publishing_not_at_all_and_stopping_only_shortly(
    broker: Kafka, own_options: dict[str, Any]
) -> None:
    """With the broker frozen, publishing goes on into the outbox, health says degraded, and a stop takes seconds."""
    holder: list[App] = []
    app = service(own_options, worker.recorder(own_options, holder), send_seconds=2.0)
    holder.append(app)
    async with app.running(serve=True):
        await prepare(app)
        await publish(app, keys=4, each=5)
        await wait_for(app, 20)
        await asyncio.to_thread(broker.pause)
        before = time.monotonic()
        await publish(app, keys=4, each=10, start=5)
        assert time.monotonic() - before < 15  # waiting for the broker, the ten batches would take 2 s each
        relay = app.get(OutboxRelay)
        end = time.monotonic() + 60
        while (await relay.health()).status == "ok":
            assert time.monotonic() < end
            await asyncio.sleep(0.05)
        before = time.monotonic()
    assert time.monotonic() - before < 60
    await asyncio.to_thread(broker.resume)
    holder.clear()
    again = service(own_options, worker.recorder(own_options, holder))
    holder.append(again)
    async with again.running(serve=True):
        done = await wait_for(again, 40)
        exactly_once_and_in_order(done, keys=4, each=10)


async def test_a_broker_that_is_away_does_not_stop_a_start_where_the_outbox_holds_what_is_published(
    broker: Kafka, own_options: dict[str, Any]
) -> None:
    """Without a broker a service starts and publishes; straight to the broker the start fails and names the setting."""
    await asyncio.to_thread(broker.stop)
    holder: list[App] = []
    app = service(own_options, worker.recorder(own_options, holder))
    holder.append(app)
    async with app.running(serve=True):
        await prepare(app)
        await publish(app, keys=2, each=3)
        report = await app.health()
        assert report["database.Database"].status == "ok"
        with pytest.raises(ConfigurationError, match="MAINSTAY_EVENTS_KAFKA_SERVERS"):
            async with service({**own_options, "url": None}, outbox=False):
                pass
        await asyncio.to_thread(broker.start)
        exactly_once_and_in_order(await wait_for(app, 6), keys=2, each=3)


async def test_a_database_restart_under_load_loses_nothing(own_postgres: Postgres, prefix: str) -> None:
    """PostgreSQL is killed and started again while the log in it is written and read."""
    with fresh_database(own_postgres.url) as url:
        await upgrade(url, [SCHEMA, EVENTS])
        events = {"transport": "sql", "lease_seconds": 2.0, "partitions": 4}
        options = {"url": url, "topic": f"{prefix}-fault", "group": f"{prefix}-g", "events": events, "pause": 0}
        holder: list[App] = []
        app = service(options, worker.recorder(options, holder))
        holder.append(app)
        async with app.running(serve=True):
            await prepare(app)
            await publish(app, keys=6, each=20)
            await wait_for(app, 10)
            await asyncio.to_thread(own_postgres.kill)
            await asyncio.to_thread(own_postgres.start)
            await publish(app, keys=6, each=30, start=20)
            done = await wait_for(app, 180)
            exactly_once_and_in_order(done, keys=6, each=30)


async def test_trap_05_a_hung_handler_holds_back_its_key_only_and_is_seen(options: dict[str, Any]) -> None:
    """Others go on, health names the age, and a restart delivers the hung event and what was behind it again."""
    events = EventRouter()
    seen: list[tuple[str, int]] = []
    hang = True

    @events.on(Step, group=options["group"])
    async def handle(event: Step) -> None:
        if event.key == "k0" and hang:
            await asyncio.Event().wait()
        seen.append((event.key, event.number))

    app = service(options, events, stuck_seconds=0.3, drain_seconds=0.5)
    stack = app.running(serve=True)
    await stack.__aenter__()
    await publish(app, keys=6, each=10)
    await eventually(lambda: len(seen) == 50, what="the other keys")
    consumers = app.get(EventConsumers)
    end = time.monotonic() + 60
    while "in flight" not in (health := await consumers.health()).detail:
        assert time.monotonic() < end, health
        await asyncio.sleep(0.05)
    assert health.status == "degraded"
    # The drain time of an App is 30 s by default; this one has a handler that would use all of it.
    app._drain_seconds = 0.5
    await stack.__aexit__(None, None, None)
    hang = False
    again = EventRouter()
    again.on(Step, group=options["group"])(handle)
    async with service(options, again).running(serve=True):
        await eventually(lambda: [n for key, n in seen if key == "k0"] == list(range(10)), what="the hung key")


@with_librdkafka
async def test_trap_04_handlers_finish_before_their_partitions_move(options: dict[str, Any]) -> None:
    """When a second consumer joins, what runs is finished and committed first: nothing is begun twice."""
    options["events"]["lease_seconds"] = 10.0  # no worker is lost here, also on a busy machine
    began: list[tuple[str, int]] = []
    seen: list[tuple[str, int]] = []

    def feature() -> EventRouter:
        events = EventRouter()

        @events.on(Step, group=options["group"])
        async def handle(event: Step) -> None:
            began.append((event.key, event.number))
            await asyncio.sleep(0.05)
            seen.append((event.key, event.number))

        return events

    first = feature()
    async with service(options, first).running(serve=True) as app:
        await publish(app, keys=8, each=10)
        await eventually(lambda: len(seen) >= 8, what="the first events")
        second = service(options, feature())
        async with second.running(serve=True):
            consumer = second.get(EventConsumers).consumers[0]
            await eventually(lambda: bool(consumer._assignments), what="a share of the partitions", seconds=60)
            await publish(app, keys=8, each=20, start=10)
            await eventually(lambda: len(seen) >= 160, what="everything", seconds=60)
    exactly_once_and_in_order(began, keys=8, each=20)
    assert sorted(seen) == sorted(began)
