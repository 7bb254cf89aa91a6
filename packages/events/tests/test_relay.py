"""The relay: in order, exactly what was confirmed, and what is refused or hangs holds up no other."""

import asyncio
import time
from collections.abc import Sequence
from contextvars import Context
from typing import Any
from zlib import crc32

import pytest
import sqlalchemy as sa
from pydantic import SecretStr
from sqlalchemy.dialects import postgresql

from mainstay.core import App, Clock, Drain
from mainstay.core.testing import VirtualClock, eventually
from mainstay.database import Database, DatabaseModule, DatabaseSettings
from mainstay.database.testing import expire_lease
from mainstay.events import Event, EventsModule, EventsSettings, RefusedError, RefusedEvents
from mainstay.events._outbox import LANES, Outbox, lane_of
from mainstay.events._relay import OutboxRelay, Refused, TooLarge
from mainstay.events.metadata import Outgoing
from mainstay.events.tables import OUTBOX, REFUSED


class Note(Event, type="note.made", key="name"):
    name: str
    number: int = 0


def service(url: str, **settings: Any) -> App:
    """An App on a database, with the tables of events."""
    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url)))
    return App(database, EventsModule.for_root(EventsSettings(**settings)))


class Broker:
    """A broker with two partitions a topic, which refuses, hangs and loses what it is told to.

    Attributes:
        sent: what it has taken, in order.
        refused: topics that it refuses.
        hanging: topics and partitions that it does not answer for.
        missing: topics that are not there.
        most_bytes: of a batch, by topic.
    """

    def __init__(self) -> None:
        self.sent: list[Outgoing] = []
        self.refused: set[str] = set()
        self.hanging: set[tuple[str, int]] = set()
        self.missing: set[str] = set()
        self.most_bytes: dict[str, int] = {}
        self.batches = 0
        self.carriers = 0

    async def prepare(self, topic: str) -> None:
        if topic in self.missing:
            await asyncio.sleep(0.2)
            msg = f"topic {topic} is not there"
            raise LookupError(msg)

    def forget(self, topic: str) -> None: ...

    async def carrier(self) -> "Carrier":
        self.carriers += 1
        return Carrier(self)


class Carrier:
    """See `_relay.Carrier`."""

    def __init__(self, broker: Broker) -> None:
        self.deadline = 0.0
        self.broker = broker
        self.ended = False

    async def partitions(self, topic: str) -> int:
        return 2

    def place(self, event: Outgoing, partitions: int) -> int:
        return crc32(event.key or b"") // 16 % partitions

    async def send(self, topic: str, partition: int, events: Sequence[Outgoing]) -> None:
        assert not self.ended
        await eventually(lambda: (topic, partition) not in self.broker.hanging, seconds=3600)
        if topic in self.broker.refused:
            msg = "refused"
            raise ConnectionError(msg)
        if sum(event.size for event in events) > self.broker.most_bytes.get(topic, 10**9):
            if len(events) > 1:
                raise TooLarge
            msg = "it is too large"
            raise Refused(msg)
        assert time.monotonic() < self.deadline
        self.broker.batches += 1
        self.broker.sent += events

    def close(self) -> None:
        self.ended = True

    def abandon(self) -> None:
        self.ended = True


def numbers(broker: Broker, name: str) -> list[int]:
    """What was sent with a key."""
    return [Note.model_validate_json(event.value or b"").number for event in broker.sent if event.key == name.encode()]


def relay_of(app: App, broker: Broker, clock: Clock | None = None, **options: Any) -> tuple[Outbox, OutboxRelay]:
    """An outbox and its relay, without Kafka."""
    database = app.get(Database)
    outbox = Outbox(database, lambda _event: None)
    options = {"lease_seconds": 2.0, "most_bytes": 8_000_000, "clock": clock or app.clock, **options}
    return outbox, OutboxRelay(database, outbox, broker, **options)


