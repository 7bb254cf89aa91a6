"""Events that are handed over together: gathered, called as one, halved when they keep failing.

A caller that takes an event of a batch handler does not call it: the event joins a *gathering*, of its key or of its
partition, and its key stays busy. What follows of that key joins in its turn, as long as the same handler is meant.
What is for another handler, or cannot be read, waits behind the key until all of the key before it has ended. So the
order of a key is kept, also where handlers of both kinds take its events.

A gathering has one batch at a time. It is made when `size` events are there, when the first has waited long enough, or
when nothing more can come: its partition's window is full, or the process stops. It then waits for a caller like any
event, with its turn behind other partitions', and grows meanwhile.

A batch is a `Delivery`: it is tried again by the same rules, in the same timers. One that keeps failing ends in its
halves, which go on with its count of attempts, one after the other. What is left alone begins anew, as an event of its
own: only that can become a dead letter or park its key. An event about which something is known before its first call
(it is read carefully, or comes from a parked queue) never joins a gathering: its handler is called with it alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

from mainstay.core import Clock, Timer
from mainstay.events._delivery import Assignment, Delivery
from mainstay.events._routes import Batching, Handling, Match, Route
from mainstay.events._transport import LogRecord
from mainstay.events._turns import Head, Turns
from mainstay.events.metadata import OF_CONTEXT, Metadata, Record


class Matches(Protocol):
    """What is asked here about an event: see `_matching`."""

    def follows(self, assignment: Assignment, record: Record) -> Match:
        """How it is handled if it is nothing special."""
        ...

    def waits(self, assignment: Assignment, record: Record) -> bool:
        """Whether it goes to the end of the queue of its key instead of to its handler."""
        ...


class Member(NamedTuple):
    """An event that has joined a gathering.

    Attributes:
        record: as it was handed out.
        match: how it is read and handled.
        event: what the handler is given.
        headers: by name.
        at: since when it waits.
    """

    record: Record
    match: tuple[Record, Route, Handling]
    event: Any
    headers: dict[str, bytes | None]
    at: float


class Batch(Delivery):
    """Some events of a gathering that are handed over together, or one that is alone.

    Attributes:
        members: the events.
        whole: how they are handled together; None of one that is alone, which is matched as any other.
        is_split: it ends in its halves.
        was_called: its events were handed over, and may have been changed since then.
        gathering: where its events are from.
    """

    __slots__ = ("gathering", "is_split", "members", "was_called", "whole")

    def __init__(self, gathering: Gathering, members: Sequence[Member]) -> None:
        first = members[0]
        record = first.record
        self.whole: Match | None = None
        if len(members) > 1:
            _, route, handling = first.match
            shared = [each for each in first.headers.items() if _is_shared(each, members[1:])]
            record = LogRecord(record.topic, record.partition, record.offset, None, b"", shared)
            whole = handling._replace(validate=self._events, call=self._call, wants_metadata=False)
            self.whole = record, route, whole, None
        super().__init__(gathering.assignment, record)
        self.gathering = gathering
        self.members = members
        self.is_split = self.was_called = False

    @property
    def record_name(self) -> str:
        """Where its first record is, and how many come with it."""
        more = f" and {len(self.members) - 1} more" if len(self.members) > 1 else ""
        return f"{super().record_name}{more}"

    def parts(self, seen: Record) -> Sequence[Record]:  # noqa: ARG002  see `Delivery`
        """See `Delivery`."""
        return [member.match[0] for member in self.members]

    def split(self) -> bool:
        """End in halves; an event that is alone has none."""
        self.is_split = len(self.members) > 1
        return self.is_split

    def finish(self) -> None:
        """See `Delivery`; the gathering goes on."""
        self.gathering.ended(self)

    def part(self, members: Sequence[Member], age_seconds: float) -> Batch:
        """Some of it, with the same count of attempts unless it is one event."""
        part = Batch(self.gathering, members)
        if len(members) > 1:
            part.attempt, part.postponed, part.waited, part.aged = (
                self.attempt, self.postponed, self.waited, age_seconds
            )  # fmt: skip
            part.was_called = self.was_called
        return part

    def _events(self, _value: bytes) -> list[Any]:
        if self.was_called:
            return [member.match[2].validate(member.match[0].value or b"") for member in self.members]
        self.was_called = True
        return [member.event for member in self.members]

    async def _call(self, events: list[Any]) -> None:
        group, batching = self.gathering.group, self.gathering.batching
        metas = [
            Metadata(member.match[0], group=group, attempt=self.attempt, headers=member.headers)
            for member in self.members
        ]
        await batching.call(events, metas)


def _is_shared(header: tuple[str, bytes | None], others: Iterable[Member]) -> bool:
    """Whether it says something of the context that all say: a batch works in what its events have in common."""
    name, value = header
    return name in OF_CONTEXT and all(other.headers.get(name) == value for other in others)


class _Behind(deque[Record]):
    """What waits behind a key of a gathering: what does not join it."""

    __slots__ = ("_joins",)

    def __init__(self, joins: Callable[[Record], bool]) -> None:
        super().__init__()
        self._joins = joins

    def append(self, record: Record, /) -> None:
        """Let a record join, unless one before it did not."""
        if self or not self._joins(record):
            super().append(record)


class Gathering:
    """The events of one handler that are handed over together, of one key or of one partition.

    Args:
        batching: the handler.
        assignment: the partition.
        batches: those of the group.
        empty: called when nothing is left of it.
    """

    __slots__ = (
        "_batches", "_current", "_due", "_empty", "_of_key", "_pieces", "_queued", "_timer", "_waiting", "assignment",
        "batching", "group",
    )  # fmt: skip

    def __init__(
        self, batching: Batching, assignment: Assignment, batches: Batches, empty: Callable[[], object]
    ) -> None:
        self.batching = batching
        self.assignment = assignment
        self.group = batches.group
        self._batches = batches
        self._empty = empty
        self._waiting: deque[Member] = deque()
        self._pieces: deque[Batch] = deque()  # of a batch that was split, before all that waits
        self._of_key: dict[bytes, int] = {}  # how many of each key have not ended
        self._current: Batch | None = None  # it is called, or waits for its next attempt
        self._queued = False  # it waits for its turn
        self._due = False
        self._timer: Timer | None = None

    def join(self, member: Member) -> None:
        """Take an event in whose turn it is, and what waits behind its key as far as that joins, too."""
        self._take(member)
        key = member.record.key
        if key is not None:
            before, behind = self.assignment.busy[key], _Behind(self._joins)
            self.assignment.busy[key] = behind
            for record in before or ():
                behind.append(record)

    def _joins(self, record: Record) -> bool:
        match = self._batches.matching.follows(self.assignment, record)
        handling = match[2]
        member = self._batches.member(record, match) if handling and handling.batching is self.batching else None
        if member is not None:
            self._take(member)
        return member is not None

    def _take(self, member: Member) -> None:
        key = member.record.key
        if key is not None:
            self._of_key[key] = self._of_key.get(key, 0) + 1
        self._waiting.append(member)
        if self._timer is None or len(self._waiting) >= self.batching.size:
            self._go_on()

    def _go_on(self) -> None:
        """See to the next batch, unless there is one."""
        if self._current is not None or self._queued or not self.assignment.open:
            return
        if not self._pieces and not self._waiting:
            self._empty()
        elif self._pieces or self._due or len(self._waiting) >= self.batching.size:
            self._queue()
        else:
            left = self._waiting[0].at + self.batching.wait_seconds - self._batches.clock.monotonic()
            if left <= 0:
                self._queue()
            elif self._timer is None:
                self._timer = self._batches.clock.call_later(left, self.hand_over)

    def _queue(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._queued = True
        self._batches.turns.add_made(self._make)
        self._batches.wake()

    def hand_over(self) -> None:
        """Wait for nothing more: the time is over, or the window of the partition is full."""
        self._due = True
        self._go_on()

    def hand_over_last(self) -> bool:
        """Hand over what only waits for more: the partition is about to be given up. False where there is nothing."""
        if self._current is not None or not (self._pieces or self._waiting) or not self.assignment.open:
            return False
        self.hand_over()
        return True

    def forget(self) -> None:
        """Wait for nothing any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _make(self) -> Head:
        self._queued = self._due = False
        size = min(self.batching.size, len(self._waiting))
        batch = self._pieces.popleft() if self._pieces else Batch(self, [self._waiting.popleft() for _ in range(size)])
        pieces = self._without_what_waits(batch)
        if len(pieces) > 1:
            batch = pieces[0]
            self._pieces.extendleft(reversed(pieces[1:]))
        self._current = batch
        return self.assignment, batch.record, batch

    def _without_what_waits(self, batch: Batch) -> Sequence[Batch]:
        """A batch of the events that are for the handler, then each other alone, in the order of its key.

        The key of an event may have been parked by one before it, or a person has paused it or its kind meanwhile: then
        it waits, and so does what follows of its key, while what is before it does not.
        """
        goes: list[Member] = []
        alone: list[Batch] = []
        waiting: set[bytes] = set()
        for each in batch.members:
            key = each.record.key
            if key in waiting or self._batches.matching.waits(self.assignment, each.record):
                alone.append(Batch(self, [each]))
                if key is not None:
                    waiting.add(key)
            else:
                goes.append(each)
        if not alone:
            return (batch,)
        return [*([batch.part(goes, batch.aged)] if goes else ()), *alone]

    def ended(self, batch: Batch) -> None:
        """Go on behind a batch."""
        self._current = None
        if batch.is_split:
            now = self._batches.clock.monotonic()
            age = batch.aged + now - (now if batch.began_at is None else batch.began_at)
            middle = len(batch.members) // 2
            second, first = batch.members[middle:], batch.members[:middle]
            self._pieces.extendleft((batch.part(second, age), batch.part(first, age)))
        else:
            for member in batch.members:
                self.assignment.finish(member.record)
                self._release(member.record.key)
        self._go_on()

    def _release(self, key: bytes | None) -> None:
        if key is None:
            return
        self._of_key[key] -= 1
        if self._of_key[key]:
            return
        del self._of_key[key]
        following = self.assignment.next_of(key)
        if following is not None:
            behind = self.assignment.busy[key]
            self.assignment.busy[key] = behind and deque(behind)  # what comes now is not for this gathering
            self._batches.turns.add_again((self.assignment, following, None))


