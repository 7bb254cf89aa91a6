"""Between a source and the dispatcher: what must be known of a partition before any of its events is handed out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from functools import partial

from mainstay.core import Clock
from mainstay.events._careful import CarefulReading
from mainstay.events._crashes import Crashes, Holding
from mainstay.events._delivery import Assignment
from mainstay.events._dispatch import Dispatcher
from mainstay.events._parking import Parking
from mainstay.events.metadata import Record

_log = logging.getLogger("mainstay.events")

_AGAIN_SECONDS = 0.2
_NOTE_SECONDS = 2.0


class Intake:
    """Takes what a group fetches to its dispatcher.

    Args:
        group: the consumer group.
        dispatcher: calls the handlers.
        parking: the group's parked keys, None without a Database.
        crashes: how the holders of its partitions ended, None where that is not kept.
        window: how many events of a partition its holders may have had.
        clock: measures calls.

    Attributes:
        trouble: why nothing is handed out of new partitions, None when nothing is wrong.
    """

    def __init__(
        self,
        group: str,
        dispatcher: Dispatcher,
        *,
        parking: Parking | None,
        crashes: Crashes | None,
        window: int,
        clock: Clock,
    ) -> None:
        self._group = group
        self._dispatcher = dispatcher
        self._parking = parking
        self._crashes = crashes
        self._window = window
        self._clock = clock
        self._unread: dict[Assignment, None] = {}  # whose parked keys are not known yet
        self._waiting: dict[Assignment, Sequence[Record]] = {}  # their first records, fetched and not handed out
        self._held: dict[Assignment, Holding] = {}
        self._begun: set[Assignment] = set()  # of which something was handed out
        self._careful: dict[Assignment, CarefulReading] = {}
        self.trouble: str | None = None

    @property
    def waiting(self) -> int:
        """How many records were fetched and are not handed out yet."""
        return sum(map(len, self._waiting.values())) + sum(each.waiting for each in self._careful.values())

    def assigned(self, assignment: Assignment) -> None:
        """A partition is new."""
        if self._parking is not None:
            self._unread[assignment] = None

    def takes(self, assignment: Assignment) -> bool:
        """Whether more of a partition is wanted."""
        reading = self._careful.get(assignment)
        return assignment not in self._unread and assignment not in self._waiting and not (reading and reading.waiting)

    async def learn(self) -> None:
        """Find out what must be known of new partitions; a while later again where the database is away."""
        if not self._unread and not self._waiting:
            return
        try:
            await self._take_over()
            await self._begin()
        except Exception as error:  # noqa: BLE001  the database comes back
            self.trouble = type(error).__name__
            _log.warning("group %s does not know its parked keys and waits", self._group, exc_info=error)
            await self._dispatcher.progress(_AGAIN_SECONDS)
        else:
            self.trouble = None

    async def _take_over(self) -> None:
        """Keep others from parking keys of new partitions, and then know those that are parked."""
        unread = list(self._unread)
        if self._crashes is not None and unread:
            held = await self._crashes.take(self._group, unread)
            self._held |= {each: holding for each, holding in held.items() if each in self._unread}
        if self._parking is not None and unread:
            await self._parking.pausing.look()
            self._dispatcher.heed(self._parking.pausing)
        for assignment in unread:
            assert self._parking is not None  # noqa: S101  nothing is unread without
            assignment.parked |= await self._parking.keys_of(assignment.topic)
            self._unread.pop(assignment, None)

    async def _begin(self) -> None:
        waiting = dict(self._waiting)
        firsts = {self._held[each]: records[0] for each, records in waiting.items() if each in self._held}
        if self._crashes is not None and firsts:
            await self._crashes.begin(firsts)
        for assignment, records in waiting.items():
            if self._waiting.pop(assignment, None) is None:  # given up meanwhile
                continue
            holding = self._held.get(assignment)
            self._begun.add(assignment)
            if self._crashes is not None and holding is not None and holding.careful:
                _log.warning(
                    "group %s: processes that read %s have ended %d times in a row at %d: it is read carefully, one "
                    "event at a time", self._group, assignment, holding.ends, records[0].offset,
                )  # fmt: skip
                self._careful[assignment] = CarefulReading(
                    self._group,
                    holding,
                    crashes=self._crashes,
                    dispatcher=self._dispatcher,
                    events=self._window,
                    ended=partial(self._careful.pop, assignment, None),
                    clock=self._clock,
                )
            self._hand_over(assignment, records)

    async def take(self, fetched: Mapping[Assignment, Sequence[Record]]) -> None:
        """Hand out what was fetched, as soon as that may be."""
        for assignment, records in fetched.items():
            # A partition may have come during the fetch, and its first records with it.
            if assignment in self._unread or (assignment in self._held and assignment not in self._begun):
                self._waiting[assignment] = [*self._waiting.get(assignment, ()), *records]
            else:
                self._hand_over(assignment, records)
        await self.learn()

    def _hand_over(self, assignment: Assignment, records: Sequence[Record]) -> None:
        reading = self._careful.get(assignment)
        if reading is None:
            self._dispatcher.feed(assignment, records)
        else:
            reading.add(records)

    def held(self, assignments: Collection[Assignment]) -> list[Holding]:
        """Those of them of which something was handed out."""
        return [self._held[each] for each in assignments if each in self._begun]

    async def give_up(self, held: Sequence[Holding]) -> None:
        """Note that partitions are given up, or are about to be; an end after that is held against no event."""
        if self._crashes is None or not held:
            return
        try:
            async with asyncio.timeout(_NOTE_SECONDS):
                await self._crashes.give_up(held)
        except Exception as error:  # noqa: BLE001  then it counts as an end, of which one alone changes nothing
            _log.debug("group %s could not note what it gives up", self._group, exc_info=error)

    def forget(self, assignments: Collection[Assignment]) -> None:
        """Partitions are gone."""
        for assignment in assignments:
            self._unread.pop(assignment, None)
            self._waiting.pop(assignment, None)
            self._held.pop(assignment, None)
            self._begun.discard(assignment)
            reading = self._careful.pop(assignment, None)
            if reading is not None:
                reading.task.cancel()

    async def stop(self) -> None:
        """Hand out nothing any more."""
        tasks = [reading.task for reading in self._careful.values()]
        self.forget(list(self._careful))
        if tasks:
            await asyncio.wait(tasks)
