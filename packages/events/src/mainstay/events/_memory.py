"""The transport of tests: a log in this process, gone when it ends."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import islice
from typing import Any
from uuid import UUID

from mainstay.core import Clock, Health, Timer
from mainstay.database import Database
from mainstay.events._delivery import Assignment
from mainstay.events._starts import Start
from mainstay.events._transport import Arrivals, LogRecord, Reader, arrived, partition_of
from mainstay.events.dead_letters import DeadLetter, Wanted
from mainstay.events.metadata import Outgoing, Record
from mainstay.events.scheduled import Due, ScheduledEvent

_log = logging.getLogger("mainstay.events")

_IDLE_SECONDS = 0.25


class MemoryTransport:
    """Events in lists. Everything is lost when the App stops, and no other process sees any of it.

    Args:
        partitions: of each topic.
        database: asked for at each send: inside a unit of work an event is published when that commits.
        clock: stamps dead letters.
    """

    def __init__(self, *, partitions: int, database: Callable[[], Database | None], clock: Clock) -> None:
        self._partitions = partitions
        self._database = database
        self._clock = clock
        self._topics: dict[str, list[list[LogRecord]]] = {}
        self._positions: dict[tuple[str, str, int], int] = {}
        self.arrivals = Arrivals()
        self.sent: list[Outgoing] = []  # in the order of commits, for tests that ask what was published
        self._letters: dict[UUID, DeadLetter] = {}
        _log.warning("transport 'memory': events are lost when this process ends")

    def partitions(self, topic: str) -> list[list[LogRecord]]:
        """The records of a topic, by partition."""
        return self._topics.setdefault(topic, [[] for _ in range(self._partitions)])

    async def send(self, batch: Sequence[Outgoing]) -> None:
        """See `Transport`."""
        self.after_commit(lambda: self.append(batch))

    def after_commit(self, callback: Callable[[], None]) -> None:
        """Call back once the unit of work that is open is committed; at once without one."""
        database = self._database()
        if database is not None and database.in_unit_of_work():
            database.after_commit(callback)
        else:
            callback()

    def append(self, batch: Sequence[Outgoing]) -> None:
        """Put events into their topics."""
        self.sent.extend(batch)
        for event in batch:
            number = partition_of(event, self._partitions)
            records = self.partitions(event.topic)[number]
            records.append(LogRecord(event.topic, number, len(records), event.key, event.value, event.headers))
        self.arrivals.announce()

    @asynccontextmanager
    async def source(
        self, group: str, topics: Sequence[str], reader: Reader, start: Start = "earliest"
    ) -> AsyncGenerator[MemorySource, None]:
        """See `Transport`. All partitions belong to the one consumer there is, and all begin with the App."""
        del start
        source = MemorySource(self, group, self._positions)
        for topic in topics:
            for number in range(len(self.partitions(topic))):
                source.read_from(reader.assigned(topic, number))
        yield source

    async def health(self) -> Health:
        """It is always there."""
        return Health("ok", "events are kept in memory only")

    # Dead letters

    async def add(self, group: str, record: Record, error: Exception, attempts: int, *, type: str) -> None:
        """See `DeadLetterStore`."""
        letter = DeadLetter.of(group, record, error, attempts, self._clock.now(), type=type)
        self._letters.setdefault(letter.id, letter)

    async def list(self, wanted: Wanted, limit: int) -> Sequence[DeadLetter]:
        """See `DeadLetterStore`."""
        return list(islice((letter for letter in self._letters.values() if wanted.has(letter)), limit))

    async def get(self, id: UUID) -> DeadLetter | None:
        """See `DeadLetterStore`."""
        return self._letters.get(id)

    async def redrive(self, letter: DeadLetter, by: str) -> bool:
        """See `DeadLetterStore`."""
        known = self._letters[letter.id]
        if known.state == "redriven":
            return False
        self._letters[letter.id] = replace(known, state="redriven", **self._change(by))
        self.append([known.again()])
        return True

    async def discard(self, letter: DeadLetter, reason: str, by: str) -> bool:
        """See `DeadLetterStore`."""
        known = self._letters[letter.id]
        if known.state != "waiting":
            return False
        self._letters[letter.id] = replace(known, state="discarded", reason=reason, **self._change(by))
        return True

    async def edit(self, letter: DeadLetter, value: bytes, by: str) -> bool:
        """See `DeadLetterStore`."""
        known = self._letters[letter.id]
        if known.state == "redriven":
            return False
        received = known.received if known.edited else known.value
        self._letters[letter.id] = replace(known, value=value, edited=True, received=received, **self._change(by))
        return True

    def _change(self, by: str) -> dict[str, Any]:
        return {"changed_by": by, "changed_at": self._clock.now()}


class MemorySchedule:
    """Events that wait for their time by the App's clock; see `Schedule`.

    Args:
        transport: takes them then.
        clock: the App's.
    """

    def __init__(self, transport: MemoryTransport, clock: Clock) -> None:
        self._transport = transport
        self._clock = clock
        self._waiting: dict[UUID, ScheduledEvent] = {}  # in the order in which they were published
        self._timers: dict[UUID, Timer] = {}

    async def add(self, id: UUID, event: Outgoing, due: Due) -> None:
        """See `Schedule`."""
        now = self._clock.now()
        at = now + timedelta(seconds=due.delay_seconds or 0.0) if due.at is None else due.at
        waiting = ScheduledEvent(str(id), at, *event, published_at=now.replace(microsecond=0))
        self._transport.after_commit(lambda: self._wait(id, waiting))

    def _wait(self, id: UUID, event: ScheduledEvent) -> None:
        self._forget(id)  # a step of a workflow may be repeated
        self._waiting[id] = event
        seconds = (event.due - self._clock.now()).total_seconds()
        if seconds > 0:
            self._timers[id] = self._clock.call_later(seconds, lambda: self._hand_on(event.due))
        else:
            self._hand_on(event.due)

    def _hand_on(self, now: datetime) -> None:
        due = [event for event in self._waiting.values() if event.due <= now]
        for event in sorted(due, key=lambda each: each.due):
            self._forget(UUID(event.id))
            self._transport.append([Outgoing(event.topic, event.key, event.value, event.headers)])

    def _forget(self, id: UUID) -> None:
        self._waiting.pop(id, None)
        if (timer := self._timers.pop(id, None)) is not None:
            timer.cancel()

    async def list(self, type: str | None, key: bytes | None, limit: int) -> Sequence[ScheduledEvent]:
        """See `Schedule`."""
        wanted = (each for each in self._waiting.values() if type in {None, each.type} and key in {None, each.key})
        return sorted(wanted, key=lambda event: event.due)[:limit]

    async def cancel(self, id: UUID) -> ScheduledEvent | None:
        """See `Schedule`."""
        event = self._waiting.get(id)
        if event is not None:
            self._transport.after_commit(lambda: self._forget(id))
        return event

    async def health(self) -> Health:
        """See `Schedule`."""
        return Health("ok")

    def close(self) -> None:
        """Forget all."""
        for known in list(self._waiting):
            self._forget(known)


class MemorySource:
    """One group's place in the lists."""

    def __init__(self, transport: MemoryTransport, group: str, positions: dict[tuple[str, str, int], int]) -> None:
        self._transport = transport
        self._group = group
        self._positions = positions
        self._next: dict[Assignment, int] = {}
        self.absent: Mapping[str, str] = {}

    def read_from(self, assignment: Assignment) -> None:
        """Take a partition from where the group left off."""
        self._next[assignment] = self._positions.get((self._group, assignment.topic, assignment.number), 0)

    async def fetch(self, ready: Collection[Assignment]) -> Mapping[Assignment, Sequence[Record]]:
        """See `Source`."""
        arrival = self._transport.arrivals.next()
        fetched: dict[Assignment, Sequence[Record]] = {}
        for assignment in ready:
            start = self._next[assignment]
            records = self._transport.partitions(assignment.topic)[assignment.number][start : start + assignment.most]
            if records:
                fetched[assignment] = records
                self._next[assignment] = start + len(records)
        if not fetched:
            await arrived(arrival, _IDLE_SECONDS)
        return fetched

    async def commit(self, finished: Mapping[Assignment, Record]) -> None:
        """See `Source`."""
        for assignment, record in finished.items():
            self._positions[self._group, assignment.topic, assignment.number] = record.offset + 1

    def lag(self) -> int:
        """See `Source`."""
        return sum(
            len(self._transport.partitions(assignment.topic)[assignment.number]) - start
            for assignment, start in self._next.items()
        )

    def lag_seconds(self, unfinished: Iterable[Record]) -> None:  # noqa: ARG002  see `Source`
        """See `Source`. The lists do not say when."""
        return
