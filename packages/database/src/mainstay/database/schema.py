"""Tables of packages and applications: each schema with its own Alembic branch and version table.

Installed packages are found by an entry point; an application names its own schema. SQLite migrates when the App
starts. On PostgreSQL `mainstay db upgrade` does it, under an account that may create tables, before the new
version of the service is started.

Revision files say `from alembic import op`, and `op` is one global of the process that points to the migration under
way. So migrations of one process take turns, each in a thread with connections of its own, for any database that they
belong to.

Alembic is imported by the functions that change something: a start on tables that are up to date does without it, which
saves a tenth of a second.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from mainstay.core import ConfigurationError
from mainstay.database._engine import SQLITE_ARGUMENTS, Address, begin_events, behind_pooler, connects
from mainstay.database._revisions import newest
from mainstay.database.lease import metadata
from mainstay.database.settings import parse_url

__all__ = [
    "SCHEMA",
    "Schema",
    "SchemaStatus",
    "downgrade",
    "installed",
    "revision",
    "status",
    "upgrade",
]

T = TypeVar("T")

_log = logging.getLogger("mainstay.database")

_UPGRADE_LOCK = 7_261_153_904_017  # an arbitrary number, the same in every process
_in_turn = threading.Lock()


class SchemaStatus(NamedTuple):
    """The revision that a database is at, beside the newest one.

    Attributes:
        package: the name of the schema.
        current: the revision of the tables in the database; None where there are none.
        newest: the newest revision that this installation knows; None for a schema without revisions.
    """

    package: str
    current: str | None
    newest: str | None


@dataclass(frozen=True, slots=True)
class Schema:
    """The tables of one package or application.

    Attributes:
        package: its name, such as `events`; the tables are named `mainstay_events_…`. An application takes its own
            name, and names its tables as it likes.
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
        """The newest revision; None where there is none yet.

        Raises:
            ConfigurationError: two revisions follow the same one.
        """
        try:
            return newest(self.migrations)
        except LookupError:
            from mainstay.database import _alembic

            return _alembic.head(self)

    def current(self, connection: sa.Connection) -> str | None:
        """The revision the database is at; None where there is none yet."""
        if not sa.inspect(connection).has_table(self.version_table):
            return None
        # Asked without Alembic, which logs two lines for each context that it makes.
        version = sa.table(self.version_table, sa.column("version_num", sa.String))
        return connection.execute(sa.select(version.c.version_num)).scalar()

    def is_current(self, connection: sa.Connection) -> bool:
        """Whether the database is at the newest revision, or at one that only a newer installation knows.

        The latter happens while a new version is being rolled out beside the old one; migrations are made so that the
        version before can go on.
        """
        current = self.current(connection)
        if current == self.head():
            return True
        if current is None:
            return False
        from mainstay.database import _alembic

        if _alembic.knows(self, current):
            return False
        _log.warning("the tables of %s are at revision %s, newer than this installation", self.package, current)
        return True

    def sql(self, dialect: str) -> str:
        """The statements of a first installation."""
        from mainstay.database import _alembic

        with _in_turn:
            return _alembic.sql(self, dialect)

    def differences(self, connection: sa.Connection) -> list[object]:
        """How the tables of the database differ from the metadata, in Alembic's words; empty when they agree."""
        from mainstay.database import _alembic

        return _alembic.differences(self, connection)


SCHEMA = Schema("database", metadata, Path(__file__).parent / "migrations")


def installed() -> list[Schema]:
    """The schemas of all packages that are installed, by the entry point group `mainstay.database.schemas`."""
    found = {point.name: cast("Schema", point.load()) for point in entry_points(group="mainstay.database.schemas")}
    return [found[name] for name in sorted(found)]


async def upgrade(url: str, schemas: Sequence[Schema]) -> None:
    """Bring the database at `url` to the newest revision of `schemas` and of this package, all of it or nothing.

    Any number of processes may do so at once: they take turns, and the later ones find nothing left to do.

    Args:
        url: the database.
        schemas: whose tables, in this order.

    Raises:
        ValueError: the URL is of no supported database.
        ConfigurationError: the database cannot be reached, or a schema has two newest revisions.
        sqlalchemy.exc.DBAPIError: the database refused a statement of a migration.
    """
    await migrate(Address(parse_url(url)), [SCHEMA, *(schema for schema in schemas if schema is not SCHEMA)])


async def migrate(address: Address, schemas: Sequence[Schema]) -> None:
    """Bring the database at `address` to the newest revision of `schemas`; raises what `upgrade` does."""
    from mainstay.database import _alembic

    def work(connection: sa.Connection) -> None:
        for schema in schemas:
            if not schema.is_current(connection):
                _alembic.upgrade(schema, connection)

    await _changing(address, work)


