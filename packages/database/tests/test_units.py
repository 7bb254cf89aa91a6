"""Units of work: what holds on every database."""

import asyncio
import time
from contextvars import Context, copy_context

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase

from mainstay.core import spawn
from mainstay.database import Conflict, DatabaseBusy, FenceLost, UnitOfWorkError


async def test_a_unit_commits_as_a_whole_or_not_at_all(db, tables, count):
    """Writes, the session's own statements and reads are one transaction, invisible to others until its end."""
    async with db.transaction() as session:
        await db.write(tables.add, {"id": 1, "text": "x"})
        await session.execute(tables.add, {"id": 2, "text": "x"})
        assert (await db.read(sa.select(sa.func.count()).select_from(tables.notes)))[0][0] == 2
        assert await count(db) == 0
    assert await count(db) == 2
    with pytest.raises(ZeroDivisionError):
        async with db.transaction():
            await db.write(tables.add, {"id": 3, "text": "x"})
            _ = 1 / 0
    assert await count(db) == 2


async def test_prototype_1_the_first_write_of_a_session_rolls_back_with_it(db, tables, count):
    """A write before any other statement of the session does not survive the rollback, as a raw one would."""
    with pytest.raises(ZeroDivisionError):
        async with db.transaction():
            await db.write(tables.add, [{"id": 1, "text": "x"}, {"id": 2, "text": "x"}])
            _ = 1 / 0
    async with AsyncSession(db.engine) as session, db.transaction(session):
        await db.write(tables.add, {"id": 3, "text": "x"})
        await session.rollback()
    assert await count(db) == 0


async def test_an_inner_transaction_is_the_outer_one(db, tables, count):
    """An inner block yields the same session and commits nothing by itself."""
    async with db.transaction() as outer:
        async with db.transaction() as inner:
            assert inner is outer
            await db.write(tables.add, {"id": 1, "text": "x"})
        async with db.transaction(outer) as same:
            assert same is outer
        assert await count(db) == 0
    assert await count(db) == 1


async def test_an_inner_block_that_failed_cannot_be_half_committed(db, tables, count):
    """Catching an inner block's exception leads to an error at the end; inside a savepoint it is fine."""
    seen = []
    with pytest.raises(UnitOfWorkError, match="begin_nested"):
        async with db.transaction():
            db.after_commit(lambda: seen.append("never"))
            try:
                async with db.transaction():
                    await db.write(tables.add, {"id": 1, "text": "half"})
                    _ = 1 / 0
            except ZeroDivisionError:
                pass
            with pytest.raises(UnitOfWorkError):
                await db.write(tables.add, {"id": 2, "text": "x"})
    assert await count(db) == 0
    async with db.transaction() as session:
        db.after_commit(lambda: seen.append("committed"))
        await db.write(tables.add, {"id": 3, "text": "x"})
        try:
            async with session.begin_nested(), db.transaction():
                await db.write(tables.add, {"id": 4, "text": "half"})
                _ = 1 / 0
        except ZeroDivisionError:
            await db.write(tables.add, {"id": 5, "text": "x"})
    assert await count(db) == 2
    assert seen == ["committed"]


async def test_a_child_task_cannot_use_its_parents_open_unit(db, tables, count):
    """Every use raises and names the remedy, nothing is written twice or lost; once it is closed it counts as none."""
    opened, closed = asyncio.Event(), asyncio.Event()

    async def child():
        for use in (
            lambda: db.write(tables.add, {"id": 2, "text": "x"}),
            lambda: db.read(sa.select(tables.notes)),
            lambda: asyncio.to_thread(db.in_unit_of_work),
        ):
            with pytest.raises(UnitOfWorkError, match="spawn"):
                await use()
        with pytest.raises(UnitOfWorkError):
            db.transaction()
        with pytest.raises(UnitOfWorkError):
            db.batch()
        with pytest.raises(UnitOfWorkError):
            db.after_commit(print)
        opened.set()
        await closed.wait()
        assert not db.in_unit_of_work()
        await db.write(tables.add, {"id": 3, "text": "x"})

    async with db.transaction():
        await db.write(tables.add, {"id": 1, "text": "x"})
        task = asyncio.create_task(child())
        await asyncio.wait([asyncio.create_task(opened.wait()), task], return_when=asyncio.FIRST_COMPLETED)
    closed.set()
    await task
    assert await count(db) == 2


