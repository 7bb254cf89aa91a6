"""How far a group is behind: how many events it has yet to finish, and since when the oldest of them waits."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

from mainstay.core import Clock
from mainstay.database import Database, database_now
from mainstay.events._delivery import Assignment
from mainstay.events._metrics import IN_FLIGHT_BYTES, LAG, LAG_SECONDS, OLDEST, PARTITIONS
from mainstay.events._snapshot import Place
from mainstay.events._transport import Source
from mainstay.events.tables import LOG

_MEASURE_SECONDS = 5.0
_MOST = 100_000
"""So many rows are counted, and no more."""
_NOWHERE = 2**62
"""A position behind all: of a window that was read to its end."""


class Lag(NamedTuple):
    """How far a group is behind in the partitions that a process holds.

    Attributes:
        events: about how many are not finished; None while unknown.
        seconds: for how long the oldest of them waits; None while unknown.
    """

    events: int | None
    seconds: float | None

    @classmethod
    def of(cls, source: Source | None, assignments: Iterable[Assignment], between: int) -> Lag:
        """What a source has yet to hand out, what is `between` it and the handlers, and what they have not finished."""
        if source is None:
            return cls(None, None)
        windows = [each.window for each in assignments]
        unread = source.lag()
        return cls(
            None if unread is None else unread + between + sum(map(len, windows)),
            source.lag_seconds([window[0] for window in windows if window]),
        )

    def said(self, most_seconds: float) -> str | None:
        """In a few words, None where no event waits for longer than so."""
        if self.seconds is None or self.seconds <= most_seconds:
            return None
        return f"{self.events} events wait, the oldest for {self.seconds:.0f} s"


class Gauges:
    """What the metrics of a group say of its partitions in this process."""

    def __init__(self, group: str) -> None:
        self._events, self._seconds = LAG.labels(group), LAG_SECONDS.labels(group)
        self._oldest = OLDEST.labels(group)
        self._partitions, self._bytes = PARTITIONS.labels(group), IN_FLIGHT_BYTES.labels(group)

    def show(self, lag: Lag, oldest_seconds: float, assignments: Collection[Assignment]) -> None:
        """Set them to what is known."""
        if lag.events is not None:
            self._events.set(lag.events)
        if lag.seconds is not None:
            self._seconds.set(lag.seconds)
        self._oldest.set(oldest_seconds)
        self._partitions.set(len(assignments))
        self._bytes.set(sum(len(each.window) * each.record_bytes for each in assignments))


class LogLag:
    """What a group has yet to read of its partitions, as far as it was looked at lately.

    Args:
        database: where the log is.
        clock: says when it is time to look again.

    Attributes:
        waiting: the number of events; None before the first look.
    """

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._due_at = clock.monotonic()
        self._oldest_at: float | None = None
        self._ahead = 0.0  # the database's clock, of ours
        self.waiting: int | None = None

    async def look(self, places: Mapping[Assignment, Place]) -> None:
        """Count, if it is time; from the places up to which was read."""
        if self._clock.monotonic() < self._due_at or not places:
            return
        alike: dict[Place, list[Assignment]] = {}
        for assignment, place in places.items():
            alike.setdefault(place, []).append(assignment)
        waiting, oldest = 0, list[float]()
        for (low, high, position), assignments in alike.items():
            asked_at = self._clock.now().timestamp()
            row = (
                await self._database.read(
                    _BEHIND[self._database.dialect],
                    {
                        "low": low.end,
                        "low_running": list(low.running),
                        "high": high.end,
                        "high_running": list(high.running),
                        "position": _NOWHERE if low == high else position,
                        "topics": sorted({each.topic for each in assignments}),
                        "partitions": sorted({each.number for each in assignments}),
                    },
                )
            )[0]
            waiting += row.waiting
            oldest += [] if row.oldest is None else [row.oldest]
            # From before the question: an age is overstated by how long the answer took, never understated.
            self._ahead = row.now - asked_at
        self.waiting, self._oldest_at = waiting, min(oldest, default=None)
        self._due_at = self._clock.monotonic() + _MEASURE_SECONDS

    def look_again(self) -> None:
        """Count at the next opportunity: other partitions are held now."""
        self._due_at = float("-inf")

    def handed_out(self, count: int) -> None:
        """So many of those that were counted, or came since, are read by now."""
        if self.waiting is not None:
            self.waiting = max(0, self.waiting - count)

    def nothing_left(self) -> None:
        """All there is has been read."""
        self.waiting, self._oldest_at = 0, None

    def seconds(self, unfinished: Iterable[float]) -> float | None:
        """For how long the oldest event waits, of those that were counted and of others that came at these times."""
        if self.waiting is None:
            return None
        times = [*unfinished, *([] if self._oldest_at is None else [self._oldest_at])]
        return max(0.0, self._clock.now().timestamp() + self._ahead - min(times)) if times else 0.0


def _behind(*parts: tuple[sa.ColumnElement[int], sa.ColumnElement[bool]]) -> sa.Executable:
    """The statement that counts the rows that fulfil one of the conditions, each found in an order of its own."""
    mine = (
        LOG.c.topic.in_(sa.bindparam("topics", expanding=True)),
        LOG.c.partition.in_(sa.bindparam("partitions", expanding=True)),
    )
    found = [
        sa.select(LOG.c.created_at).where(condition, *mine).order_by(order).limit(_MOST).subquery()
        for order, condition in parts
    ]
    rows = sa.union_all(*(sa.select(part.c.created_at) for part in found)).subquery()
    return sa.select(
        sa.func.count().label("waiting"), sa.func.min(rows.c.created_at).label("oldest"), database_now().label("now")
    ).select_from(rows)


_LOW = sa.bindparam("low", type_=sa.BigInteger)
_HIGH = sa.bindparam("high", type_=sa.BigInteger)
_NUMBERS = ARRAY(sa.BigInteger)
_FURTHER = LOG.c.position > sa.bindparam("position", type_=sa.BigInteger)
_BEGUN = LOG.c.xid == sa.any_(sa.bindparam("low_running", type_=_NUMBERS))
_ENDED = LOG.c.xid != sa.all_(sa.bindparam("high_running", type_=_NUMBERS))
_LATE = LOG.c.xid == sa.any_(sa.bindparam("high_running", type_=_NUMBERS))
_BEHIND = {
    "sqlite": _behind(
        (LOG.c.position, sa.and_(_FURTHER, LOG.c.position >= _LOW, LOG.c.position < _HIGH)),
        (LOG.c.position, LOG.c.position >= _HIGH),
    ),
    "postgresql": _behind(
        (LOG.c.position, sa.and_(_FURTHER, sa.or_(LOG.c.xid >= _LOW, _BEGUN), LOG.c.xid < _HIGH, _ENDED)),
        (LOG.c.xid, LOG.c.xid >= _HIGH),
        (LOG.c.xid, _LATE),
    ),
}
