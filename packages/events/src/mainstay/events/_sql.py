"""The `sql` transport: a durable partitioned log in the service's own database, shared by its processes.

A row's position is drawn when it is inserted, but the row is seen when its transaction commits, perhaps long after rows
with higher positions. Whoever reads `position > last` loses it. On PostgreSQL the log is therefore read by *snapshots*:
what the newer of two snapshots shows and the older one does not is a window, a fixed set of rows, read by position.
Every row is in exactly one window, whenever it commits, and a transaction that stays open holds up nobody but itself.
If one event was published after another had been committed, every snapshot that shows the first shows the other too: so
the other is in an earlier window, or in the same one at a lower position, and what order there was is kept. On SQLite
writers take turns, so positions are in the order of commits and a snapshot is the highest of them.

A group's place in a partition is a window and a position in it: `low`, `high`, `position`. A dump that is restored into
another cluster counts transactions anew: then the places of all groups must be set back.

The partitions of each topic are divided by rank among the live members of a group that read it, and held by leases; a
commit is fenced by the lease.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

from mainstay.core import Clock, Health, uuid7
from mainstay.database import Database, DatabaseBusy, FenceLost, Lease
from mainstay.events import tables
from mainstay.events._delivery import Assignment
from mainstay.events._lag import LogLag
from mainstay.events._snapshot import START, Place, Snapshot
from mainstay.events._starts import Start, begin
from mainstay.events._transport import Arrivals, Reader, arrived, partition_of
from mainstay.events.metadata import Headers, Outgoing, Record
from mainstay.events.tables import LOG, headers_of, pack_headers

_log = logging.getLogger("mainstay.events")

BACKLOG = 1000
"""From so many new rows on, the beginning of a window is looked for in another way."""
_CHANNEL = "mainstay_events"
_POLL_SECONDS = 0.2
_BUSY_SECONDS = 30.0
"""For so long a database that answers, but is too busy to be read, is waited for."""
_REBALANCE_SECONDS = 1.0
_WAITING_SECONDS = 0.25
_REMEMBER_SECONDS = 30.0
"""How often the place of an idle partition is stored, so that a restart does not look again at what was not for it."""


class SqlTransport:
    """See the module.

    Args:
        database: where the log is.
        partitions: into how many parts it is divided.
        lease_seconds: how long a killed process keeps its partitions.
        clock: measures waits on this side.
    """

    def __init__(self, database: Database, *, partitions: int, lease_seconds: float, clock: Clock) -> None:
        self.database = database
        self.arrivals = Arrivals()
        self.lease_seconds = lease_seconds
        self.clock = clock
        self._partitions = partitions

    async def note_partitions(self) -> None:
        """Leave word of how many partitions are written to from here: whoever reads with fewer must know of the rest.

        Looking through the log for the highest one would take longer the more there is in it.
        """
        if await self._known_partitions() < self._partitions:
            await self.database.write(tables.NOTE_PARTITION[self.database.dialect], {"partition": self._partitions - 1})

    async def _known_partitions(self) -> int:
        widest = (await self.database.read(tables.WIDEST_PARTITION))[0][0]
        return 0 if widest is None else widest + 1

    async def send(self, batch: Sequence[Outgoing]) -> None:
        """See `Transport`. Joins the unit of work that is open."""
        numbers = [partition_of(event, self._partitions) for event in batch]
        rows = [
            {
                "topic": event.topic,
                "partition": number,
                "key": event.key,
                "value": event.value,
                "headers": pack_headers(event.headers),
            }
            for event, number in zip(batch, numbers, strict=True)
        ]
        await self.database.write(tables.INSERT_LOG, rows, route=("events", numbers[0]))
        self.database.notify(_CHANNEL)

    async def health(self) -> Health:
        """The Database answers for itself."""
        return Health("ok", "events are kept in the Database")

    @asynccontextmanager
    async def source(
        self, group: str, topics: Sequence[str], reader: Reader, start: Start = "earliest"
    ) -> AsyncGenerator[SqlSource, None]:
        """See `Transport`."""
        source = SqlSource(
            self,
            group,
            sorted(topics),
            reader,
            start=start,
            # Where there were more partitions once, events may still wait in them.
            partitions=max(self._partitions, await self._known_partitions()),
        )
        # A hint that there are events, also of other processes; polling is what finds them.
        with self.database.listen(_CHANNEL, self._heard):
            try:
                yield source
            finally:
                await source.close()

    def _heard(self, _payload: str) -> None:
        self.arrivals.announce()


class _Slot:
    """One partition of one topic, and how far it was read."""

    __slots__ = ("assignment", "high", "lease", "low", "position", "remembered")

    def __init__(self, assignment: Assignment, lease: Lease, place: Place) -> None:
        self.assignment = assignment
        self.lease = lease
        self.low, self.high, self.position = place
        self.remembered = place

    @property
    def place(self) -> Place:
        """Up to where it was read."""
        return Place(self.low, self.high, self.position)


class SqlRecord:
    """A row of the log, and the place that a group is at when it has finished it."""

    __slots__ = ("_headers", "created_at", "high", "key", "low", "offset", "partition", "topic", "value")

    def __init__(self, row: Any, low: Snapshot, high: Snapshot) -> None:
        self.topic: str = row.topic
        self.partition: int = row.partition
        self.offset: int = row.position
        self.key: bytes | None = row.key
        self.value: bytes | None = row.value
        self._headers: str = row.headers
        self.created_at: int = row.created_at
        self.low = low
        self.high = high

    @property
    def headers(self) -> Headers:
        """The headers."""
        return headers_of(self._headers)


class SqlSource:
    """One group's membership and reading."""

    def __init__(
        self,
        transport: SqlTransport,
        group: str,
        topics: Sequence[str],
        reader: Reader,
        *,
        start: Start,
        partitions: int,
    ) -> None:
        self._database = database = transport.database
        self._arrivals = transport.arrivals
        self._group = group
        self._topics = topics
        self._reader = reader
        self._start: Start = start
        self._begun: set[str] = set()  # topics in which the group is known to have a place, or to have been given one
        self._partitions = partitions
        self._lease_seconds = transport.lease_seconds
        self._clock = clock = transport.clock
        self._member = f"{uuid7()} {socket.gethostname()}:{os.getpid()}"  # the oldest first, and who it is for people
        self._leases: dict[tuple[str, int], Lease] = {}
        self._slots: dict[Assignment, _Slot] = {}
        self._announced_until = 0.0
        self._rebalance_at = 0.0
        self._remember_at = clock.monotonic() + _REMEMBER_SECONDS
        self._read_at = clock.monotonic()
        self._window_statement, self._page_statement = _STATEMENTS[database.dialect]
        self._lag = LogLag(database, clock)
        self.absent: Mapping[str, str] = {}

    # Reading

    async def fetch(self, ready: Sequence[Assignment]) -> Mapping[Assignment, Sequence[Record]]:
        """See `Source`."""
        fetched: dict[Assignment, Sequence[Record]] = {}
        try:
            await self._keep_partitions()
            await self._read(ready, fetched)
            await self._lag.look({assignment: slot.place for assignment, slot in self._slots.items()})
        except DatabaseBusy:
            # Handlers and requests have all connections, or the writer's turn. That is no loss of the transport: the
            # leases are renewed by a connection of their own, and what they hold is read a little later.
            if self._clock.monotonic() - self._read_at > _BUSY_SECONDS:
                raise
        else:
            self._read_at = self._clock.monotonic()
        return fetched

    async def _read(self, ready: Sequence[Assignment], fetched: dict[Assignment, Sequence[Record]]) -> None:
        arrival = self._arrivals.next()
        slots = [self._slots[assignment] for assignment in ready if assignment in self._slots]
        exhausted = [slot for slot in slots if slot.low == slot.high]
        if exhausted:
            await self._open_window(exhausted)
        reading = [slot for slot in slots if slot.low != slot.high]
        for high in sorted({slot.high for slot in reading}, key=_age):
            await self._read_page([slot for slot in reading if slot.high == high], high, fetched)
        if not reading and (slots or not self._slots):  # or there is something else to do for those that are held
            if slots and len(slots) == len(self._slots):
                self._lag.nothing_left()
            await arrived(arrival, _POLL_SECONDS)

    async def _open_window(self, slots: Sequence[_Slot]) -> None:
        low = min((slot.low for slot in slots), key=_age)
        row = (await self._database.read(self._window_statement, _seen("low", low)))[0]
        high, start = Snapshot.parse(row.high), row.start
        if row.found >= BACKLOG:
            backlog = (await self._database.read(START_OF_BACKLOG, {"low": low.end}))[0].start
            start = start if backlog is None else min(start, backlog)
        for slot in slots:
            if start is None:  # nothing for anybody up to there
                slot.low = slot.high = high
            else:
                slot.high, slot.position = high, start - 1

    async def _read_page(
        self, slots: Sequence[_Slot], high: Snapshot, fetched: dict[Assignment, Sequence[Record]]
    ) -> None:
        most = min(slot.assignment.most for slot in slots)
        rows = await self._database.read(
            self._page_statement,
            {
                "most": most,
                **_seen("low", min((slot.low for slot in slots), key=_age)),
                **_seen("high", high),
                "position": min(slot.position for slot in slots),
                "topics": sorted({slot.assignment.topic for slot in slots}),
                "partitions": sorted({slot.assignment.number for slot in slots}),
            },
        )
        by_place = {(slot.assignment.topic, slot.assignment.number): slot for slot in slots}
        pages: dict[_Slot, list[Record]] = {}
        for row in rows:
            slot = by_place.get((row.topic, row.partition))
            if slot is not None and row.position > slot.position and not slot.low.shows(row.xid):
                pages.setdefault(slot, []).append(SqlRecord(row, slot.low, slot.high))
        full = len(rows) == most
        for slot in slots:
            if slot in pages:
                fetched[slot.assignment] = pages[slot]
            if full:
                slot.position = max(slot.position, rows[-1].position)
            else:
                slot.low, slot.position = slot.high, 0
        self._lag.handed_out(sum(map(len, pages.values())))

    def lag(self) -> int | None:
        """See `Source`."""
        return self._lag.waiting

    def lag_seconds(self, unfinished: Iterable[Record]) -> float | None:
        """See `Source`."""
        return self._lag.seconds(record.created_at for record in unfinished if isinstance(record, SqlRecord))

    async def commit(self, finished: Mapping[Assignment, Record]) -> None:
        """See `Source`."""
        by_lease: dict[Lease, list[tuple[_Slot, Place]]] = {}
        for assignment, record in finished.items():
            slot = self._slots.get(assignment)
            if slot is not None and isinstance(record, SqlRecord):
                by_lease.setdefault(slot.lease, []).append((slot, Place(record.low, record.high, record.offset)))
        await self._store(by_lease)

    async def _store(self, by_lease: Mapping[Lease, Sequence[tuple[_Slot, Place]]]) -> None:
        statement = tables.COMMIT_OFFSET[self._database.dialect]
        for lease, places in by_lease.items():
            rows = [
                {
                    "group_name": self._group,
                    "topic": slot.assignment.topic,
                    "partition": slot.assignment.number,
                    "low": str(low),
                    "high": str(high),
                    "position": position,
                }
                for slot, (low, high, position) in places
            ]
            try:
                await self._database.write(statement, rows, fence=lease.fence)
            except FenceLost:
                await self._lose([lease])
            else:
                for slot, place in places:
                    slot.remembered = place

    # Partitions

    async def _keep_partitions(self) -> None:
        lost = [lease for lease in self._leases.values() if not lease.held]
        if lost:
            await self._lose(lost)
        now = self._clock.monotonic()
        if now < self._rebalance_at:
            return
        self._rebalance_at = now + min(_REBALANCE_SECONDS, self._lease_seconds / 4)
        if now >= self._announced_until:
            # It ends before the leases do, so that the others are waiting for these when a process was killed.
            note = {"group_name": self._group, "member": self._member, "seconds": self._lease_seconds * 2 / 3}
            statement = tables.JOIN_GROUP[self._database.dialect]
            rows = [{**note, "topic": topic} for topic in self._topics]
            await self._database.write(statement, [*rows, *({**row, "member": tables.ANY} for row in rows)])
            self._announced_until = now + self._lease_seconds / 3
        readers: dict[str, list[str]] = {}
        for row in await self._database.read(tables.READ_MEMBERS[self._database.dialect], {"group": self._group}):
            readers.setdefault(row.topic, []).append(row.member)
        if any(self._member not in readers.get(topic, ()) for topic in self._topics):
            self._announced_until = 0.0  # our own note expired: the loop was blocked for long
            return
        share = {
            (topic, number)
            for topic in self._topics
            for number in range(self._partitions)
            if number % len(readers[topic]) == readers[topic].index(self._member)
        }
        await self._give_up([lease for place, lease in self._leases.items() if place not in share])
        for topic, number in sorted(share - self._leases.keys()):
            await self._take(topic, number)
        if share - self._leases.keys():  # another has yet to give them back, or was killed
            self._rebalance_at = now + min(_WAITING_SECONDS, self._lease_seconds / 4)
        if now >= self._remember_at:
            self._remember_at = now + _REMEMBER_SECONDS
            await self._remember_idle()

    async def _take(self, topic: str, number: int) -> None:
        lease = await self._database.lease(f"events/{self._group}/{topic}/{number}", seconds=self._lease_seconds)
        if lease is None:
            return
        try:
            place = {"group": self._group, "of_topic": topic, "number": number}
            rows = await self._database.read(tables.READ_OFFSETS, place)
            if not rows and topic not in self._begun:
                await begin(self._database, self._group, topic, self._start, self._partitions)
                rows = await self._database.read(tables.READ_OFFSETS, place)
            self._begun.add(topic)
        except BaseException:
            await lease.release()
            raise
        self._leases[topic, number] = lease
        self._lag.look_again()
        assignment = self._reader.assigned(topic, number)
        self._slots[assignment] = _Slot(assignment, lease, Place.of(rows[0]) if rows else START)

    async def _give_up(self, leases: Sequence[Lease]) -> None:
        assignments = self._of(leases)
        if assignments:
            await self._reader.revoked(assignments)
        for lease in leases:
            self._forget(lease)
            await lease.release()

    async def _lose(self, leases: Sequence[Lease]) -> None:
        _log.warning("group %s lost partitions to others: %s", self._group, ", ".join(lease.name for lease in leases))
        assignments = self._of(leases)
        for lease in leases:
            self._forget(lease)
        await self._reader.lost(assignments)
        for lease in leases:
            await lease.release()

    def _of(self, leases: Sequence[Lease]) -> list[Assignment]:
        return [assignment for assignment, slot in self._slots.items() if slot.lease in leases]

    def _forget(self, lease: Lease) -> None:
        self._leases = {place: held for place, held in self._leases.items() if held is not lease}
        self._slots = {assignment: slot for assignment, slot in self._slots.items() if slot.lease is not lease}

    async def _remember_idle(self) -> None:
        idle: dict[Lease, list[tuple[_Slot, Place]]] = {}
        for assignment, slot in self._slots.items():
            place = slot.place
            if (
                slot.low == slot.high
                and not assignment.window
                and assignment.finished is None
                and place != slot.remembered
            ):
                idle.setdefault(slot.lease, []).append((slot, place))
        await self._store(idle)

    async def close(self) -> None:
        """Leave the group; others take the partitions at once."""
        for lease in list(self._leases.values()):
            self._forget(lease)
            await lease.release()
        await self._database.write(tables.LEAVE_GROUP, {"of_group": self._group, "leaver": self._member})


