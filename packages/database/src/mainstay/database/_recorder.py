"""The recorder: many coroutines' small writes become few commits.

A commit costs a round trip and a flush of the log whether it carries one row or a thousand. So no write commits alone:
a write is an entry in a queue, and all that waits when a connection becomes free goes into one transaction. There
is no timer and no minimum: alone, an entry is committed at once; by a thousand, the batch grows by itself while the one
before it is being flushed. Every caller waits until its own entry is durable, which is also the back-pressure: the
queue never holds more than the callers that wait.

Entries fail alone. A batch is tried together; when the database refuses it, each entry is repeated inside a savepoint,
so that the guilty one is found and the others are committed after all. On PostgreSQL, an entry that waits for another
session's lock is put aside and tried again beside the later batches: a long transaction of one user must not hold up
the writes of all.

Entries with the same route share a connection and take effect in the order in which they were handed in. Entries of
different routes are concurrent: their statements are merged and may be reordered, which is what makes a batch cheap.

What a caller is told is the truth. A connection lost before COMMIT was sent has done nothing: the entry is simply tried
again on a new one. Lost after that, the outcome is unknown: `CommitUnknown`, and no second attempt from here.

The rows that keep this honest: "durable rows by 1,000 at once" (and by 1, 32, 256) of both databases in
`benchmarks/database`.
"""

# asyncpg ships no types.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
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
from collections.abc import AsyncGenerator, Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import asyncpg

from mainstay.core import SYSTEM_CLOCK, Clock, spawn
from mainstay.database import _metrics
from mainstay.database._engine import Address, Bounds, postgres_connection, sqlite_connection
from mainstay.database._statements import Arguments, Literal, Operation, Prepared, Statements
from mainstay.database._translation import (
    DRIVER_ERRORS,
    connection_is_gone,
    did_nothing,
    is_busy,
    only_reads,
    translate,
    waits_for_others,
)
from mainstay.database.errors import CommitUnknown, DatabaseBusy, DatabaseError, DatabaseUnavailable, FenceLost
from mainstay.database.fence import Fence, FenceOn

T = TypeVar("T")

_log = logging.getLogger("mainstay.database")

_BATCH_ROWS = 2_000  # more would hold locks, and other callers' answers, for longer than a commit costs
_PATIENCE_SECONDS = 0.2  # how long a whole batch waits for a lock that another session holds
_SHORT_PATIENCE_SECONDS = 0.01  # and how long an entry that is tried by itself
_HUNG = 3.0  # times the busy timeout: a server that has not answered by then is taken for gone
_AGAIN_SECONDS = 0.02  # how soon what was put aside is tried again when there is nothing else to do


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
        """Take a batch when ready for it, commit it and settle its entries; raises only what it did not foresee."""
        ...

    def put_aside(self) -> bool:
        """Whether there are entries that it took and has yet to commit."""
        ...

    async def close(self) -> None:
        """Close the connection."""
        ...


class Lane:
    """The queue before one writer, and the task that empties it."""

    def __init__(self, writer: Writer, close_seconds: float) -> None:
        self._writer = writer
        self._close_seconds = close_seconds
        self._pending: deque[Entry] = deque()
        self._taken: list[Entry] = []
        self._closed = False
        self._wake = asyncio.Event()
        self._task = spawn(self._run(), name="database.recorder")

    async def record(self, entry: Entry) -> None:
        """Hand in an entry; returns when it is durable. A cancelled caller takes it back if it has not been begun."""
        if self._closed:
            msg = "the database is closing: nothing more can be written"
            raise DatabaseUnavailable(msg, retryable=False)
        self._pending.append(entry)
        self._wake.set()
        await entry.durable

    def waiting(self) -> int:
        """The number of entries not yet begun."""
        return len(self._pending)

    def idle(self) -> bool:
        """Whether every entry that was handed in has its answer."""
        return not self._pending and not self._taken and not self._writer.put_aside()

    async def close(self) -> None:
        """Commit what is waiting, refuse what comes later; a database that does not answer is not waited for."""
        self._closed = True
        self._wake.set()
        try:
            await asyncio.wait([self._task], timeout=self._close_seconds)
        finally:
            self._task.cancel()
            await asyncio.wait([self._task])
            await self._writer.close()

    async def _run(self) -> None:
        try:
            while await self._work_to_do():
                await asyncio.sleep(0)  # callers that are ready in this turn of the loop join the batch
                try:
                    await self._writer.commit(self._take)
                except Exception as error:  # noqa: BLE001  each of its callers is told
                    _log.exception("the recorder could not commit a batch")
                    for entry in self._taken or self._take():
                        entry.settle(DatabaseError(f"{type(error).__name__}: {error}", no_effect=False))
                self._taken = []
        finally:
            # Also when the loop is being shut down: no caller may wait for an answer that cannot come.
            self._closed = True
            for entry in self._taken:
                entry.settle(CommitUnknown("the recorder was stopped while it was writing"))
            for entry in self._pending:
                entry.settle(DatabaseUnavailable("the recorder was stopped", retryable=False))

    async def _work_to_do(self) -> bool:
        while not self._pending:
            self._wake.clear()
            if self._writer.put_aside():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_AGAIN_SECONDS):
                        await self._wake.wait()
                return True
            if self._closed:
                return False
            await self._wake.wait()
        return True

    def _take(self) -> list[Entry]:
        taken: list[Entry] = []
        rows = 0
        while self._pending and rows < _BATCH_ROWS:
            entry = self._pending.popleft()
            if not entry.durable.done():  # or its caller went away before anything happened
                taken.append(entry)
                rows += entry.rows
        self._taken = taken
        return taken


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

    def idle(self) -> bool:
        """Whether every write that was handed in has its answer."""
        return all(lane.idle() for lane in self._lanes)

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


