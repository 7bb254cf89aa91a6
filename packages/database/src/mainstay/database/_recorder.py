"""The recorder: many coroutines' small writes become few commits.

A commit costs a round trip and a flush of the log whether it carries one row or a thousand. So nobody commits alone:
a write is an entry in a queue, and whatever is waiting when a connection becomes free goes into one transaction. There
is no timer and no minimum: alone, an entry is committed at once; by a thousand, the batch grows by itself while the one
before it is being flushed. The entries that fail (a constraint, a lost fence) fail alone.

Entries with the same route share a connection and take effect in the order in which they were handed in. Entries of
different routes are concurrent: their statements may be merged and reordered, which is what makes a batch cheap.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import random
import sqlite3
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Hashable, Sequence
from typing import Any, Protocol, TypeVar, cast

import asyncpg

from mainstay.core import spawn
from mainstay.database import _metrics
from mainstay.database._engine import Address, asyncpg_arguments, sqlite_pragmas
from mainstay.database._statements import Arguments, Literal, Operation, Prepared, Statements
from mainstay.database.errors import (
    CommitUnknown,
    Conflict,
    DatabaseBusy,
    DatabaseError,
    DatabaseUnavailable,
    FenceLost,
)
from mainstay.database.fence import Fence, FenceOn

T = TypeVar("T")

_log = logging.getLogger("mainstay.database")

_BATCH_ROWS = 2_000  # more would hold locks and other callers' answers for longer than a commit costs
_PENDING_ROWS = 20_000  # beyond this, whoever writes waits: memory is bounded
_CONFLICT_RETRIES = 5  # deadlocks and serialization failures, which PostgreSQL asks to repeat


class Entry:
    """What one caller wants durable: all of it or nothing."""

    __slots__ = ("durable", "fence", "handed_in", "operations", "route", "rows")

    def __init__(self, operations: list[Operation], fence: Fence | None, route: Hashable) -> None:
        self.operations = operations
        self.fence = fence
        self.route = route
        self.rows = sum(len(rows) for _, rows in operations)
        self.handed_in = time.monotonic()
        self.durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def settle(self, error: Exception | None) -> None:
        """Tell the caller, if it still waits."""
        if not self.durable.done():
            if error is None:
                self.durable.set_result(None)
            else:
                self.durable.set_exception(error)


class Writer(Protocol):
    """Commits batches on one connection: SQLite's and PostgreSQL's are below."""

    async def commit(self, take: Callable[[], list[Entry]]) -> None:
        """Take a batch when ready for it, commit it and settle every entry; raises only what it did not foresee."""
        ...

    async def close(self) -> None:
        """Close the connection."""
        ...


class Lane:
    """The queue before one writer, and the task that empties it."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._pending: deque[Entry] = deque()
        self._rows = 0
        self._room: deque[asyncio.Future[None]] = deque()
        self._taken: list[Entry] = []
        self._closing = False
        self._wake = asyncio.Event()
        self._task = spawn(self._run(), name="mainstay.database recorder")

    async def record(self, entry: Entry) -> None:
        """Hand in an entry; returns when it is durable."""
        while self._rows >= _PENDING_ROWS and not self._closing:
            room: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._room.append(room)
            await room
        if self._closing:
            msg = "the database is closing: nothing more can be written"
            raise DatabaseUnavailable(msg, retryable=False)
        self._pending.append(entry)
        self._rows += entry.rows
        self._wake.set()
        await entry.durable

    def waiting(self) -> int:
        """Rows that nobody works on yet."""
        return self._rows

    async def close(self) -> None:
        """Commit what is waiting, refuse what comes later."""
        self._closing = True
        self._wake.set()
        await self._task
        await self._writer.close()

    async def _run(self) -> None:
        while True:
            while not self._pending:
                self._let_in()
                if self._closing:
                    return
                self._wake.clear()
                await self._wake.wait()
            await asyncio.sleep(0)  # whoever is ready to run in this turn of the loop joins the batch
            try:
                await self._writer.commit(self._take)
            except Exception as error:
                _log.exception("the recorder could not commit a batch")
                self._fail(error)
            except BaseException:
                self._fail(CommitUnknown("the recorder was stopped while it was writing"))
                raise
            self._taken = []
            self._let_in()

    def _take(self) -> list[Entry]:
        taken: list[Entry] = []
        rows = 0
        while self._pending and rows < _BATCH_ROWS:
            entry = self._pending.popleft()
            self._rows -= entry.rows
            if not entry.durable.done():  # its caller went away before anything happened
                taken.append(entry)
                rows += entry.rows
        self._taken = taken
        return taken

    def _let_in(self) -> None:
        while self._room and (self._closing or self._rows < _PENDING_ROWS):
            room = self._room.popleft()
            if not room.done():
                room.set_result(None)
                if not self._closing:
                    break

    def _fail(self, error: Exception) -> None:
        for entry in self._taken or self._take():
            entry.settle(error)


