"""`db.write`, `db.batch` and `db.read`: what holds on every database."""

import asyncio
import enum
import uuid
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
import sqlalchemy as sa
from prometheus_client import REGISTRY
from sqlalchemy.dialects import postgresql, sqlite

from mainstay.database import Conflict, DatabaseError, FenceLost, FenceOn, UnitOfWorkError
from mainstay.database._statements import _by_column


class Colour(enum.Enum):
    """A type that SQLAlchemy stores by name."""

    RED = "r"
    BLUE = "b"


jobs = sa.Table(
    "jobs",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("owner", sa.String(50)),
    sa.Column("state", sa.String(20), nullable=False),
    sa.Column("stop", sa.Boolean, nullable=False, server_default=sa.false()),
)
kinds = sa.Table(
    "kinds",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("uuid", sa.Uuid),
    sa.Column("json", sa.JSON),
    sa.Column("money", sa.Numeric(12, 2)),
    sa.Column("at", sa.DateTime(timezone=True)),
    sa.Column("day", sa.Date),
    sa.Column("lasts", sa.Interval),
    sa.Column("raw", sa.LargeBinary),
    sa.Column("yes", sa.Boolean),
    sa.Column("colour", sa.Enum(Colour)),
    sa.Column("share", sa.Double),
    sa.Column("text", sa.Text),
    sa.Column("made_here", sa.Uuid, default=lambda: uuid.UUID(int=7)),
    sa.Column("constant", sa.Integer, default=42),
)
KIND = {
    "uuid": uuid.UUID(int=2**100 + 5),
    "json": {"a": [1, None, "ü"], "b": {}},
    "money": Decimal("1234.50"),
    "at": datetime(2026, 2, 3, 4, 5, 6, 789, tzinfo=UTC),
    "day": date(2026, 2, 3),
    "lasts": timedelta(hours=1, microseconds=1),
    "raw": b"\x00\xff",
    "yes": True,
    "colour": Colour.BLUE,
    "share": 0.1,
    "text": "'\\ü😀",
}


async def test_recorder_and_session_write_identical_values(db):
    """Every type looks the same in the table whichever way it went, also as NULL, and Python-side defaults are made."""
    async with db.transaction() as session:
        await (await session.connection()).run_sync(kinds.metadata.create_all)
    nothing = dict.fromkeys(KIND)
    await db.write(sa.insert(kinds), [{"id": 1, **KIND}, {"id": 2, **nothing}])
    async with db.transaction():
        await db.write(sa.insert(kinds), [{"id": 3, **KIND}, {"id": 4, **nothing}])
    shown: list[sa.ColumnElement[str]] = [
        sa.literal_column(f"quote({column.name})" if db.dialect == "sqlite" else f"{column.name}::text")
        for column in kinds.c
        if column.name != "id"
    ]
    raw = await db.read(sa.select(*shown).select_from(kinds).order_by(kinds.c.id))
    assert raw[0] == raw[2]
    assert raw[1] == raw[3]
    assert raw[0] != raw[1]
    # Without the enum, PostgreSQL takes the rows by column.
    plain = {name: value for name, value in KIND.items() if name != "colour"}
    await db.write(sa.insert(kinds), [{"id": number, **plain} for number in (5, 6)])
    await db.write(sa.insert(kinds), [{"id": number, **dict.fromkeys(plain)} for number in (7, 8)])
    async with db.transaction():
        await db.write(sa.insert(kinds), [{"id": 9, **plain}, {"id": 10, **dict.fromkeys(plain)}])
    raw = await db.read(sa.select(*shown).select_from(kinds).where(kinds.c.id > 4).order_by(kinds.c.id))
    assert raw[0] == raw[1] == raw[4]
    assert raw[2] == raw[3] == raw[5]
    (row,) = await db.read(sa.select(kinds).where(kinds.c.id == 1))
    assert (row.uuid, row.json, row.money, row.colour, row.raw) == (
        KIND["uuid"],
        KIND["json"],
        KIND["money"],
        Colour.BLUE,
        KIND["raw"],
    )
    assert (row.made_here, row.constant) == (uuid.UUID(int=7), 42)