async def downgrade(url: str, schema: Schema, target: str) -> None:
    """Take the tables of one schema back to an older revision, in one transaction.

    Args:
        url: the database.
        schema: whose tables.
        target: the revision to go back to, `-1` for the one before the current one, `base` for no tables at all.

    Raises:
        ValueError: the URL is of no supported database.
        ConfigurationError: the database cannot be reached, has no tables of the schema, or `target` is no revision
            before the current one, or a migration between the two has no `downgrade`.
        sqlalchemy.exc.DBAPIError: the database refused a statement of a migration.
    """
    from mainstay.database import _alembic

    def work(connection: sa.Connection) -> None:
        if schema.current(connection) is None:
            msg = f"the database has no tables of the schema {schema.package}: there is nothing to take back"
            raise ConfigurationError(msg)
        _alembic.downgrade(schema, connection, target)

    await _changing(Address(parse_url(url)), work)


async def revision(url: str, schema: Schema, message: str, *, autogenerate: bool = True) -> Path:
    """Write a new revision file into the schema's folder, and return its path.

    With `autogenerate` it holds what the database at `url` lacks of the schema's metadata, to be read and corrected
    before it is used: Alembic sees neither renames nor data, and a table that left the metadata is not dropped, since
    the database holds tables of others too.

    Args:
        url: the database to compare with; its tables are not changed.
        schema: whose tables.
        message: what the revision does, in a few words; part of the file's name.
        autogenerate: compare; otherwise both functions of the file are empty.

    Raises:
        ValueError: the URL is of no supported database.
        ConfigurationError: the database cannot be reached, or is not at the schema's newest revision.
    """
    from mainstay.database import _alembic

    address = Address(parse_url(url))

    def work(connection: sa.Connection) -> tuple[str, str]:
        current, newest = schema.current(connection), schema.head()
        if current != newest:
            msg = f"{_state(schema, current, newest)}: run `{upgrade_command(schema)}` before a revision is compared"
            raise ConfigurationError(msg)
        return _alembic.code(schema, connection)

    up, down = await _changing(address, work) if autogenerate else ("pass", "pass")
    with _in_turn:  # Alembic reads the file that it has written, and with it `op`
        return _alembic.write(schema, message, up, down)


async def status(url: str, schemas: Sequence[Schema]) -> list[SchemaStatus]:
    """Say for each schema which revision the database is at. Changes nothing, and creates no SQLite file.

    Raises:
        ValueError: the URL is of no supported database.
        ConfigurationError: the database cannot be reached, or a schema has two newest revisions.
    """
    address = Address(parse_url(url))
    try:
        if address.missing():
            return [SchemaStatus(schema.package, None, schema.head()) for schema in schemas]
        engine = await _engine(address)
        try:
            async with engine.connect() as connection:
                return [
                    SchemaStatus(schema.package, await connection.run_sync(schema.current), schema.head())
                    for schema in schemas
                ]
        finally:
            await engine.dispose()
    finally:
        address.remove()


async def require(connection: AsyncConnection, schema: Schema) -> None:
    """Make sure that the database is at the newest revision.

    Raises:
        ConfigurationError: it is at another one; names the command.
    """
    if await connection.run_sync(schema.is_current):
        return
    current = await connection.run_sync(schema.current)
    msg = f"{_state(schema, current, schema.head())}: run `{upgrade_command(schema)}` before the service starts"
    raise ConfigurationError(msg)


def upgrade_command(schema: Schema) -> str:
    """The command that upgrades this schema: an application that is not installed names its schema by module."""
    if schema in installed():
        return "mainstay db upgrade"
    places = (
        f"{name}:{attribute}"
        for name, module in sorted(sys.modules.items())
        if name != "__main__"
        for attribute, value in vars(module).items()
        if value is schema
    )
    return f"mainstay db upgrade --schema {next(places, 'module:SCHEMA')}"


def _state(schema: Schema, current: str | None, newest: str | None) -> str:
    state = "has no tables" if current is None else f"is at revision {current}"
    return f"the database {state} of the schema {schema.package}, whose newest revision is {newest}"


async def _changing(address: Address, work: Callable[[sa.Connection], T]) -> T:
    """Do the work in one transaction that no other migration of this database shares, in this or another process."""

    async def transaction() -> T:
        engine = await _engine(address)
        try:
            async with engine.execution_options(mainstay_begin="BEGIN IMMEDIATE").begin() as connection:
                if address.dialect == "postgresql":
                    # Held until the commit, so it works behind a transaction pooler.
                    await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_UPGRADE_LOCK)))
                return await connection.run_sync(work)
        finally:
            await engine.dispose()

    return await asyncio.to_thread(_by_turns, transaction)


def _by_turns(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    with _in_turn:
        return asyncio.run(work())


async def _engine(address: Address) -> AsyncEngine:
    """An engine for migrations, without the foreign keys of SQLite: to rebuild a table there is to drop it first."""
    if address.dialect == "sqlite":
        engine = create_async_engine(
            address.url, poolclass=NullPool, connect_args={"timeout": 30} | SQLITE_ARGUMENTS, hide_parameters=True
        )

        def connect(connection: Any, _record: object) -> None:
            cursor = connection.cursor()
            cursor.execute(f"PRAGMA synchronous={address.synchronous}")
            cursor.close()

        event.listen(engine.sync_engine, "connect", connect)
        begin_events(engine)
        return engine
    pooled = await behind_pooler(address)
    return create_async_engine(
        address.url, poolclass=NullPool, hide_parameters=True, connect_args=connects(address, pooled=pooled)
    )