def _age(snapshot: Snapshot) -> tuple[int, int]:
    return snapshot.age


def _seen(name: str, snapshot: Snapshot) -> dict[str, object]:
    return {name: snapshot.end, f"{name}_running": list(snapshot.running)}


def _page(order: sa.ColumnElement[int], *window: sa.ColumnElement[bool]) -> sa.Executable:
    """The statement that reads a page of a window."""
    columns = (LOG.c.position, LOG.c.topic, LOG.c.partition, LOG.c.key, LOG.c.value, LOG.c.headers, LOG.c.created_at)
    return (
        sa.select(order.label("xid"), *columns)
        .where(
            LOG.c.position > sa.bindparam("position", type_=sa.BigInteger),
            *window,
            LOG.c.topic.in_(sa.bindparam("topics", expanding=True)),
            LOG.c.partition.in_(sa.bindparam("partitions", expanding=True)),
        )
        .order_by(LOG.c.position)
        .limit(sa.bindparam("most", type_=sa.Integer))
    )


_LOW = sa.bindparam("low", type_=sa.BigInteger)
_HIGH = sa.bindparam("high", type_=sa.BigInteger)


def _on_sqlite() -> tuple[sa.Executable, sa.Executable]:
    """The statements that open a window after the snapshot `low`, and that read a page of it up to `high`."""
    end = sa.select(sa.func.coalesce(sa.func.max(LOG.c.position), 0) + 1).scalar_subquery()
    start = sa.select(sa.func.min(LOG.c.position)).where(LOG.c.position >= _LOW).scalar_subquery()
    window = sa.select(sa.func.printf("0:%d:", end).label("high"), start.label("start"), sa.literal(0).label("found"))
    return window, _page(LOG.c.position, LOG.c.position >= _LOW, LOG.c.position < _HIGH)