class Batches:
    """What is gathered in one group.

    Args:
        group: the consumer group.
        matching: says what an event is for.
        turns: where batches wait for a caller.
        wake: has a caller look there.
        clock: measures how long events wait for more.

    Attributes:
        group, matching, turns, wake, clock: as given.
    """

    def __init__(self, group: str, matching: Matches, turns: Turns, wake: Callable[[], object], clock: Clock) -> None:
        self.group = group
        self.matching = matching
        self.turns = turns
        self.wake = wake
        self.clock = clock
        self._gatherings: dict[Assignment, dict[tuple[Batching, bytes | None], Gathering]] = {}
        self._last: set[Gathering] = set()  # whose batch is handed over although its partition is given up

    def join(self, assignment: Assignment, record: Record, match: Match) -> bool:
        """Take an event in whose turn it is; False where it cannot be read."""
        member = self.member(record, match)
        if member is None:
            return False
        batching = member.match[2].batching
        assert batching is not None  # noqa: S101  or it would not be here
        name = batching, record.key if batching.by_key else None
        mine = self._gatherings.setdefault(assignment, {})
        gathering = mine.get(name)
        if gathering is None:
            mine[name] = gathering = Gathering(batching, assignment, self, partial(mine.pop, name, None))
        gathering.join(member)
        return True

    def member(self, record: Record, match: Match) -> Member | None:
        """An event that can be handed over together with others, None where it cannot be read."""
        seen, route, handling, _ = match
        assert route is not None  # noqa: S101  it has a handler
        assert handling is not None  # noqa: S101  as above
        try:
            event = handling.validate(seen.value or b"")
        except Exception:  # noqa: BLE001  it is read again by itself, and that says what is wrong
            return None
        return Member(record, (seen, route, handling), event, dict(seen.headers), self.clock.monotonic())

    def hand_over(self, assignment: Assignment) -> None:
        """Wait for nothing more of a partition: its window is full."""
        for gathering in list(self._gatherings.get(assignment, {}).values()):
            gathering.hand_over()

    def hand_over_last(self, assignments: Collection[Assignment]) -> None:
        """Hand over what only waits for more of partitions that are about to be given up."""
        for assignment in assignments:
            mine = self._gatherings.get(assignment, {}).values()
            self._last |= {gathering for gathering in mine if gathering.hand_over_last()}

    def takes_last(self, delivery: Delivery | None) -> bool:
        """Whether a batch is to be called although its partition is given up: once."""
        gathering = delivery.gathering if isinstance(delivery, Batch) else None
        is_last = gathering in self._last
        self._last -= {gathering}
        return is_last

    def has_last(self, assignments: Collection[Assignment]) -> bool:
        """Whether such batches wait for a caller."""
        return any(gathering.assignment in assignments for gathering in self._last)

    def forget(self, assignments: Collection[Assignment]) -> None:
        """Partitions are given up."""
        for assignment in assignments:
            for gathering in self._gatherings.pop(assignment, {}).values():
                gathering.forget()
        self._last = {gathering for gathering in self._last if gathering.assignment not in assignments}
