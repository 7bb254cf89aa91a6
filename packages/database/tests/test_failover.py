"""A standby is promoted, a primary demoted, a process freezes, a network loses packets: nothing is lost or held up."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url

from mainstay.core import App
from mainstay.core.testing import eventually
from mainstay.database import (
    CommitUnknown,
    Database,
    DatabaseBusy,
    DatabaseError,
    DatabaseModule,
    DatabaseSettings,
    DatabaseUnavailable,
)
from mainstay.database.testing import database
from mainstay_servers import Forwarder, MissingServer, Pair

CHILD = Path(__file__).parent / "child.py"
LIMIT_SECONDS = 60.0


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A primary and a standby behind one address."""
    try:
        with Pair() as servers:
            yield servers
    except MissingServer as error:
        pytest.skip(str(error))


async def add(db, tables, number: int, *, unit: bool, fence=None) -> None:
    """Add a note, again and again until it is acknowledged or there already."""
    while True:
        try:
            async with db.transaction() if unit else contextlib.nullcontext():
                await db.write(tables.add, {"id": number, "text": "x"}, fence=fence)
        except CommitUnknown:
            rows = await known(db, tables, number)
            if rows:
                return
        except DatabaseError as error:
            if not error.retryable:
                raise
            await asyncio.sleep(0.05)
        else:
            return


async def known(db, tables, number: int) -> bool:
    """Whether the note is there, as soon as the database answers."""
    while True:
        try:
            return bool(await db.read(sa.select(tables.notes.c.id).where(tables.notes.c.id == number)))
        except (DatabaseUnavailable, DatabaseBusy):
            await asyncio.sleep(0.05)


async def test_a_promotion_loses_nothing(pair, open_database, tables, count):
    """Writes, units and fenced writes go on over the loss of the primary; every acknowledged row is on the new one."""
    async with asyncio.timeout(LIMIT_SECONDS), open_database(pair.url, busy_timeout_seconds=20.0) as db:
        lease = await db.lease("work", seconds=40.0)
        done: list[int] = []
        promoted = asyncio.Event()

        async def work(first: int) -> None:
            number = first
            while not promoted.is_set() or number < first + 200:
                await add(db, tables, number, unit=first % 2_000 == 0, fence=lease.fence if first == 3_000 else None)
                done.append(number)
                number += 1

        async with asyncio.TaskGroup() as group:
            for first in range(1_000, 7_000, 1_000):
                group.create_task(work(first))
            await eventually(lambda: len(done) > 100, seconds=30)
            await asyncio.to_thread(pair.promote)
            promoted.set()
        rows = {row.id for row in await db.read(sa.select(tables.notes.c.id))}
        assert set(done) <= rows
        assert await count(db) == len(rows)
        assert lease.held
        assert (await db.health()).status == "ok"


async def test_health_says_that_the_primary_is_gone(pair, open_database, tables):
    """Down while there is no server that can write, ok when there is one again."""
    async with asyncio.timeout(LIMIT_SECONDS), open_database(pair.url, busy_timeout_seconds=0.5) as db:
        assert (await db.health()).status == "ok"
        await asyncio.to_thread(pair.primary.kill)
        assert (await db.health()).status == "down"
        with pytest.raises(DatabaseUnavailable):
            await db.write(tables.add, {"id": 1, "text": "x"})
        await asyncio.to_thread(pair.standby.promote)
        await asyncio.to_thread(pair.move)
        await add(db, tables, 2, unit=True)
        assert (await db.health()).status == "ok"


async def test_open_connections_to_a_demoted_primary_are_not_used(pair, open_database, tables):
    """It stays reachable and refuses to write: pool, recorder and keeper each find the new one, by one attempt more."""
    async with asyncio.timeout(LIMIT_SECONDS), open_database(pair.url) as db:
        lease = await db.lease("work", seconds=2.0)
        await db.write(tables.add, {"id": 1, "text": "before"})
        async with db.engine.connect() as first, db.engine.connect() as second:  # several in the pool
            await first.execute(sa.select(1))
            await second.execute(sa.select(1))
        await asyncio.to_thread(pair.demote, restart=False)
        assert (await db.health()).status == "down"
        await asyncio.to_thread(pair.move)
        await db.write(tables.add, {"id": 2, "text": "the recorder tries again by itself"})
        await add(db, tables, 3, unit=True)
        async with db.transaction():
            await db.write(tables.add, {"id": 4, "text": "the whole pool was made anew"})
        epoch = lease.epoch
        until = lease._until
        await eventually(lambda: lease._until > until, seconds=30)
        assert (lease.held, lease.epoch) == (True, epoch)
        server = sa.select(sa.func.inet_server_port())
        assert [tuple(row) for row in await db.read(server)] == [(pair.standby.port,)]
        assert (await db.health()).status == "ok"


