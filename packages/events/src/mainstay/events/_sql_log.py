"""The `sql` log, read without a group: see `_log` for what, and `_sql` for why by snapshots.

The log has indexes by position and, on PostgreSQL, by transaction, and none by topic: one more would cost each event.
So a statement here looks at some thousands of rows that lie together and takes what it wants of them, and however large
the log is none takes long. A time is found by halving: later positions were written later, but for what a transaction
writes long after its beginning, so each look is at several rows.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from mainstay.database import Database, database_now, lease_holders
from mainstay.events import tables
from mainstay.events._log import Behind, Extent, Member, Page, Partition, Places, Reading, Stored, Topic
from mainstay.events._snapshot import START, Place, Snapshot
from mainstay.events._sql import BACKLOG, START_OF_BACKLOG, WINDOW
from mainstay.events.tables import LOG, MEMBERS, OFFSETS, headers_of

_PAGE = 2000
"""Rows of the log that one statement looks at."""
_COUNTED = 100_000
"""Rows that are counted, and no more."""
_WALKED = 10_000
"""Of those, what one statement counts."""
_LOOKS = 200
"""Rows of which the newest says how late it is at a position."""
_BEYOND = 2**62
_DAY = 86_400.0


class SqlLog:
    """See `Log`.

    Args:
        database: where it is.
        partitions: into how many parts this service divides a topic.
        log_days: for how long this service keeps an event at least.
    """

    def __init__(self, database: Database, *, partitions: int, log_days: float) -> None:
        self._database = database
        self._partitions = partitions
        self._keeps_seconds = log_days * _DAY

    async def _numbers(self) -> range:
        widest = (await self._database.read(tables.WIDEST_PARTITION))[0][0]
        return range(max(self._partitions, 0 if widest is None else widest + 1))

    # What there is

    async def topics(self, names: Collection[str] | None) -> Mapping[str, Topic]:
        """See `Log`. A topic is there once it was written to, or is read by a group."""
        rows = await self._database.read(_EXTENTS, {"most": _COUNTED})
        whole = sum(row.events for row in rows) < _COUNTED
        found: dict[str, dict[int, Extent]] = {}
        for row in rows:
            found.setdefault(row.topic, {})[row.partition] = Extent(row.first, row.last, row.events)
        for row in await self._database.read(_READ_TOPICS):
            found.setdefault(row.topic, {})
        if not whole:  # one of which nothing is among the newest may be there all the same
            found |= {topic: {} for topic in names or () if topic not in found}
        numbers = await self._numbers()
        return {
            topic: Topic(
                {number: extents.get(number, Extent(None, None, 0)) for number in numbers},
                self._keeps_seconds,
                whole=whole,
            )
            for topic, extents in sorted(found.items())
            if names is None or topic in names
        }

    # Records

    async def end(self, topics: Collection[str]) -> Places:
        """See `Log`."""
        now = await self._now()
        return await self._all_at(topics, Place(now, now, 0))

    async def since(self, topics: Collection[str], time: float) -> Places:
        """See `Log`. The clock is the database's, in whole seconds."""
        now = await self._now()
        return await self._all_at(topics, Place(START.low, now, await self._before(int(time))))

    async def _now(self) -> Snapshot:
        row = (await self._database.read(WINDOW[self._database.dialect], {"low": _BEYOND, "low_running": []}))[0]
        return Snapshot.parse(row.high)

    async def _all_at(self, topics: Collection[str], place: Place) -> Places:
        return {(topic, number): place for topic in sorted(topics) for number in await self._numbers()}

    async def _before(self, time: int) -> int:
        """The position behind which all were written at a time or later, or nearly all."""
        ends = (await self._database.read(_ENDS))[0]
        if ends.last is None:
            return 0
        low: int = ends.first - 1
        high: int = ends.last  # what is sought is from `low` on
        while low < high:
            middle = (low + high) // 2
            newest = (await self._database.read(_NEWEST_AFTER, {"position": middle, "most": _LOOKS}))[0].newest
            if newest is None or newest >= time:
                high = middle
            else:
                low = middle + 1
        return low

    async def read(self, places: Places) -> Page:
        """See `Log`."""
        alike: dict[Place, list[Partition]] = {}
        for partition, place in places.items():
            alike.setdefault(place, []).append(partition)
        records: list[Stored] = []
        following: dict[Partition, Place] = {}
        last = True
        for place, partitions in alike.items():
            found, then, over = await self._page(place, set(partitions))
            records += found
            last = last and over
            following.update(dict.fromkeys(partitions, then))
        return Page(records, following, last)

    async def _page(self, place: Place, partitions: set[Partition]) -> tuple[list[Stored], Place, bool]:
        low, high, position = place
        if low == high:
            asked = {"low": low.end, "low_running": list(low.running)}
            row = (await self._database.read(WINDOW[self._database.dialect], asked))[0]
            high = Snapshot.parse(row.high)
            if row.start is None:
                return [], Place(high, high, 0), True
            start = row.start
            if row.found >= BACKLOG:  # of these the first alone were looked at
                lowest = (await self._database.read(START_OF_BACKLOG, {"low": low.end}))[0].start
                start = start if lowest is None else min(start, lowest)
            position = start - 1
        rows = await self._rows(position, _BEYOND, topics={topic for topic, _ in partitions}, newest_first=False)
        if rows is None:
            return [], Place(high, high, 0), False  # of this window; there may be another
        records = [
            _stored(row)
            for row in rows[0]
            if (row.topic, row.partition) in partitions and high.shows(row.xid) and not low.shows(row.xid)
        ]
        return records, Place(low, high, rows[1]), False

    async def _rows(
        self, after: int, before: int, *, topics: Collection[str], newest_first: bool
    ) -> tuple[Sequence[Any], int] | None:
        """Of the next rows those of topics, and the position of the furthest one; None where none is left."""
        edges = _OLDEST_EDGE if newest_first else _NEWEST_EDGE
        span = {"after": after, "before": before}
        edge = (await self._database.read(edges, {**span, "most": _PAGE}))[0].edge
        if edge is None:
            return None
        span |= {"after": edge - 1} if newest_first else {"before": edge + 1}
        rows = await self._database.read(_ROWS[self._database.dialect], {**span, "topics": sorted(topics)})
        return rows, edge

    async def backwards(self, places: Places) -> AsyncGenerator[Sequence[Stored]]:
        """See `Log`."""
        topics = {topic for topic, _ in places}
        # Of a place that a time was looked for by, nothing behind its position is before it.
        before = max((each.position + 1 if each.low == START.low else _BEYOND for each in places.values()), default=0)
        while (rows := await self._rows(-1, before, topics=topics, newest_first=True)) is not None:
            found, before = rows
            yield [
                _stored(row)
                for row in found
                if (place := places.get((row.topic, row.partition))) is not None
                and place.is_past(row.xid, row.position)
            ]

    # Groups

    async def groups(self, names: Collection[str] | None) -> Mapping[str, Reading]:
        """See `Log`."""
        members: dict[str, dict[str, set[str]]] = {}
        topics: dict[str, set[str]] = {}
        away: dict[str, float] = {}
        for row in await self._database.read(_MEMBERS):
            topics.setdefault(row.group_name, set()).add(row.topic)
            if row.member == tables.ANY:
                away[row.group_name] = min(row.away, away.get(row.group_name, row.away))
            elif row.away < 0:
                members.setdefault(row.group_name, {}).setdefault(row.member, set()).add(row.topic)
        places: dict[str, dict[Partition, Place]] = {}
        for row in await self._database.read(tables.READ_PLACES):
            topics.setdefault(row.group_name, set()).add(row.topic)
            places.setdefault(row.group_name, {})[row.topic, row.partition] = Place.of(row)
        numbers = await self._numbers()
        found: dict[str, Reading] = {}
        for group, of_group in sorted(topics.items()):
            if names is not None and group not in names:
                continue
            begun = {(topic, number): START for topic in of_group for number in numbers} | places.get(group, {})
            held = await self._held(group)
            known = members.get(group, {})
            found[group] = Reading(
                state="",
                members=[_member(name, held) for name in sorted(known)],
                topics=frozenset(of_group),
                places=begun,
                away_seconds=None if known or group not in away else max(0.0, away[group]),
            )
        return found

    async def _held(self, group: str) -> Mapping[str, frozenset[Partition]]:
        """Who holds which partitions, by process."""
        begins = f"events/{group}/"
        held: dict[str, set[Partition]] = {}
        for name, holder in await self._database.read(lease_holders(begins)):
            topic, _, number = name.removeprefix(begins).rpartition("/")
            if number.isdecimal() and "/" not in topic:
                held.setdefault(holder.rpartition(":")[0], set()).add((topic, int(number)))
        return {process: frozenset(partitions) for process, partitions in held.items()}

    async def behind(self, places: Places) -> Mapping[Partition, Behind]:
        """See `Log`: counted along the log from the place that is furthest behind, then from those beyond the walk."""
        counts: dict[Partition, _Count] = {}
        left, now = dict(places), 0.0
        while left:
            counts |= {partition: _Count() for partition in left}
            now, ended_at = await self._walk(left, counts)
            if ended_at is None:
                break
            left = {each: place for each, place in left.items() if place.low.end > ended_at}
            for partition in counts.keys() - left.keys():
                counts[partition].whole = counts[partition].whole and places[partition].low.end > ended_at
        firsts = sorted(count.first for count in counts.values() if count.first is not None)
        rows = await self._database.read(_AT, {"positions": firsts}) if firsts else ()
        at = {row.position: _stored(row) for row in rows}
        return {
            partition: Behind(
                count.events,
                count.whole,
                at.get(count.first or 0),
                None if count.oldest is None else max(0.0, now - count.oldest),
            )
            for partition, count in counts.items()
        }

    async def _walk(
        self, places: Mapping[Partition, Place], counts: Mapping[Partition, _Count]
    ) -> tuple[float, int | None]:
        """Count what comes after places; the database's time, and where the walk was ended before the log was."""
        begin = min(place.low.end for place in places.values())
        late = sorted({each for place in places.values() for each in place.low.running if each < begin})
        if late:  # transactions that were open when a group had read all others
            for row in await self._database.read(_LATE, {"transactions": late, "most": _COUNTED}):
                _count(row, places, counts)
        statement = _WALK[self._database.dialect]
        transaction, position, seen = begin, -1, 0
        while True:
            asked = {"transaction": transaction, "position": position, "most": _WALKED}
            rows = await self._database.read(statement, asked)
            for row in rows:
                _count(row, places, counts)
            if len(rows) < _WALKED:
                return (await self._database.read(_NOW))[0].now, None
            transaction, position, seen = rows[-1].xid, rows[-1].position, seen + len(rows)
            if seen >= _COUNTED:
                return (await self._database.read(_NOW))[0].now, transaction