async def test_an_unrelated_task_is_not_part_of_the_unit(db, tables, count, until):
    """A task with an empty context writes on its own, and what it wrote stays when the unit is rolled back."""

    async def other():
        assert not db.in_unit_of_work()
        await db.write(tables.add, {"id": 2, "text": "x"})

    with pytest.raises(ZeroDivisionError):
        async with db.transaction():
            await db.write(tables.add, {"id": 1, "text": "x"})
            task = spawn(other(), name="other")
            await asyncio.sleep(0)
            _ = 1 / 0
    await task
    assert await count(db) == 1


async def test_after_commit(db, tables):
    """Callbacks run once, in order, after the commit and not after a rollback; one that fails harms no other."""
    seen: list[object] = []
    db.after_commit(lambda: seen.append("at once"))
    assert seen == ["at once"]
    async with db.transaction():
        db.after_commit(lambda: seen.append(1))
        db.after_commit(lambda: 1 / 0)
        async with db.transaction(), db.batch():
            db.after_commit(lambda: seen.append(db.in_unit_of_work()))
        assert seen == ["at once"]
    assert seen == ["at once", 1, False]
    with pytest.raises(ZeroDivisionError):
        async with db.transaction():
            db.after_commit(lambda: seen.append("never"))
            _ = 1 / 0
    with pytest.raises(Conflict):
        async with db.transaction():
            db.after_commit(lambda: seen.append("never"))
            await db.write(tables.add, [{"id": 1, "text": "x"}, {"id": 1, "text": "x"}])
    assert seen == ["at once", 1, False]


async def test_a_session_of_ones_own_that_has_not_begun(db, tables, count):
    """It is begun and committed by the block, rolled back with it, and can be used again afterwards."""
    async with AsyncSession(db.engine, expire_on_commit=False) as session:
        async with db.transaction(session) as same:
            assert same is session
            await db.write(tables.add, {"id": 1, "text": "x"})
            await session.execute(tables.add, {"id": 2, "text": "x"})
        assert await count(db) == 2
        assert not session.in_transaction()
        with pytest.raises(ZeroDivisionError):
            async with db.transaction(session):
                await db.write(tables.add, {"id": 3, "text": "x"})
                _ = 1 / 0
        async with db.transaction(session):
            await db.write(tables.add, {"id": 4, "text": "x"})
    assert await count(db) == 3


async def test_a_session_of_ones_own_in_its_transaction(db, tables, count):
    """Its owner commits: writes and callbacks count from then on, and not if it rolls back."""
    seen = []
    async with AsyncSession(db.engine) as session:
        async with session.begin():
            await session.execute(tables.add, {"id": 1, "text": "x"})
            async with db.transaction(session):
                await db.write(tables.add, {"id": 2, "text": "x"})
                db.after_commit(lambda: seen.append("committed"))
            async with session.begin_nested():
                await session.execute(tables.add, {"id": 3, "text": "x"})
            assert seen == []
            assert await count(db) == 0
        assert seen == ["committed"]
        assert await count(db) == 3
        async with session.begin():
            async with db.transaction(session):
                await db.write(tables.add, {"id": 4, "text": "x"})
                db.after_commit(lambda: seen.append("never"))
            await session.rollback()
        with pytest.raises(ZeroDivisionError):
            async with session.begin(), db.transaction(session):
                await db.write(tables.add, {"id": 5, "text": "x"})
                _ = 1 / 0
        await session.execute(tables.add, {"id": 6, "text": "x"})
        await session.commit()
    assert seen == ["committed"]
    assert await count(db) == 4


