"""Publishing, consuming, relaying; and what a dispatched event costs beyond reading it and calling its handler."""

import asyncio
import itertools
import json
import logging
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from aiokafka.structs import ConsumerRecord
from pydantic import SecretStr

from benchmarks.events.consumer import HANDLED, Beat
from benchmarks.events.consumer import service as beats
from benchmarks.events.load import Fields, Line, orders, per_second
from benchmarks.rows import Peers, Row, compare, row
from mainstay.core import SYSTEM_CLOCK, App, Context, Retry
from mainstay.database import Database, DatabaseModule, DatabaseSettings, upgrade
from mainstay.database.schema import SCHEMA
from mainstay.events import Event, EventPublisher, EventRouter, EventsModule, EventsSettings
from mainstay.events._delivery import Assignment, Delivery
from mainstay.events._dispatch import Dispatcher
from mainstay.events._failure import Failures
from mainstay.events._routes import Route
from mainstay.events.metadata import encode, envelope
from mainstay.events.router import InboxMode
from mainstay.events.tables import OUTBOX
from mainstay.events.tables import SCHEMA as EVENTS
from mainstay_servers import Kafka, Postgres, fresh_database

logging.disable(logging.WARNING)

PARTITIONS = 4


class Paid(Event, type="bench.paid", key="order"):
    order: uuid.UUID
    customer: str
    amount: Decimal
    currency: str
    lines: list[Line]


def events(count: int) -> list[Paid]:
    return [Paid.model_construct(**dict(order)) for order in orders(count)]


def service(url: str | None, topic: str, *routers: EventRouter, **settings: Any) -> App:
    root = EventsSettings(partitions=PARTITIONS, topics={"bench.paid": topic}, **settings)
    modules: list[Any] = [EventsModule.for_root(root), EventsModule.for_feature(*routers)]
    if url is not None:
        modules.insert(0, DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url))))
    return App(*modules)


class Handled:
    """A feature whose handler does nothing, and the moment it has done so often enough."""

    def __init__(self, count: int) -> None:
        self.router = EventRouter()
        self.enough = asyncio.Event()
        self.first = 0.0
        self.seen = 0

        @self.router.on(Paid, group=uuid.uuid4().hex)
        async def handle(_event: Paid) -> None:
            self.seen += 1
            if self.seen == 1:
                self.first = time.perf_counter()
            if self.seen >= count:
                self.enough.set()


async def _nothing(_event: Paid) -> None:
    pass


async def _bury(_delivery: Delivery, error: Exception) -> None:
    raise error


