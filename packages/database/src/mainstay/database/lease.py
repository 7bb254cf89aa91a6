"""Leases: one holder at a time, by the database's clock, renewed from a thread.

A lease is a row. A process that finds it expired takes it with one statement that repeats the question, and raises its
epoch; the row is never deleted, so that an epoch never comes twice. All times in the row are the database's own, since
processes disagree about the time of day; the holder measures by its monotonic clock, from *before* it asked, and calls
the lease over some time before the database does.

Renewal runs in a thread with a connection of its own: user code that blocks the event loop must not cost the process
its leases. What a lease must never protect alone is a write; that is what its fence is for.
"""

# asyncpg ships no types.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Generator, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import asyncpg
import sqlalchemy as sa

from mainstay.core import SYSTEM_CLOCK, Clock
from mainstay.database import _metrics
from mainstay.database._engine import Address, Bounds, postgres_connection, sqlite_connection
from mainstay.database._recorder import begin_immediate
from mainstay.database._translation import connection_is_gone, only_reads
from mainstay.database.clock import database_now
from mainstay.database.errors import DatabaseBusy, DatabaseUnavailable
from mainstay.database.fence import Fence, FenceOn

__all__ = ["Lease", "lease_holders"]

T = TypeVar("T")

_log = logging.getLogger("mainstay.database")

NAME_LENGTH = 255

metadata = sa.MetaData()
leases = sa.Table(
    "mainstay_database_leases",
    metadata,
    sa.Column("name", sa.String(NAME_LENGTH), primary_key=True),
    sa.Column("holder", sa.String(NAME_LENGTH), nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.Double, nullable=False),
)
_fence_on = FenceOn(leases, leases.c.name, leases.c.epoch)

_MARGIN = 0.2  # of the lease: how long before the database's end the holder stops believing in it
_RENEWALS = 4  # so many fit into a lease
_BEGIN = "BEGIN; SET LOCAL lock_timeout = '300ms'"
_LOOK_SECONDS = 0.2  # how soon a lease that was just taken is seen by the one who renews
_CLOSE_SECONDS = 2.0  # how long giving leases back may hold up the end of the process

# Seconds since 1970 by the database's clock, unless a test's clock says otherwise. `unixepoch('subsec')` would be
# shorter, and is NULL before SQLite 3.42. On PostgreSQL not `now()`: that is when the transaction began.
_SQLITE_NOW = "coalesce(:now, (julianday('now') - 2440587.5) * 86400.0)"
_POSTGRES_NOW = "coalesce($1::float8, extract(epoch from clock_timestamp())::float8)"

# A client that is frozen between two messages of one statement is active for its server, which waits for it without
# limit: no timeout of idle transactions ends it. One that copies rows is active and waits for its client, too.
_END_FROZEN = """
    SELECT pg_terminate_backend(backend.pid)
    FROM pg_locks held JOIN pg_stat_activity backend ON backend.pid = held.pid
    WHERE held.locktype = 'relation' AND held.granted AND held.mode IN ('RowShareLock', 'RowExclusiveLock')
    AND held.relation = 'mainstay_database_leases'::regclass AND backend.datname = current_database()
    AND backend.state = 'active' AND backend.wait_event = 'ClientRead' AND backend.query NOT ILIKE 'copy%'
    AND backend.state_change < clock_timestamp() - make_interval(secs => $1::float8)
"""


def lease_holders(prefix: str) -> sa.Executable:
    """The statement that reads who holds which leases at this moment: columns `name` and `holder`, for people.

    Args:
        prefix: what their names begin with.
    """
    begins = sa.func.substr(leases.c.name, 1, len(prefix)) == prefix
    return sa.select(leases.c.name, leases.c.holder).where(begins, leases.c.expires_at > database_now())


