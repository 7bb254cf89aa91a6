"""The SQLAlchemy engine, set up so that transactions mean the same on both databases."""

# asyncpg ships no types.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
from __future__ import annotations

import asyncio
import shutil
import sqlite3
import tempfile
import time
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import asyncpg
import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.engine import URL, ExceptionContext
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import PoolResetState

from mainstay.core import SYSTEM_CLOCK, Clock, ConfigurationError
from mainstay.database._virtual_time import DriverCalls, follow_clock
from mainstay.database.settings import DatabaseSettings, variable_of_url

SQLITE_ARGUMENTS = {"isolation_level": None}  # the driver begins no transaction by itself
CONNECT_SECONDS = 10.0  # how long making a connection may take; it is no write that somebody waits for


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
        """The URL without its password, and without the parameters, which may hold another."""
        return self.url.set(query={}).render_as_string(hide_password=True)

    def missing(self) -> bool:
        """Whether it is a SQLite file that does not exist yet; to connect would create it."""
        place = self.url.database
        return self.dialect == "sqlite" and "uri" not in self.url.query and not Path(cast("str", place)).exists()

    def remove(self) -> None:
        """Remove what was in memory only."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


def sqlite_connection(address: Address, clock: Clock = SYSTEM_CLOCK) -> sqlite3.Connection:
    """A connection of this package's own; it never waits for locks by itself.

    Args:
        address: where the database is.
        clock: by what its statements tell the time.

    Raises:
        sqlite3.Error: it cannot be opened.
    """
    place, options = address.url.get_dialect()().create_connect_args(address.url)
    own: dict[str, Any] = {**options, "timeout": 0, "isolation_level": None, "cached_statements": 512}
    connection: sqlite3.Connection = sqlite3.connect(*cast("tuple[Any]", place), **own)
    try:
        for pragma in sqlite_pragmas(address.synchronous):
            connection.execute(pragma)
        if clock.virtual:
            follow_clock(connection, clock)
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def sqlite_pragmas(synchronous: str) -> tuple[str, ...]:
    """What every connection to SQLite is told, the recorder's and the sessions' alike."""
    return (f"PRAGMA synchronous={synchronous}", "PRAGMA foreign_keys=ON")


def write_ahead(address: Address, seconds: float) -> None:
    """Put the file into WAL mode, once and for all; blocks.

    Several processes may do so at once, and SQLite does not wait for the lock that this takes.

    Raises:
        sqlite3.Error: the file cannot be opened, or somebody else kept it locked.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            # Opening is part of it: while another process switches, not even a pragma gets its read lock.
            with closing(sqlite_connection(address)) as connection:
                connection.execute("PRAGMA journal_mode=WAL").fetchone()
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.01)
        else:
            return


async def postgres_connection(address: Address, *, pooled: bool, timeout_seconds: float) -> asyncpg.Connection:
    """A connection of this package's own, by the arguments with which SQLAlchemy would make it.

    With `pooled` it keeps no prepared statements: a pooler would send them to servers that do not know them.

    Raises:
        OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError: it cannot be made.
        TypeError, ValueError: the URL has parameters that asyncpg does not know.
    """
    _, arguments = address.url.get_dialect()().create_connect_args(address.url)
    mine: dict[str, Any] = {key: value for key, value in arguments.items() if not key.startswith("prepared_")}
    mine["timeout"] = timeout_seconds
    if pooled:
        mine["statement_cache_size"] = 0
    connection: asyncpg.Connection = await cast("Any", asyncpg).connect(**mine)
    return connection


