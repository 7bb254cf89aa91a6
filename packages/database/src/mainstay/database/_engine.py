"""The SQLAlchemy engine, set up so that transactions mean the same on both databases."""

# asyncpg ships no types.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from weakref import WeakSet

import aiosqlite
import asyncpg
import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.engine import URL, ExceptionContext
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, PoolProxiedConnection, PoolResetState

from mainstay.core import SYSTEM_CLOCK, Clock, ConfigurationError
from mainstay.database import _metrics
from mainstay.database._translation import DRIVER_ERRORS, connection_is_gone, driver_error, only_reads, translate
from mainstay.database._virtual_time import DriverCalls, follow_clock
from mainstay.database.errors import CommitUnknown, DatabaseError, DatabaseUnavailable, WrongEventLoop
from mainstay.database.settings import DatabaseSettings, shown, variable_of_url

SQLITE_ARGUMENTS: dict[str, Any] = {"isolation_level": None}  # the driver begins no transaction by itself
_log = logging.getLogger("mainstay.database")

_NOT_SENT = frozenset({"ssl", "connect_timeout", "channel_binding"})  # what is ours, or what asyncpg does not know
_TRIED_AGAIN_SECONDS = 3.0  # a write that SQLite could not make is tried again within that, by those who insist on it
_UNWRITABLE_SECONDS = 30.0  # for so long a write that SQLite could not make counts, where none was tried since
CONNECT_SECONDS = 10.0  # how long making a connection may take; no caller's write is measured by it


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
        self.left_at = float("-inf")
        self._refused_at = self._wrote_at = float("-inf")
        self._why = ""

    def leave(self) -> None:
        """Retire each connection that was made before now: its server was found to be one that only reads.

        Such a server refuses writes, but would go on to answer reads, with what it had when it was demoted.
        """
        self.left_at = time.monotonic()

    def refused(self, error: DatabaseError) -> None:
        """Note that SQLite could not write just now, if that is what the error says."""
        if self.dialect == "sqlite" and isinstance(error, DatabaseUnavailable | CommitUnknown):
            self._refused_at, self._why = time.monotonic(), str(error)

    def wrote(self) -> None:
        """Note that something was written."""
        self._wrote_at = time.monotonic()

    @property
    def unwritable(self) -> str | None:
        """Why SQLite could not write when that was last tried; None where it could, or that was long ago."""
        ago = time.monotonic() - self._refused_at
        # On a full disk some writes still find room, while others are tried again.
        seconds = _TRIED_AGAIN_SECONDS if self._wrote_at > self._refused_at else _UNWRITABLE_SECONDS
        return self._why if ago < seconds else None

    @property
    def dsn(self) -> str:
        """The address as asyncpg reads it, which knows libpq's parameters. Secret: the password is in it."""
        query: dict[str, Any] = {key: value for key, value in self.url.query.items() if key not in _NOT_SENT}
        if "ssl" in self.url.query:
            query["sslmode"] = self.url.query["ssl"]
        query.setdefault("target_session_attrs", "read-write")
        return self.url.set(drivername="postgresql", query=query).render_as_string(hide_password=False)

    @property
    def connect_seconds(self) -> float | None:
        """The URL's `connect_timeout`; None where it has none, or 0."""
        return float(cast("str", self.url.query.get("connect_timeout", 0))) or None

    @property
    def must_write(self) -> bool:
        """Whether a server that only reads is of no use: so it is unless the URL asks for one."""
        return self.url.query.get("target_session_attrs", "read-write") in {"read-write", "primary"}

    @property
    def shown(self) -> str:
        """The URL without its secrets."""
        return shown(self.url)

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
        sqlite3.Error: the file cannot be opened, or another process kept it locked.
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


