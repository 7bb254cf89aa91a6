"""For tests of code that uses the database."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from mainstay.core import SYSTEM_CLOCK, App, Clock
from mainstay.database._simulated import Moments, Simulated
from mainstay.database.database import Database
from mainstay.database.lease import Lease
from mainstay.database.module import DatabaseModule
from mainstay.database.schema import Schema, upgrade
from mainstay.database.settings import DatabaseSettings

__all__ = ["Moments", "SimulatedDatabase", "database", "expire_lease", "schema_differences"]


@asynccontextmanager
async def database(
    url: str = "sqlite+aiosqlite:///:memory:", *schemas: Schema, clock: Clock = SYSTEM_CLOCK, **settings: Any
) -> AsyncGenerator[Database, None]:
    """A running Database with the tables of `schemas`, migrated also on PostgreSQL.

    Args:
        url: where; by default in memory.
        schemas: whose tables to bring up to date.
        clock: the App's. On SQLite a virtual one takes the place of the database's clock too, but for leases.
        settings: further `DatabaseSettings`.
    """
    if not url.startswith("sqlite"):
        await upgrade(url, schemas)
    app = App(DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url), **settings)), clock=clock)
    async with app:
        running = app.get(Database)
        for schema in schemas:
            await running.ensure_schema(schema)
        yield running


class SimulatedDatabase:
    """The Database of one process of a simulation: on a SQLite file, without threads, and never synced.

    For simulators, which run several processes on one event loop whose time is virtual and own every moment of it.
    Leases follow that time, too.

    Args:
        path: the file, which the processes share; its tables exist, and it is in WAL mode.
        moments: asked at each statement and commit.

    Attributes:
        module: to be given to the process' App.
    """

    def __init__(self, path: Path, moments: Moments) -> None:
        self._simulated = Simulated(moments)
        self.module = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(f"sqlite+aiosqlite:///{path}")))
        self.module._simulated = self._simulated

    def crash(self) -> None:
        """Close every connection as the end of a process does: what is not committed by now is gone."""
        self._simulated.crash()


async def expire_lease(database: Database, lease: Lease) -> None:
    """End a lease at the database as if its time had run out: others may take it, and its holder does not know yet.

    Args:
        database: the one that the lease is of.
        lease: what expires; `lease.held` stays as it is until the holder asks the database.
    """
    await database._keeper.release(lease)


async def schema_differences(database: Database, schema: Schema) -> Sequence[object]:
    """What the migrations of a package fail to make of its metadata, in Alembic's words; empty when they agree."""
    async with database.engine.connect() as connection:
        return await connection.run_sync(schema.differences)