class Recorder:
    """All lanes of one database."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = lanes

    async def record(self, operations: list[Operation], fence: Fence | None, route: Hashable) -> None:
        """Make the operations durable together; entries of one route in the order in which they come."""
        entry = Entry(operations, fence, route)
        await self._lane(route).record(entry)

    def _lane(self, route: Hashable) -> Lane:
        lanes = self._lanes
        if len(lanes) == 1:
            return lanes[0]
        if route is None:
            return min(lanes, key=Lane.waiting)
        return lanes[hash(route) % len(lanes)]

    async def close(self) -> None:
        """Commit what is waiting and close the connections."""
        await asyncio.gather(*(lane.close() for lane in self._lanes))


def merge(entries: Sequence[Entry]) -> list[tuple[Prepared | Literal, list[Arguments]]]:
    """One list of rows for each statement, in an order that every entry and every route would have had alone."""
    groups: list[tuple[Prepared | Literal, list[Arguments]]] = []
    latest: dict[Prepared | Literal, int] = {}
    floors: dict[Hashable, int] = {}
    for entry in entries:
        route = entry.route
        floor = 0 if route is None else floors.get(route, 0)
        for statement, rows in entry.operations:
            place = latest.get(statement, -1)
            if place < floor or place < 0:
                place = len(groups)
                groups.append((statement, []))
                latest[statement] = place
            groups[place][1].extend(rows)
            floor = place
        if route is not None:
            floors[route] = floor
    return groups


def _settle(entries: Sequence[Entry], errors: dict[int, Exception]) -> None:
    """Answer the callers of a batch that was committed except for the entries with an error."""
    rows = 0
    oldest = 0.0
    now = time.monotonic()
    for entry in entries:
        error = errors.get(id(entry))
        entry.settle(error)
        if error is None:
            rows += entry.rows
            oldest = max(oldest, now - entry.handed_in)
    if rows:
        _metrics.COMMITS_BY_RECORDER.inc()
        _metrics.ROWS.inc(rows)
        _metrics.BATCH_ROWS.observe(rows)
        _metrics.WAIT_SECONDS.observe(oldest)


# ---------------------------------------------------------------------------------------------------------------- SQLite


class Turn:
    """The process's turn to write to SQLite, first come first served, between units of work and the recorder.

    SQLite has one writer and lets others poll for it. Within the process they queue instead.
    """

    def __init__(self, busy_timeout_seconds: float) -> None:
        self._lock = asyncio.Lock()
        self._seconds = busy_timeout_seconds

    @contextlib.asynccontextmanager
    async def mine(self) -> AsyncGenerator[None, None]:
        """Wait for the turn and hold it.

        Raises:
            DatabaseBusy: it did not come in time.
        """
        try:
            async with asyncio.timeout(self._seconds):
                await self._lock.acquire()
        except TimeoutError:
            msg = (
                f"SQLite's writer was not free within {self._seconds:g} s: another unit of work of this process holds "
                "it; keep units of work short, and never await in one what itself waits for a write"
            )
            raise DatabaseBusy(msg) from None
        try:
            yield
        finally:
            self._lock.release()


class SQLiteWriter:
    """One thread with one connection; `commit` runs on the loop and hands it a batch at a time."""

    def __init__(self, address: Address, statements: Statements, turn: Turn, busy_timeout_seconds: float) -> None:
        self._arguments = address.url.get_dialect()().create_connect_args(address.url)
        self._synchronous = address.synchronous
        self._statements = statements
        self._turn = turn
        self._busy_timeout_seconds = busy_timeout_seconds
        self._loop = asyncio.get_running_loop()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._connection: sqlite3.Connection | None = None
        self._thread = threading.Thread(target=self._work, name="mainstay.database writer", daemon=True)
        self._thread.start()

    async def commit(self, take: Callable[[], list[Entry]]) -> None:
        async with self._turn.mine():
            entries = take()
            if entries:
                errors = await self._call(lambda: self._commit(entries))
                _settle(entries, errors)

    async def close(self) -> None:
        self._jobs.put(None)
        while self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    def _call(self, work: Callable[[], T]) -> asyncio.Future[T]:
        loop = self._loop
        answer: asyncio.Future[T] = loop.create_future()

        def job() -> None:
            try:
                result = work()
            except BaseException as error:  # noqa: BLE001  it belongs to whoever waits
                tell: Callable[[], None] = _teller(answer.set_exception, error)
            else:
                tell = _teller(answer.set_result, result)
            with contextlib.suppress(RuntimeError):  # the loop is gone, and with it whoever waited
                loop.call_soon_threadsafe(lambda: None if answer.done() else tell())

        self._jobs.put(job)
        return answer

    # The rest runs in the thread.

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
        if self._connection is not None:
            self._connection.close()

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None:
            place, options = self._arguments
            options = {**options, "timeout": 0, "isolation_level": None, "cached_statements": 512}
            connection = sqlite3.connect(*place, **options)
            for pragma in sqlite_pragmas(self._synchronous):
                connection.execute(pragma)
            self._connection = connection
        return self._connection

    def _commit(self, entries: Sequence[Entry]) -> dict[int, Exception]:
        try:
            connection = self._connected()
            begin_immediate(connection, self._busy_timeout_seconds)
        except sqlite3.Error as error:
            failure = sqlite_error(error)
            return {id(entry): failure for entry in entries}
        try:
            errors = self._fenced_out(connection, entries)
            good = [entry for entry in entries if id(entry) not in errors]
            try:
                for statement, rows in merge(good):
                    _execute(connection, statement.sql, rows)
            except (sqlite3.Error, OverflowError, ValueError) as error:
                if len(good) == 1:
                    errors[id(good[0])] = sqlite_error(error)
                    connection.execute("ROLLBACK")
                    return errors
                connection.execute("ROLLBACK")
                begin_immediate(connection, self._busy_timeout_seconds)
                errors = self._fenced_out(connection, entries)
                self._one_by_one(connection, [entry for entry in entries if id(entry) not in errors], errors)
            connection.execute("COMMIT")
        except BaseException as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if not isinstance(error, sqlite3.Error):
                raise
            failure = sqlite_error(error)
            return {id(entry): failure for entry in entries}
        return errors

    def _fenced_out(self, connection: sqlite3.Connection, entries: Sequence[Entry]) -> dict[int, Exception]:
        errors: dict[int, Exception] = {}
        lost: dict[Fence, bool] = {}
        for entry in entries:
            fence = entry.fence
            if fence is None:
                continue
            if fence not in lost:
                form = self._statements.prepared(fence.on.one, ("id",))
                row = connection.execute(form.sql, form.arguments({"id": fence.id})).fetchone()
                lost[fence] = row is None or row[0] != fence.epoch
            if lost[fence]:
                errors[id(entry)] = FenceLost(fence.lost())
        return errors

    def _one_by_one(
        self, connection: sqlite3.Connection, entries: Sequence[Entry], errors: dict[int, Exception]
    ) -> None:
        for entry in entries:
            connection.execute("SAVEPOINT entry")
            try:
                for statement, rows in entry.operations:
                    _execute(connection, statement.sql, rows)
            except (sqlite3.Error, OverflowError, ValueError) as error:
                if not connection.in_transaction:
                    raise
                connection.execute("ROLLBACK TO entry")
                errors[id(entry)] = sqlite_error(error)
            connection.execute("RELEASE entry")


def _teller(tell: Callable[[Any], None], value: object) -> Callable[[], None]:
    return lambda: tell(value)


def _execute(connection: sqlite3.Connection, sql: str, rows: Sequence[Arguments]) -> None:
    if len(rows) == 1:
        connection.execute(sql, rows[0])
    else:
        connection.executemany(sql, rows)


def begin_immediate(connection: sqlite3.Connection, seconds: float) -> None:
    """Begin a write transaction, waiting for other processes' writers.

    SQLite's own busy handler ends up asking ten times a second, and starves beside a process that writes all the time;
    this asks every millisecond or two.

    Raises:
        sqlite3.OperationalError: the database stayed locked, or cannot be opened.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if not _is_busy(error) or time.monotonic() > end:
                raise
            time.sleep(0.0005 + 0.0015 * random.random())  # noqa: S311  jitter
        else:
            return


