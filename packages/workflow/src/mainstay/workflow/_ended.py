"""Runs that have ended and need not be kept any longer: which they are, and how they are deleted.

A family is deleted from below. A run goes only when no child of it is left, and a child only when its parent may go,
too: while a parent can still be compensated its children must be there to be undone, and a parent that is started again
under its id must not find the children of the one before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from mainstay.database import database_now
from mainstay.workflow.tables import asks, history, runs, signals, values
from mainstay.workflow.workflow import RunStatus

# A subquery, so that PostgreSQL asks once, and may look the answer up in an index.
_now = sa.select(database_now()).scalar_subquery()

_parents, _children = runs.alias("parents"), runs.alias("children")

FROM_THE_FIRST = {"after": float("-inf"), "after_id": ""}

UNCLAIMED = (
    sa.select(signals.c.number)
    .where(
        signals.c.received_by.is_(None),
        signals.c.at < _now - sa.bindparam("kept_seconds", type_=sa.Double),
        ~sa.exists().where(runs.c.id == signals.c.run_id),
    )
    .order_by(signals.c.at)
    .limit(sa.bindparam("most"))
)
EXPIRE = (
    sa.delete(signals)
    .where(signals.c.number.in_(UNCLAIMED.with_for_update(skip_locked=True, of=signals)))
    .returning(signals.c.run_id, signals.c.name)
)

OF_A_RUN: Mapping[str, sa.Table] = {"history": history, "signals": signals, "values": values, "asks": asks}
"""Every table with rows of runs. They are archived and deleted with them, so each of the two knows all of them."""

_IDS: sa.BindParameter[str] = sa.bindparam("ids", expanding=True)

READ_OF_RUNS = {
    part: sa.select(table).where(table.c.run_id.in_(_IDS)).order_by(*table.primary_key)
    for part, table in OF_A_RUN.items()
}
READ_RUNS = sa.select(runs).where(runs.c.id.in_(_IDS)).order_by(runs.c.ended_at, runs.c.id)
_DELETE = (
    *(sa.delete(table).where(table.c.run_id.in_(_IDS)) for table in OF_A_RUN.values()),
    sa.delete(runs).where(runs.c.id.in_(_IDS)),
)


class Ended:
    """The ended runs that are older than they are kept.

    Args:
        kept_seconds: how long after its end a run is kept, by the state that it ended in. One of another state is kept
            for ever.
        alone: whether a run counts without regard to its parent and its children: where nothing is deleted.
    """

    def __init__(self, kept_seconds: Mapping[RunStatus, float], *, alone: bool = False) -> None:
        over = sa.or_(sa.false(), *(_over(_parents, status, seconds) for status, seconds in kept_seconds.items()))
        held = sa.exists().where(
            _parents.c.id == runs.c.parent,
            _parents.c.generation == runs.c.parent_generation,
            sa.not_(sa.func.coalesce(over, sa.false())),
        )
        family = [] if alone else [~held, ~sa.exists().where(_children.c.parent == runs.c.id)]
        after = sa.tuple_(sa.bindparam("after", type_=sa.Double), sa.bindparam("after_id", type_=sa.String))
        self.of = {
            status: sa.select(runs.c.id, runs.c.epoch, runs.c.ended_at)
            .where(_over(runs, status, seconds), sa.tuple_(runs.c.ended_at, runs.c.id) > after, *family)
            .order_by(runs.c.ended_at, runs.c.id)
            .limit(sa.bindparam("most"))
            for status, seconds in kept_seconds.items()
        }
        """A query for each state: some of its runs in the order of their ends, after one of them."""

    def locked(self, status: RunStatus) -> sa.Select[Any, Any, Any]:
        """The query for a state that keeps its rows, and passes those over that another transaction has."""
        return self.of[status].with_for_update(skip_locked=True, of=runs)


def _over(table: sa.FromClause, status: RunStatus, seconds: float) -> sa.ColumnElement[bool]:
    return sa.and_(table.c.status == str(status), table.c.ended_at < _now - seconds)


async def delete(session: AsyncSession, ids: Sequence[str]) -> None:
    """Delete runs that this transaction holds, with everything that is theirs."""
    for statement in _DELETE:
        await session.execute(statement, {"ids": ids})
