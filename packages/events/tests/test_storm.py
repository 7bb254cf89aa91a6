"""Producers, consumers, broker and database are killed and frozen, with poison in between: nothing lost or doubled.

`MAINSTAY_STORM=full` makes it 100,000 events, fifty kills, five freezes beyond the session, five crashes of the broker
and three of the database.
"""

import asyncio
import multiprocessing
import os
import random
import signal
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from mainstay.database import upgrade
from mainstay.database.schema import SCHEMA
from mainstay.events import EventPublisher
from mainstay.events.tables import DEAD_LETTERS, OUTBOX, PARKED, unpack_headers
from mainstay.events.tables import SCHEMA as EVENTS
from mainstay_servers import Kafka, Postgres, fresh_database
from packages.events.tests import storm
from packages.events.tests.storm import EFFECTS, META, PUBLISHED, is_odd, is_refused

FULL = os.environ.get("MAINSTAY_STORM") == "full"
FREEZE_SECONDS = 8.0  # a broker's shortest session is six
WAIT_SECONDS = 900.0 if FULL else 240.0

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["pytest", "packages.events.tests.storm", "packages.events.tests.worker"])


@dataclass
class Numbers:
    """How much of what."""

    keys: int
    each: int
    kills: int
    freezes: int
    broker: int
    database: int

    def disasters(self) -> list[str]:
        """All of them, mixed; always in the same order."""
        mixed = ["kill"] * self.kills + ["freeze"] * self.freezes
        mixed += ["broker"] * self.broker + ["database"] * self.database
        random.Random(9).shuffle(mixed)  # noqa: S311  the same in every run, on purpose
        return mixed


class Fleet:
    """Two producers and three consumers; one that is gone is started again."""

    def __init__(self, roles: list[dict[str, Any]]) -> None:
        self._roles = roles
        self._processes: list[Any] = [None] * len(roles)
        self.deaths = 0

    def tend(self) -> None:
        """Start what does not run."""
        for number, process in enumerate(self._processes):
            if process is None or process.exitcode is not None:
                self.deaths += process is not None
                self._start(number)

    def _start(self, number: int) -> None:
        process = _FORKS.Process(target=storm.run, args=(self._roles[number],))
        process.start()
        self._processes[number] = process

    def pid(self, number: int) -> int:
        """Of one that runs."""
        pid: int = self._processes[number].pid
        return pid

    def kill(self, number: int) -> None:
        """SIGKILL; it is started again by the next look."""
        self._processes[number].kill()
        self._processes[number].join()

    def stop(self) -> None:
        """Kill all."""
        for process in self._processes:
            if process is not None:
                process.kill()
                process.join()


@asynccontextmanager
async def tended(roles: list[dict[str, Any]]) -> AsyncGenerator[Fleet]:
    """A fleet that is looked after while the block lasts."""
    fleet = Fleet(roles)

    async def tend() -> None:
        while True:
            await asyncio.to_thread(fleet.tend)
            await asyncio.sleep(0.2)

    task = asyncio.create_task(tend())
    try:
        yield fleet
    finally:
        task.cancel()
        await asyncio.wait((task,))
        await asyncio.to_thread(fleet.stop)