async def test_an_adopted_unit_that_failed_is_rolled_back_even_if_its_owner_goes_on(db, tables, count):
    """The failed block's half is never committed by its owner, unless its owner goes back to a savepoint himself."""
    async with AsyncSession(db.engine) as session:
        await session.execute(tables.add, {"id": 1, "text": "x"})
        with pytest.raises(ZeroDivisionError):
            async with db.transaction(session):
                await db.write(tables.add, {"id": 2, "text": "half"})
                _ = 1 / 0
        await session.commit()
        assert await count(db) == 0
        await session.execute(tables.add, {"id": 3, "text": "x"})
        with pytest.raises(ZeroDivisionError):
            async with session.begin_nested(), db.transaction(session):
                await db.write(tables.add, {"id": 4, "text": "half"})
                _ = 1 / 0
        await session.commit()
    assert await count(db) == 1


async def test_two_sessions_cannot_be_one_unit(db):
    """Another session inside a unit of work is refused."""
    async with AsyncSession(db.engine) as session, db.transaction():
        with pytest.raises(UnitOfWorkError, match="one commit"):
            db.transaction(session)


async def test_a_cancelled_unit_is_whole_or_nothing(db, tables, count):
    """Cancelled at any point, also in the middle of its commit, it is all there or not at all, as its callback says."""
    seen: list[int] = []

    async def unit(number: int):
        async with db.transaction():
            db.after_commit(lambda: seen.append(number))
            await db.write(tables.add, {"id": 2 * number, "text": "x"})
            await db.write(tables.add, {"id": 2 * number + 1, "text": "x"})

    for number in range(16):
        task = asyncio.create_task(unit(number))
        for _ in range(number * 3):
            await asyncio.sleep(0)
            if db.dialect == "sqlite":
                await asyncio.to_thread(time.sleep, 0.0002)  # its steps are a thread's, not turns of the loop
        task.cancel()
        cancelled = (await asyncio.gather(task, return_exceptions=True))[0] is not None
        assert cancelled or number in seen
        assert await count(db, tables.notes.c.id.in_([2 * number, 2 * number + 1])) == (2 if number in seen else 0)
        # The connection, and on SQLite the writer's turn, are free again.
        async with asyncio.timeout(30):
            await asyncio.gather(*(db.write(tables.add, {"id": 1000 + number * 10 + i, "text": "x"}) for i in range(3)))
            async with db.transaction():
                await db.write(tables.add, {"id": 1009 + number * 10, "text": "x"})


async def test_observability_16_an_exhausted_pool_neither_deadlocks_nor_waits_for_ever(
    url, open_database, tables, count
):
    """With one connection everything in a unit works; a second unit gets DatabaseBusy after the pool's timeout."""
    async with open_database(url, pool_size=1, pool_timeout_seconds=0.3, busy_timeout_seconds=0.4) as db:
        async with db.transaction():
            await db.write(tables.add, {"id": 1, "text": "x"})
            await db.read(sa.select(tables.notes))
            async with db.transaction(), db.batch():
                await db.write(tables.add, {"id": 2, "text": "x"})
            assert (await db.health()).status == "degraded"

            async def second():
                async with db.transaction():
                    pytest.fail("there is no connection for this")

            begun = time.monotonic()
            with pytest.raises(DatabaseBusy) as caught:
                await spawn(second(), name="second")
            assert time.monotonic() - begun < 30
            assert caught.value.no_effect
            assert caught.value.retryable
        assert await count(db) == 2
        assert (await db.health()).status == "ok"


async def test_workflow_16_a_unit_that_reads_first_may_write(db, tables, count):
    """On SQLite a transaction that read before another wrote could not write any more."""

    async def one(i: int) -> None:
        async with db.transaction():
            (row,) = await db.read(sa.select(sa.func.count()).select_from(tables.notes))
            await db.write(tables.add, {"id": i, "text": str(row[0])})

    await asyncio.gather(
        *(one(i) for i in range(10)), *(db.write(tables.add, {"id": 100 + i, "text": "x"}) for i in range(40))
    )
    assert await count(db) == 50


