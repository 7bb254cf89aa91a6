"""Cancel scopes of anyio, which cancel a task again at each of its turns until it has left them."""

import asyncio
import gc

import anyio
import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from mainstay.database.testing import database

# Where a scope ends while aiosqlite opens a connection, that is left to the garbage collector, which closes it; since
# Python 3.13 it says so.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in. <sqlite3:pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _opened_in_vain():
    """It is collected in the test whose scope it was."""
    yield
    gc.collect()


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
