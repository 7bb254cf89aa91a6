"""Virtual time on SQLite: the database's clock follows the App's, and the App's is held while statements run."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import Any, cast

from sqlalchemy import event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncEngine

from mainstay.core import Clock

_JULIAN_DAY_OF_1970 = 2440587.5
_SECONDS_A_DAY = 86400.0


class DriverCalls:
    """How many calls of one engine's driver are under way in its threads."""

    def __init__(self) -> None:
        self._under_way = 0

    def count(self, engine: AsyncEngine) -> None:
        """Count the calls of this engine's connections from now on."""
        dialect = engine.sync_engine.dialect
        connect = dialect.connect

        def connecting(*args: Any, **kwargs: Any) -> DBAPIConnection:
            self._under_way += 1
            try:
                return connect(*args, **kwargs)
            finally:
                self._under_way -= 1

        def connected(connection: Any, _record: object) -> None:
            # aiosqlite has no public place that every call goes through. SQLAlchemy's events do not tell of cursors
            # that are opened and closed, nor of the end of a commit.
            driver = connection.driver_connection
            execute = driver._execute

            async def counting(*args: Any, **kwargs: Any) -> Any:
                self._under_way += 1
                try:
                    return await execute(*args, **kwargs)
                finally:
                    self._under_way -= 1

            driver._execute = counting

        cast("Any", dialect).connect = connecting
        event.listen(engine.sync_engine, "connect", connected, insert=True)

    def under_way(self) -> bool:
        """Whether there is any."""
        return self._under_way > 0


def follow_clock(connection: Any, clock: Clock) -> None:
    """Make `julianday('now')`, which Mainstay's statements read the time from, the clock's time.

    Args:
        connection: a `sqlite3.Connection`, or SQLAlchemy's adapter around one.
        clock: the App's.
    """

    def julian_day(*args: object) -> object:
        if args == ("now",):
            return clock.now().timestamp() / _SECONDS_A_DAY + _JULIAN_DAY_OF_1970
        with closing(sqlite3.connect(":memory:")) as plain:  # in which the function is SQLite's own
            marks = ", ".join("?" * len(args))
            return plain.execute(f"SELECT julianday({marks})", args).fetchone()[0]

    connection.create_function("julianday", -1, julian_day)