class Witness:
    """What the database says, also while it comes back."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def rows(self, statement: Any) -> list[Any]:
        """The rows of a statement, asked for again and again where the server is away."""
        end = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                async with self._engine.connect() as connection:
                    return list(await connection.execute(statement))
            except (DBAPIError, OSError):
                assert time.monotonic() < end, "the database does not come back"
                await asyncio.sleep(0.2)

    async def count(self, table: sa.Table) -> int:
        """How many rows there are."""
        return int((await self.rows(sa.select(sa.func.count()).select_from(table)))[0][0])

    async def letters(self) -> dict[str, str]:
        """The errors of dead letters by event: one that was relayed twice has two."""
        rows = await self.rows(sa.select(DEAD_LETTERS.c.headers, DEAD_LETTERS.c.error))
        return {str(dict(unpack_headers(row.headers))["ce_id"]): row.error for row in rows}


async def befall(disaster: str, fleet: Fleet, chance: random.Random, broker: Kafka | None, database: Postgres) -> None:
    """One disaster, to its end."""
    victim = chance.randrange(5)
    if disaster == "kill":
        await asyncio.to_thread(fleet.kill, victim)
    elif disaster == "freeze":
        pid = fleet.pid(victim)
        with suppress(ProcessLookupError):  # it may have ended by itself
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(FREEZE_SECONDS)  # the session ends meanwhile: the time is what is tested
            os.kill(pid, signal.SIGCONT)
    else:
        server = broker if disaster == "broker" else database
        if server is not None:  # the log of `sql` is in the database
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)


@pytest.mark.parametrize("transport", ["kafka", "sql"])
async def test_a_storm(transport: str, request: pytest.FixtureRequest, own_postgres: Postgres, prefix: str) -> None:
    """Each effect once and in the order of its key; what is poison is a dead letter, and is no more than that."""
    numbers = Numbers(200, 500, 50, 5, 5, 3) if FULL else Numbers(40, 60, 6, 1, 1, 1)
    broker: Kafka | None = request.getfixturevalue("broker") if transport == "kafka" else None
    with fresh_database(own_postgres.url) as url:
        await upgrade(url, [SCHEMA, EVENTS])
        engine = create_async_engine(url, pool_pre_ping=True)
        async with engine.begin() as connection:
            await connection.run_sync(META.create_all)
        shared = {"url": url, "topic": prefix, "transport": transport, "kafka": broker and broker.address}
        keys = [f"k{number}" for number in range(numbers.keys)]
        producing = {**shared, "each": numbers.each, "pause": 0.01}
        roles = [{**producing, "keys": keys[half::2]} for half in range(2)] + [shared] * 3
        chance, witness = random.Random(9), Witness(engine)  # noqa: S311  as above
        disasters, total = numbers.disasters(), numbers.keys * numbers.each
        try:
            async with tended(roles) as fleet, asyncio.timeout(WAIT_SECONDS):
                async with storm.service(shared) as app:
                    await app.get(EventPublisher).publish(storm.Ending(key="k0"))
                for number, disaster in enumerate(disasters):
                    at = total * (number + 1) // (len(disasters) + 1)
                    while await witness.count(EFFECTS) < at * 0.8 and await witness.count(PUBLISHED) < total:  # noqa: ASYNC110  others do it
                        await asyncio.sleep(0.05)
                    await befall(disaster, fleet, chance, broker, own_postgres)
                await _all_is_done(witness, total)
            await _nothing_is_lost_or_doubled(witness, numbers, keys)
            assert fleet.deaths >= numbers.kills
        finally:
            await engine.dispose()


async def _all_is_done(witness: Witness, total: int) -> None:
    """Return when nothing waits any more."""
    bad = sa.select(PUBLISHED.c.key, PUBLISHED.c.number)
    while await witness.count(PUBLISHED) < total:  # noqa: ASYNC110  others do it
        await asyncio.sleep(0.1)
    poison = sum(is_refused(key, number) or is_odd(key, number) for key, number in await witness.rows(bad))
    while (  # noqa: ASYNC110  as above
        await witness.count(EFFECTS) < total - poison
        or len(await witness.letters()) < poison + 1
        or await witness.count(OUTBOX)
    ):
        await asyncio.sleep(0.2)


async def _nothing_is_lost_or_doubled(witness: Witness, numbers: Numbers, keys: list[str]) -> None:
    effects: dict[str, list[int]] = {key: [] for key in keys}
    for key, number in await witness.rows(sa.select(EFFECTS.c.key, EFFECTS.c.number).order_by(EFFECTS.c.id)):
        effects[key].append(number)
    wanted = {
        key: [number for number in range(numbers.each) if not is_refused(key, number) and not is_odd(key, number)]
        for key in keys
    }
    assert effects == wanted
    errors = (await witness.letters()).values()
    poison = [(key, number) for key in keys for number in range(numbers.each)]
    assert sum("ValueError: for good" in each for each in errors) == sum(is_refused(*each) for each in poison)
    assert sum("cannot be read" in each for each in errors) == sum(is_odd(*each) for each in poison)
    assert sum("its process ended" in each for each in errors) == 1
    assert len(errors) == sum(is_refused(*each) or is_odd(*each) for each in poison) + 1
    assert await witness.count(PARKED) == 0
