"""Errors of the drivers: every entry of the table, provoked on a real server, by every way to the database."""

import sqlite3

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from mainstay.core import App
from mainstay.database import (
    CommitUnknown,
    Conflict,
    Database,
    DatabaseBusy,
    DatabaseError,
    DatabaseModule,
    DatabaseSettings,
    DatabaseUnavailable,
)
from mainstay.database._translation import GONE, PASSING, translate

FAIL = """
CREATE FUNCTION fail(state text) RETURNS bigint LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION USING ERRCODE = state, MESSAGE = 'as asked'; END $$
"""


def examples(table):
    """Each entry of a table; a class of SQLSTATEs stands for one of its own."""
    return [entry if len(entry) == 5 else f"{entry}{'000' if entry != '40' else '001'}" for entry in table]


async def attempt(db, tables, way: str, state: str) -> None:
    """Run a statement that the server answers with this SQLSTATE."""
    value = sa.func.fail(sa.bindparam("state", type_=sa.Text))
    insert = sa.insert(tables.notes).values(id=value, text="x")
    if way == "write":
        await db.write(insert, {"state": state})
    elif way == "read":
        await db.read(sa.select(value), {"state": state})
    elif way == "engine":
        async with db.engine.begin() as connection:
            await connection.execute(insert, {"state": state})
    else:
        async with db.transaction() as session:
            if way == "unit":
                await db.write(insert, {"state": state})
            else:
                await session.execute(insert, {"state": state})


async def backend(db) -> int:
    """The server's process behind the connection of the pool."""
    ((pid,),) = await db.read(sa.select(sa.func.pg_backend_pid()))
    return int(pid)


WAYS = ["write", "read", "engine", "unit", "session"]


@pytest.fixture(params=WAYS)
def way(request) -> str:
    """One of the ways to the database."""
    return str(request.param)


@pytest.fixture
async def failing(postgres, open_database):
    """A database whose function `fail` raises the SQLSTATE that it is given."""
    async with open_database(postgres, busy_timeout_seconds=0.3, pool_size=1) as db:
        async with db.transaction() as session:
            await session.execute(sa.text(FAIL))
        yield db


async def test_every_lost_connection_is_retryable_and_closed(failing, tables, way):
    """After an error of a server that is gone, starts, stops or only reads, the next attempt has another connection."""
    for state in examples(GONE):
        before = await backend(failing)
        with pytest.raises(DatabaseError) as caught:
            await attempt(failing, tables, way, state)
        if way == "write" and state != "25006":
            assert type(caught.value) is CommitUnknown, state  # alone, the statement is its own commit
            assert not caught.value.no_effect
        else:
            assert type(caught.value) is DatabaseUnavailable, state
            assert caught.value.retryable
            assert caught.value.no_effect
        assert "as asked" in str(caught.value)
        if way != "write":
            assert await backend(failing) != before, f"after {state} the connection is still in the pool"
        await failing.write(tables.add, {"id": 1, "text": "the next one works"})
        async with failing.transaction():
            await failing.write(sa.delete(tables.notes))


async def test_every_passing_condition_is_retryable(failing, tables, way):
    """Deadlocks, timeouts, a lock, a shortage: nothing happened, and the next attempt may succeed."""
    for state in examples(PASSING):
        with pytest.raises(DatabaseBusy) as caught:
            await attempt(failing, tables, way, state)
        assert caught.value.retryable, state
        assert caught.value.no_effect, state


@pytest.mark.parametrize(
    ("state", "kind"), [("23505", Conflict), ("23503", Conflict), ("42703", DatabaseError), ("40003", CommitUnknown)]
)
async def test_what_is_final_stays_final(failing, tables, way, state, kind):
    """A constraint, a mistake in a statement, and an outcome that the server does not know are not tried again."""
    with pytest.raises(DatabaseError) as caught:
        await attempt(failing, tables, way, state)
    assert type(caught.value) is kind
    assert not caught.value.retryable
    assert caught.value.no_effect == (kind is not CommitUnknown)


@pytest.mark.parametrize(
    ("code", "kind", "committing"),
    [
        (sqlite3.SQLITE_BUSY, DatabaseBusy, True),
        (sqlite3.SQLITE_BUSY_SNAPSHOT, DatabaseBusy, False),
        (sqlite3.SQLITE_LOCKED, DatabaseBusy, False),
        (sqlite3.SQLITE_FULL, DatabaseUnavailable, True),
        (sqlite3.SQLITE_READONLY, DatabaseUnavailable, False),
        (sqlite3.SQLITE_READONLY_DBMOVED, DatabaseUnavailable, True),
        (sqlite3.SQLITE_CANTOPEN, DatabaseUnavailable, False),
        (sqlite3.SQLITE_ERROR, DatabaseError, True),
        (sqlite3.SQLITE_IOERR_WRITE, DatabaseUnavailable, False),
        (sqlite3.SQLITE_IOERR_FSYNC, CommitUnknown, True),
    ],
)
def test_results_of_sqlite(code, kind, committing):
    """Locked by another, full, or not to be written to is passing; a commit that a disk failed is in doubt."""
    error = sqlite3.OperationalError("as asked")
    error.sqlite_errorcode = code
    mine = translate(error, committing=committing)
    passing = kind in {DatabaseBusy, DatabaseUnavailable}
    assert (type(mine), mine.retryable, mine.no_effect) == (kind, passing, kind is not CommitUnknown)
    assert mine.__cause__ is error


async def test_a_locked_file_is_busy(tmp_path, open_database, tables):
    """Another process's writer, met by every way to write."""
    path = tmp_path / "x.db"
    async with open_database(f"sqlite:///{path}", busy_timeout_seconds=0.1) as db:
        other = sqlite3.connect(path, isolation_level=None)
        try:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(DatabaseBusy):
                await db.write(tables.add, {"id": 1, "text": "x"})
            with pytest.raises(DatabaseBusy):
                async with db.transaction():
                    pass
            with pytest.raises(DatabaseBusy):
                async with db.engine.begin() as connection:
                    await connection.execute(tables.add, {"id": 1, "text": "x"})
        finally:
            other.close()


async def test_too_many_connections(postgres, open_database, tables):
    """A server without a free connection is busy; the unit of work that could not begin may be tried again."""
    name = sa.make_url(postgres).database
    role = f"few_{name}"
    async with open_database(postgres) as db, db.engine.connect() as admin:
        await admin.execute(sa.text(f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 1"))
        await admin.execute(sa.text(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}"))
        await admin.commit()
        url = sa.make_url(postgres).set(username=role).render_as_string()
        app = App(DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url))))
        async with app:
            few = app.get(Database)
            async with few.engine.connect() as only:
                await only.execute(sa.select(1))
                with pytest.raises(DatabaseBusy, match="too many connections"):
                    async with few.transaction():
                        pass
            async with few.transaction():
                await few.write(tables.add, {"id": 1, "text": "now there is one"})
        await admin.execute(sa.text(f"DROP OWNED BY {role}"))
        await admin.execute(sa.text(f"DROP ROLE {role}"))
        await admin.commit()
