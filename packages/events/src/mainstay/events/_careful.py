"""Reading a partition carefully: one event at a time, each noted before it is called. Why: see `_crashes`."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from functools import partial

from mainstay.core import Clock, spawn
from mainstay.events._crashes import Crashes, Holding, Suspect, Turn
from mainstay.events._delivery import Delivery
from mainstay.events._dispatch import Dispatcher
from mainstay.events.errors import ProcessEndedError
from mainstay.events.metadata import Record

_log = logging.getLogger("mainstay.events")

_STORE_SECONDS = 1.0
_SOON_SECONDS = 5.0
"""A retry that is due later than this holds up nothing behind its event."""
_LONGEST_SECONDS = 600.0


class CarefulReading:
    """Hands out a partition's events one by one, until as many have passed as its last holders may have had.

    Args:
        group: the consumer group.
        holding: the partition.
        crashes: what is known of all.
        dispatcher: calls the handlers.
        events: how many to read so.
        ended: called when the partition is read as all others are from then on.
        clock: measures calls.
    """

    def __init__(
        self,
        group: str,
        holding: Holding,
        *,
        crashes: Crashes,
        dispatcher: Dispatcher,
        events: int,
        ended: Callable[[], object],
        clock: Clock,
    ) -> None:
        self._group = group
        self._holding = holding
        self._assignment = holding.assignment
        self._crashes = crashes
        self._dispatcher = dispatcher
        self._left = events
        self._ended = ended
        self._clock = clock
        self._waiting: deque[Record] = deque()
        self._more = asyncio.Event()
        self.task = spawn(self._read(), name=f"events.{group}.careful")

    @property
    def waiting(self) -> int:
        """How many records were not handed out yet."""
        return len(self._waiting)

    def add(self, records: Iterable[Record]) -> None:
        """Hand out more, behind what waits."""
        self._waiting.extend(records)
        self._more.set()

    async def _read(self) -> None:
        while self._left and self._assignment.open:
            if not self._waiting:
                self._more.clear()
                await self._more.wait()
                continue
            if self._dispatcher.held:  # what waits for a person must not be noted as called
                await self._dispatcher.progress(1.0)
                continue
            await self._pass(self._waiting[0])
            self._left -= 1
            self._waiting.popleft()
        self._ended()
        if self._assignment.open:
            _log.info("group %s: nothing of %s ends its process any more", self._group, self._assignment)
            self._dispatcher.feed(self._assignment, self._waiting)

    async def _pass(self, record: Record) -> None:
        suspect = self._holding.suspicion(record)
        if suspect is not None and suspect.crashes >= self._crashes.most:
            await self._refuse(record, suspect.crashes)
            return
        if record.key is not None and record.key in self._assignment.busy:  # it is not called before another is done
            self._dispatcher.feed(self._assignment, [record])
            return
        if suspect is not None:
            await self._wait_without(record, suspect)
        delivery = Delivery(self._assignment, record)
        with self._crashes.turn(self._clock) as turn:
            delivery.before_call = partial(turn.begin, partial(self._noted, partial(self._holding.calls, record)))
            self._dispatcher.feed_one(delivery)
            await self._called(delivery, turn)
            await self._noted(self._holding.rests)  # before another partition's call begins, which may be the one

    async def _refuse(self, record: Record, crashes: int) -> None:
        delivery = Delivery(self._assignment, record)
        delivery.attempt = crashes
        delivery.refused = ProcessEndedError(crashes)
        self._dispatcher.feed_one(delivery)
        while not delivery.done and self._assignment.open:
            await self._dispatcher.progress(1.0)

    async def _wait_without(self, record: Record, suspect: Suspect) -> None:
        """Show that the process does not end without it."""
        seconds = min(1.0 + 2.0 * suspect.seconds, _LONGEST_SECONDS)
        _log.warning("group %s: %s@%d was being handled when its process ended, %d times in a row: again in %.1f s",
                     self._group, self._assignment, record.offset, suspect.crashes, seconds)  # fmt: skip
        end = self._clock.monotonic() + seconds
        while self._assignment.open and (left := end - self._clock.monotonic()) > 0:
            await self._dispatcher.progress(min(left, 1.0))

    async def _called(self, delivery: Delivery, turn: Turn) -> None:
        """Wait for the end of the event's call; how long it lasts is noted now and then."""
        note_at = 1.0
        while self._assignment.open and not self._is_over(delivery):
            turn.yield_if_long()
            lasted = turn.lasted
            if lasted >= note_at:
                note_at = 2 * lasted
                await self._noted(partial(self._holding.calls, delivery.record, lasted))
            await self._dispatcher.progress(0.5)
        delivery.before_call = None  # what is called only later holds up nothing, and is not noted

    def _is_over(self, delivery: Delivery) -> bool:
        later = delivery.timer is not None and delivery.again_at - self._clock.monotonic() > _SOON_SECONDS
        return delivery.done or later

    async def _noted(self, note: Callable[[], Awaitable[None]]) -> None:
        while self._assignment.open:
            try:
                await note()
            except Exception as error:  # noqa: BLE001  the database comes back
                _log.warning("group %s: the call of an event of %s cannot be noted, and waits", self._group,
                             self._assignment, exc_info=error)  # fmt: skip
                await self._dispatcher.progress(_STORE_SECONDS)
            else:
                return
