"""The stored tree: hashes of any range of the log, read from as few rows as possible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import sqlalchemy as sa

from mainstay.database import Database
from mainstay.observability.audit import tables
from mainstay.observability.audit.errors import TamperedLog
from mainstay.observability.audit.merkle import (
    STORED_LEVELS,
    Frontier,
    Range,
    fold,
    leaf_hash,
    perfect,
    subtrees,
)

_LEAVES = (
    sa.select(tables.log.c.leaf, tables.log.c.data)
    .where(tables.log.c.leaf >= sa.bindparam("low"), tables.log.c.leaf < sa.bindparam("high"))
    .order_by(tables.log.c.leaf)
)
_NODES = (
    sa.select(tables.nodes.c.position, tables.nodes.c.hash)
    .where(
        tables.nodes.c.level == sa.bindparam("level"),
        tables.nodes.c.position >= sa.bindparam("low"),
        tables.nodes.c.position < sa.bindparam("high"),
    )
    .order_by(tables.nodes.c.position)
)
_LATEST = (
    sa.select(tables.checkpoints.c.number, tables.checkpoints.c.note)
    .order_by(tables.checkpoints.c.number.desc())
    .limit(1)
)


async def leaves(database: Database, low: int, high: int) -> list[bytes]:
    """The bytes of the entries [low, high).

    Raises:
        TamperedLog: one of them is missing.
    """
    rows = await database.read(_LEAVES, {"low": low, "high": high})
    _complete(rows, low, high, "entry")
    return [bytes(row.data) for row in rows]


async def latest_checkpoint(database: Database) -> tuple[int, str] | None:
    """Number and note of the newest checkpoint."""
    rows = await database.read(_LATEST)
    return (rows[0].number, rows[0].note) if rows else None


async def range_hash(database: Database, low: int, high: int) -> bytes:
    """The hash of the tree over the entries [low, high), as it is within any tree that contains them so.

    Raises:
        TamperedLog: a row that must be there is missing.
    """
    return fold([await _subtree(database, level, position) for level, position in subtrees(low, high)])


async def proof(database: Database, ranges: Sequence[Range]) -> list[bytes]:
    """The hashes of a proof."""
    return [await range_hash(database, low, high) for low, high in ranges]


async def frontier(database: Database, size: int) -> Frontier:
    """The growing edge of the tree with `size` leaves."""
    return Frontier(size, [await _subtree(database, level, position) for level, position in subtrees(0, size)])


async def _subtree(database: Database, level: int, position: int) -> bytes:
    base = level // STORED_LEVELS * STORED_LEVELS
    low, high = position << (level - base), (position + 1) << (level - base)
    if base == 0:
        return perfect([leaf_hash(data) for data in await leaves(database, low, high)])
    rows = await database.read(_NODES, {"level": base, "low": low, "high": high})
    _complete(rows, low, high, f"node of level {base}")
    return perfect([bytes(row.hash) for row in rows])


def _complete(rows: Sequence[Any], low: int, high: int, what: str) -> None:
    places = [cast("int", row[0]) for row in rows]
    if places != list(range(low, high)):
        missing = next(place for place in range(low, high) if place not in places)
        msg = f"the audit log lacks {what} {missing}"
        raise TamperedLog(msg)
