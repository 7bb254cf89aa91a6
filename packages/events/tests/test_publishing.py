"""Publishing: with the unit of work that is open, once inside a workflow, and through the outbox in order."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from mainstay.core import App, Clock, Drain, Effect, bind_journal, derived_id, digest
from mainstay.core.testing import VirtualClock, eventually
from mainstay.database import CommitUnknown, Database, DatabaseModule, DatabaseSettings, WrongEventLoop
from mainstay.database.testing import expire_lease
from mainstay.events import DeadLetters, Event, EventPublisher, EventRouter, EventsModule, EventsSettings, PublishError
from mainstay.events._outbox import LANES, Outbox, OutboxRelay, Wave, lane_of
from mainstay.events.metadata import ID, Outgoing
from mainstay.events.tables import INBOX, LOG, OUTBOX, unpack_headers
from mainstay.events.testing import Placed, in_memory


class Note(Event, type="note.made", key="name"):
    name: str
    number: int = 0


def service(url: str, *routers: EventRouter, **settings: Any) -> App:
    """An App on a database; the sql transport unless told otherwise."""
    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url)))
    return App(database, EventsModule.for_root(EventsSettings(**settings)), EventsModule.for_feature(*routers))


async def logged(app: App) -> list[bytes]:
    """The values in the log."""
    return [row.value for row in await app.get(Database).read(sa.select(LOG).order_by(LOG.c.position))]


async def test_an_event_commits_or_rolls_back_with_the_unit_of_work(database_url: str) -> None:
    """Nobody has to pass a session: publishing inside a transaction is part of it."""
    async with service(database_url) as app:
        database, publisher = app.get(Database), app.get(EventPublisher)
        with pytest.raises(ZeroDivisionError):
            async with database.transaction():
                await publisher.publish(Note(name="a", number=1))
                raise ZeroDivisionError
        assert await logged(app) == []
        async with database.transaction():
            await publisher.publish(Note(name="a", number=2))
        await publisher.publish(Note(name="a", number=3))
        assert await logged(app) == [b'{"name":"a","number":2}', b'{"name":"a","number":3}']


async def test_memory_publishes_when_the_unit_of_work_commits(sqlite_url: str) -> None:
    """Also the transport of tests is no dual write."""
    events = EventRouter()
    seen: list[int] = []

    @events.on(Note, group="g", inbox=True)
    async def handle(event: Note) -> None:
        seen.append(event.number)

    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(sqlite_url)))
    async with in_memory(events, modules=[database]) as rehearsal:
        with pytest.raises(ZeroDivisionError):
            async with rehearsal.app.get(Database).transaction():
                await rehearsal.publish(Note(name="a", number=1))
                raise ZeroDivisionError
        async with rehearsal.app.get(Database).transaction():
            await rehearsal.publish(Note(name="a", number=2))
            assert rehearsal.published(Note) == []
        await rehearsal.settled()
        assert seen == [2]
        assert rehearsal.published(Note) == [Note(name="a", number=2)]


class Journal:
    """A durable run, as far as publishing can see it."""

    def __init__(self, *, done: bool = False) -> None:
        self.done = done
        self.asked: list[tuple[str, bool]] = []
        self.digests: list[str] = []

    async def once(
        self, name: str, effect: Effect, *, transactional: bool, arguments: Callable[[], object] | None = None
    ) -> str:
        self.asked.append((name, transactional))
        self.digests.append(digest(arguments and arguments()))
        if not self.done:
            await effect("run-1:publish:1")
        return "run-1:publish"


async def test_inside_a_workflow_publishing_is_a_step_with_ids_of_its_key(database_url: str) -> None:
    """A replay publishes nothing, a repetition after a crash has the same ids, and the step shares the commit."""
    async with service(database_url) as app:
        publisher = app.get(EventPublisher)
        journal = Journal()
        with bind_journal(journal):
            await publisher.publish_batch([Note(name="a"), Placed(order="b")])
            await publisher.publish_batch([Note(name="a"), Placed(order="b")])
        with bind_journal(Journal(done=True)):
            await publisher.publish(Note(name="a"))
        rows = await app.get(Database).read(sa.select(LOG).order_by(LOG.c.position))
        ids = [(dict(unpack_headers(row.headers))[ID] or b"").decode() for row in rows]
        once = [str(derived_id(f"run-1:publish:1:{index}")) for index in range(2)]
        assert ids == once * 2
        assert journal.asked == [("publish:note.made,contract.placed", True)] * 2
        assert journal.digests == [digest([Note(name="a"), Placed(order="b")])] * 2


async def test_trap_11_an_inbox_makes_a_repeated_event_one_effect(database_url: str) -> None:
    """The same id twice in the log, one call; a handler that fails leaves no note that it succeeded."""
    events = EventRouter()
    calls: list[int] = []

    @events.on(Note, group="g", inbox=True)
    async def handle(event: Note) -> None:
        calls.append(event.number)
        if calls == [1]:
            msg = "the first attempt fails"
            raise RuntimeError(msg)

    async with service(database_url, events, retry_initial_seconds=0.0).running(serve=True) as app:
        publisher = app.get(EventPublisher)
        for _ in range(2):
            with bind_journal(Journal()):
                await publisher.publish(Note(name="a", number=1))
        await publisher.publish(Note(name="a", number=2))
        await eventually(lambda: 2 in calls)
        assert calls == [1, 1, 2]
        end = time.monotonic() + 60
        while len(await app.get(Database).read(sa.select(INBOX))) < 2:  # the last call's commit
            assert time.monotonic() < end
            await asyncio.sleep(0.02)


async def test_a_commit_of_unknown_outcome_is_tried_again_where_the_inbox_can_tell(sqlite_url: str) -> None:
    """Whether the commit arrived or not, the next attempt makes it one effect; without the note it would be a guess."""
    events = EventRouter()
    calls = 0

    @events.on(Note, group="g", inbox=True)
    async def handle(event: Note) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            msg = "the connection was lost while committing"
            raise CommitUnknown(msg)

    async with service(sqlite_url, events, retry_initial_seconds=0.0).running(serve=True) as app:
        await events.publish(Note(name="a"))
        await eventually(lambda: calls == 2)
        assert await app.get(DeadLetters).list() == []


async def test_trap_11_what_is_old_is_swept(database_url: str) -> None:
    """The log keeps events, and the inbox its notes, for as long as the settings say and no longer."""
    events = EventRouter()
    seen: list[int] = []

    @events.on(Note, group="g", inbox=True)
    async def handle(event: Note) -> None:
        seen.append(event.number)

    async with service(database_url, events).running(serve=True) as app:
        await events.publish(Note(name="a", number=1))
        await eventually(lambda: bool(seen))
        async with app.get(Database).transaction() as session:
            for table in (LOG, INBOX):
                await session.execute(sa.update(table).values(created_at=table.c.created_at - 8 * 86_400))
        await events.publish(Note(name="a", number=2))
        await eventually(lambda: len(seen) == 2)
    async with service(database_url, events).running(serve=True) as app:
        end = time.monotonic() + 60
        while len(await logged(app)) > 1 or len(await app.get(Database).read(sa.select(INBOX))) > 1:
            assert time.monotonic() < end
            await asyncio.sleep(0.05)
        assert await logged(app) == [b'{"name":"a","number":2}']


# The outbox


class Broker:
    """A broker that refuses the topics it is told to refuse."""

    def __init__(self) -> None:
        self.sent: list[Outgoing] = []
        self.refused: set[str] = set()

    async def send_wave(self, events: Sequence[Outgoing]) -> Wave:
        confirmed = {index for index, event in enumerate(events) if event.topic not in self.refused}
        self.sent += [events[index] for index in sorted(confirmed)]
        failed = {event.topic: ConnectionError("refused") for event in events if event.topic in self.refused}
        return Wave(confirmed, dict(failed))


def numbers(broker: Broker, name: str) -> list[int]:
    """What was sent with a key."""
    return [Note.model_validate_json(event.value or b"").number for event in broker.sent if event.key == name.encode()]


def relay_of(app: App, broker: Broker, clock: Clock | None = None) -> tuple[Outbox, OutboxRelay]:
    """An outbox and its relay, without Kafka."""
    database = app.get(Database)
    outbox = Outbox(database, lambda _event: None)
    return outbox, OutboxRelay(database, outbox, broker, lease_seconds=2.0, clock=clock or app.clock)


async def write(outbox: Outbox, name: str, *numbers: int) -> None:
    """Events of a key into the outbox."""
    await outbox.send(
        [
            Outgoing(f"topic-{name}", name.encode(), Note(name=name, number=number).model_dump_json().encode(), [])
            for number in numbers
        ]
    )


async def test_trap_10_the_relay_keeps_each_keys_order_through_failures(database_url: str) -> None:
    """While the broker refuses one topic, the others go on; later it follows in order, and nothing is left behind."""
    async with service(database_url) as app:
        broker = Broker()
        outbox, relay = relay_of(app, broker)
        broker.refused.add("topic-stuck")
        await write(outbox, "stuck", 1, 2)
        for _ in range(5):  # more than fits into a wave: what is stuck must not fill it for ever
            await write(outbox, "stuck", *[2] * 500)
        await write(outbox, "free", 1, 2)
        drain = Drain()
        task = asyncio.create_task(relay.serve(drain))
        await eventually(lambda: numbers(broker, "free") == [1, 2])
        await write(outbox, "stuck", 3)
        await write(outbox, "free", 3)
        await eventually(lambda: numbers(broker, "free") == [1, 2, 3])
        assert numbers(broker, "stuck") == []
        assert (await relay.health()).status == "degraded"
        broker.refused.clear()
        await eventually(lambda: numbers(broker, "stuck") == [1, *[2] * 2501, 3])
        end = time.monotonic() + 60
        while await app.get(Database).read(sa.select(OUTBOX)):
            assert time.monotonic() < end
            await asyncio.sleep(0.02)
        end = time.monotonic() + 60
        while (await relay.health()).status != "ok":
            assert time.monotonic() < end
            await asyncio.sleep(0.02)
        drain.begin()
        await task


async def test_trap_10_the_outbox_deletes_exactly_what_was_confirmed(postgres_url: str) -> None:
    """A row of a transaction that began earlier and commits later is not deleted with those around it."""
    async with service(postgres_url) as app:
        broker = Broker()
        outbox, relay = relay_of(app, broker)
        database = app.get(Database)
        async with database.transaction():
            await write(outbox, "a", 1)
            await asyncio.create_task(_apart(write(outbox, "a", 2)))
            drain = Drain()
            task = asyncio.get_running_loop().create_task(_apart(relay.serve(drain)), context=_empty())
            await eventually(lambda: numbers(broker, "a") == [2])
        await eventually(lambda: sorted(numbers(broker, "a")) == [1, 2])
        drain.begin()
        await task


def _empty() -> Any:
    from contextvars import Context

    return Context()


async def _apart(work: Any) -> None:
    """Run outside of the unit of work around the caller."""
    await asyncio.get_running_loop().create_task(work, context=_empty())


async def test_trap_10_two_relays_share_the_lanes_without_overlap(database_url: str) -> None:
    """A lane has one relay at a time: what one holds the other leaves alone, and takes over when it is given back."""
    async with service(database_url) as app:
        one, two = Broker(), Broker()
        outbox, first = relay_of(app, one)
        _, second = relay_of(app, two)
        stop_first, stop_second = Drain(), Drain()
        running = asyncio.create_task(first.serve(stop_first))
        await write(outbox, "a", 1)
        await eventually(lambda: numbers(one, "a") == [1])
        other = asyncio.create_task(second.serve(stop_second))
        await write(outbox, "a", 2)
        await eventually(lambda: numbers(one, "a") == [1, 2])
        stop_first.begin()
        await running
        await write(outbox, "a", 3)
        await eventually(lambda: numbers(two, "a") == [3])
        stop_second.begin()
        await other
        assert numbers(one, "a") == [1, 2]


async def test_a_lane_whose_renewal_was_late_is_taken_again(sqlite_url: str) -> None:
    """A relay that stopped believing in its lease gives it back, or nobody could use the lane again."""
    async with service(sqlite_url) as app:
        broker, clock = Broker(), VirtualClock()
        outbox, relay = relay_of(app, broker, clock)
        await relay._take_lanes()
        assert len(relay._leases) == LANES
        for lease in relay._leases.values():
            lease._until = float("-inf")  # as if the process had slept
        clock.tick(10.0)
        await relay._take_lanes()
        assert len(relay._leases) == LANES
        await write(outbox, "a", 1)
        assert await relay._wave()
        assert numbers(broker, "a") == [1]
        for lane in list(relay._leases):
            await relay._drop(lane)


def test_lanes_are_stable() -> None:
    """Equal keys share a lane, whatever their topics and ids; the number of lanes is for ever."""
    assert LANES == 8
    assert lane_of(Outgoing("a", b"k", b"", [(ID, b"1")])) == lane_of(Outgoing("b", b"k", b"", [(ID, b"2")]))
    assert len({lane_of(Outgoing("a", None, b"", [(ID, str(n).encode())])) for n in range(100)}) == LANES


async def test_an_event_that_no_broker_would_take_is_refused_when_it_is_published(sqlite_url: str) -> None:
    """In the outbox it would block its lane for ever."""
    async with service(sqlite_url, transport="kafka", kafka_servers="127.0.0.1:1") as app:
        with pytest.raises(PublishError, match="at most 900000") as caught:
            await app.get(EventPublisher).publish(Note(name="x" * 1_000_000))
        assert caught.value.no_effect
        assert not caught.value.retryable
        assert await app.get(Database).read(sa.select(OUTBOX)) == []


async def test_straight_to_the_broker_is_refused_inside_a_transaction(sqlite_url: str, kafka: str, prefix: str) -> None:
    """It would be out even if the transaction rolls back."""
    settings = {"transport": "kafka", "kafka_servers": kafka, "outbox": False, "topics": {"note.made": prefix}}
    async with service(sqlite_url, **settings) as app:
        async with app.get(Database).transaction():
            with pytest.raises(PublishError, match="outbox=False") as caught:
                await app.get(EventPublisher).publish(Note(name="a"))
        assert caught.value.no_effect
        await app.get(EventPublisher).publish(Note(name="a"))


async def test_virtual_time_drives_retries_in_rehearsals() -> None:
    """A test moves the clock instead of waiting; handlers publish on; dead letters are listed."""
    events = EventRouter()
    clock = VirtualClock()
    calls: list[float] = []

    @events.on(Note, group="g")
    async def handle(event: Note) -> None:
        calls.append(clock.monotonic())
        if event.number == 2:
            msg = "no"
            raise RuntimeError(msg)
        await events.publish(Note(name=event.name, number=2))

    async with in_memory(
        events, clock=clock, retry_attempts=3, retry_initial_seconds=60.0, retry_max_seconds=60.0
    ) as rehearsal:
        await rehearsal.publish(Note(name="a", number=1))
        await eventually(lambda: len(calls) == 2)
        with pytest.raises(TimeoutError, match="still have work: g"):
            await rehearsal.settled(0.05)
        await clock.advance(60.0)
        await clock.advance(60.0)
        await rehearsal.settled()
        letters = await rehearsal.dead_letters()
        assert [letter.attempts for letter in letters] == [3]
        assert len(rehearsal.published(Note)) == 2


class Halting(Broker):
    """One that takes its time, and of each key no more than the first event of a wave."""

    def __init__(self) -> None:
        super().__init__()
        self.sending = asyncio.Event()
        self.go_on = asyncio.Event()

    async def send_wave(self, events: Sequence[Outgoing]) -> Wave:
        self.sending.set()
        await self.go_on.wait()
        first: dict[bytes | None, int] = {}
        for index, event in enumerate(events):
            first.setdefault(event.key, index)
        self.sent += [events[index] for index in first.values()]
        return Wave(set(first.values()), {})


async def test_trap_10_nothing_is_sent_inside_an_open_transaction(database_url: str) -> None:
    """While the broker takes its time, the relay holds no transaction, no row and no writer's turn."""
    async with service(database_url) as app:
        broker, database = Halting(), app.get(Database)
        outbox, relay = relay_of(app, broker)
        await write(outbox, "a", 1)
        await relay._take_lanes()
        wave = asyncio.create_task(relay._wave())
        await broker.sending.wait()
        if database.dialect == "postgresql":
            states = sa.text("SELECT state FROM pg_stat_activity WHERE datname = current_database()")
            assert "idle in transaction" not in [row.state for row in await database.read(states)]
        async with asyncio.timeout(30), database.transaction() as session:
            await session.execute(sa.update(OUTBOX).values(topic="moved"))
        broker.go_on.set()
        assert await wave
        assert await database.read(sa.select(OUTBOX)) == []
        for lane in list(relay._leases):
            await relay._drop(lane)


