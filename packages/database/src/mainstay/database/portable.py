"""Portable parts of SQL: a moment, and an insert that may find its row there, alike on SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Dialect
from sqlalchemy.sql.base import ReadOnlyColumnCollection
from sqlalchemy.sql.elements import KeyedColumnElement

__all__ = ["UtcDateTime", "upsert"]


class UtcDateTime(sa.types.TypeDecorator[datetime]):
    """A moment: aware datetimes of any zone go in, aware datetimes in UTC come out, on every database.

    PostgreSQL keeps it as `timestamptz`, SQLite as a text in UTC, which sorts and compares as the moments do.

    Raises:
        ValueError: a naive datetime is written or compared with; it names no moment. Through SQLAlchemy it comes as the
            cause of a `StatementError`, through `db.write` of a `DatabaseError`.
    """

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Take it to UTC; SQLite's type knows no zones."""
        if value is None:
            return None
        if value.utcoffset() is None:
            msg = f"{value!r} is naive, so it names no moment: give it a zone, such as datetime.now(UTC)"
            raise ValueError(msg)
        moment = value.astimezone(UTC)
        return moment.replace(tzinfo=None) if dialect.name == "sqlite" else moment

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Give it the zone that it is kept in."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if dialect.name == "sqlite" else value.astimezone(UTC)


def upsert(
    table: sa.Table,
    changes: Callable[[ReadOnlyColumnCollection[str, KeyedColumnElement[Any]]], Mapping[str, Any]] | None = None,
    *,
    on: Sequence[str] | None = None,
) -> sa.Insert:
    """Make an insert that changes the row that is there already, or leaves it as it is.

    Best a constant of the module, for `db.write` and sessions alike:
    `COUNT = upsert(sales, lambda new: {"sold": sales.c.sold + new.sold})`.

    Args:
        table: where to.
        changes: called at once with the columns of the row that could not be inserted; the new values of the row that
            is there, by column. Without it, that row stays.
        on: the columns of the constraint that tells whether a row is there; by default those of the primary key.
    """
    # SQLite and PostgreSQL write it alike, and SQLAlchemy renders PostgreSQL's for both.
    insert = postgresql.insert(table)
    constraint = [table.c[name] for name in on] if on is not None else list(table.primary_key.columns)
    if changes is None:
        return insert.on_conflict_do_nothing(index_elements=constraint)
    return insert.on_conflict_do_update(index_elements=constraint, set_=dict(changes(insert.excluded)))
