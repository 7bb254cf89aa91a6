"""From records to handler calls: in order for each key, side by side for different keys, committed only when finished.

The benchmark row is `events/dispatch`: microseconds an event beyond validating it and calling the handler. What it
taught:

- **Callers, not a task for each event.** A task with a fresh context costs more than reading the event. A few
  long-lived callers take events from `Turns`, and one goes on with what waits behind the key that it works on. So equal
  keys are serial, different keys never wait for each other, and there are never more calls at once than callers.
- **No object for an event.** A record is known by itself: as the first of its partition's window, by identity where it
  ends before that. A `Delivery` is made when it fails.
- **Type and version are read by position**, since our publisher writes them first, and by name for everything else: a
  dict of the headers costs as much as the call.
- **A fresh context for each event, without creating one.** A caller binds the event's context over the last one's, and
  reads it out of the headers only for a handler that asks: most do not. If a handler sets a context variable of its own
  and leaves it set, the caller would carry it to the next event; comparing two `copy_context()` is nearly free, and a
  caller that was changed is replaced.
- **What few handlers ask for costs the others nothing.** Those that take many events at once, have few places or no
  order are not found by position: their events take the way by name, which sees to that (`_batches`, `_places`).
- **A retry waits in a timer, not in a caller.** Its key stays busy meanwhile: order is kept and no caller is lost to a
  slow key.

What may be committed is a matter of the *window*: records in the order in which they were handed out. A finished one
leaves it only when all before it have; whatever left last is where a restart resumes, whichever numbers lie between.
Each assignment of a partition has a window of its own, so that work from before a partition was lost and regained
finishes into a window that nobody commits any more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from contextvars import copy_context
from functools import partial

from mainstay.core import Clock, Context, Later, rebind, spawn
from mainstay.events._ages import Ages
from mainstay.events._batches import Batches
from mainstay.events._delivery import Assignment, Delivery
from mainstay.events._failure import Failures, that_give_way
from mainstay.events._matching import Matching
from mainstay.events._pausing import Pausing
from mainstay.events._places import Caller, Places
from mainstay.events._routes import Handling, Route, unreadable
from mainstay.events._sparing import said
from mainstay.events._turns import Turns
from mainstay.events.metadata import TYPE, VERSION, Headers, Metadata, Record, context_of

_log = logging.getLogger("mainstay.events")

_TURNS = 64
"""Events that a caller may handle without giving the loop to others."""
_CANCELLATIONS = 3
"""How often a handler that swallows its cancellation is cancelled, a second apart, before it is left behind."""


class Dispatcher:
    """Calls one group's handlers; `ages` says how old is what it has in hand.

    Args:
        group: the consumer group.
        routes: by event type.
        concurrency: the most calls at once.
        failures: decides what becomes of an event that could not be handled.
        clock: measures ages and waits between attempts.
    """

    def __init__(
        self, group: str, routes: Mapping[str, Route], *, concurrency: int, failures: Failures, clock: Clock
    ) -> None:
        self._group = group
        self._concurrency = concurrency
        self._failures = failures
        self._clock = clock
        self._turns = Turns()
        self._matching = Matching(group, {name.encode(): route for name, route in routes.items()}, failures)
        self._batches = Batches(group, self._matching, self._turns, self._wake, clock)
        self._places = Places(self._turns, self._batches, self._wake)
        self._idle: list[asyncio.Future[None]] = []
        self._callers: set[Caller] = set()
        self._progress: asyncio.Future[None] | None = None
        self._crash: BaseException | None = None
        self._waking = False  # a caller has been called and has not begun yet
        self.ages = Ages(self._callers, failures.failing, clock)

    def feed(self, assignment: Assignment, records: Collection[Record]) -> None:
        """Take records of a partition, in its order."""
        self._failures.fetched()
        self._turns.add(assignment, records)
        self._wake()

    def feed_one(self, delivery: Delivery) -> None:
        """Take an event of which something is known before its first call here."""
        delivery.assignment.known[id(delivery.record)] = delivery
        self.feed(delivery.assignment, [delivery.record])

    def heed(self, pausing: Pausing) -> None:
        """Call what a person has not paused, and nothing else from now on."""
        self._turns.held = pausing.whole is not None
        self.ages.hold(self.held)
        self._matching.heed(pausing)
        self._wake()

    @property
    def held(self) -> bool:
        """Whether the group as a whole is paused."""
        return self._turns.held

    async def progress(self, seconds: float) -> None:
        """Return when some delivery has finished since the call, at the latest after `seconds`."""
        if self._progress is None:
            self._progress = asyncio.get_running_loop().create_future()
        await asyncio.wait((self._progress,), timeout=seconds)

    async def settle(self, assignments: Collection[Assignment], seconds: float | None) -> bool:
        """Wait until nothing of `assignments` is in flight; False when `seconds` were not enough."""
        end = None if seconds is None else self._clock.monotonic() + seconds
        while any(assignment.window for assignment in assignments):
            self.check()
            left = 1.0 if end is None else end - self._clock.monotonic()
            if left <= 0:
                return False
            await self.progress(min(left, 1.0))
        return True

    async def drain(self, assignments: Collection[Assignment], seconds: float) -> bool:
        """Begin nothing more of `assignments` but batches that are gathered; False when the calls need longer."""
        self._batches.hand_over_last(() if self.held else assignments)
        for assignment in assignments:
            assignment.open = False
        end = self._clock.monotonic() + seconds
        while self._running(assignments) or (not self.held and self._batches.has_last(assignments)):
            left = end - self._clock.monotonic()
            if left <= 0:
                return False
            await self.progress(min(left, 1.0))
        self._batches.forget(assignments)
        return True

    async def cancel(self, assignments: Collection[Assignment]) -> None:
        """Cancel the calls of `assignments` that still run."""
        for assignment in assignments:
            assignment.open = False
        self._batches.forget(assignments)
        await self._end(self._running(assignments))
        self._wake()

    async def stop(self) -> None:
        """Cancel every caller; nothing is called any more."""
        await self._end(list(self._callers))

    def check(self) -> None:
        """Raise what stopped a caller: a defect here, never an error of a handler."""
        if self._crash is not None:
            raise self._crash

    def _running(self, assignments: Collection[Assignment]) -> list[Caller]:
        return [caller for caller in self._callers if caller.assignment in assignments]

    async def _end(self, callers: Sequence[Caller]) -> None:
        tasks: list[asyncio.Task[None]] = []
        for caller in callers:
            caller.stopping = True
            self._callers.discard(caller)
            if caller.task is not None:
                caller.task.cancel()
                tasks.append(caller.task)
        for _ in range(_CANCELLATIONS):
            if tasks:
                _, late = await asyncio.wait(tasks, timeout=1.0)
                tasks = list(late)
            for task in tasks:
                task.cancel()
        if tasks:  # what it still does is its own affair: nothing of it is committed, and an inbox refuses its effects
            _log.error("group %s: %d handlers go on although they were cancelled", self._group, len(tasks))

    def _wake(self) -> None:
        """See that a caller is on its way while something waits; it sees to the next one itself.

        Where no handler ever waits for anything, one caller does it all, and waking the others is half of the cost.
        """
        if self._waking or not self._turns.waiting:
            return
        while self._idle:
            parked = self._idle.pop()
            if not parked.done():
                self._waking = True
                parked.set_result(None)
                return
        if len(self._callers) >= self._concurrency:
            return
        self._waking = True
        caller = Caller()
        self._callers.add(caller)
        caller.task = spawn(self._work(caller), name=f"events.{self._group}.handler")
        caller.task.add_done_callback(lambda task: self._left(caller, task))

    def _left(self, caller: Caller, task: asyncio.Task[None]) -> None:
        self._callers.discard(caller)
        caller.end_span("cancelled")
        self._places.leave(caller)
        self._waking = False
        if not caller.stopping and not task.cancelled() and task.exception() is not None:
            self._crash = task.exception()
        self._step()

    def _step(self) -> None:
        """Tell whoever waits for progress."""
        progress, self._progress = self._progress, None
        if progress is not None and not progress.done():
            progress.set_result(None)

    async def _work(self, caller: Caller) -> None:
        turns, heads, monotonic = self._turns, self._turns.heads, self._clock.monotonic
        routes, spans = self._matching.at_once, self._failures.spans
        takes_last, match, admit = self._batches.takes_last, self._matching.match, self._places.admit
        loop = asyncio.get_running_loop()
        calls = 0
        self._waking = False
        while True:
            while (head := next(heads)) is None:
                parked = loop.create_future()
                self._idle.append(parked)
                await parked
                self._waking = False
            if not self._waking:
                self._wake()
            record: Record | None
            delivery: Delivery | None
            assignment, record, delivery = head
            # One that is not open is given up: another process will handle this and all that follows.
            while record is not None and (assignment.open or takes_last(delivery)):
                caller.assignment = assignment
                if assignment.known and delivery is None:
                    delivery = assignment.known.pop(id(record), None)
                seen, headers = record, record.headers
                route: Route | None = None
                handling: Handling | None = None
                error: Exception | None = None
                if delivery is None and not assignment.parked and len(headers) > 1:
                    (first, name), (second, version) = headers[0], headers[1]
                    if first == TYPE and second == VERSION and (route := routes.get(name or b"")) is not None:
                        handling = route.versions.get(version or b"")
                if handling is None:
                    seen, route, handling, error = found = match(assignment, record, delivery)
                    if handling is not None and (handling.batching is not None or handling.limits is not None):
                        delivery = admit(caller, assignment, record, found, delivery)
                        if delivery is None:
                            record = caller.assignment = None
                            calls += 1
                            if not calls % _TURNS:
                                await asyncio.sleep(0)
                            continue
                if handling and delivery and delivery.before_call and not await self._places.begin(caller, delivery):
                    break
                clean = True
                if route is not None and handling is not None:
                    try:
                        event = handling.validate(seen.value or b"")
                    except Exception as invalid:  # noqa: BLE001  an event's own validator may raise anything
                        error = unreadable(route.type, invalid)
                    else:
                        rebind(Later(_context_of, seen.headers))
                        if spans is not None:
                            seen_all, attempt = (delivery.parts(seen), delivery.attempt) if delivery else ((seen,), 1)
                            caller.span = spans.handling(seen_all, self._group, attempt)
                        before = copy_context()
                        started = caller.began_at = monotonic()
                        try:
                            if handling.wants_metadata:
                                attempt = 1 if delivery is None else delivery.attempt
                                await handling.call(event, Metadata(seen, group=self._group, attempt=attempt))
                            else:
                                await handling.call(event)
                        except Exception as failure:  # noqa: BLE001  whatever a handler raises is its verdict on the event
                            error = failure
                        except BaseExceptionGroup as several:
                            error = _several(several)
                        except asyncio.CancelledError:
                            if caller.stopping:
                                caller.assignment = None
                                self._step()
                                raise
                            error = _own_cancellation()
                        else:
                            route.seconds.observe(monotonic() - started)
                        clean = copy_context() == before
                following: Record | None = None
                if error is not None:
                    delivery = delivery or Delivery(assignment, record)
                    if not await self._failed(caller, delivery, route, handling, error):
                        following = self._finished(delivery)
                elif delivery is not None:
                    self._places.leave(caller)
                    following = self._finished(delivery)
                else:
                    assignment.finish(record)
                    if record.key is not None:
                        following = assignment.next_of(record.key)
                caller.assignment = caller.began_at = None
                if caller.span is not None:
                    caller.end_span()
                if self._progress is not None:
                    self._step()
                # A handler may have gone on to its end although it was cancelled: its caller does not.
                if caller.stopping or turns.held or not clean:
                    if following is not None:
                        turns.add_again((assignment, following, None))
                    self._callers.discard(caller)
                    self._wake()
                    return
                record, delivery = following, None
                calls += 1
                if not calls % _TURNS:
                    await asyncio.sleep(0)

    async def _failed(
        self, caller: Caller, delivery: Delivery, route: Route | None, handling: Handling | None, error: Exception
    ) -> bool:
        """Deal with a failure; whether the event is handed out again."""
        self._places.leave(caller)
        now, began = self._clock.monotonic(), caller.began_at
        if route is not None and began is not None:
            route.failed_seconds.observe(now - began)
        if delivery.began_at is None:
            delivery.began_at = now if began is None else began
            self._failures.failing.add(delivery)
        if self._failures.spans is not None:
            caller.span = self._failures.spans.failed(caller.span, delivery, self._group, error)
        again = await self._failures.failed(delivery, route, handling, error)
        if again is None:
            return False
        delivery.again_at = self._clock.monotonic() + again.after_seconds
        delivery.timer = self._clock.call_later(again.after_seconds, partial(self._hand_out, delivery))
        return True

    def _finished(self, delivery: Delivery) -> Record | None:
        """Note the end of what had failed, or was known before its call; what waits behind its key."""
        delivery.done = True
        self._failures.ended(delivery)
        return delivery.finish()

    def make_room(self, assignment: Assignment, *, parks: bool) -> None:
        """Let go what holds back the others of a full window; see `that_give_way`."""
        self._batches.hand_over(assignment)
        for delivery in that_give_way(assignment, self._failures.failing, self._clock.monotonic()) if parks else ():
            end = self._finished if delivery.verdict is None else self._hand_out  # the parts are tried by themselves
            end(delivery)

    def _hand_out(self, delivery: Delivery) -> None:
        delivery.timer = None
        if delivery.assignment.open:
            self._turns.add_again((delivery.assignment, delivery.record, delivery))
            self._wake()
        else:
            self._failures.ended(delivery)


def _own_cancellation() -> Exception:
    """A cancellation that was not asked of the caller came from inside the handler: a failure, not an end."""
    task = asyncio.current_task()
    while task is not None and task.cancelling():
        task.uncancel()
    return RuntimeError("the handler was cancelled from inside: it awaited something that was cancelled")


def _several(errors: BaseExceptionGroup[BaseException]) -> Exception:
    """A group of errors that is none itself, since one of them is a cancellation or the like: a failure, not an end.

    Raises:
        BaseExceptionGroup: one of them ends the process.
    """
    if errors.subgroup((KeyboardInterrupt, SystemExit)) is not None:
        raise errors
    failure = RuntimeError(f"the handler raised {said(errors)}")
    failure.__cause__ = errors
    return failure


def _context_of(headers: Headers) -> Context:
    return context_of(dict(headers))
