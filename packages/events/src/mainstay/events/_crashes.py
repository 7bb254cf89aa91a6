"""Events that end the process that handles them: counted durably, and given up after some.

An exception is counted in memory. An event that ends its process (out of memory, `os._exit`, a watchdog's SIGKILL)
takes that memory with it, and the next process begins with it again. So a row for each partition says who holds it, at
which event that holder began, and whether it has given the partition up. It is written once when a partition is taken
and once when it is given up; an event costs nothing.

A holder that did not give up has ended, or was cut off. After the second such end at the same place something there
may be to blame, or nothing is: processes are killed for many reasons. From then on the partition is read *carefully*,
for as many events as its holders may have had: one at a time, each noted before it is called, and no two of a process
at once. An end during a noted call is held against that event. Before such an event is called again its process waits
twice as long as the call had lasted: a process that ends while it only waits shows that others are to blame, and
nothing is held against the event any more. So neither a deploy (which says that it gives up before it drains) nor a
storm of kills makes a slow and healthy event look like one that ends its process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple
from uuid import UUID

from mainstay.core import uuid7
from mainstay.database import Database
from mainstay.events import tables
from mainstay.events._delivery import Assignment
from mainstay.events.metadata import Record

_ENDS = 2
"""From so many ends at one place on a partition is read carefully."""


class Suspect(NamedTuple):
    """The event that was being called when a holder of its partition ended.

    Attributes:
        offset: its place.
        crashes: how often in a row.
        seconds: about how long its last call had been running.
    """

    offset: int
    crashes: int
    seconds: float


class Crashes:
    """What is known of how the holders of partitions ended, for all groups of a process.

    Args:
        database: where it is kept.
        most: how often the call of an event may end its process.
    """

    def __init__(self, database: Database, most: int) -> None:
        self._database = database
        self.most = most
        self._alone = asyncio.Lock()
        self._careful = False

    @property
    def alone(self) -> AbstractAsyncContextManager[Any]:
        """One careful call of this process at a time: of two that run, nobody could tell which one ended it."""
        return self._alone

    async def hold(self, group: str, firsts: Mapping[Assignment, Record]) -> dict[Assignment, Holding]:
        """Take partitions, each from its first record on."""
        found: dict[Assignment, Any] = {}
        rows: list[dict[str, object]] = []
        holdings: dict[Assignment, Holding] = {}
        async with self._database.transaction() as session:
            for assignment in firsts:
                place = {"of_group": group, "of_topic": assignment.topic, "number": assignment.number}
                found[assignment] = (await session.execute(tables.READ_HOLDER, place)).first()
            for assignment, record in firsts.items():
                holding, row = self._holding(group, assignment, record, found[assignment])
                holdings[assignment] = holding
                rows.append(row)
            await session.execute(tables.HOLD_PARTITION[self._database.dialect], rows)
        # One that was read by a process that ended may be to blame for those of the others, too.
        self._careful = self._careful or any(each.careful for each in holdings.values())
        if self._careful:
            for holding in holdings.values():
                holding.careful = holding.careful or holding.ends > 0
        return holdings

    def _holding(
        self, group: str, assignment: Assignment, record: Record, before: Any | None
    ) -> tuple[Holding, dict[str, object]]:
        ends, suspect = 0, None
        if before is not None:
            if before.first == record.offset:
                ends = before.ends
            if before.held:
                ends += 1
            crashes = before.crashes
            if before.held:  # during its call, or while it was only waited with
                crashes = crashes + 1 if before.calling else 0
            if crashes and before.called is not None:
                suspect = Suspect(before.called, crashes, before.called_seconds)
        holding = Holding(self._database, group, assignment, suspect)
        holding.ends = ends
        holding.careful = ends >= _ENDS or suspect is not None
        row: dict[str, object] = {
            "group_name": group,
            "topic": assignment.topic,
            "partition": assignment.number,
            "holder": holding.id,
            "first": record.offset,
            "ends": ends,
            "called": suspect and suspect.offset,
            "called_seconds": 0.0 if suspect is None else suspect.seconds,
            "crashes": 0 if suspect is None else suspect.crashes,
        }
        return holding, row

    async def give_up(self, holdings: Sequence[Holding]) -> None:
        """Note that partitions are given up: what ends now is held against no event."""
        if holdings:
            await self._database.write(tables.GIVE_UP_PARTITION, [each.place for each in holdings])


class Holding:
    """One partition in the hands of this process.

    Args:
        database: where it is noted.
        group: whose.
        assignment: the partition.
        suspect: the event that may have ended its last holder.

    Attributes:
        assignment: the partition.
        id: of this holding.
        ends: of holders at this place, in a row.
        careful: how it is read.
    """

    def __init__(self, database: Database, group: str, assignment: Assignment, suspect: Suspect | None) -> None:
        self.id: UUID = uuid7()
        self.ends = 0
        self.careful = False
        self._database = database
        self._group = group
        self.assignment = assignment
        self._suspect = suspect

    @property
    def place(self) -> dict[str, object]:
        """What names its row."""
        return {
            "of_group": self._group,
            "of_topic": self.assignment.topic,
            "number": self.assignment.number,
            "of_holder": self.id,
        }

    def suspicion(self, record: Record) -> Suspect | None:
        """What is held against an event."""
        suspect = self._suspect
        return suspect if suspect is not None and suspect.offset == record.offset else None

    async def calls(self, record: Record, seconds: float = 0.0) -> None:
        """Note that an event is called, or has been running for some time."""
        suspect = self.suspicion(record)
        crashes = 0 if suspect is None else suspect.crashes
        called = {"called": record.offset, "called_seconds": seconds, "crashes": crashes}
        await self._database.write(tables.NOTE_CALL, {**self.place, **called})

    async def rests(self) -> None:
        """Note that no event is called."""
        await self._database.write(tables.NOTE_NO_CALL, self.place)