async def write(outbox: Outbox, name: str, *numbers: int, topic: str | None = None) -> None:
    """Events of a key into the outbox."""
    await outbox.send(
        [
            Outgoing(
                topic or f"topic-{name}", name.encode(), Note(name=name, number=number).model_dump_json().encode(), []
            )
            for number in numbers
        ]
    )


def keys_of(partition: int, count: int) -> list[str]:
    """Keys that are placed on a partition of two."""
    names = (f"k{number}" for number in range(10_000))
    found = (name for name in names if crc32(name.encode()) // 16 % 2 == partition)
    return [next(found) for _ in range(count)]


async def is_empty(app: App) -> bool:
    return not await app.get(Database).read(sa.select(OUTBOX.c.position).limit(1))


class Relaying:
    """A relay that serves within the block."""

    def __init__(self, relay: OutboxRelay) -> None:
        self._relay = relay
        self._drain = Drain()

    async def __aenter__(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._relay.serve(self._drain), context=Context())

    async def __aexit__(self, *_: object) -> None:
        self._drain.begin()
        await self._task


async def test_trap_10_the_relay_keeps_each_keys_order_through_failures(database_url: str) -> None:
    """While the broker refuses one topic, the others go on; later it follows in order, and nothing is left behind."""
    async with service(database_url) as app:
        broker = Broker()
        outbox, relay = relay_of(app, broker)
        broker.refused.add("topic-stuck")
        await write(outbox, "stuck", 1, 2)
        for _ in range(5):  # more than fits into a page: what is stuck must not fill it for ever
            await write(outbox, "stuck", *[2] * 500)
        await write(outbox, "free", 1, 2)
        async with Relaying(relay):
            await eventually(lambda: numbers(broker, "free") == [1, 2])
            await write(outbox, "stuck", 3)
            await write(outbox, "free", 3)
            await eventually(lambda: numbers(broker, "free") == [1, 2, 3])
            assert numbers(broker, "stuck") == []

            async def shown() -> bool:
                health = await relay.health()
                return health.status == "degraded" and "topic-stuck" in (health.detail or "")

            await eventually(shown)
            broker.refused.clear()
            await eventually(lambda: numbers(broker, "stuck") == [1, *[2] * 2501, 3])
            await eventually(lambda: is_empty(app))

            async def well() -> bool:
                return (await relay.health()).status == "ok"

            await eventually(well)


async def test_trap_10_the_outbox_deletes_exactly_what_was_confirmed(postgres_url: str) -> None:
    """A row of a transaction that began earlier and commits later is not deleted with those around it."""
    async with service(postgres_url) as app:
        broker = Broker()
        outbox, relay = relay_of(app, broker)
        async with app.get(Database).transaction():
            await write(outbox, "a", 1)
            await asyncio.create_task(_apart(write(outbox, "a", 2)))
            relaying = Relaying(relay)
            await asyncio.create_task(_apart(relaying.__aenter__()))
            await eventually(lambda: numbers(broker, "a") == [2])
        await eventually(lambda: sorted(numbers(broker, "a")) == [1, 2])
        await relaying.__aexit__()


async def _apart(work: Any) -> None:
    """Run outside of the unit of work around the caller."""
    await asyncio.get_running_loop().create_task(work, context=Context())


async def test_trap_10_two_relays_share_the_lanes_without_overlap(database_url: str) -> None:
    """A lane has one relay at a time: what one holds the other leaves alone, and takes over when it is given back."""
    async with service(database_url) as app:
        one, two = Broker(), Broker()
        outbox, first = relay_of(app, one)
        _, second = relay_of(app, two)
        async with Relaying(first):
            await write(outbox, "a", 1)
            await eventually(lambda: numbers(one, "a") == [1])
            other = Relaying(second)
            await other.__aenter__()
            await write(outbox, "a", 2)
            await eventually(lambda: numbers(one, "a") == [1, 2])
        await write(outbox, "a", 3)
        await eventually(lambda: numbers(two, "a") == [3])
        await other.__aexit__()
        assert numbers(one, "a") == [1, 2]


async def test_a_lane_whose_renewal_was_late_is_taken_again(sqlite_url: str) -> None:
    """A relay that stopped believing in its lease gives it back, or nobody could use the lane again."""
    async with service(sqlite_url) as app:
        broker, clock = Broker(), VirtualClock()
        outbox, relay = relay_of(app, broker, clock)
        assert await relay._lanes.take()
        assert len(relay._lanes.held()) == LANES
        for lease in relay._lanes._leases.values():
            lease._until = float("-inf")  # as if the process had slept
        clock.tick(10.0)
        assert await relay._lanes.take()
        assert len(relay._lanes.held()) == LANES
        await relay._lanes.release()
        clock.tick(10.0)
        async with Relaying(relay):
            await write(outbox, "a", 1)
            await eventually(lambda: numbers(broker, "a") == [1])


async def test_trap_10_nothing_is_sent_inside_an_open_transaction(database_url: str) -> None:
    """While the broker takes its time, the relay holds no transaction, no row and no writer's turn."""
    async with service(database_url) as app:
        broker, database = Broker(), app.get(Database)
        broker.hanging |= {("topic-a", 0), ("topic-a", 1)}
        outbox, relay = relay_of(app, broker)
        await write(outbox, "a", 1)
        async with Relaying(relay):
            await eventually(lambda: relay._places, what="that it hangs")
            if database.dialect == "postgresql":
                states = sa.text("SELECT state FROM pg_stat_activity WHERE datname = current_database()")
                assert "idle in transaction" not in [row.state for row in await database.read(states)]
            async with asyncio.timeout(30), database.transaction() as session:
                await session.execute(sa.update(OUTBOX).values(created_at=1))
            broker.hanging.clear()
            await eventually(lambda: is_empty(app))
        assert numbers(broker, "a") == [1]


@pytest.mark.parametrize("hanging", [1, 0])
async def test_a_partition_that_hangs_delays_nobody_and_keeps_its_order(database_url: str, hanging: int) -> None:
    """Others of its topic go on at once, also behind a backlog of many pages; then it follows, each event once."""
    slow, fast = keys_of(hanging, 2), keys_of(1 - hanging, 2)
    async with service(database_url) as app:
        broker = Broker()
        broker.hanging.add(("t", hanging))
        outbox, relay = relay_of(app, broker)
        for start in range(0, 5000, 500):
            for key in slow:
                await write(outbox, key, *range(start, start + 500), topic="t")
        for key in fast:
            await write(outbox, key, 1, topic="t")
        await write(outbox, "other", 1)
        async with Relaying(relay):
            await eventually(lambda: [numbers(broker, key) for key in (*fast, "other")] == [[1], [1], [1]])
            for number in range(2, 30):  # no wave waits for it
                for key in fast:
                    await write(outbox, key, number, topic="t")
            await eventually(lambda: [numbers(broker, key) for key in fast] == [[*range(1, 30)]] * 2)
            for key in slow:
                assert numbers(broker, key) == []
                await write(outbox, key, 5000, topic="t")
            broker.hanging.clear()
            await eventually(lambda: all(len(numbers(broker, key)) >= 5001 for key in slow))
            await eventually(lambda: is_empty(app))
        assert [numbers(broker, key) for key in slow] == [[*range(5001)]] * 2


async def test_what_a_killed_relay_put_aside_is_found_by_its_successor(database_url: str) -> None:
    """And in order with what came after."""
    (slow,) = keys_of(0, 1)
    async with service(database_url) as app:
        broker = Broker()
        broker.hanging.add(("t", 0))
        outbox, first = relay_of(app, broker)
        for start in range(0, 3000, 500):
            await write(outbox, slow, *range(start, start + 500), topic="t")

        async def put_aside() -> bool:
            return len(await app.get(Database).read(sa.select(OUTBOX.c.position).where(OUTBOX.c.aside == 0))) >= 2000

        async with Relaying(first):
            await eventually(put_aside)
        await write(outbox, slow, 3000, topic="t")
        broker.hanging.clear()
        _, second = relay_of(app, broker)
        async with Relaying(second):
            await eventually(lambda: is_empty(app))
        assert numbers(broker, slow) == [*range(3001)]


async def test_a_topic_that_is_missing_is_waited_for_by_itself(database_url: str) -> None:
    """Looking for it takes its time, and no other topic's event waits for that; health names it."""
    async with service(database_url) as app:
        broker = Broker()
        broker.missing |= {"topic-a", "topic-b"}
        outbox, relay = relay_of(app, broker)
        await write(outbox, "a", 1)
        await write(outbox, "b", 1)
        async with Relaying(relay):
            for number in range(20):
                await write(outbox, "c", number)
                await eventually(lambda n=number: numbers(broker, "c") == [*range(n + 1)])

            async def named() -> bool:
                detail = (await relay.health()).detail or ""
                return "topic-a is not there" in detail and "topic-b is not there" in detail

            await eventually(named)
            broker.missing.clear()
            await eventually(lambda: numbers(broker, "a") == [1] == numbers(broker, "b"))


async def test_a_batch_that_is_too_large_is_divided_and_a_single_event_put_before_a_person(database_url: str) -> None:
    """The others of its key go on; it is kept with the reason, shown, and nothing is sent twice."""
    async with service(database_url) as app:
        broker = Broker()
        broker.most_bytes["t"] = 3000
        outbox, relay = relay_of(app, broker)
        await write(outbox, "a", *range(300), topic="t")
        await outbox.send([Outgoing("t", b"a", b"x" * 4000, [])])
        await write(outbox, "a", 300, topic="t")
        async with Relaying(relay):
            await eventually(lambda: is_empty(app))
            health = await relay.health()
        assert numbers(broker, "a") == [*range(301)]
        (row,) = await app.get(Database).read(sa.select(REFUSED))
        assert (row.topic, row.key, row.value, row.reason) == ("t", b"a", b"x" * 4000, "it is too large")
        assert health.status == "degraded"
        assert "1 events were refused" in (health.detail or "")


@pytest.mark.parametrize("headers", ["{", "null", "[5]", '[["ce_type", 5]]', '[[5, "ce_type"]]'])
async def test_what_cannot_be_read_is_put_before_a_person(database_url: str, headers: str) -> None:
    """The others of its key go on; it is listed with the reason, cannot be sent, and is discarded."""
    async with service(database_url) as app:
        broker = Broker()
        outbox, relay = relay_of(app, broker)
        await write(outbox, "a", *range(3), topic="t")
        second = sa.select(OUTBOX.c.position).order_by(OUTBOX.c.position).offset(1).limit(1).scalar_subquery()
        await app.get(Database).write(sa.update(OUTBOX).where(OUTBOX.c.position == second).values(headers=headers))
        async with Relaying(relay):
            await eventually(lambda: is_empty(app))
        assert numbers(broker, "a") == [0, 2]
        refused = RefusedEvents(app.get(Database), outbox)
        (event,) = await refused.list()
        assert (event.topic, event.key, event.type) == ("t", b"a", "")
        assert "headers" in event.reason or "Expecting" in event.reason
        with pytest.raises(RefusedError, match="its headers cannot be read"):
            await refused.retry(event.id)
        await refused.discard(event.id)
        assert await refused.list() == []


async def test_a_page_is_bounded_in_bytes(database_url: str) -> None:
    """However large the rows are, and never less than one."""
    async with service(database_url) as app:
        broker = Broker()
        outbox, relay = relay_of(app, broker, most_bytes=100_000)
        for _ in range(10):
            await outbox.send([Outgoing("t", b"a", b"x" * 30_000, [])] * 5 + [Outgoing("t", b"a", b"y" * 200_000, [])])
        rows = await relay.rows.read(["t"], range(LANES))
        assert [len(row.event.value or b"") for row in rows] == [30_000] * 4
        rows = await relay.rows.read(["t", "u"], range(LANES))
        assert [len(row.event.value or b"") for row in rows] == [30_000] * 2
        async with Relaying(relay):
            await eventually(lambda: is_empty(app))
        assert sum(event.size for event in broker.sent) == 10 * 350_000 + 60


async def test_no_byte_goes_out_after_the_lease(sqlite_url: str) -> None:
    """The deadline of a batch is before the end of the leases of its rows."""
    async with service(sqlite_url) as app:
        broker = Broker()
        outbox, relay = relay_of(app, broker)
        deadlines: list[float] = []
        ends: list[float] = []
        send = Carrier.send

        async def noted(self: Carrier, topic: str, partition: int, events: Sequence[Outgoing]) -> None:
            deadlines.append(self.deadline)
            ends.append(min(lease._until for lease in relay._lanes._leases.values()))
            await send(self, topic, partition, events)

        Carrier.send = noted  # type: ignore[method-assign]
        try:
            async with Relaying(relay):
                for number in range(50):
                    await write(outbox, "a", number)
                    await eventually(lambda n=number: len(numbers(broker, "a")) > n)
        finally:
            Carrier.send = send  # type: ignore[method-assign]
        assert all(deadline <= end + 0.05 for deadline, end in zip(deadlines, ends, strict=True))


async def test_trap_10_a_relay_that_lost_its_lane_deletes_nothing(database_url: str) -> None:
    """Its lane is another relay's by the time the broker confirms: the rows are the new owner's, who sends them."""
    async with service(database_url) as app:
        broker, database = Broker(), app.get(Database)
        broker.hanging |= {("topic-a", 0), ("topic-a", 1)}
        outbox, relay = relay_of(app, broker)
        await write(outbox, "a", 1)
        lane = lane_of(Outgoing("", b"a", b"", []))
        async with Relaying(relay):
            await eventually(lambda: relay._places, what="that it hangs")
            await expire_lease(database, relay._lanes._leases[lane])
            taken = await database.lease(f"events/outbox/{lane}")
            assert taken is not None
            broker.hanging.clear()
            await eventually(lambda: lane not in relay._lanes._leases)
            assert not await is_empty(app)
            await taken.release()


async def test_a_backlog_of_a_topic_that_takes_nothing_is_not_read_through(postgres_url: str) -> None:
    """A page of another topic costs what is in it, however much waits elsewhere."""
    async with service(postgres_url) as app:
        database = app.get(Database)
        many = (
            "INSERT INTO mainstay_events_outbox (lane, topic, aside, key, value, headers) SELECT n % 8, topic, aside, "
            "'k', 'v', '[]' FROM generate_series(1, 20000) n, (VALUES ('paused', -1), ('t', 3)) AS held (topic, "
            "aside)"
        )
        async with database.transaction() as session:
            await session.execute(sa.text(many))
        async with database.transaction() as session:
            await session.execute(sa.text("ANALYZE mainstay_events_outbox"))
        broker = Broker()
        outbox, relay = relay_of(app, broker)
        await write(outbox, "a", 1, topic="t")
        plan: list[str] = []

        async def explained(statement: sa.Executable, parameters: dict[str, Any]) -> list[Any]:
            dialect = postgresql.dialect()
            text = statement.params(parameters).compile(  # type: ignore[attr-defined]
                dialect=dialect, compile_kwargs={"literal_binds": True}
            )
            async with database.transaction() as session:
                rows = (await session.execute(sa.text(f"EXPLAIN (ANALYZE, TIMING OFF) {text}"))).scalars().all()
            plan.extend(rows)
            return []

        relay.rows._database = type("Explaining", (), {"read": staticmethod(explained), "dialect": "postgresql"})()
        await relay.rows.read(["t"], range(LANES))
        assert any("mainstay_events_outbox_topic" in line for line in plan), "\n".join(plan)
        assert not any("Seq Scan" in line for line in plan), "\n".join(plan)
        assert not any("Rows Removed" in line for line in plan), "\n".join(plan)
