"""Cancel scopes of anyio, which cancel a task again at each of its turns until it has left them."""

import asyncio
import sqlite3
from contextlib import closing

import anyio
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from mainstay.core.testing import eventually
from mainstay.database._engine import Threads
from mainstay.database.testing import database


@pytest.fixture
def slowly(monkeypatch):
    """The end of a unit takes many turns of the loop; says how often it has begun and ended."""
    times = {"begun": 0, "ended": 0}

    def slow(session_method):
        original = getattr(AsyncSession, session_method)

        async def wrapped(self):
            times["begun"] += 1
            for _ in range(20):
                await asyncio.sleep(0.001)
            await original(self)
            times["ended"] += 1

        monkeypatch.setattr(AsyncSession, session_method, wrapped)

    slow("commit")
    slow("close")
    return times


def in_use(db):
    """How many connections of the pool are in use, or were not given back."""
    return db.engine.sync_engine.pool.checkedout()


async def test_a_scope_that_ends_during_the_commit_lets_it_end(db, tables, count, slowly):
    """What was being committed is there, the scope's owner learns that it is over, and nothing is held."""
    with anyio.CancelScope() as scope:
        async with db.transaction():
            await db.write(tables.add, {"id": 1, "text": "x"})
            asyncio.get_running_loop().call_later(0.005, scope.cancel)
        pytest.fail("the scope was cancelled meanwhile")
    assert scope.cancelled_caught
    assert slowly["begun"] == slowly["ended"]
    assert await count(db) == 1
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    assert in_use(db) == 0


async def test_a_scope_that_ends_inside_a_unit_rolls_it_back(db, tables, count, slowly):
    """The rollback is not interrupted either: the next unit finds the connection, and the writer's turn."""
    for number in range(12):  # more than there are connections
        with anyio.move_on_after(0.002) as scope:
            async with db.transaction():
                await db.write(tables.add, {"id": number, "text": "x"})
                await asyncio.sleep(60)
        assert scope.cancelled_caught
    assert slowly["begun"] == slowly["ended"]
    assert in_use(db) == 0
    async with asyncio.timeout(30), db.transaction():
        await db.write(tables.add, {"id": 100, "text": "x"})
    assert await count(db) == 1


@pytest.mark.parametrize("url", ["file"], indirect=True)
@pytest.mark.parametrize("again_and_again", [False, True])
async def test_a_unit_that_ends_while_it_begins_keeps_no_writer_out(db, url, tables, count, again_and_again):
    """SQLite waits in a thread for another's transaction: what begins there after its owner has gone is rolled back."""

    async def unit():
        async with db.transaction():
            pytest.fail("another holds the database")

    scope = anyio.CancelScope()

    async def in_a_scope():
        with scope:
            await unit()

    with closing(sqlite3.connect(url.partition(":///")[2], isolation_level=None, timeout=0.0)) as other:
        other.execute("BEGIN IMMEDIATE")
        task = asyncio.ensure_future(in_a_scope() if again_and_again else unit())
        await eventually(lambda: in_use(db) == 1, what="its connection")
        if again_and_again:
            scope.cancel()
        else:
            task.cancel()
        await eventually(lambda: in_use(db) == 0, what="the end of its owner")
        other.execute("ROLLBACK")
        await asyncio.wait([task])
        assert in_use(db) == 0
        await eventually(lambda: is_free(other), what="the writer's turn")
        async with asyncio.timeout(30), db.transaction():
            await db.write(tables.add, {"id": 1, "text": "x"})
        assert await count(db) == 1


def is_free(other):
    """Whether another process may write."""
    try:
        other.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        return False
    other.execute("ROLLBACK")
    return True


@pytest.mark.parametrize("url", ["memory", "file"], indirect=True)
@pytest.mark.parametrize("where", ["read", "unit", "engine"])
async def test_a_scope_that_ends_during_a_statement_leaves_nothing_behind(url, open_database, where):
    """No task that waits for ever, no connection in use, no thread; the database stops."""
    statement = sa.text(
        "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300000) SELECT count(*) FROM n"
    )
    before = asyncio.all_tasks()
    async with open_database(url) as db:
        for _ in range(3):
            with anyio.CancelScope() as scope:
                asyncio.get_running_loop().call_later(0.02, scope.cancel)
                if where == "read":
                    await db.read(statement)
                elif where == "unit":
                    async with db.transaction() as session:
                        await session.execute(statement)
                else:
                    async with db.engine.connect() as connection:
                        await connection.execute(statement)
            assert scope.cancelled_caught
        await eventually(lambda: in_use(db) == 0, what="the connections")
    assert asyncio.all_tasks() == before


async def test_a_session_of_ones_own_is_rolled_back_too(db, tables, count, slowly):
    """It is another's to close, and is left without a transaction."""
    async with AsyncSession(db.engine) as session:
        with anyio.CancelScope() as scope:
            _ = await session.connection(execution_options=db._to_write)
            async with db.transaction(session):
                await db.write(tables.add, {"id": 1, "text": "x"})
                scope.cancel()
                await asyncio.sleep(60)
        assert scope.cancelled_caught
        assert not session.in_transaction()
    async with asyncio.timeout(30):
        await db.write(tables.add, {"id": 2, "text": "x"})
    assert await count(db) == 1


async def test_a_scope_around_a_database_that_stops_lets_it_stop(url, tables, count, open_database):
    """Writes that were handed in are durable, and connections and threads are gone, before the scope is left."""
    with anyio.CancelScope() as scope:
        async with open_database(url) as db:
            await db.lease("one")
            writes = [asyncio.ensure_future(db.write(tables.add, {"id": n, "text": "x"})) for n in range(50)]
            await asyncio.sleep(0)
            scope.cancel()
    assert scope.cancelled_caught
    results = await asyncio.gather(*writes, return_exceptions=True)
    assert db._keeper._closed
    assert not db._keeper._thread.is_alive()
    assert in_use(db) == 0
    if ":memory:" not in url:
        async with database(url) as again:
            assert await count(again) == results.count(None)
            assert await again.lease("one") is not None


@pytest.mark.parametrize("closed", [False, True])
async def test_a_connection_may_be_ended_more_than_once(tmp_path, closed):
    """Its pool may end what a scope has ended, or closed, already; the thread is gone then, and answers nothing."""
    threads = Threads()
    connection = await threads.open(tmp_path / "test.db")
    if closed:
        await connection.close()
    for _ in range(2):
        threads._end(connection)
    async with asyncio.timeout(30):
        await threads.ended()
    await asyncio.to_thread(connection._thread.join, 30)
    assert not connection._thread.is_alive()
