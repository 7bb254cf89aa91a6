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
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self
from uuid import UUID

from mainstay.core import Clock, uuid7
from mainstay.database import Database
from mainstay.events import tables
from mainstay.events._delivery import Assignment
from mainstay.events.metadata import Record

_ENDS = 2
"""From so many ends at one place on a partition is read carefully."""
_ALONE_SECONDS = 30.0
"""After so long a call is left to itself, and other careful ones go on beside it."""


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

    def turn(self, clock: Clock) -> Turn:
        """The turn of one careful call, of which there is one at a time in this process."""
        return Turn(self._alone, clock)

    async def take(self, group: str, assignments: Sequence[Assignment]) -> dict[Assignment, Holding]:
        """Become the holder of partitions: from now on no other process parks their keys."""
        holdings = {each: Holding(self._database, group, each) for each in assignments}
        rows = [
            {"group_name": group, "topic": each.topic, "partition": each.number, "holder": holding.id}
            for each, holding in sorted(holdings.items(), key=lambda item: (item[0].topic, item[0].number))
        ]  # in one order, whichever process takes them
        await self._database.write(tables.TAKE_PARTITION[self._database.dialect], rows)
        for each, holding in holdings.items():
            each.holder = holding.id
        return holdings

    async def begin(self, firsts: Mapping[Holding, Record]) -> None:
        """Note at which records partitions are begun, and learn how that went the last time."""
        async with self._database.transaction() as session:
            for holding, record in firsts.items():
                row: Any = (await session.execute(tables.READ_HOLDER, holding.place)).first()
                if row is None:  # another's meanwhile
                    continue
                await session.execute(tables.BEGIN_PARTITION, {**holding.place, **holding.begins(record, row)})
        # One that was read by a process that ended may be to blame for those of the others, too.
        self._careful = self._careful or any(each.careful for each in firsts)
        if self._careful:
            for holding in firsts:
                holding.careful = holding.careful or holding.ends > 0

    async def give_up(self, holdings: Sequence[Holding]) -> None:
        """Note that partitions are given up: what ends now is held against no event."""
        if holdings:
            await self._database.write(tables.GIVE_UP_PARTITION, [each.place for each in holdings])


class Turn:
    """The turn of one careful call: of two that run, none could be told to have ended their process.

    It is taken when the call begins, and not before: an event that waits for a place with its handler, or for a person,
    must not hold up the others. Leaving the block gives it back.

    Args:
        alone: is held by the call that has its turn.
        clock: measures the call.

    Attributes:
        called_at: when the call began, None before.
    """

    def __init__(self, alone: asyncio.Lock, clock: Clock) -> None:
        self.called_at: float | None = None
        self._alone = alone
        self._clock = clock
        self._has = False
        self._over = False

    def __enter__(self) -> Self:
        """Nothing is taken yet."""
        return self

    def __exit__(self, *_details: object) -> None:
        """Let others call."""
        self._over = True
        self._give_back()

    async def begin(self, note: Callable[[], Awaitable[object]]) -> None:
        """Wait for the turn, and note that the event is called now."""
        await self._alone.acquire()
        self._has = True
        if self._over:  # those who handed the event out have gone meanwhile
            self._give_back()
        await note()
        self.called_at = self._clock.monotonic()

    @property
    def lasted(self) -> float:
        """For how long the call has been running."""
        return 0.0 if self.called_at is None else self._clock.monotonic() - self.called_at

    def yield_if_long(self) -> None:
        """Leave a call to itself that has been running for long."""
        if self.lasted >= _ALONE_SECONDS:
            self._give_back()

    def _give_back(self) -> None:
        if self._has:
            self._has = False
            self._alone.release()


class Holding:
    """One partition in the hands of this process.

    Args:
        database: where it is noted.
        group: whose.
        assignment: the partition.

    Attributes:
        assignment: as given.
        id: of this holding.
        ends: of holders at this place, in a row.
        careful: how it is read.
    """

    def __init__(self, database: Database, group: str, assignment: Assignment) -> None:
        self.id: UUID = uuid7()
        self.ends = 0
        self.careful = False
        self.assignment = assignment
        self._database = database
        self._group = group
        self._suspect: Suspect | None = None

    def begins(self, record: Record, before: Any) -> dict[str, object]:
        """What to note when it begins at a record, by what its row says of the one before."""
        same_place = before.first == record.offset
        self.ends = (before.ends if same_place else 0) + bool(before.held)
        crashes = before.crashes
        if before.held:  # it ended during that call, or while the event was only waited with
            crashes = crashes + 1 if before.calling else 0
        if crashes and before.called is not None:
            self._suspect = Suspect(before.called, crashes, before.called_seconds)
        self.careful = self.ends >= _ENDS or self._suspect is not None
        return {
            "first": record.offset,
            "ends": self.ends,
            "called": self._suspect and self._suspect.offset,
            "called_seconds": self._suspect.seconds if self._suspect else 0.0,
            "crashes": self._suspect.crashes if self._suspect else 0,
        }

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
