"""Tables of the packages: each with its own Alembic branch and version table, found by an entry point.

SQLite migrates when the App starts. On PostgreSQL `mainstay-database upgrade` does it, under an account that may create
tables, before the new version of the service is started.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, cast

import sqlalchemy as sa
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from mainstay.core import ConfigurationError
from mainstay.database._engine import SQLITE_ARGUMENTS, Address, begin_events, behind_pooler, pooler_arguments
from mainstay.database.lease import metadata
from mainstay.database.settings import parse_url

_log = logging.getLogger("mainstay.database")

_UPGRADE_LOCK = 7_261_153_904_017  # an arbitrary number, the same in every process


@dataclass(frozen=True, slots=True)
class Schema:
    """The tables of one package.

    Attributes:
        package: its name, such as `events`; the tables are named `mainstay_events_…`.
        metadata: the tables as the code uses them.
        migrations: the folder with the Alembic revision files that lead there.
    """

    package: str
    metadata: sa.MetaData
    migrations: Path

    @property
    def version_table(self) -> str:
        """The table that holds the revision the database is at."""
        return f"mainstay_{self.package}_version"

    def head(self) -> str | None:
        """The newest revision."""
        return self._script().get_current_head()

    def _script(self) -> ScriptDirectory:
        return ScriptDirectory(str(self.migrations), version_locations=[str(self.migrations)])

    def current(self, connection: sa.Connection) -> str | None:
        """The revision the database is at; None where there is none yet."""
        if not sa.inspect(connection).has_table(self.version_table):
            return None
        context = MigrationContext.configure(connection, opts={"version_table": self.version_table})
        return context.get_current_revision()

    def is_current(self, connection: sa.Connection) -> bool:
        """Whether the database is at the newest revision, or at one that only a newer installation knows.

        The latter happens while a new version is being rolled out beside the old one; migrations are made so that the
        version before can go on.
        """
        current = self.current(connection)
        script = self._script()
        if current == script.get_current_head():
            return True
        if current is None or current in {known.revision for known in script.walk_revisions()}:
            return False
        _log.warning(
            "the tables of mainstay-%s are at revision %s, newer than this installation", self.package, current
        )
        return True

    def upgrade(self, connection: sa.Connection) -> None:
        """Bring the database to the newest revision, in the transaction that the connection is in."""
        if self.is_current(connection):
            return
        script = self._script()
        context = MigrationContext.configure(
            connection,
            opts={"version_table": self.version_table, "fn": _steps(script), "transactional_ddl": True},
        )
        with Operations.context(context):
            context.run_migrations()

    def sql(self, dialect: str) -> str:
        """The statements of a first installation."""
        buffer = io.StringIO()
        context = MigrationContext.configure(
            dialect_name=dialect,
            opts={
                "as_sql": True,
                "output_buffer": buffer,
                "version_table": self.version_table,
                "fn": _steps(self._script()),
                "literal_binds": True,
            },
        )
        with Operations.context(context), context.begin_transaction():
            context.run_migrations()
        return buffer.getvalue()


SCHEMA = Schema("database", metadata, Path(__file__).parent / "migrations")


def _steps(script: ScriptDirectory) -> Callable[[Any, MigrationContext], Any]:
    return lambda revision, _context: script._upgrade_revs("head", revision)


def installed() -> list[Schema]:
    """The schemas of all packages that are installed, by the entry point group `mainstay.database.schemas`."""
    found = {point.name: cast("Schema", point.load()) for point in entry_points(group="mainstay.database.schemas")}
    return [found[name] for name in sorted(found)]


async def upgrade(url: str, schemas: Sequence[Schema]) -> None:
    """Bring the database at `url` to the newest revision of `schemas` and of this package, all of it or nothing.

    Any number of processes may do so at once: they take turns, and the later ones find nothing left to do.

    Raises:
        ValueError: the URL is of no supported database.
        ConfigurationError: the database cannot be reached.
    """
    engine = await _engine(url)
    try:
        await upgrade_with(engine, [SCHEMA, *(schema for schema in schemas if schema is not SCHEMA)])
    finally:
        await engine.dispose()


async def status(url: str, schemas: Sequence[Schema]) -> list[tuple[str, str | None, str | None]]:
    """For each schema its package, the revision the database is at, and the newest one.

    Raises:
        ValueError: the URL is of no supported database.
        ConfigurationError: the database cannot be reached.
    """
    engine = await _engine(url)
    try:
        async with engine.connect() as connection:
            return [(schema.package, await connection.run_sync(schema.current), schema.head()) for schema in schemas]
    finally:
        await engine.dispose()


async def _engine(url: str) -> AsyncEngine:
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite":
        engine = create_async_engine(parsed, poolclass=NullPool, connect_args={"timeout": 30} | SQLITE_ARGUMENTS)
        begin_events(engine)
        return engine
    pooled = await behind_pooler(Address(parsed))
    return create_async_engine(
        parsed, poolclass=NullPool, hide_parameters=True, connect_args=pooler_arguments() if pooled else {}
    )


async def upgrade_with(engine: AsyncEngine, schemas: Sequence[Schema]) -> None:
    """The same on an engine of this package's making."""
    async with engine.execution_options(mainstay_begin="BEGIN IMMEDIATE").begin() as connection:
        if engine.dialect.name == "postgresql":
            # Held until the commit, so it works behind a transaction pooler.
            await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_UPGRADE_LOCK)))
        for schema in schemas:
            await connection.run_sync(schema.upgrade)


async def require(connection: AsyncConnection, schema: Schema) -> None:
    """Make sure that the database is at the newest revision.

    Raises:
        ConfigurationError: it is at another one; names the command.
    """
    if await connection.run_sync(schema.is_current):
        return
    current = await connection.run_sync(schema.current)
    head = schema.head()
    state = "has no tables" if current is None else f"is at revision {current}"
    msg = (
        f"the database {state} for mainstay-{schema.package}, whose newest revision is {head}: "
        "run `mainstay-database upgrade` before the service starts"
    )
    raise ConfigurationError(msg)
