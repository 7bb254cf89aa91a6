"""A batch as one statement on PostgreSQL: the same as the long way, also beside other sessions."""

import asyncio

import asyncpg
import pytest
import sqlalchemy as sa

from mainstay.database import Conflict, FenceLost
from mainstay.database._statements import BY_COLUMN


@pytest.fixture
def statements(monkeypatch):
    """The statements that the recorder sends."""
    sent: list[str] = []
    for name in ("execute", "fetch", "executemany"):
        real = getattr(asyncpg.Connection, name)

        async def watched(self, query, *args, _real=real, **kwargs):
            sent.append(query)
            return await _real(self, query, *args, **kwargs)

        monkeypatch.setattr(asyncpg.Connection, name, watched)
    return sent


async def test_fenced_writes_are_one_statement(postgres, open_database, tables, count, statements):
    """Inserts under fences are one message; the rows of a fence that is lost are left out."""
    async with open_database(postgres) as db:
        await db.write(tables.own, [{"id": n, "epoch": 5} for n in range(1, 4)])
        statements.clear()
        results = await asyncio.gather(
            *(
                db.write(tables.add, {"id": n, "text": "x"}, fence=tables.fences.at(n, 4 if n == 2 else 5))
                for n in range(1, 5)
            ),
            db.write(tables.add, {"id": 10, "text": "no fence"}),
            return_exceptions=True,
        )
        assert [type(each) for each in results] == [type(None), FenceLost, type(None), FenceLost, type(None)]
        (sent,) = statements
        assert sent.startswith("WITH fence AS (SELECT ")
        assert await count(db) == 3


async def test_one_write_that_is_refused_does_not_fail_the_others(postgres, open_database, tables, count):
    """The batch is refused as a whole and repeated write by write."""
    async with open_database(postgres) as db:
        await db.write(tables.own, {"id": 1, "epoch": 5})
        fence = tables.fences.at(1, 5)
        writes = (db.write(tables.add, {"id": n, "text": "x"}, fence=fence) for n in (1, 2, 2, 3))
        results = await asyncio.gather(*writes, return_exceptions=True)
        assert sorted(type(each).__name__ for each in results) == ["Conflict", "NoneType", "NoneType", "NoneType"]
        assert await count(db) == 3
        with pytest.raises(Conflict):
            await db.write(tables.add, {"id": 1, "text": "x"}, fence=fence)


async def test_a_row_that_another_session_changes_meanwhile(postgres, open_database, tables, count):
    """The check waits for it and sees its newest form, and so do the updates of the same statement."""
    raise_text = (
        sa.update(tables.owners)
        .where(tables.owners.c.id == sa.bindparam("which"), tables.owners.c.epoch == sa.bindparam("at"))
        .values(epoch=sa.bindparam("to"))
        .execution_options(**{BY_COLUMN: True})
    )
    async with open_database(postgres) as db, open_database(postgres) as other:
        await db.write(tables.own, [{"id": 1, "epoch": 5}, {"id": 2, "epoch": 5}])
        async with other.engine.begin() as session:
            # The row changes without its epoch changing, and another one is taken over.
            await session.execute(sa.text("UPDATE owners SET epoch = 5 WHERE id = 1"))
            await session.execute(sa.text("UPDATE owners SET epoch = 6 WHERE id = 2"))
            tasks = []
            for number in (1, 2):
                fence = tables.fences.at(number, 5)

                async def write(number=number, fence=fence):
                    async with db.batch(fence=fence, route=number):
                        await db.write(tables.add, {"id": number, "text": "x"})
                        await db.write(raise_text, {"which": number, "at": 5, "to": 7})

                tasks.append(asyncio.create_task(write()))
            waiting = sa.text(
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
            )
            async with asyncio.timeout(30):
                while (await other.read(waiting))[0][0] == 0:  # noqa: ASYNC110  the server tells nobody
                    await asyncio.sleep(0.001)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(each) for each in results] == [type(None), FenceLost]
        epochs = await db.read(sa.select(tables.owners.c.epoch).order_by(tables.owners.c.id))
        assert [epoch for (epoch,) in epochs] == [7, 6]
        assert await count(db) == 1


async def test_updates_that_could_meet_go_the_long_way(postgres, open_database, tables):
    """Two statements that update one table may concern one row, so each is carried out by itself."""
    by_column = tables.touch.execution_options(**{BY_COLUMN: True})
    also = sa.update(tables.notes).where(tables.notes.c.id == sa.bindparam("which")).values(n=tables.notes.c.n + 10)
    also = also.execution_options(**{BY_COLUMN: True})
    async with open_database(postgres) as db:
        await db.write(tables.add, {"id": 1, "text": "x"})
        await asyncio.gather(db.write(by_column, {"which": 1}), db.write(also, {"which": 1}))
        async with db.batch(route="one"):  # the update is to see the row
            await db.write(tables.add, {"id": 2, "text": "x"})
            await db.write(by_column, {"which": 2})
        assert [n for (n,) in await db.read(sa.select(tables.notes.c.n).order_by(tables.notes.c.id))] == [11, 1]