def _is_busy(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


def sqlite_error(error: Exception) -> DatabaseError:
    """Our error for the driver's; nothing was committed when it was raised."""
    if isinstance(error, sqlite3.IntegrityError):
        mine: DatabaseError = Conflict(str(error))
    elif isinstance(error, sqlite3.OperationalError) and _is_busy(error):
        mine = DatabaseBusy(f"SQLite stayed locked by another process ({error})")
    else:
        mine = DatabaseError(f"SQLite refused the write: {error}")
    mine.__cause__ = error
    return mine


# ------------------------------------------------------------------------------------------------------------ PostgreSQL


class PostgresWriter:
    """One asyncpg connection, made anew when it is lost."""

    def __init__(self, address: Address, statements: Statements, busy_timeout_seconds: float, *, pooled: bool) -> None:
        self._arguments = asyncpg_arguments(address.url)
        if pooled:
            self._arguments["statement_cache_size"] = 0
        self._shown = address.shown
        self._statements = statements
        self._seconds = busy_timeout_seconds
        self._connection: asyncpg.Connection | None = None
        self._committing = False

    async def commit(self, take: Callable[[], list[Entry]]) -> None:
        entries: list[Entry] = []
        end = time.monotonic() + self._seconds
        conflicts = 0
        while True:
            try:
                connection = await self._connected()
                entries = [entry for entry in entries or take() if not entry.durable.done()]
                if not entries:
                    return
                try:
                    errors = await self._write(connection, entries)
                except (asyncpg.DeadlockDetectedError, asyncpg.SerializationError) as error:
                    await connection.execute("ROLLBACK")
                    conflicts += 1
                    if conflicts <= _CONFLICT_RETRIES:
                        continue
                    errors = dict.fromkeys(map(id, entries), cast("Exception", postgres_error(error)))
                _settle(entries, errors)
                return
            except BaseException as error:
                lost = self._connection is None or self._connection.is_closed() or is_disconnect(error)
                await self._drop()
                if self._committing:
                    self._fail(entries or take(), CommitUnknown(f"the connection was lost while committing: {error}"))
                    if isinstance(error, Exception):
                        return
                    raise
                if not lost or not isinstance(error, Exception):
                    raise
                if time.monotonic() > end:
                    msg = f"{self._shown} is away ({type(error).__name__}: {error})"
                    self._fail(entries or take(), DatabaseUnavailable(msg))
                    return
            await asyncio.sleep(0.05 + 0.1 * random.random())  # noqa: S311  jitter

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                await connection.close(timeout=5)
            except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
                connection.terminate()

    def _fail(self, entries: Sequence[Entry], error: Exception) -> None:
        for entry in entries:
            entry.settle(error)

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

    async def _connected(self) -> asyncpg.Connection:
        self._committing = False
        if self._connection is None or self._connection.is_closed():
            self._connection = await asyncpg.connect(**self._arguments, timeout=self._seconds)
        return self._connection

    async def _write(self, connection: asyncpg.Connection, entries: Sequence[Entry]) -> dict[int, Exception]:
        await connection.execute("BEGIN")
        errors = await self._fenced_out(connection, entries)
        good = [entry for entry in entries if id(entry) not in errors]
        try:
            for statement, rows in merge(good):
                await _run(connection, statement.sql, rows)
        except (asyncpg.DeadlockDetectedError, asyncpg.SerializationError):
            raise
        except (asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as error:
            if connection.is_closed() or is_disconnect(error):
                raise
            await connection.execute("ROLLBACK")
            if len(good) == 1:
                errors[id(good[0])] = postgres_error(error)
                return errors
            await connection.execute("BEGIN")
            errors = await self._fenced_out(connection, entries)
            await self._one_by_one(connection, [entry for entry in entries if id(entry) not in errors], errors)
        self._committing = True
        await connection.execute("COMMIT")
        self._committing = False
        return errors

    async def _fenced_out(self, connection: asyncpg.Connection, entries: Sequence[Entry]) -> dict[int, Exception]:
        tables: dict[FenceOn, set[Hashable]] = {}
        for entry in entries:
            if entry.fence is not None:
                tables.setdefault(entry.fence.on, set()).add(entry.fence.id)
        epochs: dict[tuple[FenceOn, Hashable], int] = {}
        for on, ids in tables.items():
            form = self._statements.prepared(on.many, ("ids",))
            rows = await connection.fetch(form.sql, *form.arguments({"ids": list(ids)}))
            epochs |= {(on, row[0]): row[1] for row in rows}
        return {
            id(entry): FenceLost(fence.lost())
            for entry in entries
            if (fence := entry.fence) is not None and epochs.get((fence.on, fence.id)) != fence.epoch
        }

    async def _one_by_one(
        self, connection: asyncpg.Connection, entries: Sequence[Entry], errors: dict[int, Exception]
    ) -> None:
        for entry in entries:
            await connection.execute("SAVEPOINT entry")
            try:
                for statement, rows in entry.operations:
                    await _run(connection, statement.sql, rows)
            except (asyncpg.DeadlockDetectedError, asyncpg.SerializationError):
                raise
            except (asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as error:
                if connection.is_closed() or is_disconnect(error):
                    raise
                await connection.execute("ROLLBACK TO SAVEPOINT entry")
                errors[id(entry)] = postgres_error(error)
            await connection.execute("RELEASE SAVEPOINT entry")


async def _run(connection: asyncpg.Connection, sql: str, rows: Sequence[Arguments]) -> None:
    if len(rows) == 1:
        await connection.execute(sql, *rows[0])
    else:
        await connection.executemany(sql, rows)


def is_disconnect(error: BaseException) -> bool:
    """Whether the server went away or is coming up; the connection is of no further use."""
    if isinstance(error, asyncpg.PostgresError):
        state = str(getattr(error, "sqlstate", None) or "")
        return state.startswith(("08", "57P"))
    if isinstance(error, asyncpg.InterfaceError):
        return "closed" in str(error) or "released" in str(error)
    return isinstance(error, OSError | TimeoutError)


def postgres_error(error: Exception) -> DatabaseError:
    """Our error for the driver's; nothing was committed when it was raised."""
    if isinstance(error, asyncpg.IntegrityConstraintViolationError):
        mine: DatabaseError = Conflict(str(error))
    elif isinstance(error, asyncpg.DeadlockDetectedError | asyncpg.SerializationError | asyncpg.LockNotAvailableError):
        mine = DatabaseBusy(f"PostgreSQL gave up waiting for others: {error}")
    else:
        mine = DatabaseError(f"PostgreSQL refused the write: {error}")
    mine.__cause__ = error
    return mine
