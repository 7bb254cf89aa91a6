"""Fences: a write that happens only while its writer still owns what it writes for.

A worker that was stopped for a minute believes that it holds its lease. The next owner has raised the epoch on the
owner's row; the sleeper's writes name the old epoch and are refused. The check holds the row until the commit (on
PostgreSQL `FOR SHARE`, which many writers may hold at once and which a takeover must wait for; on SQLite the one
writer's transaction), so that no other can take over between check and commit.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
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
        owner_column: names the owner; a row that names another one, or none, refuses.
        where: what must hold of the row besides; a constant condition, such as a state in which rows have owners.
        flag_column: a boolean that others set for the owner to see, not null. A fence `at(…, unflagged=True)` refuses
            while it is set, so that the owner cannot pass a point of no return before it has seen it.
    """

    __slots__ = ("_name", "columns", "flagged", "many", "one", "owned")

    def __init__(
        self,
        table: sa.Table,
        id_column: sa.Column[Any],
        epoch_column: sa.Column[Any],
        *,
        owner_column: sa.Column[Any] | None = None,
        where: sa.ColumnElement[bool] | None = None,
        flag_column: sa.Column[Any] | None = None,
    ) -> None:
        self._name = table.name
        self.owned = owner_column is not None
        self.flagged = flag_column is not None
        seen = [column for column in (epoch_column, owner_column, flag_column) if column is not None]
        self.columns = tuple(column.name for column in (id_column, *seen))
        conditions = [] if where is None else [where]
        # Locked in the order of ids, or two batches could wait for each other.
        self.many = (
            sa.select(id_column, *seen)
            .where(id_column == sa.any_(sa.bindparam("ids", type_=ARRAY(id_column.type))), *conditions)
            .order_by(id_column)
            .with_for_update(read=True)
        )
        self.one = (
            sa.select(*seen)
            .where(id_column == sa.bindparam("id", type_=id_column.type), *conditions)
            .with_for_update(read=True)
        )

    def at(self, id: Hashable, epoch: int, owner: str | None = None, *, unflagged: bool = False) -> Fence:
        """The fence of the owner who took the row `id` at `epoch`.

        Args:
            unflagged: it refuses while the row's flag is set, too.

        Raises:
            ValueError: an owner or the flag is named and the table has no column for it, or an owner is missing.
        """
        if (owner is not None) != self.owned:
            msg = f"{self!r}.at({id!r}, …) {'lacks an owner' if self.owned else 'names an owner, which no column has'}"
            raise ValueError(msg)
        if unflagged and not self.flagged:
            msg = f"{self!r}.at({id!r}, …) asks for a flag, which no column has"
            raise ValueError(msg)
        return Fence(self, id, epoch, owner, unflagged)

    def __repr__(self) -> str:
        return f"<FenceOn {self._name}>"


@dataclass(frozen=True, slots=True)
class Fence:
    """One owner's claim to one row; given to `db.write` and `db.batch`."""

    on: FenceOn
    id: Hashable
    epoch: int
    owner: str | None = None
    unflagged: bool = False

    def holds(self, found: Sequence[Any] | None) -> bool:
        """Whether the row that the fence's statement found, if any, is still this owner's."""
        if found is None or (self.unflagged and found[-1]):
            return False
        return bool(found[0] == self.epoch and (self.owner is None or found[1] == self.owner))

    def lost(self) -> str:
        """The sentence for `FenceLost`."""
        mine = f"epoch {self.epoch}" if self.owner is None else f"epoch {self.epoch} of {self.owner}"
        flag = f", or {self.on.columns[-1]} is set" if self.unflagged else ""
        return (
            f"{self.on._name} {self.id!r} is no longer at {mine}: another owner has taken over, or it has ended{flag}"
        )
