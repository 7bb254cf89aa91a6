"""The tables, and who may do what with them.

`pending` is the set of entries that are written and not yet sealed. The application inserts into it, in its own
transactions; the sealer moves them, in batches, into `log`, which nobody updates or deletes from. The set shrinks by
what is sealed, so there is no cursor that a late commit could slip behind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa

from mainstay.database import Schema

__all__ = ["SCHEMA"]

metadata = sa.MetaData()

# SQLite numbers rows by itself only where the type is INTEGER.
_BIG = sa.BigInteger().with_variant(sa.Integer, "sqlite")

pending = sa.Table(
    "mainstay_audit_pending",
    metadata,
    sa.Column("seq", _BIG, sa.Identity(always=True), primary_key=True),
    sa.Column("entry_id", sa.Uuid, nullable=False, unique=True),
    sa.Column("recorded_at", sa.BigInteger, nullable=False),  # microseconds since 1970: tells the lag, orders nothing
    sa.Column("data", sa.LargeBinary, nullable=False),
)

log = sa.Table(
    "mainstay_audit_log",
    metadata,
    sa.Column("leaf", sa.BigInteger, primary_key=True, autoincrement=False),
    # Not unique: an effect that was repeated after a crash is an entry each time, and must not stop the sealer.
    sa.Column("entry_id", sa.Uuid, nullable=False, index=True),
    sa.Column("data", sa.LargeBinary, nullable=False),
)

nodes = sa.Table(
    "mainstay_audit_nodes",
    metadata,
    sa.Column("level", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("hash", sa.LargeBinary, nullable=False),
)

checkpoints = sa.Table(
    "mainstay_audit_checkpoints",
    metadata,
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("note", sa.Text, nullable=False),
)

# What was among the pending entries and is none: put aside by the sealer, for people to look at and remove.
refused = sa.Table(
    "mainstay_audit_refused",
    metadata,
    sa.Column("id", _BIG, sa.Identity(always=True), primary_key=True),
    sa.Column("entry_id", sa.Text, nullable=False),
    sa.Column("data", sa.LargeBinary, nullable=False),
)

SCHEMA = Schema("audit", metadata, Path(__file__).parent / "migrations")

INSERT_PENDING = sa.insert(pending).values(
    entry_id=sa.bindparam("entry_id"), recorded_at=sa.bindparam("recorded_at"), data=sa.bindparam("data")
)


def raw(column: sa.Column[Any]) -> sa.ColumnElement[Any]:
    """The column as the driver reads it, since a conversion of a value of another type raises."""
    return sa.type_coerce(column, sa.types.NullType()).label(column.name)