async def test_prototype_2_a_unit_that_awaits_the_recorder_is_told_so(tmp_path, open_database, tables, count):
    """On SQLite, what waits for a write that waits for the unit fails soon and by name; the unit goes on."""
    async with open_database(f"sqlite:///{tmp_path / 'x.db'}", busy_timeout_seconds=0.3) as db:

        async def other():
            await db.write(tables.add, {"id": 2, "text": "x"})

        async with db.transaction():
            await db.write(tables.add, {"id": 1, "text": "x"})
            with pytest.raises(DatabaseBusy, match="another unit of work of this process"):
                await spawn(other(), name="other")
        assert await count(db) == 1
        await other()
        assert await count(db) == 2


async def test_sqlites_turn_is_fair(tmp_path, open_database, tables, until):
    """A unit of work gets its turn soon while a hundred tasks keep the recorder busy, and they go on too."""
    async with open_database(f"sqlite:///{tmp_path / 'x.db'}") as db:
        stop = asyncio.Event()
        written = [0]

        async def writing(task: int) -> None:
            i = 0
            while not stop.is_set():
                await db.write(tables.add, {"id": task * 1_000_000 + i, "text": "x"})
                written[0] += 1
                i += 1

        tasks = [asyncio.create_task(writing(task)) for task in range(1, 101)]
        await until(lambda: written[0] >= 1_000)
        longest = 0.0
        for i in range(10):
            begun = time.monotonic()
            async with db.transaction():
                longest = max(longest, time.monotonic() - begun)
                await db.write(tables.add, {"id": i, "text": "unit"})
        stop.set()
        await asyncio.gather(*tasks)
        assert longest < 2.0


async def test_after_a_long_turn_sqlite_is_left_to_others_for_a_moment(tmp_path, open_database):
    """Other processes and the leases ask for the file now and then, and must not find it taken every time."""
    async with open_database(f"sqlite:///{tmp_path / 'x.db'}") as db:

        async def unit(seconds: float) -> tuple[float, float]:
            async with db.transaction():
                begun = time.monotonic()
                await asyncio.sleep(seconds)
            return begun, begun + seconds

        long, after = await asyncio.gather(spawn(unit(0.05), name="long"), spawn(unit(0.0), name="after"))
        assert after[0] - long[1] >= 0.005


async def test_prototype_3_a_fenced_unit_stalls_nobody_but_a_takeover(postgres, open_database, tables, count):
    """On PostgreSQL other writes with the same fence go through while a fenced unit is open; taking over must wait."""
    async with open_database(postgres) as db:
        await db.write(tables.own, {"id": 1, "epoch": 1})
        fence = tables.fences.at(1, 1)
        take_over = sa.update(tables.owners).values(epoch=2)

        async def others():
            begun = time.monotonic()
            await asyncio.gather(*(db.write(tables.add, {"id": i, "text": "x"}, fence=fence) for i in range(100)))
            return time.monotonic() - begun

        async with db.transaction():
            await db.write(tables.add, {"id": 1000, "text": "x"}, fence=fence)
            assert await spawn(others(), name="others") < 1.0
            assert await count(db) == 100
            async with db.engine.connect() as connection:
                await connection.execute(sa.text("SET LOCAL lock_timeout = '100ms'"))
                with pytest.raises(DatabaseBusy, match="lock timeout"):
                    await connection.execute(take_over)
        async with db.transaction() as session:
            await session.execute(take_over)
        assert await count(db) == 101


