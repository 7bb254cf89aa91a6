"""The SQLAlchemy engine, set up so that transactions mean the same on both databases."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any

import asyncpg
import sqlalchemy as sa
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from mainstay.core import ConfigurationError
from mainstay.database.settings import DatabaseSettings, variable_of_url


class Address:
    """Where the database is, once the App has started.

    `:memory:` becomes a private file in the temporary directory that is never synced and is removed at the end:
    SQLite's own forms of it make readers wait for writers or show them uncommitted rows, so that code which works on
    them may not work on a file, nor the other way round.
    """

    def __init__(self, url: URL) -> None:
        self.dialect = url.get_backend_name()
        self._directory: str | None = None
        self.synchronous = "FULL"
        if self.dialect == "sqlite" and url.database in {None, "", ":memory:"}:
            self._directory = tempfile.mkdtemp(prefix="mainstay-memory-")
            self.synchronous = "OFF"
            url = url.set(database=str(Path(self._directory) / "memory.db"))
        self.url = url

    @property
    def shown(self) -> str:
        """The URL without its password."""
        return self.url.render_as_string(hide_password=True)

    def remove(self) -> None:
        """Remove what was in memory only."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


def sqlite_pragmas(synchronous: str) -> tuple[str, ...]:
    """What every connection to SQLite is told, the recorder's and the sessions' alike."""
    return ("PRAGMA journal_mode=WAL", f"PRAGMA synchronous={synchronous}", "PRAGMA foreign_keys=ON")


def asyncpg_arguments(url: URL) -> dict[str, Any]:
    """The keyword arguments with which SQLAlchemy would call `asyncpg.connect`."""
    _, arguments = url.get_dialect()().create_connect_args(url)
    for own in ("prepared_statement_cache_size", "prepared_statement_name_func"):
        arguments.pop(own, None)
    return dict(arguments)


async def behind_pooler(address: Address, timeout_seconds: float) -> bool:
    """Whether a pooler such as PgBouncer stands before the server: then prepared statements do not last.

    A pooler invents the process id by which its client could cancel a query; the server knows its own.

    Raises:
        ConfigurationError: the database cannot be reached.
    """
    try:
        connection = await asyncpg.connect(
            **asyncpg_arguments(address.url) | {"timeout": timeout_seconds, "statement_cache_size": 0}
        )
        try:
            (row,) = await connection.fetch("SELECT pg_backend_pid()")
            return bool(row[0] != connection.get_server_pid())
        finally:
            await connection.close(timeout=timeout_seconds)
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise unreachable(address, error) from error


def unreachable(address: Address, error: BaseException) -> ConfigurationError:
    """The error of a start without a database."""
    msg = (
        f"DatabaseModule cannot reach {address.shown} ({type(error).__name__}: {error}); "
        f"start the database, or set {variable_of_url()} or pass DatabaseSettings(url=…)"
    )
    return ConfigurationError(msg)


def pooler_arguments() -> dict[str, Any]:
    """What keeps SQLAlchemy and asyncpg from relying on a statement that another server connection has prepared."""
    return {
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
        "prepared_statement_name_func": lambda: f"mainstay_{uuid.uuid4().hex}",
    }


def make_engine(address: Address, settings: DatabaseSettings, *, pooled: bool) -> AsyncEngine:
    """The engine; with `pooled` it relies on nothing that a transaction pooler forgets."""
    arguments: dict[str, Any] = {"timeout": settings.busy_timeout_seconds}
    if pooled:
        arguments |= pooler_arguments()
    engine = create_async_engine(
        address.url,
        pool_size=settings.pool_size,
        max_overflow=0,
        pool_timeout=settings.pool_timeout_seconds,
        connect_args=arguments,
        hide_parameters=True,
    )
    if address.dialect == "sqlite":
        _prepare_sqlite(engine, address.synchronous)
    else:
        sa.event.listen(engine.sync_engine, "checkout", _refuse_closed)
    return engine


def _prepare_sqlite(engine: AsyncEngine, synchronous: str) -> None:
    def connect(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        for pragma in sqlite_pragmas(synchronous):
            cursor.execute(pragma)
        cursor.close()

    sa.event.listen(engine.sync_engine, "connect", connect)
    begin_events(engine)


def begin_events(engine: AsyncEngine) -> None:
    """Make SQLite's transactions begin as the engine's execution option `mainstay_write` says."""

    def plain(connection: Any, _record: object) -> None:
        # The driver's own idea of when a transaction begins is turned off: `begin` says it.
        connection.isolation_level = None

    def begin(connection: sa.Connection) -> None:
        # A transaction that starts with a read and then writes would fail at once when somebody else has written in
        # between, whatever the busy timeout says; who means to write says so at the start.
        write = connection.get_execution_options().get("mainstay_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    sa.event.listen(engine.sync_engine, "connect", plain)
    sa.event.listen(engine.sync_engine, "begin", begin)


def _refuse_closed(connection: Any, _record: object, _proxy: object) -> None:
    # A server that restarted has closed its side, and the loop has noticed: asking costs nothing, a ping three
    # messages. Raising this makes the pool connect anew.
    if connection.driver_connection.is_closed():
        msg = "the server has closed this connection"
        raise sa.exc.DisconnectionError(msg)
