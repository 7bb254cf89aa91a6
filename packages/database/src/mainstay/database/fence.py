"""Fences: a write that happens only while its writer still owns what it writes for.

A worker that was stopped for a minute believes that it holds its lease. The next owner has raised the epoch on the
owner's row; the sleeper's writes name the old epoch and are refused. The check holds the row until the commit (on
PostgreSQL `FOR SHARE`, which many writers may hold at once and which a takeover must wait for; on SQLite the one
writer's transaction), so that no other can take over between check and commit.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

__all__ = ["Fence", "FenceOn"]


class FenceOn:
    """A table whose rows have an owner; built once for each table.

    Args:
        table: the table of the owners' rows.
        id_column: identifies a row, unique.
        epoch_column: a number that every takeover raises.
    """

    __slots__ = ("_name", "many", "one")

    def __init__(self, table: sa.Table, id_column: sa.Column[Any], epoch_column: sa.Column[Any]) -> None:
        self._name = table.name
        # Locked in the order of ids, or two batches could wait for each other.
        self.many = (
            sa.select(id_column, epoch_column)
            .where(id_column == sa.any_(sa.bindparam("ids", type_=ARRAY(id_column.type))))
            .order_by(id_column)
            .with_for_update(read=True)
        )
        self.one = (
            sa.select(epoch_column)
            .where(id_column == sa.bindparam("id", type_=id_column.type))
            .with_for_update(read=True)
        )

    def at(self, id: Hashable, epoch: int) -> Fence:
        """The fence of the owner who took the row `id` at `epoch`."""
        return Fence(self, id, epoch)

    def __repr__(self) -> str:
        return f"<FenceOn {self._name}>"


@dataclass(frozen=True, slots=True)
class Fence:
    """One owner's claim to one row; given to `db.write` and `db.batch`."""

    on: FenceOn
    id: Hashable
    epoch: int

    def lost(self) -> str:
        """The sentence for `FenceLost`."""
        return f"{self.on._name} {self.id!r} is no longer at epoch {self.epoch}: another owner has taken over"