async def test_prototype_4_a_route_has_one_connection(postgres, open_database, tables):
    """With four connections, batches that lock the same rows in either order neither deadlock nor overtake."""
    change = sa.update(tables.notes).where(tables.notes.c.id == sa.bindparam("which")).values(n=sa.bindparam("value"))
    async with open_database(postgres, recorder_connections=4) as db:
        await db.write(tables.add, [{"id": i, "text": "x"} for i in range(38)])

        async def batch(route: int, value: int) -> None:
            pair = [2 * route, 2 * route + 1]
            async with db.batch(route=route):
                for which in pair if value % 2 else reversed(pair):
                    await db.write(change, {"which": which, "value": value})

        # No multiple of the connections: taken in turn, they would give each route the same one by chance.
        await asyncio.gather(*(batch(route, value) for value in range(30) for route in range(19)))
        rows = await db.read(sa.select(tables.notes.c.n))
        assert [row.n for row in rows] == [29] * 38
        (deadlocks,) = await db.read(
            sa.text("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
        )
        assert deadlocks[0] == 0


async def test_a_lock_of_somebody_else_holds_up_only_who_needs_it(postgres, open_database, tables, count):
    """A write that waits for a user's open transaction, and those behind it on its route, are put aside."""
    async with open_database(postgres, busy_timeout_seconds=20) as db:
        async with db.engine.connect() as user:
            await user.execute(tables.add, {"id": 1, "text": "the user's"})
            waiting = asyncio.create_task(db.write(tables.add, {"id": 1, "text": "mine"}, route="a"))
            behind = asyncio.create_task(db.write(tables.add, {"id": 2, "text": "behind"}, route="a"))
            for i in range(3, 53):  # held up as well, the first would fail after the 20 s
                await db.write(tables.add, {"id": i, "text": "x"}, route=f"r{i}")
            assert not waiting.done()
            assert not behind.done()
            await user.rollback()
        async with asyncio.timeout(30):
            await asyncio.gather(waiting, behind)
        assert await count(db, tables.notes.c.text == "mine") == 1
        async with db.engine.connect() as user:
            await user.execute(tables.add, {"id": 100, "text": "the user's"})
            waiting = asyncio.create_task(db.write(tables.add, {"id": 100, "text": "mine"}))
            await db.write(tables.add, {"id": 101, "text": "x"})
            await user.commit()
        with pytest.raises(Conflict):
            await waiting


async def test_a_lock_that_does_not_become_free(postgres, open_database, tables, count):
    """After the busy timeout the write fails, having done nothing, and a cancelled one is not done later either."""
    async with open_database(postgres, busy_timeout_seconds=0.5) as db, db.engine.connect() as user:
        await user.execute(tables.add, [{"id": 1, "text": "the user's"}, {"id": 2, "text": "the user's"}])
        cancelled = asyncio.create_task(db.write(tables.add, {"id": 2, "text": "mine"}))
        with pytest.raises(DatabaseBusy) as caught:
            await db.write(tables.add, {"id": 1, "text": "mine"})
        assert caught.value.no_effect
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        await user.rollback()
        await db.write(tables.add, {"id": 3, "text": "x"})
        assert await count(db) == 1


async def test_a_deferred_constraint_fails_its_own_write(postgres, open_database, tables, count):
    """A violation that PostgreSQL would report at the commit is found, and the rest of the batch is committed."""
    async with open_database(postgres) as db:
        async with db.transaction() as session:
            await session.execute(
                sa.text("CREATE TABLE late (id int, UNIQUE (id) DEFERRABLE INITIALLY DEFERRED)"),
            )
        late = sa.insert(sa.table("late", sa.column("id", sa.Integer)))
        results = await asyncio.gather(
            db.write(late, {"id": 1}),
            db.write(late, [{"id": 2}, {"id": 2}]),
            *(db.write(tables.add, {"id": i, "text": "x"}) for i in range(20)),
            return_exceptions=True,
        )
        assert isinstance(results.pop(1), Conflict)
        assert results == [None] * 21
        with pytest.raises(Conflict):
            async with db.transaction():
                await db.write(late, {"id": 1})
        assert await count(db) == 20


class _Base(DeclarativeBase):
    pass


class _Note(_Base):
    __table__ = sa.Table("notes", _Base.metadata, sa.Column("id", sa.Integer, primary_key=True), sa.Column("text"))


async def test_callbacks_share_the_fate_of_their_savepoint(db, tables, count):
    """Rolled back with a savepoint, or one around it, they are dropped; after one that is released they run."""
    seen: list[int] = []

    async def note(number: int) -> None:
        await db.write(tables.add, {"id": number, "text": "x"})
        db.after_commit(lambda: seen.append(number))

    async def notes(session: AsyncSession) -> None:
        await note(1)
        with pytest.raises(ZeroDivisionError):
            async with session.begin_nested():
                await note(2)
                async with session.begin_nested():
                    await note(3)
                _ = 1 / 0
        async with session.begin_nested():
            await note(4)
            inner = await session.begin_nested()
            await note(5)
            await inner.rollback()
        with pytest.raises(Conflict):
            async with session.begin_nested():
                await note(6)
                session.add(_Note(id=1, text="there is one already"))
                await session.flush()
        await note(7)

    async with db.transaction() as session:
        await notes(session)
        assert seen == []
    assert (seen, await count(db)) == ([1, 4, 7], 3)
    await db.write(sa.delete(tables.notes))
    seen.clear()
    async with AsyncSession(db.engine) as session:
        async with session.begin(), db.transaction(session):
            await notes(session)
        assert (seen, await count(db)) == ([1, 4, 7], 3)


async def test_callbacks_of_a_session_that_its_owner_takes_back(db, tables, count):
    """Also rolled back around the savepoint that the unit joined in, or closed without a commit, nothing is called."""
    seen: list[int] = []

    async def joined(session: AsyncSession, number: int) -> None:
        async with db.transaction(session):
            await db.write(tables.add, {"id": number, "text": "x"})
            db.after_commit(lambda: seen.append(number))

    async with AsyncSession(db.engine) as session:
        async with session.begin():
            around = await session.begin_nested()
            async with session.begin_nested():
                await joined(session, 1)
            await around.rollback()
        await session.execute(sa.select(sa.func.count()).select_from(tables.notes))
        await joined(session, 2)
        await session.close()
        await session.execute(tables.add, {"id": 3, "text": "x"})
        await session.commit()
    async with db.transaction() as session:
        await db.write(tables.add, {"id": 4, "text": "x"})
        db.after_commit(lambda: seen.append(4))
        await session.rollback()
    assert (seen, await count(db)) == ([], 1)


async def test_a_fence_is_looked_at_again_after_a_savepoint(postgres, open_database, tables, count):
    """Going back to a savepoint gives up the lock on the owner's row: who has lost it by then must not write."""
    async with open_database(postgres) as db:
        await db.write(tables.own, {"id": 1, "epoch": 1})
        fence = tables.fences.at(1, 1)
        with pytest.raises(FenceLost):
            async with db.transaction() as session:
                inner = await session.begin_nested()
                await db.write(tables.add, {"id": 1, "text": "x"}, fence=fence)
                await inner.rollback()
                await spawn(db.write(sa.update(tables.owners).values(epoch=2)), name="takes over")
                await db.write(tables.add, {"id": 2, "text": "x"}, fence=fence)
        assert await count(db) == 0


async def test_a_unit_leaves_the_context_as_it_was(db):
    """Whoever compares contexts, to see whether a callee has changed one, finds nothing; also after a failure."""

    async def use():
        before = copy_context()
        async with db.transaction():
            assert copy_context() != before
        async with db.batch():
            pass
        with pytest.raises(LookupError):
            async with db.transaction():
                raise LookupError
        assert copy_context() == before

    await asyncio.create_task(use(), context=Context())


async def test_a_unit_that_ends_in_another_context_than_it_began_in(db):
    """As a fixture's may: what was around it is around again."""
    unit = db.transaction()
    await asyncio.create_task(unit.__aenter__(), context=Context())
    await asyncio.create_task(unit.__aexit__(None, None, None), context=Context())
    assert not db.in_unit_of_work()