class Lease:
    """The right to do something, until it is released or lost.

    Attributes:
        name: what it is for.
        epoch: raised by every acquisition, by any owner.
        holder: who holds it, for people who look at the table.
        fence: for `db.write` and `db.batch`: refuses once another owner has taken the lease.
    """

    __slots__ = ("_clock", "_keeper", "_renew_at", "_seconds", "_until", "epoch", "fence", "holder", "name")

    def __init__(self, keeper: Keeper, name: str, *, holder: str, epoch: int, seconds: float, asked_at: float) -> None:
        self.name = name
        self.holder = holder
        self.epoch = epoch
        self.fence: Fence = _fence_on.at(name, epoch)
        self._keeper = keeper
        self._clock = keeper.clock
        self._seconds = seconds
        self._renewed(asked_at)

    def _renewed(self, asked_at: float) -> None:
        self._until = asked_at + self._seconds * (1 - _MARGIN)
        self._renew_at = time.monotonic() + self._seconds / _RENEWALS

    @property
    def held(self) -> bool:
        """Whether the holder may go on; False from a margin before the lease ends at the database.

        It may become True again, when a renewal was late and no other owner had taken over; `epoch` is then the same.
        """
        return self._clock.monotonic() < self._until

    @property
    def remaining_seconds(self) -> float:
        """For how long it is held if it is not renewed, as `held` says; zero where it is not."""
        return max(0.0, self._until - self._clock.monotonic())

    async def release(self) -> None:
        """Let others have it at once. Does nothing when it was lost; never fails, the lease ends by itself too."""
        self._until = float("-inf")
        await self._keeper.release(self)

    def __repr__(self) -> str:
        return f"<Lease {self.name} epoch {self.epoch}{'' if self.held else ', not held'}>"


class Rows(Protocol):
    """The leases' table, by a connection of one's own."""

    async def acquire(self, name: str, holder: str, seconds: float) -> int | None:
        """Take the lease if it has expired or never was; its epoch, or None."""
        ...

    async def renew(self, held: Sequence[Lease]) -> tuple[set[str], set[str]]:
        """Prolong; the names that were, and those that have another owner."""
        ...

    async def release(self, held: Sequence[Lease]) -> None:
        """Let them expire now."""
        ...

    async def close(self) -> None:
        """Close the connection."""
        ...