def records(count: int) -> list[ConsumerRecord]:
    """What aiokafka hands out."""
    made = []
    for number, event in enumerate(events(count)):
        shared = envelope(time=datetime.now(UTC), source="bench", context=Context(correlation_id=str(uuid.uuid4())))
        out = encode(event, id=str(uuid.uuid4()), topic="bench", shared=shared)
        place = number % PARTITIONS
        sizes = (len(out.key or b""), len(out.value or b""))
        made.append(
            ConsumerRecord("bench", place, number // PARTITIONS, 0, 0, out.key, out.value, None, *sizes, out.headers)
        )
    return made


async def dispatch_rows(*, quick: bool) -> AsyncIterator[Row]:
    count = 5_000 if quick else 50_000
    load = records(count)
    batches = [load[start : start + 500] for start in range(0, count, 500)]
    by_partition = [
        [[record for record in batch if record.partition == number] for number in range(PARTITIONS)]
        for batch in batches
    ]

    async def dispatched() -> float:
        route = Route("bench.paid", "bench")
        route.reads(Paid, _nothing, wants_metadata=False, retry=Retry())
        failures = Failures("bench", bury=_bury, clock=SYSTEM_CLOCK)
        dispatcher = Dispatcher("bench", {"bench.paid": route}, concurrency=64, failures=failures, clock=SYSTEM_CLOCK)
        assignments = [Assignment("bench", number) for number in range(PARTITIONS)]
        started = time.perf_counter()
        for parts in by_partition:
            for assignment, part in zip(assignments, parts, strict=True):
                dispatcher.feed(assignment, part)
            await asyncio.sleep(0)
        await dispatcher.settle(assignments, None)
        cost = (time.perf_counter() - started) / count * 1e6
        assert sum(route.seconds.buckets) >= count
        assert [assignment.finished.offset for assignment in assignments if assignment.finished] == [
            count // PARTITIONS - 1
        ] * PARTITIONS
        await dispatcher.stop()
        return cost

    async def floor() -> float:
        validate = Paid.__pydantic_validator__.validate_json
        started = time.perf_counter()
        for record in load:
            await _nothing(validate(record.value))
        return (time.perf_counter() - started) / count * 1e6

    yield await compare(
        "dispatch: order by key, safe commits, context, metrics",
        "µs/event",
        dispatched,
        peer=("validate and call", floor),
        better="lower",
        rounds=3 if quick else 9,
    )


def _options(servers: str, client: str) -> dict[str, Any]:
    return {"transport": "kafka", "kafka_client": client, "outbox": False, "kafka_servers": servers, "source": "bench"}


CLIENTS = {"aiokafka": "", "confluent": " by librdkafka"}
"""The clients of Kafka, and what the names of their rows say of them."""
PEERS = {
    "publish many": {
        "aiokafka": {"aiokafka by hand": "publish_many", "confluent-kafka": "confluent_publish_many"},
        "confluent": {"confluent-kafka": "confluent_publish_many"},
    },
    "publish and wait": {
        "aiokafka": {"aiokafka by hand": "publish_each", "FastStream": "faststream_publish_each"},
        "confluent": {"FastStream": "faststream_publish_each"},
    },
    "consume": {
        "aiokafka": {
            "aiokafka by hand": "consume", "FastStream": "faststream_consume", "confluent-kafka": "confluent_consume"
        },
        "confluent": {"confluent-kafka": "confluent_consume"},
    },
}  # fmt: skip


async def publish_rows(servers: str, client: str, peers: Peers, *, quick: bool) -> AsyncIterator[Row]:
    many = 5_000 if quick else 50_000
    single = 2_000 if quick else 20_000
    rounds = 1 if quick else 5
    topic = f"bench-{uuid.uuid4().hex[:8]}"
    load = events(many)
    async with service(None, topic, **_options(servers, client)) as app:
        publisher = app.get(EventPublisher)
        await publisher.publish(load[0])

        async def publish_many() -> float:
            async def work() -> None:
                await asyncio.gather(
                    *(publisher.publish_batch(load[start : start + 1000]) for start in range(0, many, 1000))
                )

            return await per_second(many, work)

        async def publish_each() -> float:
            left = iter(load[:single])

            async def one() -> None:
                for event in left:
                    await publisher.publish(event)

            async def work() -> None:
                await asyncio.gather(*(one() for _ in range(200)))

            return await per_second(single, work)

        for peer, name in PEERS["publish many"][client].items():
            yield await compare(
                f"publish many on Kafka{CLIENTS[client]}, beside {peer}",
                "events/s",
                publish_many,
                peer=(peer, peers(name, servers, f"{topic}-peer", many)),
                better="higher",
                rounds=rounds,
            )
        for peer, name in PEERS["publish and wait"][client].items():
            yield await compare(
                f"publish and wait on Kafka{CLIENTS[client]}, 200 at once, beside {peer}",
                "events/s",
                publish_each,
                peer=(peer, peers(name, servers, f"{topic}-peer", single)),
                better="higher",
                rounds=rounds,
            )


async def consume_rows(servers: str, peers: Peers, *, quick: bool) -> AsyncIterator[Row]:
    many = 5_000 if quick else 50_000
    full = f"bench-{uuid.uuid4().hex[:8]}-full"
    load = events(many)
    async with service(None, full, **_options(servers, "aiokafka")) as app:
        for start in range(0, many, 1000):
            await app.get(EventPublisher).publish_batch(load[start : start + 1000])

    for client, by in CLIENTS.items():

        async def consume(client: str = client) -> float:
            handled = Handled(many)
            async with service(None, full, handled.router, **_options(servers, client)).running(serve=True):
                await asyncio.wait_for(handled.enough.wait(), 120)
                return many / (time.perf_counter() - handled.first)

        for peer, name in PEERS["consume"][client].items():
            yield await compare(
                f"consume from Kafka{by} with validation and a call, beside {peer}",
                "events/s",
                consume,
                peer=(peer, peers(name, servers, full, many)),
                better="higher",
                rounds=1 if quick else 5,
            )


@asynccontextmanager
async def _database(kind: str, server: Postgres, folder: Path, number: int) -> AsyncIterator[str]:
    if kind == "SQLite":
        yield f"sqlite+aiosqlite:///{folder / f'{number}.db'}"
    else:
        with fresh_database(server.url) as url:
            await upgrade(url, [SCHEMA, EVENTS])
            yield url


async def database_rows(servers: str, server: Postgres, folder: Path, *, quick: bool) -> AsyncIterator[Row]:
    count = 2_000 if quick else 20_000
    rounds = 1 if quick else 5
    load = events(count)
    numbers = itertools.count()

    for kind in ("SQLite", "PostgreSQL"):

        async def relay(client: str = "aiokafka", kind: str = kind) -> float:
            async with _database(kind, server, folder, next(numbers)) as url:
                options = {**_options(servers, client), "outbox": True}
                topic = f"bench-{uuid.uuid4().hex[:8]}"
                async with service(url, topic, **options) as app:
                    for start in range(0, count, 1000):
                        await app.get(EventPublisher).publish_batch(load[start : start + 1000])
                app = service(url, topic, **options)
                async with app.running(serve=True):
                    left, started, first = count, 0.0, count
                    while left:
                        left = (await app.get(Database).read(sa.select(sa.func.count()).select_from(OUTBOX)))[0][0]
                        if not started and left < count:
                            started, first = time.perf_counter(), left
                        await asyncio.sleep(0.01)
                    return first / (time.perf_counter() - started)

        async def publish_each(kind: str = kind) -> float:
            async with (
                _database(kind, server, folder, next(numbers)) as url,
                service(url, "bench", transport="sql") as app,
            ):
                publisher = app.get(EventPublisher)
                left = iter(load)

                async def one() -> None:
                    for event in left:
                        await publisher.publish(event)

                async def work() -> None:
                    await asyncio.gather(*(one() for _ in range(200)))

                return await per_second(count, work)

        async def consume(kind: str = kind) -> float:
            async with _database(kind, server, folder, next(numbers)) as url:
                async with service(url, "bench", transport="sql") as app:
                    for start in range(0, count, 1000):
                        await app.get(EventPublisher).publish_batch(load[start : start + 1000])
                handled = Handled(count)
                async with service(url, "bench", handled.router, transport="sql").running(serve=True):
                    await asyncio.wait_for(handled.enough.wait(), 120)
                    return count / (time.perf_counter() - handled.first)

        for client, by in CLIENTS.items():
            name = f"outbox relayed from {kind} to Kafka{by}"
            yield await compare(name, "events/s", partial(relay, client), better="higher", rounds=rounds)
        yield await compare(
            f"publish and wait on the log in {kind}, 200 at once",
            "events/s",
            publish_each,
            better="higher",
            rounds=rounds,
        )
        yield await compare(f"consume the log in {kind}", "events/s", consume, better="higher", rounds=rounds)


EFFECTS = sa.Table("effects", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True), sa.Column("who", sa.Text))
ADD = sa.insert(EFFECTS)


