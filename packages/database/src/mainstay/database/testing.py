"""For tests of code that uses the database."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from pydantic import SecretStr

from mainstay.core import SYSTEM_CLOCK, App, Clock
from mainstay.database.database import Database
from mainstay.database.module import SCHEMA, DatabaseModule
from mainstay.database.schema import Schema, upgrade
from mainstay.database.settings import DatabaseSettings


@asynccontextmanager
async def database(
    url: str = "sqlite+aiosqlite:///:memory:", *schemas: Schema, clock: Clock = SYSTEM_CLOCK, **settings: Any
) -> AsyncGenerator[Database, None]:
    """A running Database with the tables of `schemas`, migrated also on PostgreSQL.

    Args:
        url: where; by default in memory.
        schemas: whose tables to bring up to date.
        clock: what leases are measured with on the holder's side.
        settings: further `DatabaseSettings`.
    """
    if not url.startswith("sqlite"):
        await upgrade(url, [SCHEMA, *schemas])
    app = App(DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url), **settings)), clock=clock)
    async with app:
        running = app.get(Database)
        for schema in schemas:
            await running.ensure_schema(schema)
        yield running