class Keeper:
    """The thread that acquires, renews and releases, for all leases of one Database; started by the first."""

    def __init__(self, address: Address, clock: Clock, limits: Bounds, *, pooled: bool) -> None:
        self.clock = clock
        self._rows: Rows = (
            SQLiteRows(address, self._time, limits.lock_seconds)
            if address.dialect == "sqlite"
            else PostgresRows(address, self._time, limits, pooled=pooled)
        )
        self._held: dict[str, Lease] = {}
        self._me = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._asked = 0
        self._behind = False  # the last renewal failed

    def _time(self) -> float | None:
        # A lease is about processes, which live in real time. Only a test of leases themselves moves them.
        return None if self.clock is SYSTEM_CLOCK else self.clock.now().timestamp()

    # On the caller's loop

    async def acquire(self, name: str, seconds: float, holder: str | None) -> Lease | None:
        """Take the lease; None while it has not expired."""
        future = self._submit(self._acquire(name, seconds, holder or self._me))
        self._asked += 1
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:
            future.add_done_callback(self._abandon)
            raise
        finally:
            self._asked -= 1

    async def release(self, lease: Lease) -> None:
        """Give it back; what fails is left to expire."""
        if not self._closed:
            self._asked += 1
            try:
                await asyncio.shield(asyncio.wrap_future(self._submit(self._release(lease))))
            finally:
                self._asked -= 1

    def idle(self) -> bool:
        """Whether no task of the loop waits for a lease to be taken or given back."""
        return self._asked == 0

    async def close(self) -> None:
        """Release everything and stop the thread."""
        if self._loop is not None and self._thread is not None:
            future = self._submit(self._release_all())
            self._closed = True
            await asyncio.wrap_future(future)
            self._loop.call_soon_threadsafe(self._loop.stop)
            await asyncio.to_thread(self._thread.join)
        self._closed = True

    def _abandon(self, future: Future[Lease | None]) -> None:
        # The caller went away while the database was asked: no caller would ever release what was taken.
        lease = None if future.cancelled() or future.exception() is not None else future.result()
        if lease is not None and not self._closed:
            self._submit(self._release(lease))

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        if self._closed:
            work.close()
            msg = "the database is closed: no lease can be taken"
            raise DatabaseUnavailable(msg, retryable=False)
        if self._loop is None:
            loop = self._loop = asyncio.new_event_loop()
            name = "mainstay.database leases"
            self._thread = threading.Thread(target=self._run, args=(loop,), name=name, daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    # In the thread

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        self._lock = asyncio.Lock()
        renewing = loop.create_task(self._renew_for_ever())
        loop.run_forever()
        renewing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(renewing)
        loop.run_until_complete(self._rows.close())
        loop.close()

    async def _acquire(self, name: str, seconds: float, holder: str) -> Lease | None:
        async with self._lock:
            asked_at = self.clock.monotonic()
            epoch = await self._rows.acquire(name, holder, seconds)
            if epoch is None:
                return None
            lease = Lease(self, name, holder=holder, epoch=epoch, seconds=seconds, asked_at=asked_at)
            if name in self._held:  # it had expired, and this process was the first to come back for it
                self._lose(self._held[name])
            self._held[name] = lease
            _metrics.LEASES_HELD.inc()
            return lease

    async def _release(self, *leases: Lease) -> None:
        async with self._lock:
            mine = [lease for lease in leases if self._held.get(lease.name) is lease]
            for lease in mine:
                lease._until = float("-inf")
                self._forget(lease)
            try:
                if mine:
                    await self._rows.release(mine)
            except Exception as error:  # noqa: BLE001  they expire by themselves
                _log.warning("%d leases could not be released and expire by themselves: %s", len(mine), error)

    async def _release_all(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._release(*self._held.values())

    def _lose(self, lease: Lease) -> None:
        lease._until = float("-inf")
        self._forget(lease)
        _metrics.LEASES_LOST.inc()
        _log.warning("lease %s was lost: it was taken over after epoch %d", lease.name, lease.epoch)

    def _forget(self, lease: Lease) -> None:
        del self._held[lease.name]
        _metrics.LEASES_HELD.dec()

    async def _renew_for_ever(self) -> None:
        while True:
            due = min((lease._renew_at for lease in self._held.values()), default=time.monotonic() + _LOOK_SECONDS)
            await asyncio.sleep(min(_LOOK_SECONDS, max(0.005, due - time.monotonic())))
            async with self._lock:
                # Leases that are due soon go along: one statement for all.
                now = time.monotonic()
                held = [lease for lease in self._held.values() if lease._renew_at <= now + lease._seconds / 10]
                if any(lease._renew_at <= now for lease in held):
                    await self._renew(held)

    async def _renew(self, held: list[Lease]) -> None:
        asked_at = self.clock.monotonic()
        try:
            renewed, lost = await self._rows.renew(held)
        except Exception as error:  # noqa: BLE001  the database may be back before the leases end
            if not self._behind:  # it is tried many times a second, and one line is enough for an outage
                _log.warning("leases could not be renewed, and are tried again until they end: %s", error)
            self._behind = True
            renewed, lost = set[str](), set[str]()
        else:
            if self._behind:
                _log.info("leases are renewed again")
            self._behind = False
        for lease in held:
            if lease.name in renewed:
                lease._renewed(asked_at)
            elif lease.name in lost:
                self._lose(lease)
            else:
                lease._renew_at = time.monotonic() + lease._seconds / 20


class SQLiteRows:
    """The table in SQLite; blocks its thread, which is there for that."""

    def __init__(self, address: Address, time_: Callable[[], float | None], busy_timeout_seconds: float) -> None:
        self._address = address
        self._time = time_
        self.busy_timeout_seconds = busy_timeout_seconds
        self._connection: sqlite3.Connection | None = None

    async def acquire(self, name: str, holder: str, seconds: float) -> int | None:
        """Take the lease if it has expired or never was; its epoch, or None."""
        held = f"SELECT 1 FROM mainstay_database_leases WHERE name = :name AND expires_at > {_SQLITE_NOW}"  # noqa: S608  constants
        take = f"""
            INSERT INTO mainstay_database_leases (name, holder, epoch, expires_at)
            VALUES (:name, :holder, 1, {_SQLITE_NOW} + :seconds)
            ON CONFLICT (name) DO UPDATE
            SET holder = excluded.holder, epoch = mainstay_database_leases.epoch + 1, expires_at = excluded.expires_at
            WHERE mainstay_database_leases.expires_at <= {_SQLITE_NOW}
            RETURNING epoch
        """  # noqa: S608  constants
        values = {"name": name, "holder": holder, "seconds": seconds, "now": self._time()}
        with self._transaction("BEGIN") as connection:
            if connection.execute(held, {"name": name, "now": self._time()}).fetchone() is not None:
                return None  # those who only wait for their turn do not ask for the writer's
        with self._transaction() as connection:
            row = connection.execute(take, values).fetchone()
        return None if row is None else int(row[0])

    async def renew(self, held: Sequence[Lease]) -> tuple[set[str], set[str]]:
        """Prolong; the names that were, and those that have another owner."""
        sql = f"""
            UPDATE mainstay_database_leases SET expires_at = {_SQLITE_NOW} + :seconds
            WHERE name = :name AND epoch = :epoch
        """  # noqa: S608  constants
        renewed: set[str] = set()
        with self._transaction() as connection:
            for lease in held:
                values = {"name": lease.name, "epoch": lease.epoch, "seconds": lease._seconds, "now": self._time()}
                if connection.execute(sql, values).rowcount:
                    renewed.add(lease.name)
        return renewed, {lease.name for lease in held} - renewed

    async def release(self, held: Sequence[Lease]) -> None:
        """Let them expire now."""
        sql = "UPDATE mainstay_database_leases SET expires_at = 0 WHERE name = ? AND epoch = ?"
        with self._transaction() as connection:
            connection.executemany(sql, [(lease.name, lease.epoch) for lease in held])

    async def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()

    @contextlib.contextmanager
    def _transaction(self, begin: str = "BEGIN IMMEDIATE") -> Generator[sqlite3.Connection, None, None]:
        try:
            if self._connection is None:
                self._connection = sqlite_connection(self._address)
            connection = self._connection
            if begin == "BEGIN":
                connection.execute(begin)
            else:
                begin_immediate(connection, self.busy_timeout_seconds)
        except sqlite3.OperationalError as error:
            msg = f"SQLite was not free for a lease ({error})"
            raise DatabaseBusy(msg) from error
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


class PostgresRows:
    """The table in PostgreSQL."""

    def __init__(self, address: Address, time_: Callable[[], float | None], limits: Bounds, *, pooled: bool) -> None:
        self._address = address
        self._pooled = pooled
        self._time = time_
        self._limits = limits
        self._seconds = limits.lock_seconds
        self._connection: asyncpg.Connection | None = None
        self._made_at = float("-inf")

    async def acquire(self, name: str, holder: str, seconds: float) -> int | None:
        """Take the lease if it has expired or never was; its epoch, or None."""
        # The first statement locks nothing: the second would, also where it then changes nothing, and wait for every
        # fenced unit of work of the holder.
        held = f"SELECT 1 FROM mainstay_database_leases WHERE name = $2 AND expires_at > {_POSTGRES_NOW}"  # noqa: S608  constants
        take = f"""
            INSERT INTO mainstay_database_leases (name, holder, epoch, expires_at)
            VALUES ($2, $3, 1, {_POSTGRES_NOW} + $4::float8)
            ON CONFLICT (name) DO UPDATE
            SET holder = excluded.holder, epoch = mainstay_database_leases.epoch + 1,
                expires_at = {_POSTGRES_NOW} + $4::float8
            WHERE mainstay_database_leases.expires_at <= {_POSTGRES_NOW}
            RETURNING epoch
        """  # noqa: S608  constants
        if await self._fetch(held, self._time(), name):
            return None
        try:
            rows = await self._fetch(take, self._time(), name, holder, seconds)
        except asyncpg.LockNotAvailableError:  # expired, and its holder is still committing what it began in time
            if await self._fetch(_END_FROZEN, self._limits.idle_seconds):
                _log.warning("a transaction of a frozen process was ended, which held lease %s", name)
            return None
        return int(rows[0][0]) if rows else None

    async def renew(self, held: Sequence[Lease]) -> tuple[set[str], set[str]]:
        """Prolong; the names that were, and those that have another owner."""
        # A fenced unit of work holds its lease's row FOR SHARE until it commits. Waiting for it here would cost all the
        # other leases; it is skipped, and asked for again soon. No other can take it over meanwhile either.
        sql = f"""
            WITH mine AS (
                SELECT l.name, v.seconds
                FROM mainstay_database_leases l
                JOIN unnest($2::text[], $3::bigint[], $4::float8[]) AS v (name, epoch, seconds)
                ON l.name = v.name AND l.epoch = v.epoch
                FOR NO KEY UPDATE OF l SKIP LOCKED
            )
            UPDATE mainstay_database_leases l SET expires_at = {_POSTGRES_NOW} + mine.seconds
            FROM mine WHERE l.name = mine.name RETURNING l.name
        """  # noqa: S608  constants
        names = [lease.name for lease in held]
        epochs = [lease.epoch for lease in held]
        seconds = [lease._seconds for lease in held]
        renewed = {row[0] for row in await self._fetch(sql, self._time(), names, epochs, seconds)}
        rest = [lease for lease in held if lease.name not in renewed]
        if not rest:
            return renewed, set()
        sql = "SELECT name, epoch FROM mainstay_database_leases WHERE name = ANY ($1::text[])"
        there = {row[0]: row[1] for row in await self._fetch(sql, [lease.name for lease in rest])}
        return renewed, {lease.name for lease in rest if there.get(lease.name) != lease.epoch}

    async def release(self, held: Sequence[Lease]) -> None:
        """Let them expire now."""
        sql = """
            UPDATE mainstay_database_leases l SET expires_at = 0
            FROM unnest($1::text[], $2::bigint[]) AS v (name, epoch) WHERE l.name = v.name AND l.epoch = v.epoch
        """
        await self._fetch(sql, [lease.name for lease in held], [lease.epoch for lease in held])

    async def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.terminate()

    async def _fetch(self, sql: str, *arguments: object) -> list[Any]:
        try:
            async with asyncio.timeout(self._seconds):
                connection = self._connection
                if connection is not None and self._made_at < self._address.left_at:
                    connection.terminate()
                if connection is None or connection.is_closed():
                    self._made_at = time.monotonic()
                    connection = await postgres_connection(
                        self._address, pooled=self._pooled, timeout_seconds=self._seconds, limits=self._limits
                    )
                    self._connection = connection
                # A transaction of its own, or a pooler could send statement and parameters to different servers; and
                # no long wait for a lock in it, since all leases of the process wait for this connection.
                await connection.execute(_BEGIN)
                rows: list[Any] = await connection.fetch(sql, *arguments)
                await connection.execute("COMMIT")
                return rows
        except BaseException as error:
            # Its state is unknown; a new connection's is known.
            if self._connection is not None:
                self._connection.terminate()
                self._connection = None
            if only_reads(error):
                self._address.leave()
            if connection_is_gone(error):
                msg = f"the database is away ({type(error).__name__}: {error})"
                raise DatabaseUnavailable(msg) from error
            raise