async def behind_pooler(address: Address) -> bool:
    """Whether a pooler such as PgBouncer stands before the server: then prepared statements do not last.

    A pooler invents the process id by which its client could cancel a query; the server knows its own.

    Raises:
        ConfigurationError: the database cannot be reached.
    """
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            connection = await postgres_connection(address, pooled=True, timeout_seconds=CONNECT_SECONDS)
            try:
                (row,) = await connection.fetch("SELECT pg_backend_pid()")
                return bool(row[0] != connection.get_server_pid())
            finally:
                connection.terminate()
    except (OSError, TimeoutError, TypeError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        # TypeError and ValueError: parameters of the URL that asyncpg does not know.
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


def make_engine(
    address: Address, settings: DatabaseSettings, *, pooled: bool, clock: Clock = SYSTEM_CLOCK, calls: DriverCalls
) -> AsyncEngine:
    """The engine; with `pooled` it relies on nothing that a transaction pooler forgets.

    A virtual clock is the time of SQLite's sessions, and their calls of the driver are counted.
    """
    # SQLite waits for locks so long, asyncpg for the connection.
    sqlite = address.dialect == "sqlite"
    arguments: dict[str, Any] = {"timeout": settings.busy_timeout_seconds if sqlite else CONNECT_SECONDS}
    if sqlite:
        arguments |= SQLITE_ARGUMENTS
    if pooled:
        arguments |= pooler_arguments()
    engine = create_async_engine(
        address.url,
        # Whoever closes a connection in a transaction rolls it back, all but after a COMMIT that was refused: to do it
        # always would ask SQLite's thread once more each time.
        pool_reset_on_return=None if sqlite else "rollback",
        pool_size=settings.pool_size,
        max_overflow=0,
        pool_timeout=settings.pool_timeout_seconds,
        connect_args=arguments,
        hide_parameters=True,
    )
    event.listen(engine.sync_engine, "handle_error", _note_refusal)
    event.listen(engine.sync_engine, "rollback_savepoint", _forget_refusal)
    if sqlite:
        _prepare_sqlite(engine, address.synchronous, clock, calls)
    else:
        event.listen(engine.sync_engine, "checkout", _refuse_closed)
    return engine


REFUSED = "mainstay_refused"
"""In a connection's `info`: the name of the error of a statement that nobody has rolled back to a savepoint since."""


def _note_refusal(context: ExceptionContext) -> None:
    connection = context.connection
    if connection is not None and not context.is_disconnect and not connection.closed:
        connection.info[REFUSED] = type(context.original_exception).__name__


def _forget_refusal(connection: sa.Connection, _name: str, _savepoint: object) -> None:
    connection.info.pop(REFUSED, None)


def _prepare_sqlite(engine: AsyncEngine, synchronous: str, clock: Clock, calls: DriverCalls) -> None:
    def connect(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        for pragma in sqlite_pragmas(synchronous):
            cursor.execute(pragma)
        cursor.close()
        if clock.virtual:
            follow_clock(connection, clock)

    def reset(connection: Any, _record: object, state: PoolResetState) -> None:
        if state.asyncio_safe and not state.terminate_only and connection.driver_connection.in_transaction:
            connection.rollback()

    if clock.virtual:
        calls.count(engine)
    event.listen(engine.sync_engine, "connect", connect)
    event.listen(engine.sync_engine, "reset", reset)
    begin_events(engine)


def begin_events(engine: AsyncEngine) -> None:
    """Make SQLite's transactions begin with the statement in the execution option `mainstay_begin`.

    A transaction that starts with a read and then writes would fail at once when somebody else has written in between,
    whatever the busy timeout says; so who means to write says so at the start, with `BEGIN IMMEDIATE`. The empty string
    is for a single read, which is its own snapshot. The driver's own idea of when a transaction begins is turned off by
    `SQLITE_ARGUMENTS`.
    """

    def begin(connection: sa.Connection) -> None:
        how: str = connection.get_execution_options().get("mainstay_begin", "BEGIN")

        def say(driver: Any) -> Any:
            return driver.execute(how)

        if how:
            # One message to the connection's thread; a cursor of SQLAlchemy's would be three.
            cast("Any", connection.connection.dbapi_connection).run_async(say)

    event.listen(engine.sync_engine, "begin", begin)


def _refuse_closed(connection: Any, _record: object, _proxy: object) -> None:
    # A server that restarted has closed its side, and the loop has noticed: asking costs nothing, a ping three
    # messages. Raising this makes the pool connect anew.
    if connection.driver_connection.is_closed():
        msg = "the server has closed this connection"
        raise exc.DisconnectionError(msg)
