"""The database of a simulated process: real SQLite, without threads, on the simulation's time.

In a simulation nothing may happen beside the event loop, or a run could not be repeated. So what otherwise works in
threads of its own (the sessions' connections, the recorder, the keeper of leases) works on the loop here, and where it
would block for another process' lock it pauses instead. Everything else is what production runs.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Generator
from typing import Any, Protocol, TypeVar, cast

import aiosqlite

from mainstay.core import Clock, spawn
from mainstay.database._engine import Address, Bounds
from mainstay.database._pending import PendingWrite
from mainstay.database._recorder import Errors, SQLiteWriter, Turn, settle
from mainstay.database._statements import Statements
from mainstay.database._translation import is_busy
from mainstay.database.errors import DatabaseBusy, DatabaseError
from mainstay.database.lease import Keeper, Lease

T = TypeVar("T")

_AT_ONCE = -1.0
"""A time limit that is over: what blocks asks once."""
_AGAIN_SECONDS = 0.004


class Moments(Protocol):
    """What the simulation has to say about the statements of a process."""

    async def statement(self) -> None:
        """Take the time of a statement."""
        ...

    async def commit(self, work: Callable[[], None]) -> None:
        """Carry out a commit by calling `work`, or let it come out as commits may: late, refused, unknown or never."""
        ...


class Simulated:
    """What the database of one process is made of.

    Args:
        moments: asked at each statement and commit.
    """

    def __init__(self, moments: Moments) -> None:
        self.moments = moments
        self._connections: list[SimulatedConnection] = []
        self._closing: list[Callable[[], None]] = []

    def connect(self, *place: Any, **options: Any) -> SimulatedConnection:
        """Make a connection for SQLAlchemy, in place of aiosqlite's own."""
        busy_seconds = float(options.pop("timeout", 0.0))

        def connector() -> sqlite3.Connection:
            connection: sqlite3.Connection = cast("Any", sqlite3.connect)(*place, timeout=0, **options)
            return connection

        connection = SimulatedConnection(connector, self.moments, busy_seconds)
        self._connections.append(connection)
        return connection

    def writer(
        self, address: Address, statements: Statements, turn: Turn, busy_timeout_seconds: float, clock: Clock
    ) -> SimulatedWriter:
        """Make the recorder's writer."""
        writer = SimulatedWriter(address, statements, turn, busy_timeout_seconds, clock)
        writer.moments = self.moments
        self._closing.append(writer.drop)
        return writer

    def keeper(self, address: Address, clock: Clock, limits: Bounds) -> SimulatedKeeper:
        """Make the keeper of leases."""
        keeper = SimulatedKeeper(address, clock, limits, pooled=False)
        self._closing.append(keeper.drop)
        return keeper

    def crash(self) -> None:
        """Close every connection as the end of a process does: what is not committed by now is not."""
        for connection in self._connections:
            connection.drop()
        for drop in self._closing:
            drop()


class SimulatedConnection(aiosqlite.Connection):
    """A connection whose calls run on the loop."""

    def __init__(self, connector: Callable[[], sqlite3.Connection], moments: Moments, busy_seconds: float) -> None:
        super().__init__(connector, iter_chunk_size=64)
        self._moments = moments
        self._busy_seconds = busy_seconds

    def __await__(self) -> Generator[Any, None, SimulatedConnection]:
        self._connection = self._connector()
        return self._itself().__await__()

    async def _itself(self) -> SimulatedConnection:
        return self

    @property
    def in_transaction(self) -> bool:
        """Whether one is open; none is where the connection is gone."""
        return self._connection is not None and self._connection.in_transaction

    async def _execute(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        if self._connection is None:
            msg = "Connection closed"
            raise ValueError(msg)
        if fn == self._connection.commit:
            return await self._moments.commit(fn)
        if fn.__name__ in {"execute", "executemany"}:
            await self._moments.statement()
            return await patiently(lambda: fn(*args, **kwargs), self._busy_seconds)
        return fn(*args, **kwargs)

    async def close(self) -> None:
        """Close it."""
        self.drop()

    def stop(self) -> None:
        """Close it."""
        self.drop()

    def drop(self) -> None:
        """Close it, also in the middle of a statement."""
        self._running = False
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


class SimulatedWriter(SQLiteWriter):
    """The recorder's writer, on the loop."""

    moments: Moments

    def start(self) -> None:
        """Start no thread."""

    async def commit(self, take: Callable[[], list[PendingWrite]]) -> None:
        """See `Writer`."""
        try:
            async with self._turn.mine():
                if writes := take():
                    await self._settle(writes)
        except DatabaseBusy as error:
            for write in take():
                write.settle(DatabaseBusy(str(error)))

    async def _settle(self, writes: list[PendingWrite]) -> None:
        end = self._loop.time() + self._busy_timeout_seconds
        errors: Errors = {}

        def work() -> None:
            errors.update(self._commit(writes, _AT_ONCE))

        try:
            await self.moments.commit(work)
            while self._loop.time() < end and len(errors) == len(writes) and _all_busy(errors):
                errors.clear()
                await asyncio.sleep(_AGAIN_SECONDS)
                work()
        except DatabaseError as error:
            errors = {id(write): error for write in writes}
        settle(writes, errors)

    async def close(self) -> None:
        """Close the connection."""
        self.drop()

    def drop(self) -> None:
        """Close the connection, also in the middle of a statement."""
        if self._connection is not None:
            self._connection.close()


class SimulatedKeeper(Keeper):
    """The keeper of leases, on the loop. Its leases are on the simulation's time, which all of its processes share."""

    def __init__(self, address: Address, clock: Clock, limits: Bounds, *, pooled: bool) -> None:
        super().__init__(address, clock, limits, pooled=pooled)
        self._lock = asyncio.Lock()
        self._busy_seconds = limits.lock_seconds
        cast("Any", self._rows).busy_timeout_seconds = _AT_ONCE
        self._renewing: asyncio.Task[None] | None = None

    async def acquire(self, name: str, seconds: float, holder: str | None) -> Lease | None:
        """See `Keeper`."""
        if self._renewing is None:
            self._renewing = spawn(self._renew_for_ever(), name="database.leases")
        end = asyncio.get_running_loop().time() + self._busy_seconds
        while True:
            try:
                return await self._acquire(name, seconds, holder or self._me)
            except DatabaseBusy:
                if asyncio.get_running_loop().time() > end:
                    raise
            await asyncio.sleep(_AGAIN_SECONDS)

    async def release(self, lease: Lease) -> None:
        """See `Keeper`."""
        if not self._closed:
            await self._release(lease)

    async def close(self) -> None:
        """See `Keeper`."""
        self._closed = True
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait([self._renewing])
            await self._release_all()
        self.drop()

    def drop(self) -> None:
        """Close the connection."""
        connection: sqlite3.Connection | None = cast("Any", self._rows)._connection
        if connection is not None:
            connection.close()


async def patiently(work: Callable[[], T], seconds: float) -> T:
    """Do what another process' lock may refuse, again and again for so long."""
    end = asyncio.get_running_loop().time() + seconds
    while True:
        try:
            return work()
        except sqlite3.OperationalError as error:
            if not is_busy(error) or asyncio.get_running_loop().time() > end:
                raise
        await asyncio.sleep(_AGAIN_SECONDS)


def _all_busy(errors: Errors) -> bool:
    return all(isinstance(error, DatabaseBusy) for error in errors.values())