@dataclass(frozen=True, slots=True)
class Bounds:
    """How long the server lets a connection of this package hold what others wait for.

    A process that froze, or whose host vanished, cannot give up its locks; only the server can take them.

    Attributes:
        idle_seconds: how long a transaction may do nothing before the server ends it, and its connection.
        lock_seconds: how long a statement waits for a lock.
        answer_seconds: how long the client waits for the answer to a statement before it takes the server for gone.
    """

    idle_seconds: float
    lock_seconds: float
    answer_seconds: float

    def settings(self) -> dict[str, str]:
        """The server's settings, in its own terms."""
        idle, lock = _milliseconds(self.idle_seconds), _milliseconds(self.lock_seconds)
        return {"idle_in_transaction_session_timeout": idle, "lock_timeout": lock}

    def of_connection(self) -> dict[str, str]:
        """The settings of a whole connection: its server also asks whether a silent client is still there."""
        seconds = max(1, round(self.idle_seconds / 4))
        return self.settings() | {
            "tcp_user_timeout": _milliseconds(self.idle_seconds),
            "tcp_keepalives_idle": str(2 * seconds),
            "tcp_keepalives_interval": str(seconds),
            "tcp_keepalives_count": "2",
        }

    def within_transaction(self, begin: str) -> str:
        """A BEGIN that sets them for its transaction only, in the same message."""
        head, _, rest = begin.partition(";")
        local = "; ".join(f"SET LOCAL {name} = {value}" for name, value in self.settings().items())
        return f"{head}; {local};{rest}"


def _milliseconds(seconds: float) -> str:
    return str(max(1, round(seconds * 1000)))


def bounds(settings: DatabaseSettings) -> Bounds:
    """The bounds that the settings ask for."""
    return Bounds(settings.idle_transaction_seconds, settings.busy_timeout_seconds, settings.statement_timeout_seconds)


def _pooled_connection(limits: Bounds) -> type[asyncpg.Connection]:
    class PooledConnection(asyncpg.Connection):  # type: ignore[misc]  # asyncpg ships no types
        """A connection whose transactions carry their bounds: behind a pooler nothing else of a session lasts."""

        async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
            if query.startswith("BEGIN"):
                query = limits.within_transaction(query)
            return str(await super().execute(query, *args, timeout=timeout))

    return PooledConnection


async def postgres_connection(
    address: Address, *, pooled: bool, timeout_seconds: float, limits: Bounds | None = None
) -> asyncpg.Connection:
    """Connect to a server that can write, or to any that the URL's `target_session_attrs` asks for.

    Args:
        address: where the database is.
        pooled: a pooler stands before it: keep no prepared statements, which a pooler would send to servers that do
            not know them, and no settings of a session.
        timeout_seconds: how long it may take, where the URL has no `connect_timeout`.
        limits: what bounds its transactions; None for connections that migrate, or look once.

    Raises:
        OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError: it cannot
            be made.
    """
    mine: dict[str, Any] = {"dsn": address.dsn, "timeout": address.connect_seconds or timeout_seconds}
    if pooled:
        mine["statement_cache_size"] = 0
    if limits is not None:
        mine["command_timeout"] = limits.answer_seconds
        if pooled:
            mine["connection_class"] = _pooled_connection(limits)
        else:
            mine["server_settings"] = limits.of_connection()
    connection: asyncpg.Connection = await cast("Any", asyncpg).connect(**mine)
    return connection


def connects(address: Address, *, pooled: bool, limits: Bounds | None = None) -> dict[str, Any]:
    """SQLAlchemy's `connect_args` that let it connect as `postgres_connection` does."""

    async def connect(**_arguments: object) -> asyncpg.Connection:
        return await postgres_connection(address, pooled=pooled, timeout_seconds=CONNECT_SECONDS, limits=limits)

    arguments: dict[str, Any] = {"async_creator_fn": connect}
    if pooled:
        # Nothing relies on a statement that another server connection has prepared.
        arguments |= {
            "prepared_statement_cache_size": 0,
            "prepared_statement_name_func": lambda: f"mainstay_{uuid.uuid4().hex}",
        }
    return arguments


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
    except (*DRIVER_ERRORS, ValueError) as error:
        raise unreachable(address, error) from error


def unreachable(address: Address, error: BaseException) -> ConfigurationError:
    """The error of a start without a database."""
    msg = (
        f"DatabaseModule cannot reach {address.shown} ({type(error).__name__}: {error}); "
        f"start the database, or set {variable_of_url()} or pass DatabaseSettings(url=…)"
    )
    return ConfigurationError(msg)


class _CountedPool(AsyncAdaptedQueuePool):
    """A pool that tells how many wait for one of its connections, or for a new one."""

    __module__ = AsyncAdaptedQueuePool.__module__  # SQLAlchemy names a pool's logger by it, and keeps its own quiet

    def connect(self) -> PoolProxiedConnection:
        _metrics.POOL_WAITING.inc()
        try:
            return super().connect()
        finally:
            _metrics.POOL_WAITING.dec()


