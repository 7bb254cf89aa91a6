"""For tests of code that uses Mainstay: a clock that moves only when told to, and a way to wait for a condition."""

from __future__ import annotations

import asyncio
import heapq
import inspect
import itertools
import os
import random
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import ClassVar

from mainstay.core import ids
from mainstay.core.clock import Clock

__all__ = ["VirtualClock", "VirtualTimer", "eventually", "repeatable"]

_TURNS = 32  # of the event loop, without real work in between: then every chain of wake-ups has ended
_LOOK_SECONDS = 0.0002  # how often real work is looked at
_ROUNDING_SECONDS = 0.001
_PATIENCE_SECONDS = 30.0  # of real time, for real work to end


async def eventually(
    condition: Callable[[], object] | Callable[[], Awaitable[object]],
    *,
    seconds: float = 30.0,
    every_seconds: float = 0.01,
    what: str = "the condition",
) -> None:
    """Return when `condition()` is true; of an async one, what it returns.

    Args:
        condition: asked again and again.
        seconds: of real time. It only bounds a test that fails, so let it be long: machines are busy.
        every_seconds: how often it is asked.
        what: names the condition in the error.

    Raises:
        TimeoutError: it has not become true within `seconds`.
    """
    end = time.monotonic() + seconds
    while True:
        answer = condition()
        if inspect.isawaitable(answer):
            answer = await answer
        if answer:
            return
        if time.monotonic() > end:
            msg = f"{what} did not come true within {seconds:g} s"
            raise TimeoutError(msg)
        await asyncio.sleep(every_seconds)


@contextmanager
def repeatable(seed: str, clock: Clock) -> Generator[None, None, None]:
    """Make time, randomness and ids in the block depend on `seed` and `clock` alone; for simulators.

    What the block asks `time.time`, `time.monotonic`, `os.urandom` (and with it `uuid4` and `uuid7`) and the functions
    of `random` is the same each time it runs. It is so for the whole process: nothing else may run meanwhile. What
    reads the system's clock past these, as `datetime.now` does, is not reached.

    Args:
        seed: any text.
        clock: a virtual one.
    """
    # By length: what a library draws the first time alone, such as SQLAlchemy for a name, must not move the ids.
    bits: dict[int, random.Random] = {}

    def drawn(length: int) -> bytes:
        if length not in bits:
            bits[length] = random.Random(f"{seed} bits {length}")  # noqa: S311  the same each time is the point
        return bits[length].randbytes(length)

    before = (time.time, time.time_ns, time.monotonic, os.urandom, random.getstate(), ids._last)
    time.time = lambda: clock.now().timestamp()
    time.time_ns = lambda: round(clock.now().timestamp() * 1e6) * 1000
    time.monotonic = clock.monotonic
    os.urandom = drawn
    random.seed(f"{seed} random")
    ids._last = 0
    try:
        yield
    finally:
        time.time, time.time_ns, time.monotonic, os.urandom, state, ids._last = before
        random.setstate(state)


class VirtualTimer:
    """A callback that is due at a moment of virtual time; returned by `VirtualClock.call_later`."""

    __slots__ = ("_callback", "at")

    def __init__(self, at: float, callback: Callable[[], object]) -> None:
        self.at = at
        self._callback: Callable[[], object] | None = callback

    @property
    def pending(self) -> bool:
        """Whether it is still to run."""
        return self._callback is not None

    def cancel(self) -> None:
        """Make sure that the callback does not run, if it has not yet."""
        self._callback = None

    def fire(self) -> None:
        """Run the callback, once."""
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()


