"""The module that puts a Database into an App."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, ClassVar, Never

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from mainstay.core import SYSTEM_CLOCK, App, Clock, ConfigurationError, Module
from mainstay.database import _metrics
from mainstay.database._engine import (
    Address,
    Bounds,
    Home,
    Threads,
    behind_pooler,
    bounds,
    make_engine,
    unreachable,
    write_ahead,
)
from mainstay.database._hints import Messenger
from mainstay.database._recorder import PostgresWriter, Recorder, SQLiteWriter, Turn, WriteQueue, Writer
from mainstay.database._simulated import Simulated
from mainstay.database._statements import Statements
from mainstay.database._virtual_time import DriverCalls
from mainstay.database.clock import database_now
from mainstay.database.database import Database, uninterrupted
from mainstay.database.lease import Keeper, leases
from mainstay.database.schema import SCHEMA
from mainstay.database.settings import DatabaseSettings, parse_url, shown

__all__ = ["DatabaseModule"]

_log = logging.getLogger("mainstay.database")

CLOCK_SECONDS = 5.0  # so far may the two clocks be apart; leases go by the database's alone
_GOODBYE_SECONDS = 5.0
LEASE_CLOCK = SYSTEM_CLOCK  # not the App's: a lease is about processes, which live in real time


class DatabaseModule(Module[DatabaseSettings, Never]):
    """`DatabaseModule.for_root()` yields the `Database` that every other package uses."""

    name: ClassVar[str] = "database"
    _simulated: Simulated | None = None  # what the Database of a simulated process is made of

    def yields(self) -> Sequence[type]:
        """The Database."""
        return (Database,)

    def describe(self) -> Mapping[str, Sequence[str]]:
        """Where it is; the setting itself is a secret, since it may hold a password."""
        return {"address": [shown(parse_url(self.settings.url.get_secret_value()))]}

    def only_looking(self) -> None:
        """Leave old tables in SQLite as they are, and make no file."""
        super().only_looking()
        self.settings = self.settings.model_copy(update={"migrate": False})

    async def inspect(self, app: App) -> Sequence[str]:
        """Missing rights on the leases, and a clock that is off."""
        database = app.get(Database)
        rights = await database.missing_rights([leases], ("SELECT", "INSERT", "UPDATE"))
        return [*rights, *await _clock_that_is_off(database, app)]

    @asynccontextmanager
    async def running(self, app: App) -> AsyncGenerator[Sequence[object], None]:
        """Connect, migrate SQLite or check PostgreSQL, yield the Database; at the end commit what is waiting."""
        settings = self.settings
        address = Address(parse_url(settings.url.get_secret_value()))
        if self._simulated is not None:
            address.synchronous = "OFF"  # its machine never fails
        try:
            async with _database(address, settings, app, self._simulated) as database:
                yield [database]
        finally:
            address.remove()


async def _clock_that_is_off(database: Database, app: App) -> list[str]:
    before = app.clock.now().timestamp()
    ((theirs,),) = await database.read(sa.select(database_now()))
    after = app.clock.now().timestamp()
    # Half of the round trip belongs to the network, not to the clock.
    off = theirs - (before + after) / 2
    if abs(off) <= CLOCK_SECONDS + (after - before):
        return []
    ahead = "ahead of" if off > 0 else "behind"
    finding = (
        f"the database's clock is {abs(off):.0f} s {ahead} this machine's, so events and records get times that "
        "disagree: synchronise both with NTP"
    )
    return [finding]


@asynccontextmanager
async def _database(
    address: Address, settings: DatabaseSettings, app: App, simulated: Simulated | None
) -> AsyncGenerator[Database, None]:
    busy = settings.busy_timeout_seconds
    limits = bounds(settings)
    home = Home()
    pooled = False
    if address.dialect == "sqlite":
        if not settings.migrate and address.missing():
            made = "`mainstay db upgrade` makes it, as does the first start of the service"
            msg = f"there is no database at {address.shown}: {made}"
            raise ConfigurationError(msg)
        try:
            if settings.migrate:
                await asyncio.to_thread(write_ahead, address, busy)
        except sqlite3.Error as error:
            raise unreachable(address, error) from error
    else:
        if app.clock.virtual:
            msg = "a virtual clock does not move PostgreSQL's: test with SQLite, or with the system's clock"
            raise ConfigurationError(msg)
        pooled = await behind_pooler(address)
    calls, threads = DriverCalls(), Threads()
    connect = threads.open if simulated is None else simulated.connect
    engine = make_engine(address, settings, app.clock, calls, threads, pooled=pooled, connect=connect)
    event.listen(engine.sync_engine, "checkout", _checked_out)
    event.listen(engine.sync_engine, "checkin", _checked_in)  # codespell:ignore checkin
    statements = Statements(engine.dialect)
    turn = Turn(busy, alone=app.clock.virtual) if address.dialect == "sqlite" else None
    writers: list[Writer] = (
        [(SQLiteWriter if simulated is None else simulated.writer)(address, statements, turn, busy, app.clock)]
        if turn is not None
        else [PostgresWriter(address, statements, limits, pooled=pooled) for _ in range(settings.recorder_connections)]
    )
    recorder = Recorder([WriteQueue(writer, busy) for writer in writers])
    keeper = _keeper(address, app.clock, limits, simulated, pooled=pooled)

    def under_way() -> str | None:
        idle = recorder.idle() and keeper.idle() and not calls.under_way()
        return None if idle else f"work on the database {address.shown}"

    _metrics.POOL_LIMIT.inc(settings.pool_size)
    try:
        database = Database(
            address, engine, recorder, keeper, statements, turn=turn, pooled=pooled, migrates=settings.migrate
        )
        await database.ensure_schema(SCHEMA)
        if address.dialect == "postgresql":
            direct = settings.direct_url
            past = address if direct is None else Address(parse_url(direct.get_secret_value()))
            app.background("hints", Messenger(database._hints, past, limits).work)
        with app.clock.held_by(under_way):
            yield database
    finally:
        _metrics.POOL_LIMIT.dec(settings.pool_size)
        failure, cancelled = await uninterrupted(_close(recorder, keeper, engine, threads, home))
        if failure is not None:
            _log.error("the database was not closed in order", exc_info=failure)
        if cancelled is not None:
            raise cancelled


def _keeper(address: Address, clock: Clock, limits: Bounds, simulated: Simulated | None, *, pooled: bool) -> Keeper:
    if simulated is None:
        return Keeper(address, LEASE_CLOCK, limits, pooled=pooled)
    return simulated.keeper(address, clock, limits)


async def _close(recorder: Recorder, keeper: Keeper, engine: AsyncEngine, threads: Threads, home: Home) -> None:
    if home.forked():
        return  # the connections are the parent's, and its threads did not come along
    # Leases last for as long as something that is fenced with them may still be waiting to be written.
    try:
        await recorder.close()
    finally:
        try:
            await keeper.close()
        finally:
            # asyncpg waits for the server's goodbye, which a server that hangs does not say.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_GOODBYE_SECONDS):
                    await engine.dispose()
                    await threads.ended()


def _checked_out(_connection: object, record: Any, _proxy: object) -> None:
    record.info["mainstay_counted"] = True
    _metrics.POOL_IN_USE.inc()


def _checked_in(_connection: object, record: Any) -> None:
    # Also told for connections that were refused at check-out.
    if record.info.pop("mainstay_counted", False):
        _metrics.POOL_IN_USE.dec()