def make_engine(
    address: Address,
    settings: DatabaseSettings,
    clock: Clock,
    calls: DriverCalls,
    threads: Threads,
    *,
    pooled: bool,
    connect: Callable[..., Any],
) -> AsyncEngine:
    """The engine; with `pooled` it relies on nothing that a transaction pooler forgets.

    A virtual clock is the time of SQLite's sessions, and their calls of the driver are counted. `connect` makes the
    connections to SQLite.
    """
    sqlite = address.dialect == "sqlite"
    arguments = (
        SQLITE_ARGUMENTS | {"timeout": settings.busy_timeout_seconds}
        if sqlite
        else connects(address, pooled=pooled, limits=bounds(settings))
    )
    if sqlite:
        arguments = {**arguments, "async_creator_fn": connect}
    engine = create_async_engine(
        address.url,
        # Closing a connection in a transaction rolls it back, all but after a COMMIT that was refused: to do it
        # always would ask SQLite's thread once more each time.
        pool_reset_on_return=None if sqlite else "rollback",
        poolclass=_CountedPool,
        pool_size=settings.pool_size,
        max_overflow=0,
        pool_timeout=settings.pool_timeout_seconds,
        connect_args=arguments,
        hide_parameters=True,
    )

    def refused(context: ExceptionContext) -> DatabaseError | None:
        if only_reads(driver_error(context.original_exception)):
            address.leave()
        mine = _translate(context)
        if mine is not None:
            address.refused(mine)
        return mine

    event.listen(engine.sync_engine, "handle_error", refused)
    event.listen(engine.sync_engine, "rollback_savepoint", _forget_refusal)
    if sqlite:
        _prepare_sqlite(engine, address.synchronous, clock, calls, threads)
    else:
        _refuse_left(engine, address)
    home = Home()

    def check_home(_connection: object, _record: object, _proxy: object) -> None:
        home.check()

    event.listen(engine.sync_engine, "checkout", check_home)
    return engine