class Added:
    """A feature whose handler writes one row, exactly once, and the moment it has done so often enough."""

    def __init__(self, count: int, mode: InboxMode) -> None:
        self.router = EventRouter()
        self.enough = asyncio.Event()
        self.database: Database | None = None
        self.first = 0.0
        self.seen = 0

        @self.router.on(Paid, group="inbox", inbox=mode)
        async def handle(event: Paid) -> None:
            self.first = self.first or time.perf_counter()
            assert self.database is not None
            await self.database.write(ADD, {"who": event.customer})
            self.seen += 1
            if self.seen == count:
                self.enough.set()


async def inbox_rows(server: Postgres, folder: Path, *, quick: bool) -> AsyncIterator[Row]:
    numbers = itertools.count()
    modes: list[tuple[str, InboxMode, int]] = [("a transaction each", True, 2_000), ("in batches", "batch", 20_000)]

    async def handled(kind: str, mode: InboxMode, count: int) -> float:
        added = Added(count, mode)
        async with _database(kind, server, folder, next(numbers)) as url:
            async with service(url, "bench", transport="sql") as app:
                async with app.get(Database).transaction() as session:
                    await (await session.connection()).run_sync(EFFECTS.metadata.create_all)
                for start in range(0, count, 1000):
                    await app.get(EventPublisher).publish_batch(events(min(1000, count - start)))
            app = service(url, "bench", added.router, transport="sql")
            async with app.running(serve=True):
                added.database = app.get(Database)
                await asyncio.wait_for(added.enough.wait(), 120)
                rate = count / (time.perf_counter() - added.first)
            async with service(url, "bench", transport="sql") as app:
                found = await app.get(Database).read(sa.select(sa.func.count()).select_from(EFFECTS))
                assert found[0][0] == count
        return rate

    for kind in ("SQLite", "PostgreSQL"):
        for name, mode, count in modes:
            yield await compare(
                f"inbox on {kind}, {name}",
                "events/s",
                partial(handled, kind, mode, count // 10 if quick else count),
                better="higher",
                rounds=1 if quick else 5,
            )


async def hint_rows(server: Postgres, *, quick: bool) -> AsyncIterator[Row]:
    count = 20 if quick else 200
    router = EventRouter()
    arrived = asyncio.Event()
    handled = 0.0

    @router.on(Paid, group="hint")
    async def handle(_event: Paid) -> None:
        nonlocal handled
        handled = time.perf_counter()
        arrived.set()

    waits: list[float] = []
    with fresh_database(server.url) as url:
        await upgrade(url, [SCHEMA, EVENTS])
        async with (
            service(url, "bench", transport="sql") as publishing,
            service(url, "bench", router, transport="sql").running(serve=True),
        ):
            await asyncio.sleep(2)  # until each hears the other
            for event in events(count):
                arrived.clear()
                begun = time.perf_counter()
                await publishing.get(EventPublisher).publish(event)
                await arrived.wait()
                waits.append((handled - begun) * 1000)
                await asyncio.sleep(0.05)
    waits.sort()
    yield row(
        "from publish in one App to the handler in another on PostgreSQL, p50",
        "ms",
        waits[count // 2],
        low=waits[0],
        high=waits[-1],
        rounds=count,
    )


class Fleet:
    """Three consumers in processes of their own, one of which is killed under load, again and again.

    Args:
        options: of `consumer.service`, which each process is given.
    """

    def __init__(self, options: Mapping[str, Any], stack: ExitStack) -> None:
        self._options = options
        self._stack = stack
        self._children: list[subprocess.Popen[bytes]] = []
        self._keys = [f"k{number}" for number in range(48)]

    def begin(self) -> None:
        child = subprocess.Popen([sys.executable, "-m", "benchmarks.events.consumer", json.dumps(self._options)])
        self._stack.callback(child.kill)
        self._children.append(child)

    async def recoveries(self, kills: int) -> list[float]:
        """The seconds from each kill until all keys of the killed process were handled by another, shortest first."""
        async with beats(**self._options) as app, app.get(Database).transaction() as session:
            await (await session.connection()).run_sync(HANDLED.metadata.create_all)
        seconds: list[float] = []
        async with beats(**self._options) as app:
            for _ in range(3):
                self.begin()
            for _ in range(kills):
                seconds.append(await self._recovery(app.get(Database), app.get(EventPublisher)))
                self.begin()
        return sorted(seconds)

    async def _recovery(self, database: Database, publisher: EventPublisher) -> float:
        held: dict[str, int] = {}
        while len(set(held.values())) < len(self._children):
            after, held = await self._newest(database), {}
            while len(held) < len(self._keys):
                held |= await self._handled(database, publisher, after)
        victim = self._children.pop(0)
        lost = {key for key, pid in held.items() if pid == victim.pid}
        victim.kill()
        killed = time.perf_counter()
        victim.wait()
        after = await self._newest(database)
        while lost:
            now = await self._handled(database, publisher, after)
            lost -= {key for key, pid in now.items() if pid != victim.pid}
        return time.perf_counter() - killed

    async def _newest(self, database: Database) -> int:
        newest: int = (await database.read(sa.select(sa.func.coalesce(sa.func.max(HANDLED.c.id), 0))))[0][0]
        return newest

    async def _handled(self, database: Database, publisher: EventPublisher, after: int) -> dict[str, int]:
        """Publish for each key, and say which process handled each that was handled since."""
        await publisher.publish_batch([Beat(name=key) for key in self._keys])
        await asyncio.sleep(0.05)
        by_pid = sa.select(HANDLED.c.key, HANDLED.c.pid).where(HANDLED.c.id > after).order_by(HANDLED.c.id)
        return {row.key: row.pid for row in await database.read(by_pid)}


async def recovery_rows(server: Postgres, servers: str, *, quick: bool) -> AsyncIterator[Row]:
    """How long the work of a killed process waits for another one.

    On Kafka it is for as long as the session that the group's members have at the broker. Its shortest one, by the
    brokers' own defaults (`group.min.session.timeout.ms`), is 6 s, which is the default of `lease_seconds`.
    """
    leases = "after a kill of one of three consumers with leases of"
    name = f"recovery on the log in PostgreSQL {leases} 4 s"
    subjects: list[tuple[str, int, dict[str, Any]]] = [(name, 20, {"transport": "sql", "lease_seconds": 4.0})]
    for client, by in CLIENTS.items():
        topics = {"bench.beat": f"bench-{uuid.uuid4().hex[:8]}-beats"}
        options = _options(servers, client) | {"lease_seconds": 6.0, "topics": topics}
        subjects.append((f"recovery on Kafka{by} {leases} 6 s", 50, options))
    for name, many, options in subjects:
        kills = 2 if quick else many
        with fresh_database(server.url) as url, ExitStack() as stack:
            await upgrade(url, [SCHEMA, EVENTS])
            seconds = await Fleet({"url": url, **options}, stack).recoveries(kills)
        for which, value in (("p50", seconds[kills // 2]), ("longest", seconds[-1])):
            yield row(f"{name}, {which}", "s", value, low=seconds[0], high=seconds[-1], rounds=kills)


async def memory_rows(servers: str, folder: Path, *, quick: bool) -> AsyncIterator[Row]:
    """How much larger a service becomes between 100,000 events and 1,000,000, which it publishes and handles itself."""
    first, last = (10_000, 50_000) if quick else (100_000, 1_000_000)
    log = f"sqlite+aiosqlite:///{folder / 'flat.db'}"
    subjects: list[tuple[str, str | None, dict[str, Any]]] = [("the log in SQLite", log, {"transport": "sql"})]
    for client, by in CLIENTS.items():
        topics = {"bench.paid": f"bench-{uuid.uuid4().hex[:8]}-flat"}
        subjects.append((f"Kafka{by}", None, _options(servers, client) | {"topics": topics}))
    for name, url, settings in subjects:
        command = [sys.executable, "-m", "benchmarks.events.flat", json.dumps([first, last, url, settings])]
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
        told, _ = await process.communicate()
        assert process.returncode == 0, name
        early, late = map(float, told.split())
        yield row(f"memory of {name}: growth from {first:,} events to {last:,}", "MiB", late - early)


async def rows(quick: bool) -> AsyncIterator[Row]:  # noqa: FBT001  the runner's contract
    async for found in dispatch_rows(quick=quick):
        yield found
    with ExitStack() as stack:
        kafka = stack.enter_context(Kafka())
        server = stack.enter_context(Postgres())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        peers = stack.enter_context(Peers("events"))
        for client in CLIENTS:
            async for found in publish_rows(kafka.address, client, peers, quick=quick):
                yield found
        async for found in consume_rows(kafka.address, peers, quick=quick):
            yield found
        async for found in database_rows(kafka.address, server, folder, quick=quick):
            yield found
        async for found in inbox_rows(server, folder, quick=quick):
            yield found
        async for found in hint_rows(server, quick=quick):
            yield found
        async for found in recovery_rows(server, kafka.address, quick=quick):
            yield found
        async for found in memory_rows(kafka.address, folder, quick=quick):
            yield found


__all__ = ["Fields", "rows"]
