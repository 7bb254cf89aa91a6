"""The stored tree: hashes of any range of the log, in as few reads as possible."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from mainstay.audit import tables
from mainstay.audit.errors import TamperedLog
from mainstay.audit.merkle import (
    STORED_LEVELS,
    Frontier,
    Range,
    fold,
    leaf_hash,
    perfect,
    subtrees,
)
from mainstay.database import Database

_LEAVES = (
    sa.select(tables.log.c.leaf, tables.raw(tables.log.c.data))
    .where(tables.log.c.leaf >= sa.bindparam("low"), tables.log.c.leaf < sa.bindparam("high"))
    .order_by(tables.log.c.leaf)
)
_NODES = (
    sa.select(tables.nodes.c.position, tables.raw(tables.nodes.c.hash))
    .where(
        tables.nodes.c.level == sa.bindparam("level"),
        tables.nodes.c.position >= sa.bindparam("low"),
        tables.nodes.c.position < sa.bindparam("high"),
    )
    .order_by(tables.nodes.c.position)
)
_LATEST = (
    sa.select(
        tables.checkpoints.c.number,
        tables.raw(tables.checkpoints.c.note),
        sa.select(sa.func.count()).select_from(tables.checkpoints).scalar_subquery().label("total"),
    )
    .order_by(tables.checkpoints.c.number.desc())
    .limit(1)
)


async def leaves(database: Database, low: int, high: int) -> list[bytes]:
    """The bytes of the entries [low, high).

    Raises:
        TamperedLog: one of them is missing, or no bytes.
    """
    rows = await database.read(_LEAVES, {"low": low, "high": high})
    if [row.leaf for row in rows] != list(range(low, high)):
        msg = f"the audit log lacks some of the entries {low} to {high - 1}"
        raise TamperedLog(msg)
    return [_bytes(row.data, f"entry {row.leaf}") for row in rows]


async def latest_checkpoint(database: Database) -> tuple[int, str] | None:
    """Number and note of the newest checkpoint.

    Raises:
        TamperedLog: it has not the number that follows from how many there are, or its note is no text.
    """
    rows = await database.read(_LATEST)
    if not rows:
        return None
    row = rows[0]
    if row.number != row.total or not isinstance(row.note, str):
        msg = f"the newest of {row.total} checkpoints has the number {row.number!r}, or is no text"
        raise TamperedLog(msg)
    return row.total, row.note


def within(level: object, position: object, size: int) -> bool:
    """Whether a tree of `size` leaves has this node and keeps it."""
    if not isinstance(level, int) or not isinstance(position, int):
        return False
    return level > 0 and level % STORED_LEVELS == 0 and 0 <= position < size >> level


def _bytes(value: object, what: str) -> bytes:
    if not isinstance(value, bytes):
        msg = f"{what} of the audit log is no bytes but a {type(value).__name__}"
        raise TamperedLog(msg)
    return value


async def proof(database: Database, ranges: Sequence[Range]) -> list[bytes]:
    """The hashes of the trees over these ranges of entries: what a proof consists of.

    Raises:
        TamperedLog: a row that must be there is missing.
    """
    blocks = _Blocks(database)
    return [fold([await blocks.subtree(*each) for each in subtrees(low, high)]) for low, high in ranges]


async def frontier(database: Database, size: int) -> Frontier:
    """The growing edge of the tree with `size` leaves.

    Raises:
        TamperedLog: a row that must be there is missing.
    """
    blocks = _Blocks(database)
    return Frontier(size, [await blocks.subtree(*each) for each in subtrees(0, size)])


class _Blocks:
    """Hashes of leaves and stored nodes, read 256 at a time and kept: the ranges of a proof are neighbours."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[tuple[int, int], dict[int, bytes]] = {}

    async def subtree(self, level: int, position: int) -> bytes:
        """The hash of a complete subtree, from the stored level below it; all it needs lies in one block."""
        base = level // STORED_LEVELS * STORED_LEVELS
        low, high = position << (level - base), (position + 1) << (level - base)
        hashes = await self._block(base, low >> STORED_LEVELS)
        missing = next((place for place in range(low, high) if place not in hashes), None)
        if missing is not None:
            msg = f"the audit log lacks {f'node of level {base}' if base else 'entry'} {missing}"
            raise TamperedLog(msg)
        return perfect([hashes[place] for place in range(low, high)])

    async def _block(self, base: int, number: int) -> dict[int, bytes]:
        found = self._known.get((base, number))
        if found is None:
            ends = {"low": number << STORED_LEVELS, "high": (number + 1) << STORED_LEVELS}
            if base == 0:
                rows = await self._database.read(_LEAVES, ends)
                found = {row.leaf: leaf_hash(_bytes(row.data, f"entry {row.leaf}")) for row in rows}
            else:
                rows = await self._database.read(_NODES, {"level": base, **ends})
                found = {row.position: _bytes(row.hash, f"node {row.position}") for row in rows}
            self._known[base, number] = found
        return found