class _Count:
    """What was counted of one partition."""

    __slots__ = ("events", "first", "oldest", "whole")

    def __init__(self) -> None:
        self.events = 0
        self.whole = True
        self.first: int | None = None
        self.oldest: int | None = None


def _count(row: Any, places: Mapping[Partition, Place], counts: Mapping[Partition, _Count]) -> None:
    partition = (row.topic, row.partition)
    place = places.get(partition)
    if place is None or place.is_past(row.xid, row.position):
        return
    count = counts[partition]
    count.events += 1
    if count.first is None or row.position < count.first:
        count.first = row.position
    count.oldest = row.created_at if count.oldest is None else min(count.oldest, row.created_at)


def _member(name: str, held: Mapping[str, frozenset[Partition]]) -> Member:
    made, _, process = name.partition(" ")
    return Member(name, process, (UUID(made).int >> 80) / 1000, held.get(process, frozenset()))


def _stored(row: Any) -> Stored:
    return Stored(
        row.topic, row.partition, row.position, row.key, row.value, headers_of(row.headers), float(row.created_at)
    )


def _number(name: str) -> sa.BindParameter[int]:
    return sa.bindparam(name, type_=sa.BigInteger)


_MOST = sa.bindparam("most", type_=sa.Integer)
_XID = {"sqlite": LOG.c.position.label("xid"), "postgresql": LOG.c.xid.label("xid")}
_newest = (
    sa.select(LOG.c.topic, LOG.c.partition, LOG.c.position).order_by(LOG.c.position.desc()).limit(_MOST).subquery()
)
_EXTENTS = sa.select(
    _newest.c.topic,
    _newest.c.partition,
    sa.func.min(_newest.c.position).label("first"),
    sa.func.max(_newest.c.position).label("last"),
    sa.func.count().label("events"),
).group_by(_newest.c.topic, _newest.c.partition)
_READ_TOPICS = sa.union(sa.select(OFFSETS.c.topic).where(OFFSETS.c.group_name != ""), sa.select(MEMBERS.c.topic))
_ENDS = sa.select(
    sa.select(sa.func.min(LOG.c.position)).scalar_subquery().label("first"),
    sa.select(sa.func.max(LOG.c.position)).scalar_subquery().label("last"),
)
_next = (
    sa.select(LOG.c.created_at)
    .where(LOG.c.position > _number("position"))
    .order_by(LOG.c.position)
    .limit(_MOST)
    .subquery()
)
_NEWEST_AFTER = sa.select(sa.func.max(_next.c.created_at).label("newest"))


