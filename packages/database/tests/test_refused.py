"""What the database refuses late, or inside a unit of work: no other pays for it, and no caller takes it for done."""

import asyncio

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from mainstay.database import Conflict, DatabaseError, UnitOfWorkError

_LATE = sa.insert(sa.table("late", sa.column("id", sa.Integer), sa.column("other", sa.Integer)))


@pytest.fixture
async def late(db):
    """An insert into a table whose foreign key is looked at only by the commit."""
    async with db.transaction() as session:
        await session.execute(
            sa.text(
                "CREATE TABLE late (id int PRIMARY KEY, other int REFERENCES late (id) DEFERRABLE INITIALLY DEFERRED)"
            )
        )
    return _LATE


async def test_a_caught_refusal_is_not_taken_for_a_commit(db, tables, count):
    """PostgreSQL answers COMMIT with a silent rollback then; the unit must fail, on every database alike."""
    told: list[str] = []
    await db.write(tables.add, {"id": 1, "text": "x"})
    with pytest.raises(UnitOfWorkError, match="begin_nested"):
        async with db.transaction():
            db.after_commit(lambda: told.append("committed"))
            await db.write(tables.add, {"id": 2, "text": "x"})
            with pytest.raises(Conflict):
                await db.write(tables.add, {"id": 1, "text": "x"})
    with pytest.raises(UnitOfWorkError, match="begin_nested"):
        async with db.transaction() as session:
            await session.execute(tables.add, {"id": 2, "text": "x"})
            with pytest.raises(DatabaseError):
                await session.execute(sa.text("SELECT nothing FROM nowhere"))
    assert (await count(db), told) == (1, [])


async def test_a_caught_refusal_in_a_session_of_ones_own(db, tables, count):
    """Where the owner would commit, the block raises and rolls back, and no callback runs."""
    told: list[str] = []
    await db.write(tables.add, {"id": 1, "text": "x"})
    async with AsyncSession(db.engine) as session:
        await session.execute(tables.add, {"id": 2, "text": "x"})
        with pytest.raises(UnitOfWorkError, match="begin_nested"):
            async with db.transaction(session):
                db.after_commit(lambda: told.append("committed"))
                with pytest.raises(Conflict):
                    await db.write(tables.add, {"id": 1, "text": "x"})
        await session.commit()
    assert (await count(db), told) == (1, [])


async def test_a_refusal_inside_a_savepoint_is_forgotten_with_it(db, tables, count):
    """What was rolled back to a savepoint, or happened in a transaction before, dooms nothing."""
    await db.write(tables.add, {"id": 1, "text": "x"})
    for number in range(2, 24):  # more than there are connections
        with pytest.raises(Conflict):
            async with db.transaction():
                await db.write(tables.add, {"id": 1, "text": "x"})
        async with db.transaction() as session:
            await db.write(tables.add, {"id": number, "text": "x"})
            with pytest.raises(Conflict):
                async with session.begin_nested():
                    await db.write(tables.add, {"id": 1, "text": "x"})
    assert await count(db) == 23


async def test_a_commit_that_is_refused_leaves_no_transaction_behind(db, tables, count, late):
    """After a deferred constraint refused the commit of a unit of work, others can write."""
    for number in range(3):
        with pytest.raises(Conflict):
            async with db.transaction():
                await db.write(late, {"id": number, "other": 77})
        async with asyncio.timeout(30):
            await db.write(tables.add, {"id": number, "text": "x"})
            async with db.transaction():
                await db.write(tables.add, {"id": number + 10, "text": "x"})
    assert await count(db) == 6


async def test_a_deferred_constraint_is_the_conflict_of_its_own_write_only(db, tables, count, late):
    """Writes that share a batch with one that the commit refuses are committed all the same."""
    results = await asyncio.gather(
        *(db.write(tables.add, {"id": number, "text": "x"}) for number in range(10)),
        db.write(late, {"id": 1, "other": 77}),
        *(db.write(tables.add, {"id": number, "text": "x"}) for number in range(10, 20)),
        return_exceptions=True,
    )
    assert isinstance(results.pop(10), Conflict)
    assert results == [None] * 20
    assert await count(db) == 20