Errors = dict[int, Exception]  # by id() of the entry; who is not in it has succeeded


def _settle(entries: Iterable[Entry], errors: Mapping[int, Exception]) -> None:
    """Answer the callers of a batch that was committed except for the entries with an error."""
    rows = 0
    oldest = now = time.monotonic()
    for entry in entries:
        error = errors.get(id(entry))
        entry.settle(error)
        if error is None:
            rows += entry.rows
            oldest = min(oldest, entry.handed_in)
    if rows:
        _metrics.COMMITS_BY_RECORDER.inc()
        _metrics.ROWS.inc(rows)
        _metrics.BATCH_ROWS.observe(rows)
        _metrics.WAIT_SECONDS.observe(now - oldest)


# -------------------------------------------------------------------------------------------------------------- SQLite


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

    def __init__(
        self,
        address: Address,
        statements: Statements,
        turn: Turn,
        busy_timeout_seconds: float,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._address = address
        self._clock = clock
        self._statements = statements
        self._turn = turn
        self._busy_timeout_seconds = busy_timeout_seconds
        self._loop = asyncio.get_running_loop()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._connection: sqlite3.Connection | None = None
        self._thread = threading.Thread(target=self._work, name="mainstay.database writer", daemon=True)
        self._thread.start()

    async def commit(self, take: Callable[[], list[Entry]]) -> None:
        """Wait for the turn, then commit all that is there by then."""
        try:
            async with self._turn.mine():
                entries = take()
                if entries:
                    errors = await self._call(lambda: self._commit(entries))
                    _settle(entries, errors)
        except DatabaseBusy as error:
            for entry in take():
                entry.settle(DatabaseBusy(str(error)))

    def put_aside(self) -> bool:
        """Never: SQLite has one lock, and all wait for it."""
        return False

    async def close(self) -> None:
        """End the thread."""
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)

    def _call(self, work: Callable[[], T]) -> asyncio.Future[T]:
        loop = self._loop
        answer: asyncio.Future[T] = loop.create_future()

        def job() -> None:
            try:
                result = work()
            except BaseException as error:  # noqa: BLE001  it belongs to the waiting caller
                tell: Callable[[], None] = _teller(answer.set_exception, error)
            else:
                tell = _teller(answer.set_result, result)
            with contextlib.suppress(RuntimeError):  # the loop is gone, and with it the waiting caller
                loop.call_soon_threadsafe(lambda: None if answer.done() else tell())

        self._jobs.put(job)
        return answer

    # The rest runs in the thread.

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
        if self._connection is not None:
            self._connection.close()

    def _commit(self, entries: Sequence[Entry]) -> Errors:
        try:
            if self._connection is None:
                self._connection = sqlite_connection(self._address, self._clock)
            connection = self._connection
            begin_immediate(connection, self._busy_timeout_seconds)
        except sqlite3.Error as error:
            return {id(entry): translate(error) for entry in entries}
        try:
            errors = self._fenced_out(connection, entries)
            good = [entry for entry in entries if id(entry) not in errors]
            connection.execute("SAVEPOINT batch")
            try:
                for statement, rows in merge(good):
                    _execute(connection, statement.sql, rows)
            except Exception as error:  # a value that the driver refuses is the entry's own fault
                if not connection.in_transaction:
                    raise  # a full disk and the like, which SQLite answers by rolling back by itself
                connection.execute("ROLLBACK TO batch")
                if len(good) == 1:
                    errors[id(good[0])] = translate(error)
                else:
                    self._one_by_one(connection, good, errors)
            connection.execute("COMMIT")
        except BaseException as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if not isinstance(error, sqlite3.Error):
                raise
            if isinstance(error, sqlite3.IntegrityError) and len(entries) > 1:
                # A deferred constraint, which SQLite looks at only now: whose it is shows when each goes alone.
                return {who: what for entry in entries for who, what in self._commit([entry]).items()}
            return {id(entry): translate(error) for entry in entries}
        return errors

    def _fenced_out(self, connection: sqlite3.Connection, entries: Sequence[Entry]) -> Errors:
        errors: Errors = {}
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

    def _one_by_one(self, connection: sqlite3.Connection, entries: Sequence[Entry], errors: Errors) -> None:
        for entry in entries:
            connection.execute("SAVEPOINT entry")
            try:
                for statement, rows in entry.operations:
                    _execute(connection, statement.sql, rows)
            except Exception as error:  # as above
                if not connection.in_transaction:
                    raise
                connection.execute("ROLLBACK TO entry")
                errors[id(entry)] = translate(error)
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
            if not is_busy(error) or time.monotonic() > end:
                raise
            time.sleep(0.0005 + 0.0015 * random.random())  # noqa: S311  jitter
        else:
            return


