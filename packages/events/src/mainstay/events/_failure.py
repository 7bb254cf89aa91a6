"""What becomes of an event that could not be handled: tried again, parked, set aside, skipped, or stopped at."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from mainstay.core import Clock, MainstayError
from mainstay.events._attempts import Again, Attempts
from mainstay.events._decoding import NO_EVENT, OURS, Decoders, will_pass
from mainstay.events._delivery import Assignment, Delivery, Verdict, queue_of
from mainstay.events._metrics import FAILED, HANDED_OVER, PARKED, SET_ASIDE, SKIPPED, SKIPPED_FAILURES
from mainstay.events._parking import Parking
from mainstay.events._routes import Handling, Route, Unknown
from mainstay.events._sparing import Sparing, said
from mainstay.events._stops import SHORTEST_SECONDS, Stops
from mainstay.events.errors import (
    DecodeError,
    KeyIsParkedError,
    NotHandledHereError,
    NotHeldError,
    PausedError,
    ProcessEndedError,
)
from mainstay.events.metadata import TYPE, Record, kind_of
from mainstay.events.strategies import OnFailure, RetryLater

if TYPE_CHECKING:
    from mainstay.events._spans import Spans

_log = logging.getLogger("mainstay.events")

_STORE_SECONDS = (1.0, 30.0)
"""The first and the longest wait before what could not be stored is tried again."""

_NOT_READ_SECONDS = 1.0
_SPAN_EVENTS = {"park": "parked", "later": "set_aside", "dead-letter": "dead_letter", "skip": "skipped"}
"""What the span of the last attempt says, by the fate of its event."""

_FEW = 20
"""Of so many events in a full window one may hold back the others, and its key is parked then."""
_PATIENCE_SECONDS = 5.0
"""How long after its first call an event may be tried again before its key is parked for that."""


KEY_IS_PARKED = KeyIsParkedError()
NOT_HANDLED_HERE = NotHandledHereError()


class Failures:
    """Decides about one group's failures; asked by the dispatcher for nothing else.

    Args:
        group: the consumer group.
        bury: stores a dead letter; returns when it is durable.
        parking: the group's parked keys, None without a Database.
        commit: makes durable how far a partition is finished; needed with `parking`.
        unknown: what becomes of events that no process of the group can handle.
        spans: of the attempts to handle events; None where none are recorded.
        decoders: read the topics that others write.
        clock: measures ages.

    Attributes:
        spans: as given.
        decoders: as given.
        failing: events that have failed and have not ended.
        skipped: counts events that the group has nothing to do with.
        stops: where partitions have stopped.
    """

    def __init__(
        self,
        group: str,
        *,
        bury: Callable[[Delivery, Exception], Awaitable[None]],
        parking: Parking | None = None,
        commit: Callable[[Assignment], Awaitable[None]] | None = None,
        unknown: Unknown | None = None,
        spans: Spans | None = None,
        decoders: Decoders = OURS,
        clock: Clock,
    ) -> None:
        self._group = group
        self._bury = bury
        self._commit = commit
        self._parking = parking
        self.decoders = decoders
        self._sparing = Sparing(clock)
        self._attempts = Attempts(group, self._sparing, clock)
        self._unknown = Unknown() if unknown is None else unknown
        self.spans = spans
        self.failing: set[Delivery] = set()
        self.skipped = SKIPPED.labels(group)
        self.stops = Stops(group, self._sparing, clock)

    async def failed(
        self, delivery: Delivery, route: Route | None, handling: Handling | None, error: Exception
    ) -> Again | None:
        """Deal with a failure; None when the event needs nothing more here: it is parked, or a dead letter."""
        if error is KEY_IS_PARKED:  # of a batch perhaps only in parts
            return None if delivery.split() else await self._append(delivery)
        if delivery.refused is None and handling is None and will_pass(error):
            later = self._not_read_yet(delivery, error)
            if delivery.assignment.queue is None:
                return later
            # The first of a queue, which others may be worked on instead of.
            delivery.judge(Verdict(error, "park", due_seconds=later.after_seconds))
        elif delivery.refused is None and handling is None:
            kind = "it"
            try:
                kind = self.decoders.kind_of(delivery.record)
                elsewhere = self._parking is not None and await self._parking.handled.is_somebodys(kind)
            except Exception:  # noqa: BLE001  any error: the event must not be passed over
                return self._not_stored(delivery, f"it is not known who handles {kind}")
            if elsewhere:
                if delivery.assignment.queue is None and _is_parked(delivery.assignment, delivery.record.key):
                    return await self._append(delivery)
                delivery.judge(self._handed_over(kind))
            elif error is NOT_HANDLED_HERE or (kind and route is not None):
                fate = self._unknown.types if route is None else self._unknown.versions
                if fate == "skip":
                    self.skipped.inc()
                    return None
                if route is None:
                    error = DecodeError(f"group {self._group} has no handler for {kind or 'a malformed version'}")
                if fate == "stop":
                    self.stops.at(delivery, kind, error, self._attempts.age(delivery))
                    return Again(SHORTEST_SECONDS)
        if delivery.verdict is None:
            if route is not None:
                FAILED.labels(route.type, self._group).inc()
            on_failure = _fate(delivery, route, handling)
            again = self._attempts.again(delivery, route, handling, error)
            if again is not None and delivery.assignment.queue is None:
                delivery.error = None if on_failure == "stop" else error
                return again
            if self._is_split(delivery, error):
                return None
            if again is None and on_failure == "stop":
                again = self._attempts.stopped(delivery, handling, error)
                if delivery.assignment.queue is None:
                    kind = self.decoders.kind_of(delivery.record)
                    self.stops.at(delivery, kind, error, self._attempts.age(delivery))
                    return again
            verdict = self._verdict(delivery, on_failure, handling, error, again)
            delivery.judge(verdict)
            delivery.waited = 0.0 if again is None else delivery.waited
        else:
            verdict = delivery.verdict
        return await self._end(delivery, verdict)

    async def _end(self, delivery: Delivery, verdict: Verdict) -> Again | None:
        try:
            await self._carry_out(delivery, verdict)
        except Exception as error:  # noqa: BLE001  any error: the event must not be lost
            if isinstance(error, NotHeldError) and delivery.assignment.queue is not None:
                _log.warning("%s in group %s is not dealt with here: %s", delivery.record_name, self._group, error)
                return None
            # Committing now would lose the event. It stays unfinished, and so does everything behind it.
            return self._not_stored(delivery, "what could not be handled cannot be stored")
        if self.spans is not None:
            self.spans.fate(_SPAN_EVENTS[verdict.fate])
        return None

    def without_handler(self, headers: Mapping[str, bytes | None]) -> Exception | None:
        """What is wrong with an event of no type that is handled here; None where it is certain that it is skipped."""
        if NO_EVENT in headers:
            self.skipped.inc()
            return None
        if not headers.get(TYPE):
            return DecodeError(f"the record has no header {TYPE}: it is not an event")
        elsewhere = self._parking is not None and not self._parking.handled.is_nobodys(kind_of(headers))
        if elsewhere or self._unknown.types != "skip":
            return NOT_HANDLED_HERE
        self.skipped.inc()
        return None

    def fetched(self) -> None:
        """What was fetched now may be handled by a process of which nothing was known before."""
        if self._parking is not None:
            self._parking.handled.fetched()

    def ended(self, delivery: Delivery) -> None:
        """An event that had failed is handled or dealt with, or its partition is another process' now."""
        self.failing.discard(delivery)
        self.stops.ended(delivery)

    def left(self, assignments: Collection[Assignment]) -> None:
        """What waits for another attempt in partitions that are given up is tried again by others."""
        for delivery in [each for each in self.failing if each.assignment in assignments]:
            if delivery.timer is not None:
                delivery.timer.cancel()
                self.ended(delivery)

    def waits(self, assignment: Assignment, record: Record) -> bool:
        """Whether an event goes into a queue, not to its handler: its key is parked, or a person has paused it."""
        if assignment.queue is not None or self._parking is None:
            return False
        if _is_parked(assignment, record.key):
            return True
        pausing, kind = self._parking.pausing, ""
        if pausing.of_parts:
            with suppress(MainstayError):  # what cannot be read yet has no kind yet
                kind = self.decoders.kind_of(record)
        return pausing.of(record.key, kind) is not None

    def _handed_over(self, kind: str) -> Verdict:
        HANDED_OVER.labels(self._group).inc()
        if self._sparing.due(kind) is not None:
            _log.info(
                "group %s has no handler for %s in this process: its events wait for one that has", self._group, kind
            )
        error = NotHandledHereError(f"the process that read the event has no handler for {kind}; another has")
        return Verdict(error, "park", due_seconds=0.0)

    def _is_split(self, delivery: Delivery, error: Exception) -> bool:
        """Split a batch, so that the event shows which it fails of; False for a single one."""
        if not delivery.split():
            return False
        if self._sparing.due(f"splits {type(error).__name__}") is not None:
            _log.warning("%s in group %s failed at attempt %d: each half is tried by itself", delivery.record_name,
                         self._group, delivery.attempt, exc_info=error)  # fmt: skip
        return True

    def _verdict(
        self,
        delivery: Delivery,
        on_failure: OnFailure,
        handling: Handling | None,
        error: Exception,
        again: Again | None,
    ) -> Verdict:
        if again is not None:  # the first of a queue, whose attempts are far apart and outlive this process
            return Verdict(error, "park", due_seconds=again.after_seconds)
        name, attempt = delivery.record_name, delivery.attempt
        if on_failure == "skip":  # it is what the handler was told to expect: one line
            _log.error("%s in group %s failed, and is skipped, at attempt %d: %s", name, self._group, attempt,
                       said(error))  # fmt: skip
            return Verdict(error, "skip")
        verdict, fate = Verdict(error, "dead-letter"), "becomes a dead letter"
        if isinstance(on_failure, RetryLater):
            seconds = self._attempts.later(delivery, on_failure, handling, error)
            if seconds is not None:
                verdict, fate = Verdict(error, "later", seconds), f"is tried again in {seconds:g} s"
        elif on_failure == "park" and self._parking is not None and delivery.record.key is not None:
            verdict, fate = Verdict(error, "park"), "its key is parked"
        _log.error("%s in group %s failed, and %s, at attempt %d", name, self._group, fate, attempt, exc_info=error)
        return verdict

    async def _carry_out(self, delivery: Delivery, verdict: Verdict) -> None:
        assignment, record = delivery.assignment, delivery.record
        if verdict.fate == "skip":
            SKIPPED_FAILURES.labels(self._group).inc()
            return
        if verdict.fate == "dead-letter":
            await self._bury(delivery, verdict.error)
            return
        assert self._parking is not None and self._commit is not None  # noqa: S101, PT018  nothing else makes such a verdict
        if assignment.queue is not None and (verdict.fate == "park" or assignment.queue != record.key):
            await self._parking.keep(delivery, verdict, self._attempts.age(delivery))
            delivery.kept = True
            return
        if verdict.fate == "later":
            await self._parking.park(delivery, verdict, self._attempts.age(delivery), [])
            SET_ASIDE.labels(self._group).inc()
            return
        key = record.key
        before = [each for each in assignment.behind.values() if each.key == key and key is not None]
        await self._commit(assignment)  # and what has left the window is read by nobody again
        if not assignment.open:
            msg = f"{assignment} is another process' now"
            raise RuntimeError(msg)
        await self._parking.park(delivery, verdict, self._attempts.age(delivery), before)
        if key is not None:
            assignment.parked.add(queue_of(key))
        PARKED.labels(self._group).inc()

    async def _append(self, delivery: Delivery) -> Again | None:
        assert self._parking is not None  # noqa: S101  no key is parked elsewhere
        record = delivery.record
        pausing = self._parking.pausing
        try:
            appended = record.key is not None and await self._parking.append(delivery.assignment, record)
            kind = self.decoders.kind_of(record) if pausing.of_parts else ""
        except Exception:  # noqa: BLE001  as above
            return self._not_stored(delivery, "an event of a parked key cannot be stored")
        if appended:
            return None
        pause = pausing.of(record.key, kind)
        if pause is not None:  # the first that waits of its key
            delivery.judge(Verdict(PausedError(pause.said), "park", due_seconds=0.0))
        else:
            delivery.assignment.parked.discard(queue_of(record.key or b""))
        return Again(0.0)

    def _not_read_yet(self, delivery: Delivery, error: Exception) -> Again:
        """Leave the event where it is until it is known what it says: that is no attempt, and ages nothing."""
        delay: float = getattr(error, "retry_after_seconds", None) or _NOT_READ_SECONDS
        left_out = self._sparing.due(f"not read {type(error).__name__}") if delay >= _NOT_READ_SECONDS else None
        if left_out is not None:
            more = f", nor {left_out} others meanwhile" if left_out else ""
            _log.warning("%s cannot be read by group %s yet%s: %s", delivery.record_name, self._group, more, error)
        delivery.began_at = None
        return Again(delay)

    def _not_stored(self, delivery: Delivery, what: str) -> Again:
        first, longest = _STORE_SECONDS
        delivery.waited = min(max(first, delivery.waited * 2), longest)
        _log.exception("%s in group %s: %s, again in %g s", delivery.record_name, self._group, what,
                       delivery.waited)  # fmt: skip
        return Again(delivery.waited)