class Threads:
    """The threads of connections to SQLite, each of which ends with its connection.

    The caller that gives up a statement, or a connection that is being opened, does not wait for that: one that is
    cancelled again meanwhile, as by the scopes of anyio, would leave a task behind that waits for ever, also at the end
    of the process. A thread does first what it was handed before.
    """

    def __init__(self) -> None:
        self._ending: set[asyncio.Future[Any]] = set()
        self._told: WeakSet[aiosqlite.Connection] = WeakSet()  # a second one is never answered: the thread is over

    async def open(self, *arguments: Any, **options: Any) -> aiosqlite.Connection:
        """A connection, and its thread."""
        opening = asyncio.ensure_future(_opened(*arguments, **options))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            self._keep(opening)
            opening.add_done_callback(self._opened_in_vain)
            raise

    def _opened_in_vain(self, opening: asyncio.Future[aiosqlite.Connection]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            self._end(opening.result())

    def end(self, connection: Any) -> None:
        """End a connection of no further use, as SQLAlchemy has it."""
        self._end(connection.driver_connection)

    def _end(self, connection: aiosqlite.Connection) -> None:
        if connection in self._told:
            return
        self._told.add(connection)
        if asyncio._get_running_loop() is None:  # the collector has found it
            connection.stop()
        else:
            self._keep(asyncio.ensure_future(_ended(connection)))

    def _keep(self, ending: asyncio.Future[Any]) -> None:
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    async def ended(self) -> None:
        """Return when all have ended that were to."""
        while self._ending:
            await asyncio.wait(self._ending)


async def _ended(connection: aiosqlite.Connection) -> None:
    """Roll back and end a connection, behind all that its thread was handed.

    To close it is not enough: while a cursor is left, which may be in a traceback, SQLite keeps what was closed open,
    with its lock.
    """
    open_ = True
    try:
        await connection.rollback()
    except ValueError:
        open_ = False  # it was closed, which has ended its thread
    except sqlite3.Error as error:
        _log.debug("a connection to SQLite was not rolled back before its end", exc_info=error)
    finally:  # also where this is cancelled, since the loop closes then, to which the thread answers
        if open_ and (ended := connection.stop()) is not None:
            await ended


async def _opened(*arguments: Any, **options: Any) -> aiosqlite.Connection:
    return await aiosqlite.connect(*arguments, **options)


class Home:
    """The event loop and the process in which a database was started, the only ones that may use it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._process = os.getpid()

    def check(self) -> None:
        """Make sure that the caller is there.

        Raises:
            WrongEventLoop: it is not; the message names the remedy.
        """
        if self.forked():
            msg = (
                "this database was started before the process was forked, and its connections belong to the parent: "
                "start the App in the child, or start the child by `spawn` or `forkserver`"
            )
            raise WrongEventLoop(msg)
        if asyncio._get_running_loop() is not self._loop:
            msg = (
                "this database was started on another event loop: start the App on the loop that uses it (in pytest, "
                "fixtures and tests on one loop), or hand the work to its loop with asyncio.run_coroutine_threadsafe"
            )
            raise WrongEventLoop(msg)

    def forked(self) -> bool:
        """Whether this process is a child, forked from the one in which the database was started."""
        return os.getpid() != self._process


REFUSED = "mainstay_refused"
"""In a connection's `info`: the name of the error of a statement, until a rollback to a savepoint."""


MADE_AT = "mainstay_made_at"
"""In the `info` of a connection of the pool: when it was made, by the monotonic clock."""


def _translate(context: ExceptionContext) -> DatabaseError | None:
    """Make every statement of every session raise what `db.write` raises, and drop connections of no further use."""
    error = driver_error(context.original_exception)
    if connection_is_gone(error):
        context.is_disconnect = True  # then the pool makes all its connections anew
    connection = context.connection
    if connection is not None and not context.is_disconnect and not connection.closed:
        connection.info[REFUSED] = type(error).__name__
    if isinstance(error, (sqlite3.Error, *DRIVER_ERRORS)) or isinstance(context.sqlalchemy_exception, exc.DBAPIError):
        # Only COMMIT and ROLLBACK come without a statement.
        return translate(error, gone=context.is_disconnect, committing=connection is not None and not context.statement)
    return None


def _forget_refusal(connection: sa.Connection, _name: str, _savepoint: object) -> None:
    connection.info.pop(REFUSED, None)


def _prepare_sqlite(engine: AsyncEngine, synchronous: str, clock: Clock, calls: DriverCalls, threads: Threads) -> None:
    def prepare(connection: Any) -> None:
        cursor = connection.cursor()
        for pragma in sqlite_pragmas(synchronous):
            cursor.execute(pragma)
        cursor.close()
        if clock.virtual:
            follow_clock(connection, clock)

    def connect(connection: Any, _record: object) -> None:
        try:
            prepare(connection)
        except BaseException:  # the pool forgets it
            threads.end(connection)
            raise

    def reset(connection: Any, _record: object, state: PoolResetState) -> None:
        if state.asyncio_safe and not state.terminate_only and connection.driver_connection.in_transaction:
            connection.rollback()

    cast("Any", engine.sync_engine.dialect).do_terminate = threads.end
    if clock.virtual:
        calls.count(engine)
    event.listen(engine.sync_engine, "connect", connect)
    event.listen(engine.sync_engine, "reset", reset)
    begin_events(engine)


def begin_events(engine: AsyncEngine) -> None:
    """Make SQLite's transactions begin with the statement in the execution option `mainstay_begin`.

    A transaction that starts with a read and then writes would fail at once when another has written in between,
    however long the busy timeout; so a transaction that will write says so at the start, with `BEGIN IMMEDIATE`. The
    empty string is for a single read, which is its own snapshot. The driver's own idea of when a transaction begins is
    turned off by `SQLITE_ARGUMENTS`.
    """

    def begin(connection: sa.Connection) -> None:
        how: str = connection.get_execution_options().get("mainstay_begin", "BEGIN")

        def say(driver: Any) -> Any:
            return driver.execute(how)

        if how:
            try:
                # One message to the connection's thread; a cursor of SQLAlchemy's would be three.
                cast("Any", connection.connection.dbapi_connection).run_async(say)
            except asyncio.CancelledError:
                # It may begin yet, in its thread, and back in the pool it would keep all writers out.
                connection.invalidate()
                raise

    event.listen(engine.sync_engine, "begin", begin)


def _refuse_left(engine: AsyncEngine, address: Address) -> None:
    def connect(_connection: object, record: Any) -> None:
        record.info[MADE_AT] = time.monotonic()

    def checkout(connection: Any, record: Any, _proxy: object) -> None:
        # A server that restarted has closed its side, and the loop has noticed: asking costs nothing, a ping three
        # messages. Raising this makes the pool connect anew.
        if connection.driver_connection.is_closed() or record.info[MADE_AT] < address.left_at:
            msg = "the server has closed this connection, or may not write any more"
            raise exc.DisconnectionError(msg)

    event.listen(engine.sync_engine, "connect", connect)
    event.listen(engine.sync_engine, "checkout", checkout)
