"""The recorder from inside: closing, unforeseen errors, a full disk, and how statements are merged."""

import asyncio
import contextlib

import pytest
import sqlalchemy as sa
from prometheus_client import REGISTRY

from mainstay.core import Health
from mainstay.core.testing import eventually
from mainstay.database import DatabaseBusy, DatabaseError, DatabaseUnavailable
from mainstay.database._pending import PendingWrite
from mainstay.database._recorder import merge
from mainstay.database._statements import _CACHED, Literal


def sample(name: str) -> float:
    """A metric's value."""
    return REGISTRY.get_sample_value(f"mainstay_database_{name}") or 0.0


async def test_closing_commits_what_is_waiting(tmp_path, postgres, open_database, tables, count):
    """Writes that were handed in when the App stops are durable, under their fences too; later ones are refused."""
    for url in (f"sqlite:///{tmp_path / 'x.db'}", postgres):
        async with open_database(url, recorder_connections=2) as db:
            lease = await db.lease("until the end")
            writes = [
                asyncio.create_task(db.write(tables.add, {"id": i, "text": "x"}, fence=lease.fence))
                for i in range(3_000)
            ]
            await asyncio.wait(writes, return_when=asyncio.FIRST_COMPLETED)
        assert await asyncio.gather(*writes) == [None] * 3_000
        with pytest.raises(DatabaseUnavailable) as caught:
            await db.write(tables.add, {"id": 5_000, "text": "x"})
        assert caught.value.no_effect
        assert not caught.value.retryable
        async with open_database(url) as db:
            assert await count(db) == 3_000


async def test_closing_does_not_wait_for_somebody_elses_lock(postgres, open_database, tables, count):
    """A write that waits for a lock when the Database closes fails within the busy timeout, having done nothing."""
    async with open_database(postgres) as other, other.engine.connect() as user:
        await user.execute(tables.add, {"id": 1, "text": "the user's"})
        async with open_database(postgres, busy_timeout_seconds=0.5) as db:
            waiting = asyncio.create_task(db.write(tables.add, {"id": 1, "text": "mine"}))
            await db.write(tables.add, {"id": 2, "text": "x"})
        with pytest.raises(DatabaseBusy) as caught:
            await waiting
        assert caught.value.no_effect
        await user.rollback()
        assert await count(other) == 1


async def test_an_unforeseen_error_is_told_to_those_it_concerns(db, tables, count, monkeypatch):
    """An error of the recorder itself reaches the callers of that batch, as one of unknown effect; it goes on."""
    queue = db._recorder._queues[0]
    good = queue._writer.commit

    async def broken(take):
        take()
        raise ZeroDivisionError

    monkeypatch.setattr(queue._writer, "commit", broken)
    results = await asyncio.gather(
        *(db.write(tables.add, {"id": i, "text": "x"}) for i in range(5)), return_exceptions=True
    )
    monkeypatch.setattr(queue._writer, "commit", good)
    assert all(isinstance(result, DatabaseError) and not result.no_effect for result in results)
    assert len({id(result) for result in results}) == 5
    await db.write(tables.add, {"id": 1, "text": "x"})
    assert await count(db) == 1


async def test_a_full_disk_loses_nothing(tmp_path, open_database, tables, count, until):
    """Where SQLite cannot grow any more, writes fail having done nothing; once there is room, they succeed."""
    async with open_database(f"sqlite:///{tmp_path / 'x.db'}") as db:
        writer = db._recorder._queues[0]._writer
        await db.write(tables.add, {"id": 0, "text": "x"})

        async def allow(pages: int) -> None:
            await writer._call(lambda: writer._connection.execute(f"PRAGMA max_page_count={pages}").fetchone())

        await allow(40)
        results = await asyncio.gather(
            *(db.write(tables.add, {"id": i, "text": "x" * 20_000}) for i in range(1, 40)), return_exceptions=True
        )
        assert any(isinstance(result, DatabaseError) and result.no_effect for result in results)
        assert await count(db) == 1 + results.count(None)
        with pytest.raises(DatabaseUnavailable, match="SQLite cannot write at the moment"):
            await db.write(tables.add, {"id": 99, "text": "x" * 20_000_000})
        assert await db.health() == Health("down", "SQLite cannot write at the moment: database or disk is full")
        await allow(1_000_000)
        await db.write(tables.add, {"id": 100, "text": "x" * 20_000})

        async def is_ok():
            return (await db.health()).status == "ok"

        await until(is_ok)
        async with db.transaction():
            await db.write(tables.add, {"id": 101, "text": "x" * 20_000})


