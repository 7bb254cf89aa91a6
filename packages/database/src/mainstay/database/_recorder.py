"""The recorder: many coroutines' small writes become few commits.

A commit costs a round trip and a flush of the log whether it carries one row or a thousand. So no write commits alone:
a write goes into a queue, and all that waits when a connection becomes free goes into one transaction. There
is no timer and no minimum: alone, a write is committed at once; by a thousand, the batch grows by itself while the one
before it is being flushed. Every caller waits until its own write is durable, which is also the back-pressure: the
queue never holds more than the callers that wait.

Writes fail alone. A batch is tried together; when the database refuses it, each write is repeated inside a savepoint,
so that the guilty one is found and the others are committed after all. On PostgreSQL, a write that waits for another
session's lock is put aside and tried again beside the later batches: a long transaction of one user must not hold up
the writes of all.

Entries with the same route share a connection and take effect in the order in which they were handed in. Entries of
different routes are concurrent: their statements are merged and may be reordered, which is what makes a batch cheap.

What a caller is told is the truth. A connection lost before COMMIT was sent has done nothing: the write is simply tried
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
from mainstay.database._one_statement import OneStatements
from mainstay.database._pending import PendingWrite
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
_SHORT_PATIENCE_SECONDS = 0.01  # and how long a write that is tried by itself
_HUNG = 3.0  # times the busy timeout: a server that has not answered by then is taken for gone
_LONG_TURN_SECONDS = 0.02  # of a unit of work; the recorder's own turns are shorter
_GAP_SECONDS = 0.005  # some rounds of those who ask for the file
_AGAIN_SECONDS = 0.02  # how soon what was put aside is tried again when there is nothing else to do


class Writer(Protocol):
    """Commits batches on one connection: SQLite's and PostgreSQL's are below."""

    async def commit(self, take: Callable[[], list[PendingWrite]]) -> None:
        """Take a batch when ready for it, commit it and settle its writes; raises only what it did not foresee."""
        ...

    def put_aside(self) -> bool:
        """Whether there are writes that it took and has yet to commit."""
        ...

    async def close(self) -> None:
        """Close the connection."""
        ...


class WriteQueue:
    """The queue before one writer, and the task that empties it."""

    def __init__(self, writer: Writer, close_seconds: float) -> None:
        self._writer = writer
        self._close_seconds = close_seconds
        self._pending: deque[PendingWrite] = deque()
        self._taken: list[PendingWrite] = []
        self._closed = False
        self._wake = asyncio.Event()
        self._task = spawn(self._run(), name="database.recorder")

    def record(self, write: PendingWrite) -> asyncio.Future[None]:
        """Hand in a write; done when it is durable. A cancelled caller takes it back if it has not been begun."""
        if self._closed:
            msg = "the database is closing: nothing more can be written"
            raise DatabaseUnavailable(msg, retryable=False)
        self._pending.append(write)
        self._wake.set()
        return write.durable

    def waiting(self) -> int:
        """The number of writes not yet begun."""
        return len(self._pending)

    def idle(self) -> bool:
        """Whether every write that was handed in has its answer."""
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
                    for write in self._taken or self._take():
                        write.settle(DatabaseError(f"{type(error).__name__}: {error}", no_effect=False))
                self._taken = []
        finally:
            # Also when the loop is being shut down: no caller may wait for an answer that cannot come.
            self._closed = True
            for write in self._taken:
                write.settle(CommitUnknown("the recorder was stopped while it was writing"))
            for write in self._pending:
                write.settle(DatabaseUnavailable("the recorder was stopped", retryable=False))

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

    def _take(self) -> list[PendingWrite]:
        taken: list[PendingWrite] = []
        rows = 0
        while self._pending and rows < _BATCH_ROWS:
            write = self._pending.popleft()
            if not write.durable.done():  # or its caller went away before anything happened
                taken.append(write)
                rows += write.rows
        self._taken = taken
        return taken


class Recorder:
    """All queues of one database."""

    def __init__(self, queues: Sequence[WriteQueue]) -> None:
        self._queues = queues

    def record(self, operations: list[Operation], fence: Fence | None, route: Hashable) -> asyncio.Future[None]:
        """Make the operations durable together; writes of one route in the order in which they come."""
        return self._queue(route).record(PendingWrite(operations, fence, route))

    def _queue(self, route: Hashable) -> WriteQueue:
        queues = self._queues
        if len(queues) == 1:
            return queues[0]
        if route is None:
            return min(queues, key=WriteQueue.waiting)
        return queues[hash(route) % len(queues)]

    def idle(self) -> bool:
        """Whether every write that was handed in has its answer."""
        return all(queue.idle() for queue in self._queues)

    async def close(self) -> None:
        """Commit what is waiting and close the connections."""
        await asyncio.gather(*(queue.close() for queue in self._queues))


def merge(writes: Sequence[PendingWrite]) -> list[tuple[Prepared | Literal, list[Arguments]]]:
    """One list of rows for each statement, in an order that every write and every route would have had alone."""
    groups: list[tuple[Prepared | Literal, list[Arguments]]] = []
    latest: dict[Prepared | Literal, int] = {}
    floors: dict[Hashable, int] = {}
    for write in writes:
        route = write.route
        floor = 0 if route is None else floors.get(route, 0)
        for statement, rows in write.operations:
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


Errors = dict[int, DatabaseError]  # by id() of the write; who is not in it has succeeded


def settle(writes: Iterable[PendingWrite], errors: Mapping[int, DatabaseError]) -> None:
    """Answer the callers of a batch that was committed except for the writes with an error."""
    rows = 0
    oldest = now = time.monotonic()
    for write in writes:
        error = errors.get(id(write))
        write.settle(error)
        if error is None:
            rows += write.rows
            oldest = min(oldest, write.handed_in)
    if rows:
        _metrics.COMMITS_BY_RECORDER.inc()
        _metrics.ROWS.inc(rows)
        _metrics.BATCH_ROWS.observe(rows)
        _metrics.WAIT_SECONDS.observe(now - oldest)


# -------------------------------------------------------------------------------------------------------------- SQLite


class Turn:
    """The process's turn to write to SQLite, first come first served, between units of work and the recorder.

    SQLite has one writer and lets others poll for it. Within the process they queue instead. After a long turn the file
    is left alone for a moment: other processes, and the leases of this one, ask for it every millisecond or two, and
    where one long turn follows the other would find it taken each time.

    Args:
        busy_timeout_seconds: how long a turn is waited for.
        alone: there are no others, or time does not pass for them.
    """

    def __init__(self, busy_timeout_seconds: float, *, alone: bool = False) -> None:
        self._lock = asyncio.Lock()
        self._seconds = busy_timeout_seconds
        self._alone = alone

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
        began = time.monotonic()
        try:
            yield
        finally:
            if self._alone or time.monotonic() - began < _LONG_TURN_SECONDS:
                self._lock.release()
            else:
                asyncio.get_running_loop().call_later(_GAP_SECONDS, self._lock.release)


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
        self.start()

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._work, name="mainstay.database writer", daemon=True)
        self._thread.start()

    async def commit(self, take: Callable[[], list[PendingWrite]]) -> None:
        """Wait for the turn, then commit all that is there by then."""
        try:
            async with self._turn.mine():
                writes = take()
                if writes:
                    errors = await self._call(lambda: self._commit(writes, self._busy_timeout_seconds))
                    if len(errors) < len(writes):
                        self._address.wrote()
                    for error in errors.values():
                        self._address.refused(error)
                    settle(writes, errors)
        except DatabaseBusy as error:
            for write in take():
                write.settle(DatabaseBusy(str(error)))

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

    def _commit(self, writes: Sequence[PendingWrite], busy_seconds: float) -> Errors:
        try:
            if self._connection is None:
                self._connection = sqlite_connection(self._address, self._clock)
            connection = self._connection
            begin_immediate(connection, busy_seconds)
        except sqlite3.Error as error:
            return {id(write): translate(error) for write in writes}
        committing = False
        try:
            errors = self._fenced_out(connection, writes)
            good = [write for write in writes if id(write) not in errors]
            connection.execute("SAVEPOINT batch")
            try:
                for statement, rows in merge(good):
                    _execute(connection, statement.sql, rows)
            except Exception as error:  # a value that the driver refuses is the write's own fault
                if not connection.in_transaction:
                    raise  # a full disk and the like, which SQLite answers by rolling back by itself
                connection.execute("ROLLBACK TO batch")
                if len(good) == 1:
                    errors[id(good[0])] = translate(error)
                else:
                    self._one_by_one(connection, good, errors)
            committing = True
            connection.execute("COMMIT")
        except BaseException as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if not isinstance(error, sqlite3.Error):
                raise
            if isinstance(error, sqlite3.IntegrityError) and len(writes) > 1:
                # A deferred constraint, which SQLite looks at only now: whose it is shows when each goes alone.
                return {who: what for write in writes for who, what in self._commit([write], busy_seconds).items()}
            return {id(write): translate(error, committing=committing) for write in writes}
        return errors

    def _fenced_out(self, connection: sqlite3.Connection, writes: Sequence[PendingWrite]) -> Errors:
        errors: Errors = {}
        lost: dict[Fence, bool] = {}
        for write in writes:
            fence = write.fence
            if fence is None:
                continue
            if fence not in lost:
                form = self._statements.prepared(fence.on.one, ("id",))
                row = connection.execute(form.sql, form.arguments({"id": fence.id})).fetchone()
                lost[fence] = not fence.holds(row)
            if lost[fence]:
                errors[id(write)] = FenceLost(fence.lost())
        return errors

    def _one_by_one(self, connection: sqlite3.Connection, writes: Sequence[PendingWrite], errors: Errors) -> None:
        for write in writes:
            connection.execute("SAVEPOINT mainstay_write")
            try:
                for statement, rows in write.operations:
                    _execute(connection, statement.sql, rows)
            except Exception as error:  # as above
                if not connection.in_transaction:
                    raise
                connection.execute("ROLLBACK TO mainstay_write")
                errors[id(write)] = translate(error)
            connection.execute("RELEASE mainstay_write")


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
        self._one_statements = OneStatements(statements)
        self._seconds = limits.lock_seconds
        self._connection: asyncpg.Connection | None = None
        self._made_at = float("-inf")
        self._aside: list[PendingWrite] = []
        self._in_doubt: tuple[Sequence[PendingWrite], Errors] | None = None  # between sending COMMIT and its answer

    async def commit(self, take: Callable[[], list[PendingWrite]]) -> None:
        """Commit a batch, and what was put aside; over new connections if need be, until the time is up."""
        end = time.monotonic() + self._seconds
        writes: list[PendingWrite] = []
        while True:
            try:
                connection = await self._connected()
            except DRIVER_ERRORS as error:
                failure: Exception = error
            else:
                writes = writes or self._behind_those_aside(take())
                try:
                    async with asyncio.timeout(_HUNG * self._seconds):
                        if writes:
                            await self._commit(connection, writes)
                            writes = []
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
                    writes = [write for write in writes if not write.durable.done()]
                    self._aside = [write for write in self._aside if not write.durable.done()]
                    if not writes and not self._aside:
                        return
            if time.monotonic() >= end:
                for write in (*(writes or take()), *self._aside):
                    msg = f"{self._address.shown} is away ({type(failure).__name__}: {failure})"
                    write.settle(DatabaseUnavailable(msg))
                self._aside = []
                return
            await asyncio.sleep(0.05 + 0.1 * random.random())  # noqa: S311  jitter

    def put_aside(self) -> bool:
        """Whether writes wait for the locks of other sessions."""
        return bool(self._aside)

    async def close(self) -> None:
        """Close the connection; what was not committed by now is not."""
        self._settle_doubt(ConnectionAbortedError("the database was closed"))
        for write in self._aside:
            write.settle(DatabaseBusy("the database was closed while another session held a lock that the write needs"))
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

    def _behind_those_aside(self, writes: list[PendingWrite]) -> list[PendingWrite]:
        """The writes but for those that must not overtake one of their route."""
        routes = {write.route for write in self._aside} - {None}
        if not routes:
            return writes
        self._aside += [write for write in writes if write.route in routes]
        return [write for write in writes if write.route not in routes]

    def _settle_doubt(self, error: Exception) -> None:
        if self._in_doubt is not None and not did_nothing(error):
            writes, errors = self._in_doubt
            for write in writes:
                msg = f"the connection was lost while committing ({type(error).__name__}: {error})"
                write.settle(errors.get(id(write)) or CommitUnknown(msg))
        self._in_doubt = None

    async def _commit(self, connection: asyncpg.Connection, writes: Sequence[PendingWrite]) -> None:
        errors: Errors = {}
        # With a pooler the session's lock timeout is not ours, and one that is set needs a transaction.
        one = None if self._pooled or _is_plain(writes) else self._one_statements.of(writes)
        try:
            if self._pooled or not (one or _is_plain(writes)):
                await self._begin(connection, _PATIENCE_SECONDS)
                errors = await self._fenced_out(connection, writes)
                for statement, rows in merge([write for write in writes if id(write) not in errors]):
                    await _execute_many(connection, statement, rows)
                await self._end(connection, writes, errors)
            else:
                # A statement is its own transaction, in one message instead of three to five.
                self._in_doubt = (writes, errors)
                if one is None:
                    ((statement, rows),) = writes[0].operations
                    await _execute_many(connection, statement, rows)
                else:
                    held = {number for (number,) in await connection.fetch(one.sql, *one.arguments)}
                    errors |= _lost(writes, lambda fence: one.fences[fence] in held)
                self._in_doubt = None
        except Exception as error:
            if connection.is_closed() or connection_is_gone(error):
                raise
            self._in_doubt = None  # the server has answered: it refused, and nothing is there
            if connection.is_in_transaction():
                await connection.execute("ROLLBACK")
            if len(writes) == 1 and not waits_for_others(error):
                settle(writes, {id(writes[0]): translate(error)})
            else:
                await self._one_by_one(connection, writes)
        else:
            settle(writes, errors)

    async def _commit_aside(self, connection: asyncpg.Connection) -> None:
        writes = [write for write in self._aside if not write.durable.done()]
        self._aside = []
        now = time.monotonic()
        try:
            await self._one_by_one(connection, writes)
        except BaseException:
            self._aside = writes
            raise
        for write in self._aside:
            if now - write.handed_in > self._seconds:
                msg = f"a lock that another session holds did not become free within {self._seconds:g} s"
                write.settle(DatabaseBusy(msg))

    async def _one_by_one(self, connection: asyncpg.Connection, writes: Sequence[PendingWrite]) -> None:
        """Commit those that can be, each in its savepoint; those that would have to wait are put aside."""
        errors: Errors = {}
        tried: list[PendingWrite] = []
        aside: list[PendingWrite] = []
        routes: set[Hashable] = set()
        await self._begin(connection, _SHORT_PATIENCE_SECONDS)
        for write in writes:
            if write.route is not None and write.route in routes:
                aside.append(write)
                continue
            await connection.execute("SAVEPOINT mainstay_write")
            try:
                errors |= await self._fenced_out(connection, [write])
                if id(write) not in errors:
                    for statement, rows in write.operations:
                        await _execute_many(connection, statement, rows)
                    await connection.execute("SET CONSTRAINTS ALL IMMEDIATE")  # or the commit would fail for all
            except Exception as error:
                if connection.is_closed() or connection_is_gone(error):
                    raise
                await connection.execute("ROLLBACK TO SAVEPOINT mainstay_write")
                if waits_for_others(error):
                    aside.append(write)
                    routes.add(write.route)
                    continue
                errors[id(write)] = translate(error)
            await connection.execute("RELEASE SAVEPOINT mainstay_write")
            tried.append(write)
        await self._end(connection, tried, errors)
        settle(tried, errors)
        self._aside += aside

    async def _begin(self, connection: asyncpg.Connection, patience_seconds: float) -> None:
        if self._pooled or patience_seconds != _PATIENCE_SECONDS:
            await connection.execute(f"BEGIN; {_lock_timeout('SET LOCAL', patience_seconds)}")
        else:
            await connection.execute("BEGIN")

    async def _end(self, connection: asyncpg.Connection, writes: Sequence[PendingWrite], errors: Errors) -> None:
        self._in_doubt = (writes, errors)
        await connection.execute("COMMIT")
        self._in_doubt = None

    async def _fenced_out(self, connection: asyncpg.Connection, writes: Sequence[PendingWrite]) -> Errors:
        tables: dict[FenceOn, set[Hashable]] = {}
        for write in writes:
            if write.fence is not None:
                tables.setdefault(write.fence.on, set()).add(write.fence.id)
        found: dict[tuple[FenceOn, Hashable], Sequence[Any]] = {}
        for on, ids in tables.items():
            form = self._statements.prepared(on.many, ("ids",))
            rows = await connection.fetch(form.sql, *form.arguments({"ids": list(ids)}))
            found |= {(on, row[0]): row[1:] for row in rows}
        return _lost(writes, lambda fence: fence.holds(found.get((fence.on, fence.id))))


def _lost(writes: Sequence[PendingWrite], holds: Callable[[Fence], bool]) -> Errors:
    return {
        id(write): FenceLost(fence.lost())
        for write in writes
        if (fence := write.fence) is not None and not holds(fence)
    }


def _is_plain(writes: Sequence[PendingWrite]) -> bool:
    """Whether it is one statement as it stands."""
    return len(writes) == 1 and writes[0].fence is None and len(writes[0].operations) == 1


def _lock_timeout(verb: str, seconds: float) -> str:
    return f"{verb} lock_timeout = '{int(seconds * 1000)}ms'"


async def _execute_many(
    connection: asyncpg.Connection, statement: Prepared | Literal, rows: Sequence[Arguments]
) -> None:
    if len(rows) == 1:
        await connection.execute(statement.sql, *rows[0])
    elif statement.by_column is not None:
        await connection.execute(statement.by_column.sql(), *zip(*rows, strict=True))
    else:
        await connection.executemany(statement.sql, rows)