def _on_postgresql() -> tuple[sa.Executable, sa.Executable]:
    """The same. What a window holds is what the opening statement itself sees.

    Its start is looked for through the index by transaction only: a plain `min(position)` may be planned as a
    walk along the positions, which for an idle group is the whole log at every poll.
    """
    begun = LOG.c.xid == sa.any_(sa.bindparam("low_running", type_=ARRAY(sa.BigInteger)))
    ended = LOG.c.xid != sa.all_(sa.bindparam("high_running", type_=ARRAY(sa.BigInteger)))
    later = sa.select(LOG.c.position).where(LOG.c.xid >= _LOW).order_by(LOG.c.xid).limit(BACKLOG).subquery()
    fresh = sa.union_all(sa.select(later.c.position), sa.select(LOG.c.position).where(begun)).subquery()
    now = sa.literal_column("pg_current_snapshot()::text", sa.Text)
    window = sa.select(
        now.label("high"), sa.func.min(fresh.c.position).label("start"), sa.func.count().label("found")
    ).select_from(fresh)
    return window, _page(LOG.c.xid, sa.or_(LOG.c.xid >= _LOW, begun), LOG.c.xid < _HIGH, ended)


_STATEMENTS = {"postgresql": _on_postgresql(), "sqlite": _on_sqlite()}
WINDOW = {dialect: window for dialect, (window, _) in _STATEMENTS.items()}
"""The statement that opens a window after a snapshot: what is seen now, and where it begins."""
# Where there is a backlog every plan finds its beginning quickly; what was committed since can only make it lower.
START_OF_BACKLOG = sa.select(sa.func.min(LOG.c.position).label("start")).where(LOG.c.xid >= _LOW)
