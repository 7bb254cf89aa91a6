"""Rows made durable a second, reads, and units of work: against the bare drivers and SQLAlchemy.

The bare drivers do what a program would that cares for nothing else: one commit a row, or rows batched by hand, which
only a program can do that has them all in one place.
"""

import asyncio
import itertools
import sqlite3
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import asyncpg
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from benchmarks.rows import Row, compare
from mainstay.database import Database
from mainstay.database.testing import database
from mainstay_servers.postgres import Postgres, fresh_database

metadata = sa.MetaData()
table = sa.Table(
    "bench",
    metadata,
    sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("n", sa.Integer),
    sa.Column("payload", sa.LargeBinary),
)
INSERT = sa.insert(table)
ONE = sa.select(table).where(table.c.id == sa.bindparam("which"))
PAYLOAD = b"x" * 200
IDS = itertools.count(1)

Work = Callable[[], Awaitable[float]]


async def timed(concurrency: int, total: int, one: Callable[[], Awaitable[object]]) -> float:
    """How many `one` a second, by so many tasks at once."""

    async def task() -> None:
        for _ in range(total // concurrency):
            await one()

    begun = time.perf_counter()
    await asyncio.gather(*(task() for _ in range(concurrency)))
    return total // concurrency * concurrency / (time.perf_counter() - begun)


async def counted(db: Database) -> int:
    return int((await db.read(sa.select(sa.func.count()).select_from(table)))[0][0])


def ours(db: Database, concurrency: int, total: int) -> Work:
    async def measure() -> float:
        before = await counted(db)
        rate = await timed(concurrency, total, lambda: db.write(INSERT, {"id": next(IDS), "n": 1, "payload": PAYLOAD}))
        assert await counted(db) == before + total // concurrency * concurrency
        return rate

    return measure


def units(db: Database, total: int) -> Work:
    async def one() -> None:
        async with db.transaction() as session:
            await session.execute(INSERT, {"id": next(IDS), "n": 1, "payload": PAYLOAD})

    return lambda: timed(1, total, one)


def sessions(engine: AsyncEngine, total: int) -> Work:
    async def one() -> None:
        async with AsyncSession(engine) as session, session.begin():
            await session.execute(INSERT, {"id": next(IDS), "n": 1, "payload": PAYLOAD})

    return lambda: timed(1, total, one)


def reads(db: Database, concurrency: int, total: int) -> Work:
    async def one() -> None:
        assert len(await db.read(ONE, {"which": 0})) == 1

    return lambda: timed(concurrency, total, one)


def session_reads(engine: AsyncEngine, concurrency: int, total: int) -> Work:
    async def one() -> None:
        async with engine.connect() as connection:
            assert len((await connection.execute(ONE, {"which": 0})).all()) == 1

    return lambda: timed(concurrency, total, one)


def sqlite_by(rows_each: int, connection: sqlite3.Connection, total: int) -> Work:
    def work() -> float:
        begun = time.perf_counter()
        for _ in range(total // rows_each):
            connection.execute("BEGIN IMMEDIATE")
            rows = [(next(IDS), 1, PAYLOAD) for _ in range(rows_each)]
            connection.executemany("INSERT INTO bench VALUES (?, ?, ?)", rows)
            connection.execute("COMMIT")
        return total // rows_each * rows_each / (time.perf_counter() - begun)

    return lambda: asyncio.to_thread(work)


def asyncpg_by(rows_each: int, pool: Any, concurrency: int, total: int) -> Work:
    sql = "INSERT INTO bench VALUES ($1, $2, $3)"

    async def one() -> None:
        async with pool.acquire() as connection:
            if rows_each == 1:
                await connection.execute(sql, next(IDS), 1, PAYLOAD)
            else:
                await connection.executemany(sql, [(next(IDS), 1, PAYLOAD) for _ in range(rows_each)])

    async def measure() -> float:
        return await timed(concurrency, max(concurrency, total // rows_each), one) * rows_each

    return measure


async def on_sqlite(*, quick: bool) -> AsyncIterator[Row]:
    rounds = 3 if quick else 7
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mainstay-bench-")))
        db = await stack.enter_async_context(database(f"sqlite:///{folder / 'ours.db'}"))
        # Units of work and reads are compared on files that hold the same, not on the one that was just filled.
        small = await stack.enter_async_context(database(f"sqlite:///{folder / 'small.db'}"))
        raw = sqlite3.connect(folder / "raw.db", isolation_level=None, check_same_thread=False)
        stack.callback(raw.close)
        raw.execute("PRAGMA journal_mode=WAL")
        raw.execute("PRAGMA synchronous=FULL")
        raw.execute("CREATE TABLE bench (id BIGINT PRIMARY KEY NOT NULL, n INTEGER, payload BLOB)")
        bare = create_async_engine(f"sqlite+aiosqlite:///{folder / 'bare.db'}")
        stack.push_async_callback(bare.dispose)

        @sa.event.listens_for(bare.sync_engine, "connect")
        def same_promise(connection: Any, _record: object) -> None:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")

        async with bare.begin() as connection:
            await connection.run_sync(metadata.create_all)
        for each in (db, small):
            async with each.transaction() as session:
                await (await session.connection()).run_sync(metadata.create_all)
        for engine in (small.engine, bare):
            async with engine.begin() as connection:
                await connection.execute(INSERT, {"id": 0, "n": 1, "payload": PAYLOAD})
        scale = 1 if quick else 4
        for concurrency, total in ((1, 500), (32, 3_000), (256, 6_000), (1_000, 10_000)):
            yield await compare(
                f"sqlite: durable rows by {concurrency:,} at once",
                "rows/s",
                ours(db, concurrency, total * scale),
                peer=("sqlite3, one commit a row", sqlite_by(1, raw, 500 * scale)),
                better="higher",
                rounds=rounds,
            )
        by_1000 = ours(db, 1_000, 10_000 * scale)
        yield await compare(
            "sqlite: durable rows by 1,000 at once, a second",
            "rows/s",
            by_1000,
            better="higher",
            rounds=rounds,
        )
        yield await compare(
            "sqlite: durable rows by 1,000 at once, against 1,000 rows a commit by hand",
            "rows/s",
            by_1000,
            peer=("sqlite3, 1,000 rows a commit", sqlite_by(1_000, raw, 10_000 * scale)),
            better="higher",
            rounds=rounds,
        )
        yield await compare(
            "sqlite: units of work of one row",
            "units/s",
            units(small, 100 * scale),
            peer=("SQLAlchemy session.begin()", sessions(bare, 100 * scale)),
            better="higher",
            rounds=rounds,
        )
        yield await compare(
            "sqlite: reads of one row",
            "reads/s",
            reads(small, 1, 200 * scale),
            peer=("SQLAlchemy engine.connect()", session_reads(bare, 1, 200 * scale)),
            better="higher",
            rounds=rounds,
        )


async def on_postgres(*, quick: bool) -> AsyncIterator[Row]:
    rounds = 3 if quick else 7
    async with AsyncExitStack() as stack:
        server = stack.enter_context(Postgres())
        url = stack.enter_context(fresh_database(server.url))
        db = await stack.enter_async_context(database(url))
        bare = create_async_engine(url, pool_size=10, max_overflow=0)
        stack.push_async_callback(bare.dispose)
        dsn = url.replace("+asyncpg", "")
        pool = await stack.enter_async_context(asyncpg.create_pool(dsn, min_size=1, max_size=32))
        async with db.transaction() as session:
            await (await session.connection()).run_sync(metadata.create_all)
        await db.write(INSERT, {"id": 0, "n": 1, "payload": PAYLOAD})
        scale = 1 if quick else 4
        for concurrency, total in ((1, 500), (32, 3_000), (256, 6_000), (1_000, 10_000)):
            yield await compare(
                f"postgresql: durable rows by {concurrency:,} at once",
                "rows/s",
                ours(db, concurrency, total * scale),
                peer=(
                    "asyncpg, one commit a row, at most 32 connections",
                    asyncpg_by(1, pool, concurrency, min(total, 3_000) * scale),
                ),
                better="higher",
                rounds=rounds,
            )
        by_256 = ours(db, 256, 6_000 * scale)
        yield await compare(
            "postgresql: durable rows by 256 at once, a second",
            "rows/s",
            by_256,
            better="higher",
            rounds=rounds,
        )
        yield await compare(
            "postgresql: durable rows by 256 at once, against 256 rows a commit by hand",
            "rows/s",
            by_256,
            peer=("asyncpg executemany, 256 rows a commit", asyncpg_by(256, pool, 1, 6_000 * scale)),
            better="higher",
            rounds=rounds,
        )
        yield await compare(
            "postgresql: units of work of one row",
            "units/s",
            units(db, 200 * scale),
            peer=("SQLAlchemy session.begin()", sessions(bare, 200 * scale)),
            better="higher",
            rounds=rounds,
        )
        yield await compare(
            "postgresql: reads of one row",
            "reads/s",
            reads(db, 1, 300 * scale),
            peer=("SQLAlchemy engine.connect()", session_reads(bare, 1, 300 * scale)),
            better="higher",
            rounds=rounds,
        )


async def rows(quick: bool) -> AsyncIterator[Row]:  # noqa: FBT001  the runner's contract
    async for each in on_sqlite(quick=quick):
        yield each
    async for each in on_postgres(quick=quick):
        yield each