async def test_metrics_tell_what_happened(db, tables):
    """Commits, rows and batches are counted, connections in use come back to none, leases are those held."""
    rows, batches = sample("rows_total"), sample("batch_rows_count")
    held, in_use = sample("leases_held"), sample("pool_in_use")
    await asyncio.gather(*(db.write(tables.add, [{"id": 2 * i}, {"id": 2 * i + 1}]) for i in range(50)))
    assert sample("rows_total") == rows + 100
    assert 1 <= sample("batch_rows_count") - batches <= 50
    assert sample("wait_seconds_count") >= sample("batch_rows_count") - batches
    async with db.transaction():
        assert sample("pool_in_use") == in_use + 1
    assert sample("pool_in_use") == in_use
    limit = sample("pool_limit")
    assert limit == 10
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(10):
            await stack.enter_async_context(db.engine.connect())
        waiting = asyncio.ensure_future(db.read(sa.select(1)))
        await eventually(lambda: sample("pool_waiting") == 1)
        assert sample("pool_in_use") == in_use + limit
    assert len(await waiting) == 1
    assert sample("pool_waiting") == 0
    assert db.engine.sync_engine.pool.logger.name.startswith("sqlalchemy.pool.")  # quiet, unless that is asked for
    lease = await db.lease("counted")
    assert sample("leases_held") == held + 1
    await lease.release()
    assert sample("leases_held") == held


async def test_statements_that_are_made_for_each_call_do_not_pile_up(db, tables, count):
    """The cache of compiled statements is bounded, and a statement at a reused address is not taken for another."""
    for i in range(_CACHED + 50):
        statement = sa.insert(tables.notes) if i % 2 else sa.insert(tables.owners)
        row = {"id": i, "text": "x"} if i % 2 else {"id": i, "epoch": 1}
        db._statements.prepared(statement, tuple(row))
        if i % 100 < 2:
            await db.write(statement, row)
    assert len(db._statements._prepared) <= _CACHED
    assert await count(db) == (_CACHED + 50) // 100 + 1


async def test_merging_keeps_every_order_that_matters():
    """Statements of one write and of one route stay in order, and those of others meet in as few groups as possible."""
    a, b = Literal("a"), Literal("b")

    def write(number, *statements, route=None):
        return PendingWrite([(statement, [(number,)]) for statement in statements], None, route)

    def groups(*writes):
        return [(group.sql, [row[0] for row in rows]) for group, rows in merge(writes)]

    assert groups(*(write(i, a, b) for i in range(3))) == [("a", [0, 1, 2]), ("b", [0, 1, 2])]
    assert groups(write(0, b), write(1, a, b), write(2, b)) == [("b", [0]), ("a", [1]), ("b", [1, 2])]
    assert groups(write(0, a, b, a)) == [("a", [0]), ("b", [0]), ("a", [0])]
    routed = groups(write(0, a, route=1), write(1, b, route=1), write(2, a, route=1), write(3, a, route=2))
    assert routed == [("a", [0]), ("b", [1]), ("a", [2, 3])]
    assert groups(write(0, a, route=1), write(1, a, route=1), write(2, b, route=2)) == [("a", [0, 1]), ("b", [2])]