async def test_writes_at_once_share_commits(db, tables, count):
    """Three hundred concurrent writes are all there when they return, in far fewer commits."""
    before = REGISTRY.get_sample_value("mainstay_database_commits_total", {"by": "recorder"}) or 0.0
    await asyncio.gather(*(db.write(tables.add, {"id": i, "text": "x"}) for i in range(300)))
    assert await count(db) == 300
    after = REGISTRY.get_sample_value("mainstay_database_commits_total", {"by": "recorder"}) or 0.0
    assert after - before <= 20


async def test_a_write_is_committed_when_it_returns(db, tables, count):
    """Another connection sees a lone write and a write of several rows as soon as they have returned."""
    await db.write(tables.add, {"id": 1, "text": "x"})
    assert await count(db) == 1
    await db.write(tables.add, [{"id": i, "text": "x"} for i in range(2, 12)])
    assert await count(db) == 11
    await db.write(tables.add, [])
    assert await count(db) == 11


async def test_workflow_17_one_conflict_fails_only_its_own_write(db, tables, count):
    """Of a hundred writes in one batch the two that violate a constraint fail, all of each, and no others."""
    await db.write(tables.add, {"id": 50, "text": "there"})
    results = await asyncio.gather(
        *(db.write(tables.add, [{"id": i, "text": "x"}, {"id": 1000 + i, "text": "x"}]) for i in range(100)),
        db.write(tables.add, [{"id": 5000, "text": "x"}, {"id": 5000, "text": "x"}]),
        return_exceptions=True,
    )
    failed = [i for i, result in enumerate(results) if result is not None]
    assert failed == [50, 100]
    error = results[50]
    assert isinstance(error, Conflict)
    assert error.no_effect
    assert not error.retryable
    assert await count(db) == 1 + 99 * 2
    assert await count(db, tables.notes.c.id.in_([1050, 5000])) == 0


async def test_a_value_the_database_refuses_fails_alone(db, tables, count):
    """A number too large for its column, a missing value and an object that is none fail their own callers only."""
    results = await asyncio.gather(
        *(db.write(tables.add, {"id": i, "text": "x"}) for i in range(10)),
        db.write(tables.add, {"id": 2**70, "text": "x"}),
        db.write(tables.add, {"id": None, "text": "x"}),
        db.write(tables.add, {"id": 99, "text": object()}),
        return_exceptions=True,
    )
    assert [type(result) for result in results[:10]] == [type(None)] * 10
    for error in results[10:]:
        assert isinstance(error, DatabaseError), error
        assert error.no_effect
    assert await count(db) == 10


async def test_rows_that_do_not_fit_the_statement(db, tables, count):
    """An unknown column, a missing bindparam and a row unlike the first are refused before anything is written."""
    change = sa.update(tables.notes).where(tables.notes.c.id == sa.bindparam("which")).values(text=sa.bindparam("new"))
    for statement, rows in (
        (tables.add, {"id": 1, "colour": "red"}),
        (change, {"which": 1}),
        (tables.add, [{"id": 1, "text": "x"}, {"id": 2}]),
    ):
        with pytest.raises(DatabaseError):
            await db.write(statement, rows)
    assert await count(db) == 0


async def test_a_batch_is_one_write(db, tables, count):
    """What a batch collects is there as a whole when it ends; with an error in it, none of it is."""
    seen = []
    async with db.batch():
        await db.write(tables.add, {"id": 1, "text": "x"})
        await db.write(tables.own, {"id": 1, "epoch": 1})
        db.after_commit(lambda: seen.append("committed"))
        assert await count(db) == 0
        assert db.in_unit_of_work()
    assert await count(db) == 1
    assert seen == ["committed"]
    with pytest.raises(Conflict):
        async with db.batch():
            await db.write(tables.add, {"id": 2, "text": "x"})
            await db.write(tables.own, {"id": 1, "epoch": 1})
            db.after_commit(lambda: seen.append("never"))
    with pytest.raises(ZeroDivisionError):
        async with db.batch():
            await db.write(tables.add, {"id": 3, "text": "x"})
            _ = 1 / 0
    assert await count(db) == 1
    assert seen == ["committed"]


