"""For tests of code that uses Mainstay: a clock that moves only when it is told to."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial

from mainstay.core.clock import Clock


class VirtualTimer:
    """What `VirtualClock.call_later` returns."""

    __slots__ = ("_callback", "at")

    def __init__(self, at: float, callback: Callable[[], object]) -> None:
        self.at = at
        self._callback: Callable[[], object] | None = callback

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

    Args:
        start: what `now()` says at the beginning, timezone-aware.
    """

    __slots__ = ("_elapsed", "_order", "_start", "_timers")

    def __init__(self, start: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> None:
        self._start = start
        self._elapsed = 0.0
        self._timers: list[tuple[float, int, VirtualTimer]] = []
        self._order = itertools.count()

    def now(self) -> datetime:
        """The start plus everything that has passed."""
        return self._start + timedelta(seconds=self._elapsed)

    def monotonic(self) -> float:
        """Seconds that have passed."""
        return self._elapsed

    def call_later(self, seconds: float, callback: Callable[[], object]) -> VirtualTimer:
        """Run `callback` when the clock has been moved by `seconds`."""
        timer = VirtualTimer(self._elapsed + seconds, callback)
        heapq.heappush(self._timers, (timer.at, next(self._order), timer))
        return timer

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
        """Move the clock and fire the timers that fall due, in order; woken tasks run when the caller next awaits."""
        end = self._elapsed + seconds
        while self._timers and self._timers[0][0] <= end:
            at, _, timer = heapq.heappop(self._timers)
            self._elapsed = max(self._elapsed, at)
            timer.fire()
        self._elapsed = end

    async def advance(self, seconds: float) -> None:
        """Move the clock from timer to timer, and let the tasks that each one wakes run before the next."""
        end = self._elapsed + seconds
        await _settle()
        while self._timers and self._timers[0][0] <= end:
            self.tick(max(0.0, self._timers[0][0] - self._elapsed))
            await _settle()
        self._elapsed = max(self._elapsed, end)
        await _settle()


def _wake(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done():
        sleeper.set_result(None)


async def _settle() -> None:
    """Let every task that is ready run; a chain of wake-ups takes one turn of the loop for each link."""
    for _ in range(32):
        await asyncio.sleep(0)
