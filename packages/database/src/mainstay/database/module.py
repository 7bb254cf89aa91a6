"""The module that puts a Database into an App."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Never

import sqlalchemy as sa
from sqlalchemy import exc

from mainstay.core import App, Module
from mainstay.database import _metrics
from mainstay.database._engine import Address, behind_pooler, make_engine, unreachable
from mainstay.database._recorder import Lane, PostgresWriter, Recorder, SQLiteWriter, Turn
from mainstay.database._statements import Statements
from mainstay.database.database import Database
from mainstay.database.lease import Keeper, metadata
from mainstay.database.schema import Schema
from mainstay.database.settings import DatabaseSettings, parse_url

SCHEMA = Schema("database", metadata, Path(__file__).parent / "migrations")


class DatabaseModule(Module[DatabaseSettings, Never]):
    """`DatabaseModule.for_root()` yields the `Database` that every other package uses."""

    @asynccontextmanager
    async def running(self, app: App) -> AsyncGenerator[Sequence[object], None]:
        settings = self.settings
        address = Address(parse_url(settings.url.get_secret_value()))
        try:
            async with _database(address, settings, app) as database:
                yield [database]
        finally:
            address.remove()


@asynccontextmanager
async def _database(address: Address, settings: DatabaseSettings, app: App) -> AsyncGenerator[Database, None]:
    sqlite = address.dialect == "sqlite"
    pooled = not sqlite and await behind_pooler(address, settings.busy_timeout_seconds)
    engine = make_engine(address, settings, pooled=pooled)
    statements = Statements(engine.dialect)
    busy = settings.busy_timeout_seconds
    turn = Turn(busy) if sqlite else None
    if turn is not None:
        lanes = [Lane(SQLiteWriter(address, statements, turn, busy))]
    else:
        lanes = [
            Lane(PostgresWriter(address, statements, busy, pooled=pooled))
            for _ in range(settings.recorder_connections)
        ]
    recorder = Recorder(lanes)
    keeper = Keeper(address, app.clock, busy, pooled=pooled)
    sa.event.listen(engine.sync_engine, "checkout", _checked_out)
    sa.event.listen(engine.sync_engine, "checkin", _checked_in)
    try:
        database = Database(engine, recorder, keeper, statements, turn=turn, pooled=pooled)
        try:
            await database.ensure_schema(SCHEMA)
        except (exc.DBAPIError, sqlite3.Error, OSError) as error:
            raise unreachable(address, error.orig if isinstance(error, exc.DBAPIError) else error) from error
        yield database
    finally:
        await asyncio.shield(_close(database_parts=(keeper, recorder), engine=engine))


async def _close(database_parts: tuple[Keeper, Recorder], engine: Any) -> None:
    for part in database_parts:
        await part.close()
    await engine.dispose()


def _checked_out(_connection: object, record: Any, _proxy: object) -> None:
    record.info["mainstay_counted"] = True
    _metrics.POOL_IN_USE.inc()


def _checked_in(_connection: object, record: Any) -> None:
    # Also told for connections that were refused at check-out.
    if record.info.pop("mainstay_counted", False):
        _metrics.POOL_IN_USE.dec()
