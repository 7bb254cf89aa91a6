"""Where a group begins in a topic in which it has no place yet.

A place is chosen once, for all partitions of a topic that there are, and is durable before the first event is read: a
process that ends then, or one that reads other partitions, changes nothing about it. A partition that comes later is
read from its beginning, or what was published to it first would be passed over.

In the log of the Database the moment is a snapshot. Transactions that are open then are not shown by it, so that what
they commit later is read. In the log of a process (`memory`) there is nothing to choose: it begins with the App.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Literal

import sqlalchemy as sa

from mainstay.database import Database
from mainstay.events import tables
from mainstay.events._snapshot import START, Place, Snapshot
from mainstay.events.tables import LOG

_log = logging.getLogger("mainstay.events")

Start = Literal["earliest", "latest"] | datetime
"""The oldest event that is there, what comes from now on, or what was written from a moment on."""

_MOST = 100_000
"""So many events that are passed over are counted, and no more."""


def check_start(start: Start) -> None:
    """Refuse a start that is none.

    Raises:
        ValueError: it is another word, a time without its zone, or one to come.
    """
    if not isinstance(start, datetime):
        if start not in {"earliest", "latest"}:
            msg = f"on(start={start!r}): it is 'earliest', 'latest' or a datetime"
            raise ValueError(msg)
    elif start.utcoffset() is None:
        msg = f"on(start={start!r}): the time has no zone; say datetime(…, tzinfo=UTC)"
        raise ValueError(msg)
    elif start > datetime.now(UTC):
        msg = f"on(start={start!r}): the time is yet to come; 'latest' passes over all that is there"
        raise ValueError(msg)


def say(group: str, topic: str, start: Start, passed: int | None) -> None:
    """Say where a group begins, and how many events it passes over where that is known."""
    if start == "earliest":
        _log.info("group %s has no place in topic %s: it begins with all that is there", group, topic)
        return
    begins = "with what comes from now on" if start == "latest" else f"with what was written from {start} on"
    left_out = "" if passed is None else f", and passes over about {passed} events"
    _log.warning("group %s has no place in topic %s: it begins %s%s", group, topic, begins, left_out)


async def begin(database: Database, group: str, topic: str, start: Start, partitions: int) -> None:
    """Give a group without a place in a topic of the log one in each partition; one that has a place keeps it."""
    if await database.read(tables.ANY_OFFSET, {"group": group, "of_topic": topic}):
        return
    (low, high, position), passed = (START, None) if start == "earliest" else await _since_then(database, topic, start)
    places = [
        {
            "group_name": group,
            "topic": topic,
            "partition": number,
            "low": str(low),
            "high": str(high),
            "position": position,
        }
        for number in range(partitions)  # in one order, whichever process does it
    ]
    await database.write(tables.BEGIN_OFFSET[database.dialect], places)
    # Another process may have chosen at the same time, by a release that says another start: the first choice stands.
    (row,) = await database.read(tables.READ_OFFSETS, {"group": group, "of_topic": topic, "number": 0})
    if Place.of(row) == Place(low, high, position):
        say(group, topic, start, passed)


async def _since_then(database: Database, topic: str, start: datetime | Literal["latest"]) -> tuple[Place, int]:
    """The place behind all that is passed over, and how many events of the topic these are."""
    since = None if start == "latest" else int(start.timestamp())
    row = (await database.read(_SINCE[database.dialect], {"of_topic": topic, "since": since}))[0]
    high = Snapshot.parse(row.high)
    return Place(high, high, 0) if row.first is None else Place(Snapshot(0), high, row.first - 1), row.passed


def _since(now: sa.ColumnElement[str]) -> sa.Executable:
    """The snapshot of now, the first position that it shows from a time on, and how many of a topic are before it."""
    of_topic = LOG.c.topic == sa.bindparam("of_topic", type_=sa.Text)
    since = sa.bindparam("since", type_=sa.BigInteger)
    # Times are those at which transactions began, which is not quite the order of positions: the first one decides.
    first = sa.select(sa.func.min(LOG.c.position)).where(of_topic, LOG.c.created_at >= since).scalar_subquery()
    before = sa.select(LOG.c.position).where(of_topic, LOG.c.position < sa.func.coalesce(first, 2**62)).limit(_MOST)
    passed = sa.select(sa.func.count()).select_from(before.subquery()).scalar_subquery()
    return sa.select(now.label("high"), first.label("first"), passed.label("passed"))


_SINCE = {
    "postgresql": _since(sa.literal_column("pg_current_snapshot()::text", sa.Text)),
    "sqlite": _since(
        sa.func.printf("0:%d:", sa.select(sa.func.coalesce(sa.func.max(LOG.c.position), 0) + 1).scalar_subquery())
    ),
}