def _fate(delivery: Delivery, route: Route | None, handling: Handling | None) -> OnFailure:
    """What becomes of an event that is not tried again."""
    if route is None:  # no event of the group's at all
        return "dead-letter"
    # Without a handling it is of a version that no handler here reads, or has ended its processes.
    on_failure = route.on_failure if handling is None else handling.on_failure
    if on_failure == "stop" and isinstance(delivery.refused, ProcessEndedError):
        return "park"  # to be tried again by each process that starts, it would end them all
    return on_failure


def that_give_way(assignment: Assignment, failing: Iterable[Delivery], now: float) -> list[Delivery]:
    """Of the failing events of a partition whose window is full those that are to be set aside, with that verdict.

    Only a few may give way. Where many wait, what they wait for is away, and the whole topic would move to the table.
    A batch has no verdict but is split, so that the event shows which is to give way; not while it is only postponed.
    """
    mine = [delivery for delivery in failing if delivery.assignment is assignment]
    if len(mine) > max(1, len(assignment.window) // _FEW):
        return []
    found: list[Delivery] = []
    for delivery in mine:
        if delivery.timer is None or delivery.error is None or delivery.verdict is not None:
            continue
        if delivery.again_at - (delivery.began_at or 0.0) < _PATIENCE_SECONDS:
            continue
        if delivery.postponed == 0 and delivery.split():
            delivery.timer.cancel()
            found.append(delivery)
        elif delivery.record.key is not None:
            delivery.timer.cancel()
            due_seconds = max(0.0, delivery.again_at - now)
            # Where its key has no order to keep, the event is set aside without it.
            delivery.judge(Verdict(delivery.error, "later" if delivery.released else "park", due_seconds))
            found.append(delivery)
    return found


def _is_parked(assignment: Assignment, key: bytes | None) -> bool:
    return bool(assignment.parked) and key is not None and queue_of(key) in assignment.parked