class VirtualClock(Clock):
    """Time that stands still until `advance` or `tick` moves it; nothing ever really sleeps.

    Given to an App it moves all of it: `await clock.advance(14 * 86400)` takes the time of the work that falls due on
    the way, and of nothing else. While statements of the App's database are under way it stands still. Leases are not
    moved: they are about processes, which live in real time.

    Args:
        start: the answer of `now()` at the beginning, timezone-aware.

    Raises:
        ValueError: `start` is naive.
    """

    __slots__ = ("_elapsed", "_order", "_polls", "_start", "_timers", "_work")
    virtual: ClassVar[bool] = True

    def __init__(self, start: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> None:
        if start.tzinfo is None:
            msg = f"VirtualClock starts at a moment with a timezone, not at {start!r}: give it tzinfo=UTC"
            raise ValueError(msg)
        self._start = start
        self._elapsed = 0.0
        self._timers: list[tuple[float, int, VirtualTimer]] = []
        self._polls: list[tuple[float, int, VirtualTimer]] = []
        self._order = itertools.count()
        self._work: list[Callable[[], str | None]] = []

    def now(self) -> datetime:
        """The start plus everything that has passed."""
        return self._start + timedelta(seconds=self._elapsed)

    def monotonic(self) -> float:
        """Seconds that have passed."""
        return self._elapsed

    def call_later(self, seconds: float, callback: Callable[[], object]) -> VirtualTimer:
        """Run `callback` when the clock has been moved by `seconds`."""
        return self._later(self._timers, seconds, callback)

    def poll_later(self, seconds: float, callback: Callable[[], object]) -> VirtualTimer:
        """Run `callback` at the first moment at which the clock stops after `seconds`; it does not stop for this."""
        return self._later(self._polls, seconds, callback)

    def _later(
        self, queue: list[tuple[float, int, VirtualTimer]], seconds: float, callback: Callable[[], object]
    ) -> VirtualTimer:
        timer = VirtualTimer(self._elapsed + seconds, callback)
        heapq.heappush(queue, (timer.at, next(self._order), timer))
        return timer

    @contextmanager
    def held_by(self, work: Callable[[], str | None]) -> Generator[None, None, None]:
        """Stand still while `work()` names something that goes on in real time."""
        self._work.append(work)
        try:
            yield
        finally:
            self._work.remove(work)

    async def sleep(self, seconds: float) -> None:
        """Wait until the clock has been moved by `seconds`; at once for 0 or less."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        passed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        timer = self.call_later(seconds, partial(_wake, passed))
        try:
            await passed
        finally:
            timer.cancel()

    def block(self, seconds: float) -> None:
        """Move the clock by `seconds` instead of blocking the thread."""
        self.tick(seconds)

    def tick(self, seconds: float) -> None:
        """Move the clock and fire the timers that fall due, in order; woken tasks run when the caller next awaits.

        Raises:
            ValueError: `seconds` is negative, or no finite number.
        """
        end = self._elapsed + _forward(seconds)
        while (at := self._due(self._timers)) is not None and at <= end:
            self._move(at)
        self._move(end)

    async def advance(self, seconds: float) -> None:
        """Move the clock from timer to timer, and let everything that each one wakes come to rest before the next.

        A timer within a millisecond of the end still runs, since moments are sums of floats: the clock then
        stands there.

        Raises:
            TimeoutError: real work goes on for more than half a minute of real time; says which.
            ValueError: `seconds` is negative, or no finite number.
        """
        end = self._elapsed + _forward(seconds)
        await self.settle()
        while True:
            # Also at the very end: what the last stop woke may have set a timer for the same moment.
            at = self._due(self._timers)
            if at is None or at > end + _ROUNDING_SECONDS:
                if self._elapsed >= end:
                    return
                at = end
            self._move(at)
            await self.settle()

    async def settle(self) -> None:
        """Return when nothing happens any more without the clock being moved.

        Raises:
            TimeoutError: as `advance` says.
        """
        end = time.monotonic() + _PATIENCE_SECONDS
        quiet = 0
        while quiet < _TURNS:
            await asyncio.sleep(0)
            busy = next((what for work in self._work if (what := work()) is not None), None)
            if busy is None:
                quiet += 1
                continue
            quiet = 0
            if time.monotonic() > end:
                msg = f"virtual time stands still: {busy} has gone on for {_PATIENCE_SECONDS:g} s of real time"
                raise TimeoutError(msg)
            await asyncio.sleep(_LOOK_SECONDS)

    def _move(self, at: float) -> None:
        """Go to the moment `at`, and run everything that is due by then."""
        self._elapsed = max(self._elapsed, at)
        for queue in (self._polls, self._timers):
            while (due := self._due(queue)) is not None and due <= self._elapsed:
                heapq.heappop(queue)[2].fire()

    @staticmethod
    def _due(queue: list[tuple[float, int, VirtualTimer]]) -> float | None:
        while queue and not queue[0][2].pending:
            heapq.heappop(queue)
        return queue[0][0] if queue else None


def _forward(seconds: float) -> float:
    if not 0 <= seconds < float("inf"):
        msg = f"a clock cannot be moved by {seconds!r} s: time goes forward, by a finite number of seconds"
        raise ValueError(msg)
    return seconds


def _wake(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done():
        sleeper.set_result(None)