async def test_nothing_is_read_from_a_demoted_primary_once_it_is_noticed(pair, open_database, tables):
    """Reads would never be refused there, and miss what was written since: who notices first tells all others."""
    server = sa.select(sa.func.inet_server_port())
    async with asyncio.timeout(LIMIT_SECONDS), open_database(pair.url) as db:
        await db.write(tables.add, {"id": 1, "text": "before"})
        async with db.engine.connect() as first, db.engine.connect() as second:  # several in the pool
            for connection in (first, second):
                assert (await connection.execute(server)).scalar_one() == pair.primary.port
        await asyncio.to_thread(pair.demote, restart=False)
        await asyncio.to_thread(pair.move)
        await db.write(tables.add, {"id": 2, "text": "by the recorder, whose connection is not of the pool"})
        async with db.engine.connect() as first, db.engine.connect() as second:
            for connection in (first, second):
                assert (await connection.execute(server)).scalar_one() == pair.standby.port
        assert [tuple(row) for row in await db.read(sa.select(tables.notes.c.id).order_by(tables.notes.c.id))] == [
            (1,),
            (2,),
        ]


async def test_a_server_that_only_reads_is_not_connected_to(pair, open_database, tables):
    """A primary restarted as a standby accepts connections: no use of it, until the address leads to the new one."""
    async with asyncio.timeout(LIMIT_SECONDS), open_database(pair.url, busy_timeout_seconds=30.0) as db:
        await db.write(tables.add, {"id": 1, "text": "before"})
        await asyncio.to_thread(pair.demote, restart=True)
        waiting = asyncio.create_task(db.write(tables.add, {"id": 2, "text": "x"}))
        with pytest.raises(DatabaseUnavailable, match="read-write"):
            async with db.transaction():
                pass
        assert (await db.health()).status == "down"
        await asyncio.to_thread(pair.move)
        await waiting
        await add(db, tables, 3, unit=True)
        assert (await db.health()).status == "ok"


async def test_a_reader_of_a_standby(pair):
    """With `target_session_attrs=any` in the address, a service that only reads may live on a standby, healthy."""
    async with database(pair.url):
        pass  # makes the tables
    url = make_url(pair.url).set(port=pair.standby.port).update_query_dict({"target_session_attrs": "any"})
    app = App(DatabaseModule.for_root(DatabaseSettings(url=url.render_as_string(hide_password=False))))
    async with app:
        db = app.get(Database)
        assert (await db.read(sa.select(sa.func.pg_is_in_recovery())))[0][0] is True
        assert (await db.health()).status == "ok"


@pytest.mark.parametrize("by", ["postgres", "pgbouncer"])
async def test_a_frozen_process_holds_its_locks_for_seconds(request, by, open_database, tables):
    """Stopped between BEGIN and COMMIT: the server ends its transaction, and other writes of the row go on."""
    direct = request.getfixturevalue("postgres")
    url = request.getfixturevalue(by)
    async with asyncio.timeout(LIMIT_SECONDS), open_database(direct, busy_timeout_seconds=40.0) as db:
        await db.write(tables.add, {"id": 1, "text": "x"})
        child = await asyncio.create_subprocess_exec(
            sys.executable, str(CHILD), "stay", url, "1.0", stdout=asyncio.subprocess.PIPE
        )
        try:
            assert child.stdout is not None
            assert (await child.stdout.readline()).strip() == b"holding"
            child.send_signal(signal.SIGSTOP)
            change = sa.update(tables.notes).where(tables.notes.c.id == sa.bindparam("which"))
            await db.write(change.values(text="alone"), {"which": 1})
            async with db.transaction():
                await db.write(change.values(text="in a unit"), {"which": 1})
            assert [row.text for row in await db.read(sa.select(tables.notes.c.text))] == ["in a unit"]
        finally:
            child.kill()
            await child.communicate()


@pytest.mark.parametrize("unit", [True, False])
async def test_a_network_that_loses_packets(postgres, open_database, tables, unit):
    """What was sent is never answered: the caller is told within the bound, the locks are free, and work goes on."""
    with Forwarder(make_url(postgres).port or 5432) as address:
        url = make_url(postgres).set(port=address.port).render_as_string()
        bounds = {"idle_transaction_seconds": 1.0, "statement_timeout_seconds": 2.0, "busy_timeout_seconds": 2.0}
        async with (
            asyncio.timeout(LIMIT_SECONDS),
            open_database(url, **bounds) as far,
            database(postgres, busy_timeout_seconds=40.0) as near,
        ):
            await far.write(tables.add, {"id": 1, "text": "x"})
            change = sa.update(tables.notes).where(tables.notes.c.id == sa.bindparam("which"))
            with pytest.raises((DatabaseUnavailable, CommitUnknown)):
                async with far.transaction() if unit else contextlib.nullcontext():
                    if unit:
                        await far.write(change.values(text="far"), {"which": 1})
                    address.vanish()
                    await far.write(change.values(text="far again"), {"which": 1})
            await near.write(change.values(text="near"), {"which": 1})
            await add(far, tables, 2, unit=unit)
            assert {row.id for row in await near.read(sa.select(tables.notes.c.id))} == {1, 2}
