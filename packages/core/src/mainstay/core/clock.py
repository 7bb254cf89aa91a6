"""Time as the packages see it. `mainstay.core.testing.VirtualClock` is the one that tests move by hand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import ClassVar, Protocol

__all__ = ["SYSTEM_CLOCK", "Clock", "Timer"]


class Timer(Protocol):
    """A callback that is due; returned by `Clock.call_later`."""

    def cancel(self) -> None:
        """Make sure that the callback does not run, if it has not yet."""
        ...


class Clock:
    """The system's clocks. Durations are measured with `monotonic`, never with `now`.

    Attributes:
        virtual: whether time passes only when a test says so. What has a clock of its own must then follow or refuse.
    """

    __slots__ = ()
    virtual: ClassVar[bool] = False

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

    def poll_later(self, seconds: float, callback: Callable[[], object]) -> Timer:
        """Run `callback` after `seconds`, to look for something that may have come from outside.

        On this clock it is the same as `call_later`. A virtual clock does not stop for it: what it moves over runs once
        at the next moment at which something is due, or fourteen days would be a million looks at an idle queue.
        """
        return self.call_later(seconds, callback)

    @contextmanager
    def held_by(self, work: Callable[[], str | None]) -> Generator[None, None, None]:
        """Let a virtual clock stand still while `work()` names something that goes on in real time.

        For what the event loop alone does not show, such as a statement in a database driver's thread. This clock does
        not ask.

        Args:
            work: says what goes on, or None while it is idle.
        """
        del work
        yield


SYSTEM_CLOCK = Clock()
