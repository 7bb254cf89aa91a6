"""Virtual time, and the processes that live in it: one event loop each, all on one thread.

Everything happens in one order, which nothing but the program itself decides: what is ready runs first come first
served, and when nothing is, time moves to the next timer. A process that has crashed is never run again; one that is
frozen goes on later, with what has become ready meanwhile.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import Context
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, TypeVar, TypeVarTuple

from mainstay.core import Clock

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_START = datetime(2026, 1, 1, tzinfo=UTC)
_ROUNDS = 100
_PATIENCE_ROUNDS = 25  # a clean-up that is cancelled again leaves something behind
_ROUND_SECONDS = 0.2


class World:
    """Runs the loops of all processes.

    Attributes:
        now: seconds since the beginning.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._ready: deque[tuple[ProcessLoop | None, Callable[[], object]]] = deque()
        self._timers: list[tuple[float, int, ProcessLoop | None, Callable[[], object]]] = []
        self._order = itertools.count()
        self.clock = WorldClock(self)

    def run(self, until: Callable[[], bool]) -> None:
        """Run everything until the condition is true, or nothing is left that could happen."""
        while not until():
            if not self._ready:
                if not self._timers:
                    return
                when, _, loop, work = heapq.heappop(self._timers)
                self.now = max(self.now, when)
                self._ready.append((loop, work))
            loop, work = self._ready.popleft()
            if loop is None:
                work()
            elif loop.frozen or loop.dead:
                loop.held.append(work)
            else:
                loop.step(work)

    def bury(self, loops: Sequence[ProcessLoop]) -> None:
        """Take apart what processes have left, without a word; what is judged is judged by now."""
        for loop in loops:
            loop.silent = True
        for number in range(_ROUNDS):
            tasks = [task for loop in loops for task in asyncio.all_tasks(loop)]
            if not tasks:
                break
            if not number % _PATIENCE_ROUNDS:
                for task in tasks:
                    task.cancel()
            for loop in loops:
                loop.dead = False
                loop.thaw()
            end = self.now + _ROUND_SECONDS
            self.run(lambda: self.now >= end)  # noqa: B023  called before the next one
        for loop in loops:
            loop.close()

    def soon(self, loop: ProcessLoop | None, work: Callable[[], object]) -> None:
        """Run something when its turn comes."""
        self._ready.append((loop, work))

    def at(self, when: float, loop: ProcessLoop | None, work: Callable[[], object]) -> None:
        """Run something at a moment."""
        heapq.heappush(self._timers, (when, next(self._order), loop, work))


class WorldClock(Clock):
    """The clock of every process."""

    __slots__ = ("_world",)
    virtual: ClassVar[bool] = True

    def __init__(self, world: World) -> None:
        self._world = world

    def now(self) -> datetime:
        """The wall clock."""
        return _START + timedelta(seconds=self._world.now)

    def monotonic(self) -> float:
        """Seconds since the beginning."""
        return self._world.now

    def block(self, seconds: float) -> None:
        """Let time pass at once."""
        self._world.now += seconds


class ProcessLoop(asyncio.BaseEventLoop):
    """The event loop of one process.

    Attributes:
        dead: nothing of it runs any more.
        frozen: what becomes ready waits.
        held: that.
        silent: nothing is said of its tasks.
        exits: called when code of it asks its process to end, with `sys.exit` for example.
    """

    def __init__(self, world: World, exits: Callable[[], None]) -> None:
        super().__init__()
        self._world = world
        self.dead = self.frozen = self.silent = False
        self.held: deque[Callable[[], object]] = deque()
        self.exits = exits

    def step(self, work: Callable[[], object]) -> None:
        """Run something on this loop."""
        asyncio._set_running_loop(self)
        try:
            work()
        except SystemExit:
            self.exits()
        finally:
            asyncio._set_running_loop(None)

    def freeze(self, seconds: float) -> None:
        """Stand still for so long."""
        self.frozen = True
        self._world.at(self._world.now + seconds, None, self.thaw)

    def thaw(self) -> None:
        """Go on, with what has become ready meanwhile."""
        self.frozen = False
        while self.held:
            self._world.soon(self, self.held.popleft())

    # What an event loop is asked for

    def time(self) -> float:
        """See `AbstractEventLoop`."""
        return self._world.now

    def is_running(self) -> bool:
        """See `AbstractEventLoop`."""
        return asyncio._get_running_loop() is self

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """See `AbstractEventLoop`."""
        handle = asyncio.Handle(callback, args, self, context)
        self._world.soon(self, lambda: None if handle.cancelled() else handle._run())
        return handle

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """See `AbstractEventLoop`."""
        return self.call_soon(callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """See `AbstractEventLoop`."""
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._world.at(when, self, lambda: None if timer.cancelled() else timer._run())
        return timer

    def call_later(
        self, delay: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """See `AbstractEventLoop`."""
        return self.call_at(self._world.now + delay, callback, *args, context=context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It stays where it is, and does nothing."""

    def run_in_executor(self, _executor: object, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]  # it is no coroutine
        """Run it at once: there are no threads."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001  it belongs to the waiting caller
            future.set_exception(error)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """See `AbstractEventLoop`."""
        if not self.silent:
            super().call_exception_handler(context)