def _edge(*, oldest: bool) -> sa.Select[Any]:
    """The statement that finds the furthest of the next rows between two positions."""
    order = LOG.c.position.desc() if oldest else LOG.c.position
    rows = (
        sa.select(LOG.c.position)
        .where(LOG.c.position > _number("after"), LOG.c.position < _number("before"))
        .order_by(order)
        .limit(_MOST)
        .subquery()
    )
    furthest = sa.func.min if oldest else sa.func.max
    return sa.select(furthest(rows.c.position).label("edge"))


_OLDEST_EDGE, _NEWEST_EDGE = _edge(oldest=True), _edge(oldest=False)
_COLUMNS = (LOG.c.position, LOG.c.topic, LOG.c.partition, LOG.c.key, LOG.c.value, LOG.c.headers, LOG.c.created_at)
_ROWS = {
    dialect: sa.select(xid, *_COLUMNS)
    .where(
        LOG.c.position > _number("after"),
        LOG.c.position < _number("before"),
        LOG.c.topic.in_(sa.bindparam("topics", expanding=True)),
    )
    .order_by(LOG.c.position)
    for dialect, xid in _XID.items()
}
_AT = sa.select(*_COLUMNS).where(LOG.c.position.in_(sa.bindparam("positions", expanding=True, type_=sa.BigInteger)))
_WALK = {
    dialect: sa.select(xid, LOG.c.position, LOG.c.topic, LOG.c.partition, LOG.c.created_at)
    .where(further)
    .order_by(*order)
    .limit(_MOST)
    for dialect, xid, further, order in (
        (
            "sqlite",
            _XID["sqlite"],
            sa.and_(LOG.c.position >= _number("transaction"), LOG.c.position > _number("position")),
            (LOG.c.position,),
        ),
        (
            "postgresql",
            _XID["postgresql"],
            sa.tuple_(LOG.c.xid, LOG.c.position) > sa.tuple_(_number("transaction"), _number("position")),
            (LOG.c.xid, LOG.c.position),
        ),
    )
}
_LATE = (
    sa.select(LOG.c.xid, LOG.c.position, LOG.c.topic, LOG.c.partition, LOG.c.created_at)
    .where(LOG.c.xid.in_(sa.bindparam("transactions", expanding=True, type_=sa.BigInteger)))
    .limit(_MOST)
)
_NOW = sa.select(database_now().label("now"))
_MEMBERS = sa.select(
    MEMBERS.c.group_name, MEMBERS.c.member, MEMBERS.c.topic, (database_now() - MEMBERS.c.expires_at).label("away")
)