# ---------------------------------------------------------------------------------------------------------- PostgreSQL


class PostgresWriter:
    """One asyncpg connection, made anew when it is lost."""

    def __init__(self, address: Address, statements: Statements, limits: Bounds, *, pooled: bool) -> None:
        self._address = address
        self._pooled = pooled
        self._limits = limits
        self._statements = statements
        self._seconds = limits.lock_seconds
        self._connection: asyncpg.Connection | None = None
        self._made_at = float("-inf")
        self._aside: list[Entry] = []
        self._in_doubt: tuple[Sequence[Entry], Errors] | None = None  # between sending COMMIT and its answer

    async def commit(self, take: Callable[[], list[Entry]]) -> None:
        """Commit a batch, and what was put aside; over new connections if need be, until the time is up."""
        end = time.monotonic() + self._seconds
        entries: list[Entry] = []
        while True:
            try:
                connection = await self._connected()
            except DRIVER_ERRORS as error:
                failure: Exception = error
            else:
                entries = entries or self._behind_those_aside(take())
                try:
                    async with asyncio.timeout(_HUNG * self._seconds):
                        if entries:
                            await self._commit(connection, entries)
                            entries = []
                        if self._aside:
                            await self._commit_aside(connection)
                    return
                except BaseException as error:
                    lost = connection.is_closed() or connection_is_gone(error)
                    connection.terminate()
                    if not lost or not isinstance(error, Exception):
                        raise
                    failure = error
                    if only_reads(error):
                        self._address.leave()
                    self._settle_doubt(error)
                    entries = [entry for entry in entries if not entry.durable.done()]
                    self._aside = [entry for entry in self._aside if not entry.durable.done()]
                    if not entries and not self._aside:
                        return
            if time.monotonic() >= end:
                for entry in (*(entries or take()), *self._aside):
                    msg = f"{self._address.shown} is away ({type(failure).__name__}: {failure})"
                    entry.settle(DatabaseUnavailable(msg))
                self._aside = []
                return
            await asyncio.sleep(0.05 + 0.1 * random.random())  # noqa: S311  jitter

    def put_aside(self) -> bool:
        """Whether entries wait for the locks of other sessions."""
        return bool(self._aside)

    async def close(self) -> None:
        """Close the connection; what was not committed by now is not."""
        self._settle_doubt(ConnectionAbortedError("the database was closed"))
        for entry in self._aside:
            entry.settle(DatabaseBusy("the database was closed while another session held a lock that the write needs"))
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                await connection.close(timeout=5)
            except DRIVER_ERRORS:
                connection.terminate()

    async def _connected(self) -> asyncpg.Connection:
        connection = self._connection
        if connection is not None and self._made_at < self._address.left_at:
            connection.terminate()
        if connection is None or connection.is_closed():
            self._made_at = time.monotonic()
            connection = await postgres_connection(
                self._address, pooled=self._pooled, timeout_seconds=self._seconds, limits=self._limits
            )
            self._connection = connection
            if not self._pooled:
                await connection.execute(_lock_timeout("SET", _PATIENCE_SECONDS))
        return connection

    def _behind_those_aside(self, entries: list[Entry]) -> list[Entry]:
        """The entries but for those that must not overtake one of their route."""
        routes = {entry.route for entry in self._aside} - {None}
        if not routes:
            return entries
        self._aside += [entry for entry in entries if entry.route in routes]
        return [entry for entry in entries if entry.route not in routes]

    def _settle_doubt(self, error: Exception) -> None:
        if self._in_doubt is not None and not did_nothing(error):
            entries, errors = self._in_doubt
            for entry in entries:
                msg = f"the connection was lost while committing ({type(error).__name__}: {error})"
                entry.settle(errors.get(id(entry)) or CommitUnknown(msg))
        self._in_doubt = None

    async def _commit(self, connection: asyncpg.Connection, entries: Sequence[Entry]) -> None:
        errors: Errors = {}
        first = entries[0]
        alone = len(entries) == 1 and first.fence is None and len(first.operations) == 1 and not self._pooled
        try:
            if alone:
                # One statement is its own transaction, in one message instead of three.
                self._in_doubt = (entries, errors)
                statement, rows = first.operations[0]
                await _execute_many(connection, statement, rows)
                self._in_doubt = None
            else:
                await self._begin(connection, _PATIENCE_SECONDS)
                errors = await self._fenced_out(connection, entries)
                for statement, rows in merge([entry for entry in entries if id(entry) not in errors]):
                    await _execute_many(connection, statement, rows)
                await self._end(connection, entries, errors)
        except Exception as error:
            if connection.is_closed() or connection_is_gone(error):
                raise
            self._in_doubt = None  # the server has answered: it refused, and nothing is there
            if not alone:
                await connection.execute("ROLLBACK")
            elif not waits_for_others(error):
                _settle(entries, {id(first): translate(error)})
                return
            await self._one_by_one(connection, entries)
        else:
            _settle(entries, errors)

    async def _commit_aside(self, connection: asyncpg.Connection) -> None:
        entries = [entry for entry in self._aside if not entry.durable.done()]
        self._aside = []
        now = time.monotonic()
        try:
            await self._one_by_one(connection, entries)
        except BaseException:
            self._aside = entries
            raise
        for entry in self._aside:
            if now - entry.handed_in > self._seconds:
                msg = f"a lock that another session holds did not become free within {self._seconds:g} s"
                entry.settle(DatabaseBusy(msg))

    async def _one_by_one(self, connection: asyncpg.Connection, entries: Sequence[Entry]) -> None:
        """Commit those that can be, each in its savepoint; those that would have to wait are put aside."""
        errors: Errors = {}
        tried: list[Entry] = []
        aside: list[Entry] = []
        routes: set[Hashable] = set()
        await self._begin(connection, _SHORT_PATIENCE_SECONDS)
        for entry in entries:
            if entry.route is not None and entry.route in routes:
                aside.append(entry)
                continue
            await connection.execute("SAVEPOINT entry")
            try:
                errors |= await self._fenced_out(connection, [entry])
                if id(entry) not in errors:
                    for statement, rows in entry.operations:
                        await _execute_many(connection, statement, rows)
                    await connection.execute("SET CONSTRAINTS ALL IMMEDIATE")  # or the commit would fail for all
            except Exception as error:
                if connection.is_closed() or connection_is_gone(error):
                    raise
                await connection.execute("ROLLBACK TO SAVEPOINT entry")
                if waits_for_others(error):
                    aside.append(entry)
                    routes.add(entry.route)
                    continue
                errors[id(entry)] = translate(error)
            await connection.execute("RELEASE SAVEPOINT entry")
            tried.append(entry)
        await self._end(connection, tried, errors)
        _settle(tried, errors)
        self._aside += aside

    async def _begin(self, connection: asyncpg.Connection, patience_seconds: float) -> None:
        if self._pooled or patience_seconds != _PATIENCE_SECONDS:
            await connection.execute(f"BEGIN; {_lock_timeout('SET LOCAL', patience_seconds)}")
        else:
            await connection.execute("BEGIN")

    async def _end(self, connection: asyncpg.Connection, entries: Sequence[Entry], errors: Errors) -> None:
        self._in_doubt = (entries, errors)
        await connection.execute("COMMIT")
        self._in_doubt = None

    async def _fenced_out(self, connection: asyncpg.Connection, entries: Sequence[Entry]) -> Errors:
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


def _lock_timeout(verb: str, seconds: float) -> str:
    return f"{verb} lock_timeout = '{int(seconds * 1000)}ms'"


async def _execute_many(
    connection: asyncpg.Connection, statement: Prepared | Literal, rows: Sequence[Arguments]
) -> None:
    if len(rows) == 1:
        await connection.execute(statement.sql, *rows[0])
    elif statement.by_column is not None:
        await connection.execute(statement.by_column, *zip(*rows, strict=True))
    else:
        await connection.executemany(statement.sql, rows)
