"""The database's clock, the one that leases, schedules and ages of all processes are told by."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

__all__ = ["database_now"]


class database_now(FunctionElement[float]):  # noqa: N801  an SQL function, written like one
    """The database's time when the statement runs, as a float of seconds since 1970.

    Not the time at which the transaction began, which PostgreSQL's `now()` is. In an App with a virtual clock on SQLite
    it is that clock's time.
    """

    type: sa.types.TypeEngine[float] = sa.Double()
    inherit_cache = True


@compiles(database_now, "postgresql")
def _on_postgresql(_element: database_now, _compiler: Any, **_options: Any) -> str:
    return "extract(epoch from clock_timestamp())::double precision"


@compiles(database_now, "sqlite")
def _on_sqlite(_element: database_now, _compiler: Any, **_options: Any) -> str:
    # SQLite's clock has milliseconds, which the day as one float blurs. `unixepoch('subsec')` would be shorter, and is
    # NULL before SQLite 3.42.
    return "round((julianday('now') - 2440587.5) * 86400.0, 3)"