async def test_a_batch_in_a_batch_and_in_a_unit_joins(db, tables, count):
    """An inner batch is durable with the outer one, or with the unit of work around it."""
    async with db.batch():
        async with db.batch():
            await db.write(tables.add, {"id": 1, "text": "x"})
        assert await count(db) == 0
    assert await count(db) == 1
    with pytest.raises(ZeroDivisionError):
        async with db.transaction():
            async with db.batch():
                await db.write(tables.add, {"id": 2, "text": "x"})
            _ = 1 / 0
    assert await count(db) == 1


async def test_an_inner_batch_that_failed_takes_the_outer_one_with_it(db, tables, count):
    """Half of an inner batch is never committed, even if its exception is caught."""
    with pytest.raises(UnitOfWorkError, match="ZeroDivisionError"):
        async with db.batch():
            try:
                async with db.batch():
                    await db.write(tables.add, {"id": 1, "text": "half"})
                    _ = 1 / 0
            except ZeroDivisionError:
                await db.write(tables.add, {"id": 2, "text": "x"})
    assert await count(db) == 0


async def test_a_transaction_in_a_batch_is_refused(db):
    """A batch has no connection, so it cannot become a unit of work; the message says what to do."""
    async with db.batch():
        with pytest.raises(UnitOfWorkError, match="around the batch"):
            db.transaction()


async def test_workflow_5_a_zombie_writes_nothing(db, tables, count):
    """Writes, batches and units fenced with an old epoch fail with FenceLost and leave nothing; others go through."""
    await db.write(tables.own, [{"id": 1, "epoch": 3}, {"id": 2, "epoch": 1}])
    good, old, gone = tables.fences.at(1, 3), tables.fences.at(1, 2), tables.fences.at(9, 1)
    results = await asyncio.gather(
        *(db.write(tables.add, {"id": i, "text": "good"}, fence=good) for i in range(20)),
        *(db.write(tables.add, {"id": 100 + i, "text": "old"}, fence=old) for i in range(20)),
        db.write(tables.add, {"id": 200, "text": "gone"}, fence=gone),
        db.write(tables.add, {"id": 201, "text": "other"}, fence=tables.fences.at(2, 1)),
        return_exceptions=True,
    )
    assert results[:20] == [None] * 20
    assert all(isinstance(result, FenceLost) and result.no_effect for result in results[20:41])
    assert results[41] is None
    with pytest.raises(FenceLost):
        async with db.batch(fence=old):
            await db.write(tables.add, {"id": 300, "text": "x"})
    with pytest.raises(FenceLost):
        async with db.transaction():
            await db.write(tables.add, {"id": 301, "text": "x"})
            await db.write(tables.add, {"id": 302, "text": "x"}, fence=old)
    with pytest.raises(FenceLost):
        async with db.transaction(), db.batch(fence=old):
            pytest.fail("the block must not run")
    async with db.transaction():
        await db.write(tables.add, {"id": 303, "text": "x"}, fence=good)
        await db.write(tables.add, {"id": 304, "text": "x"}, fence=good)
    assert await count(db) == 23


