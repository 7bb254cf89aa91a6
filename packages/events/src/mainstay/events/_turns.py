"""Whose event is next: partitions and batches take turns, and an event waits for the one before it that has its key."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator

from mainstay.events._delivery import Assignment, Delivery
from mainstay.events.metadata import Record

Head = tuple[Assignment, Record, Delivery | None]
"""What can be called: an event that no other has to end before, and what is known of it if it has failed already."""

_PORTION = 16
"""Events that are taken from a partition before the next one has its turn."""


class Turns:
    """What was handed out and waits for a caller.

    Nothing is made for an event here: records stay in the sequences in which they arrived until a caller takes them.
    One whose key is busy is put behind that key then, and the caller that works on the key goes on with it.

    Attributes:
        heads: the next event that can be called, for each `next()`; None while there is none.
        held: nothing may be called at the moment.
    """

    def __init__(self) -> None:
        self._again: deque[Head] = deque()
        self._with_unread: deque[Assignment] = deque()
        self._made: deque[Callable[[], Head | None]] = deque()
        self.held = False
        self.heads = self._heads()

    def add(self, assignment: Assignment, records: Collection[Record]) -> None:
        """Take records of a partition, in its order."""
        assignment.window.extend(records)
        assignment.unread.extend(records)
        if records and not assignment.has_turns:
            assignment.has_turns = True
            self._with_unread.append(assignment)

    def add_again(self, head: Head) -> None:
        """An event whose key is busy with it: it comes next."""
        self._again.append(head)

    def add_made(self, make: Callable[[], Head | None]) -> None:
        """What is decided when its turn comes, since more may have come or gone until then; None for nothing at all."""
        self._made.append(make)

    @property
    def waiting(self) -> bool:
        """Whether a caller that looks may find something."""
        return not self.held and bool(self._with_unread or self._again or self._made)

    def _heads(self) -> Generator[Head | None, None, None]:
        again, made, with_unread = self._again, self._made, self._with_unread
        while True:
            if self.held:
                yield None
                continue
            if again:
                yield again.popleft()
                continue
            if made:  # one, and then a portion of a partition
                head = made.popleft()()
                if head is not None:
                    yield head
            elif not with_unread:
                yield None
            if not with_unread:
                continue
            assignment = with_unread[0]  # it stays the first while its portion lasts, since something waits until then
            unread, busy = assignment.unread, assignment.busy
            left = _PORTION
            while left and unread and assignment.open and not self.held:
                record = unread.popleft()
                key = record.key
                if key is not None:
                    if key in busy:
                        behind = busy[key]
                        if behind is None:
                            busy[key] = deque((record,))
                        else:
                            behind.append(record)
                        continue
                    busy[key] = None
                left -= 1
                yield assignment, record, None
            with_unread.popleft()
            if unread and assignment.open:
                with_unread.append(assignment)
            else:
                assignment.has_turns = False
