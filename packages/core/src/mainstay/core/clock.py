"""Time as the packages see it. `mainstay.core.testing.VirtualClock` is the one that tests move by hand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Protocol


class Timer(Protocol):
    """What `Clock.call_later` returns."""

    def cancel(self) -> None:
        """Make sure that the callback does not run, if it has not yet."""
        ...


class Clock:
    """The system's clocks. Durations are measured with `monotonic`, never with `now`."""

    __slots__ = ()

    def now(self) -> datetime:
        """The wall clock, timezone-aware, in UTC: for people and records, never for durations or leases."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Seconds since an arbitrary moment; never goes back."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Let `seconds` pass."""
        await asyncio.sleep(seconds)

    def block(self, seconds: float) -> None:
        """Let `seconds` pass on this thread, blocking it."""
        time.sleep(seconds)

    def call_later(self, seconds: float, callback: Callable[[], object]) -> Timer:
        """Run `callback` on this thread's event loop after `seconds`."""
        return asyncio.get_running_loop().call_later(seconds, callback)


SYSTEM_CLOCK = Clock()