async def test_a_fence_may_hold_an_owner_and_a_state(db, tables):
    """With an owner and a condition, the right epoch alone is not enough, in writes, batches and units."""
    async with db.transaction() as session:
        await (await session.connection()).run_sync(jobs.metadata.create_all)
    fences = FenceOn(jobs, jobs.c.id, jobs.c.epoch, owner_column=jobs.c.owner, where=jobs.c.state == "open")
    for number, owner, state in ((1, "me", "open"), (2, "other", "open"), (3, None, "open"), (4, "me", "closed")):
        await db.write(sa.insert(jobs), {"id": number, "epoch": 1, "owner": owner, "state": state})
    lost = [fences.at(2, 1, "me"), fences.at(3, 1, "me"), fences.at(4, 1, "me"), fences.at(1, 2, "me")]
    results = await asyncio.gather(
        *(db.write(tables.add, {"id": i, "text": "x"}, fence=fence) for i, fence in enumerate(lost)),
        db.write(tables.add, {"id": 9, "text": "x"}, fence=fences.at(1, 1, "me")),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [*[FenceLost] * 4, type(None)]
    for fence in lost:
        with pytest.raises(FenceLost, match="epoch"):
            async with db.transaction():
                await db.write(tables.add, {"id": 10, "text": "x"}, fence=fence)
        with pytest.raises(FenceLost):
            await db.write(tables.add, {"id": 11, "text": "x"}, fence=fence)
    async with db.transaction():
        await db.write(tables.add, {"id": 12, "text": "x"}, fence=fences.at(1, 1, "me"))
    assert {row.id for row in await db.read(sa.select(tables.notes.c.id))} == {9, 12}


async def test_a_fence_may_look_at_a_flag(db, tables):
    """A flag that another has set refuses the fences that ask for it, and no other, in writes, batches and units."""
    async with db.transaction() as session:
        await (await session.connection()).run_sync(jobs.metadata.create_all)
    fences = FenceOn(jobs, jobs.c.id, jobs.c.epoch, owner_column=jobs.c.owner, flag_column=jobs.c.stop)
    for number in (1, 2):
        row = {"id": number, "epoch": 1, "owner": "me", "state": "open", "stop": number == 2}
        await db.write(sa.insert(jobs), row)
    free, told, going_on = (
        fences.at(1, 1, "me", unflagged=True),
        fences.at(2, 1, "me", unflagged=True),
        fences.at(2, 1, "me"),
    )
    results = await asyncio.gather(
        *(
            db.write(tables.add, {"id": n, "text": "x"}, fence=fence)
            for n, fence in enumerate([free, told, free, told, going_on])
        ),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [type(None), FenceLost, type(None), FenceLost, type(None)]
    with pytest.raises(FenceLost, match="or stop is set"):
        async with db.batch(fence=told):
            await db.write(tables.add, {"id": 9, "text": "x"})
    with pytest.raises(FenceLost):
        async with db.transaction():
            await db.write(tables.add, {"id": 9, "text": "x"}, fence=told)
    async with db.transaction():
        await db.write(tables.add, {"id": 10, "text": "x"}, fence=free)
    assert {row.id for row in await db.read(sa.select(tables.notes.c.id))} == {0, 2, 4, 10}


def test_a_flag_is_named_where_the_fence_has_one(tables):
    """A fence that has no flag to look at would never refuse."""
    with pytest.raises(ValueError, match="asks for a flag, which no column has"):
        tables.fences.at(1, 1, unflagged=True)


def test_an_owner_is_named_where_the_fence_has_one(tables):
    """A fence that forgot its owner would let the wrong one through."""
    with pytest.raises(ValueError, match="lacks an owner"):
        FenceOn(jobs, jobs.c.id, jobs.c.epoch, owner_column=jobs.c.owner).at(1, 1)
    with pytest.raises(ValueError, match="which no column has"):
        tables.fences.at(1, 1, "me")


async def test_a_batch_has_one_fence(db, tables):
    """A second fence in one batch is refused, the same one again is not."""
    await db.write(tables.own, [{"id": 1, "epoch": 1}, {"id": 2, "epoch": 1}])
    async with db.batch(fence=tables.fences.at(1, 1)):
        await db.write(tables.add, {"id": 1, "text": "x"}, fence=tables.fences.at(1, 1))
        with pytest.raises(UnitOfWorkError, match="one fence"):
            await db.write(tables.add, {"id": 2, "text": "x"}, fence=tables.fences.at(2, 1))


async def test_writes_of_one_route_keep_their_order(db, tables):
    """Of fifty changes handed in at once by one route, between those of others, the last one stands."""
    set_n = sa.update(tables.notes).where(tables.notes.c.id == sa.bindparam("which")).values(n=sa.bindparam("value"))
    other = sa.update(tables.notes).where(tables.notes.c.id == sa.bindparam("which")).values(text=sa.bindparam("value"))
    reset = sa.update(tables.notes).where(tables.notes.c.id == sa.bindparam("which")).values(n=-1)
    await db.write(tables.add, [{"id": i, "text": "x"} for i in range(4)])
    writes = []
    for value in range(50):
        for route in range(4):
            writes.append(db.write(reset, {"which": route}, route=f"r{route}"))
            writes.append(db.write(set_n, {"which": route, "value": value}, route=f"r{route}"))
            writes.append(db.write(other, {"which": route, "value": str(value)}, route=f"r{route}"))
    await asyncio.gather(*writes)
    rows = await db.read(sa.select(tables.notes.c.n, tables.notes.c.text))
    assert [tuple(row) for row in rows] == [(49, "49")] * 4


async def test_statements_of_one_batch_keep_their_order(db, tables, count):
    """A batch that inserts, deletes and inserts again ends as written, beside fifty others of the same shape."""
    remove = sa.delete(tables.notes).where(tables.notes.c.id == sa.bindparam("which"))

    async def one(i: int) -> None:
        async with db.batch():
            await db.write(tables.add, {"id": i, "text": "first"})
            await db.write(remove, {"which": i})
            await db.write(tables.add, {"id": i, "text": "second"})

    await asyncio.gather(*(one(i) for i in range(50)))
    assert await count(db, tables.notes.c.text == "second") == 50
    assert await count(db) == 50


async def test_a_list_in_a_statement(db, tables, count):
    """`IN` over a list works in the recorder and in a unit of work, with lists of different lengths."""
    remove = sa.delete(tables.notes).where(
        tables.notes.c.id.in_(sa.bindparam("ids", expanding=True)), tables.notes.c.text == "x"
    )
    await db.write(tables.add, [{"id": i, "text": "x"} for i in range(20)])
    await db.write(remove, [{"ids": [1, 2, 3]}, {"ids": [4]}, {"ids": []}])
    assert await count(db) == 16
    async with db.transaction():
        await db.write(remove, {"ids": [5, 6]})
    assert await count(db) == 14


async def test_upserts_and_generated_keys(db):
    """ON CONFLICT and keys that the database makes work through the recorder."""
    table = sa.Table(
        "counted",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.Text, unique=True),
        sa.Column("n", sa.Integer),
    )
    async with db.transaction() as session:
        await (await session.connection()).run_sync(table.metadata.create_all)
    upsert = (sqlite if db.dialect == "sqlite" else postgresql).insert(table)
    upsert = upsert.on_conflict_do_update(index_elements=["name"], set_={"n": table.c.n + upsert.excluded.n})
    await asyncio.gather(*(db.write(upsert, {"name": f"name {i % 3}", "n": 1}) for i in range(30)))
    rows = await db.read(sa.select(table.c.name, table.c.n).order_by(table.c.name))
    assert [tuple(row) for row in rows] == [("name 0", 10), ("name 1", 10), ("name 2", 10)]


async def test_cancelling_a_waiting_caller_harms_nobody(db, tables, count):
    """In a storm of writes of which every third is cancelled, the others succeed, and what was cancelled is whole."""

    async def pair(i: int) -> None:
        await db.write(tables.add, [{"id": 2 * i, "text": "x"}, {"id": 2 * i + 1, "text": "x"}])

    kept: list[int] = []
    for wave in range(20):
        tasks = {i: asyncio.create_task(pair(i)) for i in range(wave * 30, wave * 30 + 30)}
        for _ in range(wave % 7):
            await asyncio.sleep(0)
        for i, task in tasks.items():
            if i % 3 == 0:
                task.cancel()
        results = await asyncio.gather(*tasks.values(), return_exceptions=True)
        kept += [i for i, result in zip(tasks, results, strict=True) if result is None]
    assert len(kept) >= 400
    rows = {row.id for row in await db.read(sa.select(tables.notes.c.id))}
    for i in range(600):
        assert (2 * i in rows) == (2 * i + 1 in rows)
    assert {2 * i for i in kept} <= rows
    await db.write(tables.add, {"id": 100_000, "text": "still alive"})


async def test_read_refuses_to_write(db, tables, count):
    """A statement that writes is refused by a read of its own, which would lose it or not, and allowed in a unit."""
    statement = sa.insert(tables.notes).values(id=1, text="x").returning(tables.notes.c.id)
    with pytest.raises(UnitOfWorkError, match="transaction"):
        await db.read(statement)
    async with db.transaction():
        assert [tuple(row) for row in await db.read(statement)] == [(1,)]
    assert await count(db) == 1
    with pytest.raises(DatabaseError):
        await db.read(sa.text("SELECT nonsense FROM nowhere"))


async def test_databases_are_apart(open_database, tables, count):
    """Two Databases in memory share nothing, not even their units of work, and leave no file behind."""
    async with open_database("sqlite+aiosqlite:///:memory:") as one, open_database("sqlite://") as two:
        async with one.transaction():
            await one.write(tables.add, {"id": 1, "text": "x"})
            await two.write(tables.add, {"id": 1, "text": "x"})
            assert not two.in_unit_of_work()
            assert await count(two) == 1
            assert await count(one) == 0
        place = one.engine.url.database
    assert not Path(place).parent.exists()


@pytest.mark.parametrize(
    ("rest", "by_column"),
    [
        ("(a, b) VALUES ($1::TEXT, now() + $2::FLOAT) ON CONFLICT (a) DO UPDATE SET b = (now() + $3::FLOAT)", None),
        (
            "(a, b) VALUES ($1::UUID, $2::NUMERIC(12, 2))",
            "(a, b) SELECT given.c1, given.c2 FROM unnest($1::UUID[], $2::NUMERIC(12, 2)[]) AS given(c1, c2)",
        ),
        (
            "(a) VALUES ($1::UUID) ON CONFLICT (a) DO NOTHING",
            "(a) SELECT given.c1 FROM unnest($1::UUID[]) AS given(c1) ON CONFLICT (a) DO NOTHING",
        ),
        (
            "(a, b, c) VALUES ($2::UUID, now() + $1::FLOAT, $2::UUID)",
            (
                "(a, b, c) SELECT given.c2, now() + given.c1, given.c2 "
                "FROM unnest($1::FLOAT[], $2::UUID[]) AS given(c1, c2)"
            ),
        ),
        ("(a) VALUES ($1::UUID) ON CONFLICT (a) DO UPDATE SET b = excluded.b", None),
        ("(a) VALUES ($1::UUID) ON CONFLICT (a) WHERE c = $2::INTEGER DO NOTHING", None),
        ("(a) VALUES ($1::UUID) RETURNING t.a", None),
        ("(a) VALUES ((SELECT max(b) FROM u WHERE c = $1::UUID))", None),
        ("(a, b) VALUES ($1::UUID, $2::INTEGER[])", None),
        ("(a, b) VALUES ($1::UUID, $2::INET)", None),
        ("(a, b) VALUES ($1::UUID, $2::colour)", None),
        ("(a, b) VALUES ($1::UUID, $1::TEXT)", None),
        ("(a) VALUES (now())", None),
        ("DEFAULT VALUES", None),
    ],
)
def test_only_plain_inserts_are_taken_by_column(rest, by_column):
    """What means something else for several rows at once, or whose values could be arrays, stays as it is."""
    found = _by_column(f"INSERT INTO t {rest}")
    assert (None if found is None else found.sql()) == (by_column and f"INSERT INTO t {by_column}")


def test_an_update_is_taken_by_column_where_it_says_so():
    """An update of one row twice in one batch would count once, so only one that allows for that is."""
    text = (
        "UPDATE t SET a=$1::VARCHAR, b=CASE WHEN t.b > $2::INTEGER THEN $2::INTEGER ELSE t.b END WHERE t.id = $3::UUID"
    )
    found = _by_column(text, updates=True)
    assert found is not None
    assert found.sql(4, "given.f IN (1)") == (
        "UPDATE t SET a=given.c1, b=CASE WHEN t.b > given.c2 THEN given.c2 ELSE t.b END "
        "FROM unnest($4::VARCHAR[], $5::INTEGER[], $6::UUID[], $7::INTEGER[]) AS given(c1, c2, c3, f) "
        "WHERE (t.id = given.c3) AND given.f IN (1)"
    )
    assert _by_column(text) is None
    assert _by_column(text + " RETURNING t.id", updates=True) is None
