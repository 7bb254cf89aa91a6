"""Events that are published for later wait in a table, and are moved on when their time has come.

They are apart from the log and the outbox, which cost the same however much waits. By the database's clock the first
ones that are due are taken out of the table and published, a page at a time, each page in one transaction: so each is
handed on once, also where a process ends in between, and takes its place in the log or the outbox then. One process at
a time does so, which holds a lease; the page is fenced by it, so that the next page is never committed before this one.
What waits behind a page, in the table or in another transaction, is found by the next look. An event that cannot be
read, of another release for example, is passed over and waits on: it holds up no other.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from mainstay.core import Clock, Drain, Health
from mainstay.database import Database, FenceLost, Lease
from mainstay.events import tables
from mainstay.events._metrics import OVERDUE, SCHEDULED
from mainstay.events._outbox import event_of
from mainstay.events._sparing import Sparing, said
from mainstay.events._transport import Arrivals
from mainstay.events.metadata import TYPE, Outgoing
from mainstay.events.publisher import Send
from mainstay.events.scheduled import Due, ScheduledEvent
from mainstay.events.tables import pack_headers, unpack_headers

_log = logging.getLogger("mainstay.events")

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LEASE = "events/scheduled"
_ROUTE = ("events", "scheduled")
_PAGE = 500
_PAGE_BYTES = 1024 * 1024
_POLL_SECONDS = 0.25
_SOONEST_SECONDS = 0.001
_MEASURE_SECONDS = 5.0
_BACKOFF_SECONDS = (0.2, 5.0)


class SqlSchedule:
    """The table.

    Args:
        database: where it is.
        check: refuses an event that the broker would refuse when its time has come.
        overdue_seconds: how long the time of an event may have passed before the health is degraded.

    Attributes:
        arrivals: tells that something was committed.
    """

    def __init__(self, database: Database, check: Callable[[Outgoing], None] | None, overdue_seconds: float) -> None:
        self._database = database
        self._check = check
        self._most_overdue_seconds = overdue_seconds
        self._overdue_seconds = 0.0
        self.arrivals = Arrivals()

    async def add(self, id: UUID, event: Outgoing, due: Due) -> None:
        """See `Schedule`."""
        if self._check is not None:
            self._check(event)
        row = {
            "id": id,
            "at": None if due.at is None else due.at.timestamp(),
            "delay": due.delay_seconds,
            "topic": event.topic,
            "type": (dict(event.headers).get(TYPE) or b"").decode(),
            "key": event.key,
            "value": event.value,
            "headers": pack_headers(event.headers),
        }
        await self._database.write(tables.SCHEDULE, row, route=_ROUTE)  # one, so that equal times keep their order
        self._database.after_commit(self.arrivals.announce)

    async def list(self, type: str | None, key: bytes | None, limit: int) -> Sequence[ScheduledEvent]:
        """See `Schedule`."""
        columns = tables.SCHEDULED.c
        statement = tables.LIST_SCHEDULED
        if type is not None:
            statement = statement.where(columns.type == type)
        if key is not None:
            statement = statement.where(columns.key == key)
        return [_scheduled(row) for row in await self._database.read(statement, {"limit": limit})]

    async def cancel(self, id: UUID) -> ScheduledEvent | None:
        """See `Schedule`."""
        async with self._database.transaction() as session:
            row = (await session.execute(tables.CANCEL_SCHEDULED, {"scheduled": id})).first()
        return None if row is None else _scheduled(row)

    async def health(self) -> Health:
        """See `Schedule`."""
        if self._overdue_seconds > self._most_overdue_seconds:
            late = f"an event was to be handed on {self._overdue_seconds:.0f} s ago"
            return Health("degraded", f"{late}: see the log of the processes that serve, and the Database")
        return Health("ok")

    async def measure(self, drain: Drain) -> None:
        """Keep known how many wait, and for how long the first is overdue, until the drain begins."""
        while not drain.begun:
            try:
                await self._measure()
            except Exception as error:  # noqa: BLE001  a figure that is missing once
                _log.debug("it is not known how many events wait for their time", exc_info=error)
            await drain.pause(_MEASURE_SECONDS)

    async def _measure(self) -> None:
        ((waiting, overdue),) = await self._database.read(tables.MEASURE_SCHEDULED)
        self._overdue_seconds = max(0.0, overdue or 0.0)
        SCHEDULED.set(waiting)
        OVERDUE.set(self._overdue_seconds)


class ScheduleMover:
    """Hands on what is due.

    Args:
        database: where it waits.
        arrivals: tells that there is something new.
        send: writes events to the log or the outbox, in the unit of work that is open.
        lease_seconds: how long a process that was killed keeps others from doing this.
        clock: measures waits.
    """

    def __init__(
        self, database: Database, arrivals: Arrivals, send: Send, *, lease_seconds: float, clock: Clock
    ) -> None:
        self._database = database
        self._arrivals = arrivals
        self._send = send
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._lease: Lease | None = None
        self._sparing = Sparing(clock)
        self._unreadable: set[int] = set()  # the positions of events that this release cannot read

    async def serve(self, drain: Drain) -> None:
        """Hand on what is due until the drain begins, through outages of the database."""
        try:
            with self._arrivals.told_to(drain.wake):
                await self._serve(drain)
        finally:
            await self._give_up()

    async def _serve(self, drain: Drain) -> None:
        delay = first = _BACKOFF_SECONDS[0]
        while not drain.begun:
            try:
                lease = await self._lead()
                if lease is None:
                    await drain.pause(self._lease_seconds / 4)
                    continue
                seconds = await self._round(lease)
            except FenceLost:
                _log.warning("another process hands on the scheduled events now")
                await self._give_up()
            except Exception as error:  # noqa: BLE001  the database comes back
                if self._sparing.due("scheduled") is not None:
                    text = "events whose time has come could not be handed on, again in %.1f s: %s"
                    _log.warning(text, delay, said(error))
                await drain.pause(delay)
                delay = min(2 * delay, _BACKOFF_SECONDS[1])
            else:
                delay = first
                await self._pause(drain, seconds)

    async def _lead(self) -> Lease | None:
        """Take the lease, or keep it; None while it is another's."""
        if self._lease is not None and not self._lease.held:
            await self._give_up()
        if self._lease is None:
            self._lease = await self._database.lease(_LEASE, seconds=self._lease_seconds)
        return self._lease

    async def _round(self, lease: Lease) -> float | None:
        """Hand on a page if anything is due; in how many seconds the next one is, None where that is not known."""
        ((seconds,),) = await self._database.read(tables.NEXT_DUE)
        if seconds is None or seconds > 0:
            return None if seconds is None else max(seconds, _SOONEST_SECONDS)
        # Where nothing could be taken, others are in the middle of cancelling it, or it cannot be read.
        try:
            return 0.0 if await self._move(lease) else None
        except _UnreadableError as error:
            self._pass_over(error.rows)
            return 0.0

    async def _move(self, lease: Lease) -> int:
        """Hand on a page, and return how many events those were."""
        dialect, unreadable = self._database.dialect, sorted(self._unreadable)
        page = {
            "limit": _PAGE,
            "bytes": _PAGE_BYTES,
            "unreadable": json.dumps(unreadable) if dialect == "sqlite" else unreadable,
        }
        async with self._database.transaction(), self._database.batch(fence=lease.fence):
            rows = await self._database.read(tables.TAKE_DUE[dialect], page)
            if rows:
                await self._send(_events_of(sorted(rows, key=_order)))
        return len(rows)

    def _pass_over(self, rows: Sequence[tuple[Any, Exception]]) -> None:
        for row, error in rows:
            text = "event %s for topic %s, whose time has come, cannot be read by this release, and waits on: %s"
            _log.error(text, row.id, row.topic, said(error))
            self._unreadable.add(row.position)

    async def _pause(self, drain: Drain, seconds: float | None) -> None:
        """Wait until it is time for the next one, and no longer than between two looks."""
        if seconds is None:
            await drain.pause(_POLL_SECONDS, wakeable=True)
            return
        # A virtual clock passes over pauses, and stops at timers.
        timer = self._clock.call_later(seconds, drain.wake)
        try:
            await drain.pause(min(seconds, _POLL_SECONDS), wakeable=True)
        finally:
            timer.cancel()

    async def _give_up(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            await lease.release()


class _UnreadableError(Exception):
    """Rows whose events cannot be read, each with the reason."""

    def __init__(self, rows: Sequence[tuple[Any, Exception]]) -> None:
        super().__init__(f"{len(rows)} events cannot be read")
        self.rows = rows


def _order(row: Any) -> tuple[float, int]:
    return row.due_at, row.position


def _events_of(rows: Sequence[Any]) -> list[Outgoing]:
    events: list[Outgoing] = []
    unreadable: list[tuple[Any, Exception]] = []
    for row in rows:
        try:
            events.append(event_of(row))
        except ValueError as error:
            unreadable.append((row, error))
    if unreadable:
        raise _UnreadableError(unreadable)
    return events


def _scheduled(row: Any) -> ScheduledEvent:
    try:
        headers = unpack_headers(row.headers)
    except ValueError:  # it is listed and cancelled all the same
        headers = [(TYPE, row.type.encode())]
    return ScheduledEvent(
        id=str(row.id),
        due=_moment(row.due_at),
        topic=row.topic,
        key=row.key,
        value=row.value,
        headers=headers,
        published_at=_moment(row.created_at),
    )


def _moment(seconds: float) -> datetime:
    try:
        return _EPOCH + timedelta(seconds=seconds)
    except (OverflowError, ValueError):  # a person has written it
        return datetime.min.replace(tzinfo=UTC) if seconds < 0 else datetime.max.replace(tzinfo=UTC)
