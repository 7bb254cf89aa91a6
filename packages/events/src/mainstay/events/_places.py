"""Who calls handlers, and those handlers that not every caller may call at once: with few places, or many events."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from mainstay.events._batches import Batches
from mainstay.events._delivery import Assignment, Delivery
from mainstay.events._routes import Limits, Match
from mainstay.events._turns import Head, Turns
from mainstay.events.metadata import Record

if TYPE_CHECKING:
    from mainstay.events._spans import Attempt


class Caller:
    """A task that calls handlers."""

    __slots__ = ("assignment", "began_at", "place", "span", "stopping", "task")

    def __init__(self) -> None:
        self.assignment: Assignment | None = None  # of which it calls a handler
        self.began_at: float | None = None  # while it calls
        self.place: Limits | None = None  # that it has with a handler which has few
        self.span: Attempt | None = None  # of what it has in hand, where there are spans
        self.stopping = False
        self.task: asyncio.Task[None] | None = None

    def end_span(self, fate: str | None = None) -> None:
        """End the span, if there is one, with a last word on what became of the event."""
        span, self.span = self.span, None
        if span is not None:
            span.end(fate)


class Places:
    """Decides which events are called now, of those whose handlers take part in more than order by key.

    An event without a place waits here and not with a caller, which would be missing to all others. A place that is
    free is offered in turn: it belongs to no event before that is called, since its partition or its key may be lost to
    this process until then. As long as one is free and an event waits, an offer is on its way.

    Args:
        turns: where events wait for a caller.
        batches: where events wait for others.
        wake: has a caller look for more.
    """

    def __init__(self, turns: Turns, batches: Batches, wake: Callable[[], object]) -> None:
        self._turns = turns
        self._batches = batches
        self._wake = wake
        self._taken: dict[Limits, int] = {}
        self._waiting: dict[Limits, deque[Delivery]] = {}
        self._offered: set[Limits] = set()
        self._next: Delivery | None = None  # which an offer has found last

    def admit(
        self, caller: Caller, assignment: Assignment, record: Record, match: Match, delivery: Delivery | None
    ) -> Delivery | None:
        """As what an event is called now; None where it waits for a place, or for others."""
        handling = match[2]
        if handling is None or handling.limits is None:
            if delivery is not None:  # something is known of it: it is called alone
                return delivery
            return None if self._batches.join(assignment, record, match) else Delivery(assignment, record)
        limits, delivery = handling.limits, delivery or Delivery(assignment, record)
        if not limits.in_order:
            self._release(delivery)
        taken, waiting = self._taken.get(limits, 0), self._waiting.get(limits)
        if limits.at_once is not None and (taken >= limits.at_once or (waiting and delivery is not self._next)):
            self._waiting.setdefault(limits, deque()).append(delivery)
            return None
        self._taken[limits] = taken + 1
        caller.place = limits
        return delivery

    async def begin(self, caller: Caller, delivery: Delivery) -> bool:
        """Do what comes before a call that waits for nothing else; False where its partition was given up meanwhile."""
        before_call, delivery.before_call = delivery.before_call, None
        if before_call is not None:
            await before_call()
        if not delivery.assignment.open:
            self.leave(caller)
            caller.assignment = None
        return delivery.assignment.open

    def _release(self, delivery: Delivery) -> None:
        """Let what follows of its key be called beside it."""
        key = delivery.record.key
        if key is not None and not delivery.released:
            delivery.released = True
            following = delivery.assignment.next_of(key)
            if following is not None:
                self._turns.add_again((delivery.assignment, following, None))
                self._wake()

    def leave(self, caller: Caller) -> None:
        """Give a caller's place back; the next event that waits for it is looked at again."""
        if caller.place is not None:
            self._taken[caller.place] -= 1
            self._offer(caller.place)
            caller.place = None

    def _offer(self, limits: Limits) -> None:
        if self._waiting.get(limits) and limits not in self._offered:
            self._offered.add(limits)
            self._turns.add_made(partial(self._called_next, limits))
            self._wake()

    def _called_next(self, limits: Limits) -> Head | None:
        """What has waited for longest, if there is a place for it."""
        self._offered.discard(limits)
        waiting = self._waiting[limits]
        while waiting and (limits.at_once is None or self._taken[limits] < limits.at_once):
            delivery = waiting.popleft()
            if delivery.assignment.open:
                self._offer(limits)  # there may be another place, and this event may take none after all
                self._next = delivery
                return delivery.assignment, delivery.record, delivery
        return None