async def test_trap_10_of_each_key_a_prefix_is_deleted_and_the_rest_follows_in_order(database_url: str) -> None:
    """A broker that confirms a wave in part gets the rest again, each event once, and nothing overtakes."""
    async with service(database_url) as app:
        broker = Halting()
        broker.go_on.set()
        outbox, relay = relay_of(app, broker)
        await write(outbox, "a", 1, 2, 3, 4)
        await write(outbox, "b", 1, 2)
        await relay._take_lanes()
        waves = 0
        while await relay._wave():
            waves += 1
        assert waves == 4
        assert (numbers(broker, "a"), numbers(broker, "b")) == ([1, 2, 3, 4], [1, 2])
        assert await app.get(Database).read(sa.select(OUTBOX)) == []
        for lane in list(relay._leases):
            await relay._drop(lane)


async def test_trap_10_a_relay_that_lost_its_lane_deletes_nothing(database_url: str) -> None:
    """Its lane is somebody else's by the time the broker confirms: the rows are the new owner's, who sends them."""
    async with service(database_url) as app:
        broker, database = Halting(), app.get(Database)
        outbox, relay = relay_of(app, broker)
        await write(outbox, "a", 1)
        await relay._take_lanes()
        wave = asyncio.create_task(relay._wave())
        await broker.sending.wait()
        lane = lane_of(Outgoing("", b"a", b"", []))
        await expire_lease(database, relay._leases[lane])
        taken = await database.lease(f"events/outbox/{lane}")
        assert taken is not None
        broker.go_on.set()
        assert await wave
        assert len(await database.read(sa.select(OUTBOX))) == 1
        assert lane not in relay._leases
        await taken.release()
        for other in list(relay._leases):
            await relay._drop(other)


async def test_publishing_from_another_loop_is_refused_at_once(database_url: str) -> None:
    """A thread with an event loop of its own gets an error that names the remedy, and nothing hangs."""
    async with service(database_url) as app:
        publisher = app.get(EventPublisher)
        with pytest.raises(WrongEventLoop, match="run_coroutine_threadsafe"):
            await asyncio.to_thread(lambda: asyncio.run(publisher.publish(Note(name="a", number=1))))
        await publisher.publish(Note(name="a", number=2))
        assert await logged(app) == [b'{"name":"a","number":2}']
