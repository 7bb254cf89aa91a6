"""One execution of a run: who told it to stop, what is at work, and for what it waits.

User code can catch, wrap or outlive an exception that ends an execution. So what ends it is kept here first and raised
second: every primitive that is called later raises the same again, and what the function makes of it decides nothing.

Three rules:

- A stop is raised only when no step is being executed: a `TaskGroup` in the function cancels the siblings of a branch
  that raises, and a cancelled step is one of which it is unknown whether it happened. A cancellation of the run ends
  those that say `cancellable`.
- The run leaves the worker's memory only when all of its branches wait, and each of them for long. A branch that wakes
  goes on independently of the others.
- A function that does not end although it was told to is closed.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, TypeVar

from mainstay.core import Clock, Timer, cancelled_from_outside
from mainstay.workflow._reach import Reach
from mainstay.workflow.errors import CancelRequested, ControlFlow, Ended, Lost, Suspended

_log = logging.getLogger("mainstay.workflow")

T = TypeVar("T")

_LEASE_LOOK_SECONDS = 0.05
_GRACE_SECONDS = 5.0  # how long a function may take to clean up
_REPEATS = 1_000  # so often a function may swallow a stop
_NEVER = float("inf")


class Wait:
    """One wait of one branch.

    Attributes:
        due: when it ends by itself, on the clock's monotonic time.
        leaves: from when on the run need not stay in memory for it.
        news: whether something new for the run ends it, too.
    """

    __slots__ = ("due", "ended", "leaves", "news")

    def __init__(self, due: float, leaves: float, *, news: bool) -> None:
        self.due = due
        self.leaves = leaves
        self.news = news
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def end(self) -> None:
        """Let the branch go on."""
        if not self.ended.done():
            self.ended.set_result(None)


class Execution:
    """What may begin, wait and end in one execution of a run.

    Args:
        held: whether the worker's lease is good, by this machine's monotonic clock.
        may_cancel: whether a cancellation that was asked for can be carried out at this moment.

    Attributes:
        stopped: what ends this execution, once there is something.
        active: the branches that do not wait.
        overdue: the function has had all the time that it gets to end.
        reach: the attempts that a cancellation ends at once.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        held: Callable[[], bool],
        may_cancel: Callable[[], bool],
        suspend_after_seconds: float,
    ) -> None:
        self.stopped: ControlFlow | None = None
        self.active = 1
        self._clock = clock
        self._held = held
        self._may_cancel = may_cancel
        self._suspend_after_seconds = suspend_after_seconds
        self._at_work = 0
        self._repeats = 0
        self.overdue = False
        self.reach = Reach()
        self._waits: set[Wait] = set()
        self._quiet: set[asyncio.Future[None]] = set()
        self._leaving: Timer | None = None
        self._grace: Timer | None = None
        self._task: asyncio.Task[Any] | None = None

    # Being told

    def stop(self, signal: ControlFlow) -> None:
        """End this execution at the next boundary; waits end at once. The first signal counts, or a lost lease."""
        if self.stopped is None or isinstance(signal, Lost):
            self.stopped = signal
        self.wake()

    def look(self) -> None:
        """There is something new for the run: the waits that it may concern look again."""
        for wait in self._waits:
            if wait.news:
                wait.end()

    def wake(self) -> None:
        """Let every wait see whether it is still to be waited for, and every attempt whether it is to go on."""
        for wait in self._waits:
            wait.end()
        if self.cancelled:
            self.reach.interrupt()

    @property
    def cancelled(self) -> bool:
        """Whether the run is to be cancelled, or is not this worker's any more."""
        return self._may_cancel() or isinstance(self.stopped, CancelRequested | Lost)

    def ended_from_outside(self) -> bool:
        """Whether the worker cancelled the run's task: it tells the run to stop first, and the function does not."""
        return self.stopped is not None and cancelled_from_outside()

    # Boundaries

    async def boundary(self) -> None:
        """Raise what ends this execution, before anything new begins.

        While the worker's lease may have ended, the owner of the run is unknown: nothing new begins until that is
        settled.
        """
        while self.stopped is None:
            if self._may_cancel():
                self.stop(CancelRequested())
            elif self._held():
                return
            else:
                await self._nap(_LEASE_LOOK_SECONDS)
        raise await self.told()

    async def told(self) -> ControlFlow:
        """What was told, as soon as no step is being executed any more."""
        assert self.stopped is not None  # noqa: S101  asked by those who know
        await self.quiet()
        if self._grace is None and not isinstance(self.stopped, Ended):
            self._grace = self._clock.call_later(_GRACE_SECONDS, self._insist)
        self._repeats += 1
        if self._repeats > _REPEATS:  # it would never end, and keep the loop from everybody else
            self._insist()
            await asyncio.get_running_loop().create_future()
        return self.stopped

    async def quiet(self) -> None:
        """Wait until no step is being executed."""
        while self._at_work:
            quiet: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._quiet.add(quiet)
            try:
                await quiet
            finally:
                self._quiet.discard(quiet)

    def at_work(self) -> Execution:
        """A step is being executed, or is about to be, within the block: a stop of the run waits for its end."""
        return self  # every step enters it, so it is no object of its own

    def __enter__(self) -> None:
        self._at_work += 1

    def __exit__(self, *_end: object) -> None:
        self._at_work -= 1
        if not self._at_work:
            for quiet in self._quiet:
                if not quiet.done():
                    quiet.set_result(None)

    # Waiting

    async def wait(self, seconds: float, *, since: float | None = None, look_seconds: float = _NEVER) -> None:
        """Let time pass in one branch, and let the run leave the memory where all branches wait for long.

        Args:
            seconds: until the wait is over.
            since: when a wait for something new began, on the clock's monotonic time. Something new ends it, and the
                run stays in memory for a while, since that may come soon.
            look_seconds: how long at most this call lasts.
        """
        due = self._clock.monotonic() + seconds
        while True:
            await self.boundary()
            now = self._clock.monotonic()
            wait = Wait(due, self._leaves(now, due, since), news=since is not None)
            self._waits.add(wait)
            self.active -= 1
            timer = self._clock.call_later(min(due - now, look_seconds), wait.end)
            try:
                self.consider_leaving()
                await wait.ended
            finally:
                timer.cancel()
                self._waits.discard(wait)
                self.active += 1
            await self.boundary()
            if since is not None or self._clock.monotonic() >= due:
                return  # a time that was cut short, by a cancellation that then was not to be, goes on

    def _leaves(self, now: float, due: float, since: float | None) -> float:
        at = now if since is None else max(now, since + self._suspend_after_seconds)
        return at if due - at > self._suspend_after_seconds else _NEVER

    def consider_leaving(self) -> None:
        """Give the run back to the queue once all of its branches wait, and each for long."""
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None
        if self.active or self.stopped is not None or not self._waits:
            return
        at, now = max(wait.leaves for wait in self._waits), self._clock.monotonic()
        if at <= now:
            self.stop(Suspended(min(wait.due for wait in self._waits)))
        elif at < _NEVER:
            self._leaving = self._clock.call_later(at - now, self.consider_leaving)

    def make_room(self) -> None:
        """Leave at once where the run would leave later: all of its branches wait, for news that may take long."""
        if self.active or self.stopped is not None or not self._waits:
            return
        if all(wait.leaves < _NEVER for wait in self._waits):
            self.stop(Suspended(min(wait.due for wait in self._waits)))

    async def turn(self, waiting: dict[Wait, None]) -> None:
        """Wait for a place of the worker's: until a wait of `waiting` is ended, or the run is told something."""
        wait = Wait(_NEVER, _NEVER, news=False)
        waiting[wait] = None
        self._waits.add(wait)
        try:
            await wait.ended
        finally:
            waiting.pop(wait, None)
            self._waits.discard(wait)

    async def _nap(self, seconds: float) -> None:
        wait = Wait(_NEVER, _NEVER, news=False)
        self._waits.add(wait)
        timer = self._clock.call_later(seconds, wait.end)
        try:
            await wait.ended
        finally:
            timer.cancel()
            self._waits.discard(wait)

    # Ending

    async def drive(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Await the function; where it does not end although it was told to, close it."""
        self._task = asyncio.current_task()
        return await self.closable(coroutine)

    def closable(self, coroutine: Coroutine[Any, Any, T]) -> Awaitable[T]:
        """Await user code in any task, and close it where the function does not end although it was told to."""
        return _closable(coroutine, self)

    def _insist(self) -> None:
        if not self.overdue and self._task is not None:
            self._task.cancel()
        self.overdue = True

    def end(self) -> None:
        """The function has ended, by itself or closed: tasks that it left behind may begin nothing any more."""
        if self.stopped is None:
            self.stopped = Ended()
        for wait in self._waits:
            wait.end()
        for timer in (self._grace, self._leaving):
            if timer is not None:
                timer.cancel()
        self._may_cancel = _never  # with the run's own method this would be a cycle, which only the collector ends
        if self.overdue and self._task is not None:
            self._task.uncancel()
        self._task = None  # it goes on, with the way back: what is left of the function has no hold on it


def _never() -> bool:
    return False


def _close(coroutine: Coroutine[Any, Any, Any]) -> None:
    """Close what does not end; what swallows even that is left where it is."""
    chain: list[object] = [coroutine]
    while (inner := getattr(chain[-1], "cr_await", None)) is not None:
        chain.append(inner)
    try:
        coroutine.close()
    except RuntimeError:
        for each in chain:  # never freed: the interpreter's own end would close it again, for ever
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))
        _log.error("%s catches every exception in a loop and could not be ended: it is left where it is", coroutine)


@types.coroutine
def _closable(coroutine: Coroutine[Any, Any, T], execution: Execution) -> Generator[Any, Any, T]:
    """`await coroutine`, but close it instead of cancelling it where it is overdue."""
    try:
        yielded = coroutine.send(None)
        while True:
            try:
                sent = yield yielded
            except GeneratorExit:
                coroutine.close()
                raise
            except BaseException as error:
                if execution.overdue:
                    _close(coroutine)
                    raise
                yielded = coroutine.throw(error)
            else:
                yielded = coroutine.send(sent)
    except StopIteration as end:
        result: T = end.value
        return result
