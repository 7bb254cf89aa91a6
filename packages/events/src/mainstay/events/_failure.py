"""What becomes of an event that could not be handled: tried again after a wait, parked with its key, a dead letter."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from mainstay.core import Clock, ConfigurationError, Outcome, RetryState
from mainstay.database import CommitUnknown
from mainstay.events._decoding import NO_EVENT, OURS, Decoders, will_pass
from mainstay.events._delivery import Assignment, Delivery, Verdict
from mainstay.events._metrics import FAILED, HANDED_OVER, PARKED, SKIPPED
from mainstay.events._parking import Parking
from mainstay.events._routes import Handling, Route, Unknown
from mainstay.events._sparing import Sparing
from mainstay.events.errors import DecodeError, KeyIsParkedError, NotHandledHereError
from mainstay.events.metadata import TYPE, kind_of

if TYPE_CHECKING:
    from mainstay.events._spans import Spans

_log = logging.getLogger("mainstay.events")

_STORE_SECONDS = (1.0, 30.0)
"""The first and the longest wait before what could not be stored is tried again."""

_STOPPED_SECONDS = 5.0
_NOT_READ_SECONDS = 1.0

_FEW = 20
"""Of so many events in a full window one may hold back the others, and its key is parked then."""
_PATIENCE_SECONDS = 5.0
"""How long after its first call an event may be tried again before its key is parked for that."""


class Again(NamedTuple):
    """The event is handed out once more; until then its key waits.

    Attributes:
        after_seconds: how much later.
    """

    after_seconds: float


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
        skipped: counts events that the group has nothing to do with.
        stopped: events at which their partitions wait, and why.
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
        self._clock = clock
        self._sparing = Sparing(clock)
        self._unknown = Unknown() if unknown is None else unknown
        self.spans = spans
        self.skipped = SKIPPED.labels(group)
        self.stopped: dict[Delivery, str] = {}

    async def failed(
        self, delivery: Delivery, route: Route | None, handling: Handling | None, error: Exception
    ) -> Again | None:
        """Deal with a failure; None when the event needs nothing more here: it is parked, or a dead letter."""
        if error is KEY_IS_PARKED:
            return await self._append(delivery)
        self.stopped.pop(delivery, None)
        if delivery.refused is None and handling is None and will_pass(error):
            later = self._not_read_yet(delivery, error)
            if not delivery.assignment.queue:
                return later
            # The first of a queue, which others may be worked on instead of.
            delivery.judge(Verdict(error, parks=True, due_seconds=later.after_seconds))
        elif delivery.refused is None and handling is None:
            kind = "it"
            try:
                kind = self.decoders.kind_of(delivery.record)
                elsewhere = self._parking is not None and await self._parking.handled.is_somebodys(kind)
            except Exception:  # noqa: BLE001  any error: the event must not be passed over
                return self._not_stored(delivery, f"it is not known who handles {kind}")
            if elsewhere:
                if not delivery.assignment.queue and delivery.record.key in delivery.assignment.parked:
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
                    return self._stop(delivery, kind)
        if delivery.verdict is None:
            if route is not None:
                FAILED.labels(route.type, self._group).inc()
            again = self._again(delivery, route, handling, error)
            if again is not None and not delivery.assignment.queue:
                delivery.error = error
                return again
            if delivery.split():
                self._say_split(delivery, error)
                return None
            verdict = self._verdict(delivery, route, handling, error, again)
            delivery.judge(verdict)
            delivery.waited = 0.0 if again is None else delivery.waited
        else:
            verdict = delivery.verdict
        try:
            await self._carry_out(delivery, verdict)
        except Exception:  # noqa: BLE001  whatever it is, the event must not be lost
            # Committing now would lose the event. It stays unfinished, and so does everything behind it.
            return self._not_stored(delivery, "what could not be handled cannot be stored")
        if self.spans is not None:
            self.spans.fate("parked" if verdict.parks else "dead_letter")
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

    def _handed_over(self, kind: str) -> Verdict:
        HANDED_OVER.labels(self._group).inc()
        if self._sparing.due(kind) is not None:
            _log.info(
                "group %s has no handler for %s in this process: its events wait for one that has", self._group, kind
            )
        error = NotHandledHereError(f"the process that read the event has no handler for {kind}; another has")
        return Verdict(error, parks=True, due_seconds=0.0)

    def _stop(self, delivery: Delivery, kind: str) -> Again:
        """Leave the event where it is, and look again after a while: another process may have come that handles it."""
        if self._sparing.due(f"stops {kind}") is not None:
            _log.error("group %s stops at %s: it has no handler for %s", self._group, delivery.record_name, kind)
        self.stopped[delivery] = f"no handler for {kind} at {delivery.record_name}"
        return Again(_STOPPED_SECONDS)

    def _say_split(self, delivery: Delivery, error: Exception) -> None:
        if self._sparing.due(f"splits {type(error).__name__}") is not None:
            _log.warning("%s in group %s failed at attempt %d: each half is tried by itself", delivery.record_name,
                         self._group, delivery.attempt, exc_info=error)  # fmt: skip

    def _verdict(
        self, delivery: Delivery, route: Route | None, handling: Handling | None, error: Exception, again: Again | None
    ) -> Verdict:
        if again is not None:  # the first of a queue, whose attempts are far apart and outlive this process
            return Verdict(error, parks=True, due_seconds=again.after_seconds)
        # Without a handling it is of a version that nobody here reads; without a route, no event of the group's at all.
        asked = route is not None and (route.parks if handling is None else handling.parks)
        parks = asked and self._parking is not None and delivery.record.key is not None
        fate = "its key is parked" if parks else "becomes a dead letter"
        _log.error("%s in group %s failed, and %s, at attempt %d", delivery.record_name, self._group, fate,
                   delivery.attempt, exc_info=error)  # fmt: skip
        return Verdict(error, parks=parks)

    async def _carry_out(self, delivery: Delivery, verdict: Verdict) -> None:
        assignment, record = delivery.assignment, delivery.record
        if not verdict.parks:
            await self._bury(delivery, verdict.error)
            return
        assert self._parking is not None and self._commit is not None  # noqa: S101, PT018  nothing else makes such a verdict
        if assignment.queue:
            await self._parking.keep(delivery, verdict)
            delivery.kept = True
            return
        key = record.key
        before = [each for each in assignment.behind.values() if each.key == key and key is not None]
        await self._commit(assignment)  # and what has left the window is read by nobody again
        if not assignment.open:
            msg = f"{assignment} is another process' now"
            raise RuntimeError(msg)
        age = delivery.aged + self._clock.monotonic() - (delivery.began_at or 0.0)
        await self._parking.park(delivery, verdict, age, before)
        if key is not None:
            assignment.parked.add(key)
        PARKED.labels(self._group).inc()

    async def _append(self, delivery: Delivery) -> Again | None:
        assert self._parking is not None  # noqa: S101  no key is parked elsewhere
        try:
            appended = await self._parking.append(delivery.assignment, delivery.record)
        except Exception:  # noqa: BLE001  as above
            return self._not_stored(delivery, "an event of a parked key cannot be stored")
        if appended:
            return None
        delivery.assignment.parked.discard(delivery.record.key or b"")
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

    def _again(
        self, delivery: Delivery, route: Route | None, handling: Handling | None, error: Exception
    ) -> Again | None:
        # Nothing happened, and it will pass: the database is away, a breaker is open. That is no verdict on the
        # event and costs no attempt: an outage of a minute must not turn a minute's events into dead letters. A
        # mistake in how the App is put together is none either: the event waits until that is mended.
        postponed = isinstance(error, ConfigurationError) or will_pass(error)
        if isinstance(error, CommitUnknown):
            # Elsewhere it would be unknown whether to try again. An event may always be handled once more.
            error.retryable = True
        delay = self._delay(delivery, handling, error, postponed=postponed)
        if delay is None:
            return None
        left_out = self._sparing.due(f"{type(error).__name__} {route and route.type}")
        if left_out is not None:
            more = f", as did {left_out} others meanwhile" if left_out else ""
            _log.warning(
                "%s in group %s failed at attempt %d%s, again in %.2f s", delivery.record_name, self._group,
                delivery.attempt, more, delay, exc_info=error,
            )  # fmt: skip
        if postponed:
            delivery.postponed += 1
        else:
            delivery.attempt += 1
        delivery.waited += delay
        return Again(delay)

    def _delay(
        self, delivery: Delivery, handling: Handling | None, error: Exception, *, postponed: bool
    ) -> float | None:
        if handling is None or isinstance(error, DecodeError):
            return None
        age = delivery.aged + self._clock.monotonic() - (delivery.began_at or 0.0)
        number = delivery.postponed + 1 if postponed else delivery.attempt
        state = RetryState(number, Outcome.of_error(error), age, delivery.waited)
        if not postponed:
            return handling.retry.delay_seconds(state)
        if not isinstance(error, ConfigurationError) and not handling.retry.retry(state):
            return None
        hint: float = getattr(error, "retry_after_seconds", None) or 0.0
        return max(handling.retry.wait(state), hint)


def that_give_way(assignment: Assignment, failing: Iterable[Delivery], now: float) -> list[Delivery]:
    """Of the failing events of a partition whose window is full those whose keys are to be parked, with that verdict.

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
            delivery.judge(Verdict(delivery.error, parks=True, due_seconds=max(0.0, delivery.again_at - now)))
            found.append(delivery)
    return found
