"""Audit entries written, sealed, verified and proved."""

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from benchmarks.rows import Row, compare
from mainstay.audit import AuditModule, AuditTrail, Keys, prove, verify
from mainstay.audit.sealer import LEASE, OpenLog
from mainstay.audit.tables import INSERT_PENDING, SCHEMA
from mainstay.audit.testing import KEY, settings, written
from mainstay.core import App, uuid7
from mainstay.database import Database, DatabaseModule, DatabaseSettings, upgrade
from mainstay.database.schema import SCHEMA as DATABASE
from mainstay_servers import Postgres


async def rows(quick: bool) -> AsyncIterator[Row]:  # noqa: FBT001  the runner's contract
    rounds = 3 if quick else 9
    with tempfile.TemporaryDirectory() as directory:
        async for each in _audit("SQLite", f"sqlite+aiosqlite:///{Path(directory) / 'audit.db'}", rounds, quick=quick):
            yield each
    with Postgres() as server:
        await upgrade(server.url, [DATABASE, SCHEMA])
        async for each in _audit("PostgreSQL", server.url, rounds, quick=quick):
            yield each


@asynccontextmanager
async def _running(url: str) -> AsyncIterator[tuple[App, AuditTrail]]:
    trail = AuditTrail()
    app = App(
        DatabaseModule.for_root(DatabaseSettings(url=url)),
        # What is written alone is deleted unsealed between rounds, which no statement of a producer must notice.
        AuditModule.for_root(settings(statement_seconds=3600.0)),
        AuditModule.for_feature(trail),
    )
    async with app:
        yield app, trail


async def _audit(engine: str, url: str, rounds: int, *, quick: bool) -> AsyncIterator[Row]:
    async with _running(url) as (app, trail):
        database = app.get(Database)
        data = b"x" * 230  # as long as the entries that are written beside it

        async def entry() -> None:
            await trail.write("order.cancelled", resource="order/17", detail={"reason": "rain"})

        async def plain_row() -> None:
            await database.write(INSERT_PENDING, {"entry_id": uuid7(), "recorded_at": 0, "data": data})

        async def alone(one: Callable[[], Any], writers: int, each: int) -> float:
            async def writer() -> None:
                for _ in range(each):
                    await one()

            started = time.perf_counter()
            await asyncio.gather(*(writer() for _ in range(writers)))
            seconds = time.perf_counter() - started
            await _empty(database)
            return writers * each / seconds

        async def inline(one: Callable[[], Any] | None, count: int) -> float:
            started = time.perf_counter()
            for _ in range(count):
                async with database.transaction():
                    await plain_row()
                    if one is not None:
                        await one()
            seconds = time.perf_counter() - started
            await _empty(database)
            return count / seconds

        each = 100 if quick else 400
        yield await compare(
            f"{engine}: entries on their own, one by one",
            "entries/s",
            lambda: alone(entry, 1, each),
            peer=("db.write of a row", lambda: alone(plain_row, 1, each)),
            better="higher",
            rounds=rounds,
        )
        # What a hash chain that is written with each entry reaches, at any concurrency, is about 1,100.
        yield await compare(
            f"{engine}: entries on their own, 256 at once",
            "entries/s",
            lambda: alone(entry, 256, 10 if quick else 40),
            peer=("db.write of a row", lambda: alone(plain_row, 256, 10 if quick else 40)),
            better="higher",
            rounds=rounds,
        )
        count = 100 if quick else 400
        yield await compare(
            f"{engine}: transactions of one row with an entry",
            "transactions/s",
            lambda: inline(entry, count),
            peer=("the same without", lambda: inline(None, count)),
            better="higher",
            rounds=rounds,
        )
        size = 4_000 if quick else 20_000
        yield await compare(
            f"{engine}: sealing, batches of 1,000",
            "entries/s",
            lambda: _seal(app, trail, size),
            better="higher",
            rounds=min(rounds, 5),
        )

        async def verified() -> float:
            started = time.perf_counter()
            report = await verify(database, [KEY.verifier])
            seconds = time.perf_counter() - started
            assert report.ok, report.problems
            return report.entries / seconds

        yield await compare(
            f"{engine}: verifying a log",
            "entries/s",
            verified,
            better="higher",
            rounds=min(rounds, 5),
        )
        entries = await written(database)
        some = entries[:: max(1, len(entries) // 20)]

        async def proved() -> float:
            started = time.perf_counter()
            receipts = [await prove(database, each.id) for each in some]
            seconds = time.perf_counter() - started
            assert [receipt.verify([KEY.verifier]) for receipt in receipts] == some
            return seconds / len(some) * 1e3

        yield await compare(f"{engine}: a receipt", "ms", proved, rounds=rounds)


async def _empty(database: Database) -> None:
    await database.write(sa.delete(SCHEMA.metadata.tables["mainstay_audit_pending"]))


async def _seal(app: App, trail: AuditTrail, count: int) -> float:
    database = app.get(Database)
    async with database.batch():
        for n in range(count):
            await trail.write("order.cancelled", resource=f"order/{n}", detail={"reason": "rain"})
    lease = await database.lease(LEASE)
    assert lease is not None
    try:
        log = await OpenLog.open(database, app.get(Keys), KEY, lease)
        started = time.perf_counter()
        sealed = 0
        while done := await log.seal(1000, "2026-01-01T00:00:00Z"):
            sealed += done
        seconds = time.perf_counter() - started
    finally:
        await lease.release()
    assert sealed >= count
    return sealed / seconds
