"""What a process has had in its hands for long, noted so that others can say why a group is stuck.

A call that lasts, and an event that waits for its next attempt, are known to their process only. Every few seconds each
group of a process writes down those that have been in its hands for longer than that, and deletes what it wrote before.
Where events are handled soon nothing is written.
"""

from __future__ import annotations

import logging
import os
import socket
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

from mainstay.core import Clock, Drain, MainstayError
from mainstay.database import Database
from mainstay.events import tables
from mainstay.events._decoding import OURS, Decoders
from mainstay.events._delivery import Assignment, Delivery
from mainstay.events._dispatch import Dispatcher
from mainstay.events.metadata import Metadata, Record

_log = logging.getLogger("mainstay.events")

LONG_SECONDS = 5.0
"""From this age on an event is written down; also how often it is looked."""
FRESH_SECONDS = 15.0
"""After which a note says nothing any more: its process has ended, or stands still."""
_FORGOTTEN_SECONDS = 86_400.0
_MOST = 20
_LONGEST_ERROR = 1000


class Held(NamedTuple):
    """An event in the hands of this process.

    Attributes:
        record: what was received.
        attempt: the number of its last call.
        seconds: since its first call.
        error: of its last attempt.
        again_seconds: until its next attempt; None while it is called.
    """

    record: Record
    attempt: int
    seconds: float
    error: Exception | None
    again_seconds: float | None


class InHand:
    """The notes of one group of this process.

    Args:
        database: where they are.
        group: the consumer group.
        handlers: by type, what handles it.
        clock: by which the dispatcher measures.
        decoders: read the topics that others write.
    """

    def __init__(
        self, database: Database, group: str, handlers: Mapping[str, str], clock: Clock, decoders: Decoders = OURS
    ) -> None:
        self._clock = clock
        self._decoders = decoders
        self._database = database
        self._group = group
        self._handlers = handlers
        self._process = f"{socket.gethostname()}:{os.getpid()}"
        self._noted = True  # by an earlier process of this name, perhaps

    async def run(self, dispatcher: Dispatcher, assignments: Callable[[], Sequence[Assignment]], drain: Drain) -> None:
        """Write down what a dispatcher has of partitions and queues, again and again, until the drain begins."""
        while not drain.begun:
            await drain.pause(LONG_SECONDS)
            try:
                await self.note(held_longer(dispatcher.ages.of(assignments()), LONG_SECONDS, self._clock.monotonic()))
            except Exception as error:  # noqa: BLE001  it is for people, and the next look is soon
                _log.debug("what group %s has in hand could not be noted", self._group, exc_info=error)

    async def note(self, held: Sequence[Held]) -> None:
        """Write down these, the oldest of them, in place of what was written before."""
        if not held and not self._noted:
            return
        rows = [self._row(each) for each in sorted(held, key=lambda each: -each.seconds)[:_MOST]]
        async with self._database.transaction() as session:
            mine = {"of_group": self._group, "me": self._process, "seconds": _FORGOTTEN_SECONDS}
            await session.execute(tables.FORGET_IN_HAND[self._database.dialect], mine)
            if rows:
                await session.execute(tables.NOTE_IN_HAND[self._database.dialect], rows)
        self._noted = bool(rows)

    def _row(self, held: Held) -> dict[str, object]:
        record = held.record
        with suppress(MainstayError):  # what is needed to read it is away, which is why it is in hand
            record = self._decoders.understood(record)
        meta = Metadata(record, group=self._group)
        return {
            "group_name": self._group,
            "process": self._process,
            "topic": record.topic,
            "partition": record.partition,
            "offset": record.offset,
            "key": record.key,
            "type": meta.type.replace("\0", ""),
            "event_id": meta.id.replace("\0", ""),
            "handler": self._handlers.get(meta.type, ""),
            "attempt": held.attempt,
            "error": "" if held.error is None else _said(held.error),
            "age": held.seconds,
            "again": held.again_seconds,
        }


class Calling(Protocol):
    """A caller, with the partition of which it has an event."""

    assignment: Assignment | None


def held_longer(ages: Iterable[tuple[Calling | Delivery, float]], seconds: float, now: float) -> list[Held]:
    """What has been in hand for longer than so: the events that failed, and of each partition the first that is called.

    A caller does not say which event it has: that would cost each event. It is the first of the partition's window,
    or one behind it that is younger.
    """
    held: list[Held] = []
    called: dict[Assignment, float] = {}
    failed: set[int] = set()
    for each, age in ages:
        if isinstance(each, Delivery):
            record = each.parts(each.record)[0]  # of a batch the first of its events
            failed.add(id(record))
            if age >= seconds:
                again = each.again_at - now if each.timer is not None else None
                held.append(Held(record, each.attempt, age, each.error, again))
        elif each.assignment is not None:
            called[each.assignment] = max(age, called.get(each.assignment, 0.0))
    for assignment, age in called.items():
        unfinished = (each for each in assignment.window if id(each) not in assignment.behind)
        first = next(unfinished, None)
        if age >= seconds and first is not None and id(first) not in failed:
            held.append(Held(first, 1, age, None, None))
    return held


def _said(error: Exception) -> str:
    """The error without its trace, as every database takes it."""
    text = "".join(traceback.format_exception_only(error)).strip()
    return text.encode(errors="backslashreplace").decode().replace("\0", "")[:_LONGEST_ERROR]
