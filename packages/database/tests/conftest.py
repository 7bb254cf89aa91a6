"""Every contract test runs on SQLite in memory and in a file, on PostgreSQL, and on it by way of PgBouncer."""

import asyncio
import time
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import sqlalchemy as sa

from mainstay.database import FenceOn
from mainstay.database.testing import database

metadata = sa.MetaData()
notes = sa.Table(
    "notes",
    metadata,
    sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("text", sa.Text),
    sa.Column("n", sa.Integer, nullable=False, server_default="0"),
)
owners = sa.Table(
    "owners", metadata, sa.Column("id", sa.Integer, primary_key=True), sa.Column("epoch", sa.BigInteger, nullable=False)
)

ADD = sa.insert(notes)
# Not one that counts once for several rows, so its batch is a transaction of several statements.
TOUCH = sa.update(notes).where(notes.c.id == sa.bindparam("which")).values(n=notes.c.n + 1)
COUNT = sa.select(sa.func.count()).select_from(notes)


@pytest.fixture
def tables() -> SimpleNamespace:
    """The tables and statements of these tests."""
    return SimpleNamespace(
        metadata=metadata,
        notes=notes,
        owners=owners,
        add=ADD,
        own=sa.insert(owners),
        touch=TOUCH,
        fences=FenceOn(owners, owners.c.id, owners.c.epoch),
    )


@pytest.fixture(params=["memory", "file", "postgres", "pgbouncer"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database of each kind."""
    if request.param == "memory":
        return "sqlite+aiosqlite:///:memory:"
    if request.param == "file":
        return f"sqlite+aiosqlite:///{tmp_path / 'test.db'}"
    return str(request.getfixturevalue(request.param))


@asynccontextmanager
async def opened(url, **settings):
    async with database(url, **settings) as db:
        async with db.transaction() as session:
            await (await session.connection()).run_sync(metadata.create_all)
        yield db


@pytest.fixture
def open_database():
    """A context manager over URL and settings: a running Database with the tables of these tests."""
    return opened


@pytest.fixture
async def db(url):
    """A running Database with the tables of these tests."""
    async with opened(url) as database_:
        yield database_


@pytest.fixture
def count():
    """How many notes there are, asked outside of any unit of work."""

    async def ask(db, *conditions) -> int:
        async with db.engine.connect() as connection:
            return int((await connection.execute(COUNT.where(*conditions))).scalar_one())

    return ask


@pytest.fixture
def until():
    """Poll a condition, sync or async, until it holds; fail after some seconds."""

    async def wait(condition: Callable[[], object], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while True:
            result = condition()
            if asyncio.iscoroutine(result):
                result = await result
            if result:
                return
            if time.monotonic() > end:
                pytest.fail(f"did not come true within {seconds:g} s")
            await asyncio.sleep(0.01)

    return wait
