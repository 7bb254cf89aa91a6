"""From records to handler calls: in order for each key, side by side for different keys, committed only when finished.

The benchmark row is `events/dispatch`: microseconds an event beyond validating it and calling the handler. What it
taught:

- **Callers, not a task for each event.** A task with a fresh context costs more than reading the event. A few
  long-lived callers take *chains* from a queue; a chain is what waits for one key, and one caller works it off.
  So equal keys are serial, different keys never wait for each other, and there are never more calls at once than
  callers.
- **A chain is a linked list through the deliveries**, and its tail is in a dict by key. A deque for each key costs as
  much as the call.
- **A fresh context for each event, without creating one.** A caller binds the event's context over the last one's, and
  reads it out of the headers only for a handler that asks: most do not. If a handler sets a context variable of its own
  and leaves it set, the caller would carry it to the next event; comparing two `copy_context()` is nearly free, and a
  caller that was changed is replaced.
- **Partitions take turns.** What can be called next is taken from each in small portions, so that an event does not
  wait for the backlog of another partition.
- **A retry waits in a timer, not in a caller.** The chain stays closed meanwhile, since the delivery is still its head:
  order is kept and no caller is lost to a slow key.

What may be committed is a matter of the *window*: deliveries in the order in which they were handed out. A finished one
leaves it only when all before it have; whatever left last is where a restart resumes, whichever numbers lie between.
Each assignment of a partition has a window of its own, so that work from before a partition was lost and regained
finishes into a window that nobody commits any more.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextvars import copy_context
from functools import partial

from pydantic import ValidationError

from mainstay.core import Clock, Later, rebind, spawn
from mainstay.events._delivery import Assignment, Delivery, Handling, Route
from mainstay.events._failure import KEY_IS_PARKED, Again, Failures, that_give_way
from mainstay.events._structured import understood
from mainstay.events.errors import DecodeError
from mainstay.events.metadata import ONLY_GROUP, TYPE, VERSION, Metadata, Record, context_of

_log = logging.getLogger("mainstay.events")

_PORTION = 16
"""Events that are taken from a partition before the next one has its turn."""
_TURNS = 64
"""Events that a caller may handle without giving the loop to others."""
_CANCELLATIONS = 3
"""How often a handler that swallows its cancellation is cancelled, a second apart, before it is left behind."""


class _Caller:
    __slots__ = ("began_at", "delivery", "stopping", "task")

    def __init__(self) -> None:
        self.began_at = 0.0
        self.delivery: Delivery | None = None
        self.stopping = False
        self.task: asyncio.Task[None] | None = None


class Dispatcher:
    """Calls one group's handlers.

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
        self._routes = {name.encode(): route for name, route in routes.items()}
        self._concurrency = concurrency
        self._failures = failures
        self._clock = clock
        self._ready: deque[Delivery] = deque()  # the portion whose turn it is
        self._turns: deque[Assignment] = deque()  # those with something that waits
        self._idle: list[asyncio.Future[None]] = []
        self._callers: set[_Caller] = set()
        self._progress: asyncio.Future[None] | None = None
        self._failing: set[Delivery] = set()
        self._crash: BaseException | None = None

    def feed(self, assignment: Assignment, records: Iterable[Record]) -> None:
        """Take records of a partition, in its order."""
        window, tails, ready = assignment.window, assignment.tails, assignment.waiting
        had_turns = bool(ready)
        self._failures.fetched()
        for record in records:
            delivery = Delivery(assignment, record)
            window.append(delivery)
            key = record.key
            if key is None:
                ready.append(delivery)
            else:
                tail = tails.get(key)
                tails[key] = delivery
                if tail is None:
                    ready.append(delivery)
                else:
                    tail.next = delivery
        if ready and not had_turns:
            self._turns.append(assignment)
        self._wake()

    def oldest_seconds(self, assignments: Iterable[Assignment]) -> float:
        """How long ago the first call of an event began that is not finished, 0.0 without one.

        An event that only waits for those before it is no sign of anything but load.
        """
        mine = set(assignments)
        running = [
            caller.began_at
            for caller in self._callers
            if caller.delivery is not None and caller.delivery.assignment in mine and caller.delivery.began_at is None
        ]
        failing = [each.began_at for each in self._failing if each.assignment in mine and each.began_at is not None]
        return self._clock.monotonic() - min(running + failing) if running or failing else 0.0

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
        """Start nothing more of `assignments`, and wait for the calls that run; False when they need longer."""
        for assignment in assignments:
            assignment.open = False
        end = self._clock.monotonic() + seconds
        while self._running(assignments):
            left = end - self._clock.monotonic()
            if left <= 0:
                return False
            await self.progress(min(left, 1.0))
        return True

    async def cancel(self, assignments: Collection[Assignment]) -> None:
        """Cancel the calls of `assignments` that still run."""
        for assignment in assignments:
            assignment.open = False
        await self._end(self._running(assignments))
        self._wake()

    async def stop(self) -> None:
        """Cancel every caller; nothing is called any more."""
        await self._end(list(self._callers))

    def check(self) -> None:
        """Raise what stopped a caller: a defect here, never an error of a handler."""
        if self._crash is not None:
            raise self._crash

    def _running(self, assignments: Collection[Assignment]) -> list[_Caller]:
        return [
            caller
            for caller in self._callers
            if caller.delivery is not None and caller.delivery.assignment in assignments
        ]

    async def _end(self, callers: Sequence[_Caller]) -> None:
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

    def _next_portion(self) -> bool:
        """Make the next partition's heads of chains ready; False when nothing waits."""
        while self._turns:
            assignment = self._turns.popleft()
            waiting = assignment.waiting
            self._ready.extend(waiting.popleft() for _ in range(min(_PORTION, len(waiting))))
            if waiting:
                self._turns.append(assignment)
            if self._ready:
                return True
        return False

    def _wake(self) -> None:
        waiting = len(self._ready) + sum(len(assignment.waiting) for assignment in self._turns)
        while waiting and self._idle:
            parked = self._idle.pop()
            if not parked.done():
                parked.set_result(None)
                waiting -= 1
        while waiting and len(self._callers) < self._concurrency:
            self._hire()
            waiting -= 1

    def _hire(self) -> None:
        caller = _Caller()
        self._callers.add(caller)
        caller.task = spawn(self._work(caller), name=f"events.{self._group}.handler")
        caller.task.add_done_callback(lambda task: self._left(caller, task))

    def _left(self, caller: _Caller, task: asyncio.Task[None]) -> None:
        self._callers.discard(caller)
        if not caller.stopping and not task.cancelled() and task.exception() is not None:
            self._crash = task.exception()
        self._step()

    def _step(self) -> None:
        """Tell whoever waits for progress."""
        progress, self._progress = self._progress, None
        if progress is not None and not progress.done():
            progress.set_result(None)

    async def _work(self, caller: _Caller) -> None:
        ready, routes, monotonic = self._ready, self._routes, self._clock.monotonic
        loop = asyncio.get_running_loop()
        turns = 0
        while True:
            while not ready and not self._next_portion():
                parked = loop.create_future()
                self._idle.append(parked)
                await parked
            delivery: Delivery | None = ready.popleft()
            while delivery is not None:
                assignment = delivery.assignment
                if not assignment.open:  # given up: another process will handle this and all that follows
                    break
                caller.delivery = delivery
                caller.began_at = 0.0
                record = delivery.record
                headers = dict(record.headers)
                route = routes.get(headers.get(TYPE) or b"")
                if route is None and not headers.get(TYPE):
                    record = understood(record)
                    headers = dict(record.headers)
                    route = routes.get(headers.get(TYPE) or b"")
                error: Exception | None = delivery.refused
                handling: Handling | None = None
                clean = True
                if error is None and (route is None or ONLY_GROUP in headers):
                    route, error = self._wanted(route, headers)
                if route is not None and error is None and assignment.parked and record.key in assignment.parked:
                    error = KEY_IS_PARKED
                if route is not None and error is None:
                    try:
                        version = headers.get(VERSION) or b"1.0"
                        handling = route.versions.get(version) or route.handling(version)
                        event = handling.validate(record.value or b"")
                    except ValidationError as invalid:
                        error = DecodeError(_explain(route.type, invalid))
                    except DecodeError as unreadable:
                        error = unreadable
                    except Exception as defect:  # noqa: BLE001  an event's own validator may raise anything
                        error = DecodeError(f"{route.type} cannot be read: its class raised {type(defect).__name__}")
                        error.__cause__ = defect
                    else:
                        rebind(Later(context_of, headers))
                        before = copy_context()
                        started = caller.began_at = monotonic()
                        try:
                            if handling.wants_metadata:
                                meta = Metadata(record, group=self._group, attempt=delivery.attempt, headers=headers)
                                await handling.call(event, meta)
                            else:
                                await handling.call(event)
                        except Exception as failure:  # noqa: BLE001  whatever a handler raises is its verdict on the event
                            error = failure
                        except asyncio.CancelledError:
                            if caller.stopping:
                                caller.delivery = None
                                self._step()
                                raise
                            error = _own_cancellation()
                        else:
                            route.seconds.observe(monotonic() - started)
                        clean = copy_context() == before
                following: Delivery | None = None
                again: Again | None = None
                if error is not None:
                    if delivery.began_at is None:
                        delivery.began_at = caller.began_at or monotonic()
                        self._failing.add(delivery)
                    again = await self._failures.failed(delivery, route, handling, error)
                if again is not None:
                    delivery.again_at = monotonic() + again.after_seconds
                    delivery.timer = self._clock.call_later(again.after_seconds, partial(self._hand_out, delivery))
                else:
                    delivery.done = True
                    if delivery.began_at is not None:
                        self._failing.discard(delivery)
                    window = assignment.window
                    if window and window[0] is delivery:
                        while window and window[0].done:
                            assignment.finished = window.popleft().record
                    following = delivery.next
                    if following is None and record.key is not None:
                        del assignment.tails[record.key]
                caller.delivery = None
                if self._progress is not None:
                    self._step()
                if caller.stopping:  # the handler went on to its end although it was cancelled: this caller does not
                    if following is not None:
                        ready.appendleft(following)
                    self._wake()
                    return
                if not clean:
                    if following is not None:
                        ready.appendleft(following)
                    self._callers.discard(caller)
                    self._wake()
                    return
                delivery = following
                turns += 1
                if not turns % _TURNS:
                    await asyncio.sleep(0)

    def _wanted(
        self, route: Route | None, headers: Mapping[str, bytes | None]
    ) -> tuple[Route | None, Exception | None]:
        """Whether the group has to do with the record at all; topics carry several types, so skipping is normal."""
        only = headers.get(ONLY_GROUP)
        if only is not None and only != self._group.encode():
            self._failures.skipped.inc()
            return None, None
        if route is None:
            return None, self._failures.without_handler(headers)
        return route, None

    def make_room(self, assignment: Assignment) -> None:
        """Park the keys of a full window that hold back the others; see `that_give_way`."""
        for delivery in that_give_way(assignment, self._failing, self._clock.monotonic()):
            self._hand_out(delivery)

    def _hand_out(self, delivery: Delivery) -> None:
        delivery.timer = None
        if delivery.assignment.open:
            self._ready.append(delivery)
            self._wake()
        else:
            self._failing.discard(delivery)


def _own_cancellation() -> Exception:
    """A cancellation that was not asked of the caller came from inside the handler: a failure, not an end."""
    task = asyncio.current_task()
    while task is not None and task.cancelling():
        task.uncancel()
    return RuntimeError("the handler was cancelled from inside: it awaited something that was cancelled")


def _explain(type: str, invalid: ValidationError) -> str:
    """What is wrong with which field; never the value, which may be anybody's secret."""
    problems = (
        f"{'.'.join(map(str, problem['loc'])) or 'the value'}: {problem['msg']}"
        for problem in invalid.errors(include_input=False, include_url=False, include_context=False)[:5]
    )
    return f"{type} cannot be read: {'; '.join(problems)}"
