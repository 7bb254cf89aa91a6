"""One deadline for everything that happens inside it.

`asyncio.timeout` does not tell the code inside whose cancellation it is: a breaker inside sees a `CancelledError`
like any other and, rightly, does not count it; a provider that hangs would never open a circuit. So the deadline is
part of the ambient, like the context, and a policy that catches `CancelledError` asks `deadline_fired()`: true means
that time ran out, which is a failure of what was called; false means that the caller went away, which says nothing
about it.
"""

from __future__ import annotations

import asyncio
from contextvars import ContextVar, Token
from math import inf
from typing import TYPE_CHECKING, cast

from mainstay.core.clock import SYSTEM_CLOCK, Clock, Timer
from mainstay.core.errors import DeadlineExceeded

if TYPE_CHECKING:
    from types import TracebackType


__all__ = ["Deadline", "ambient_deadline", "deadline_error", "deadline_fired", "remaining_seconds", "timeout"]


class Deadline:
    """A moment on a clock's monotonic time, and whether it has already cancelled what runs inside it.

    Attributes:
        at: the moment, in seconds of `clock.monotonic()`.
        fired: whether the time ran out and the work was cancelled.
        clock: the clock that it is measured on.
        parent: the deadline around it.
    """

    __slots__ = ("at", "clock", "fired", "parent")

    def __init__(self, at: float, clock: Clock, parent: Deadline | None) -> None:
        self.at = at
        self.fired = False
        self.clock = clock
        self.parent = parent

    def remaining_seconds(self) -> float:
        """Seconds left; negative once it has passed."""
        return self.at - self.clock.monotonic()

    def on(self, clock: Clock) -> float:
        """The moment on another clock's monotonic time; readings of two clocks do not compare."""
        return self.at if clock is self.clock else clock.monotonic() + self.remaining_seconds()

    def release(self) -> None:
        """Say from now on what the deadline around it says.

        For a block that ended in another context than it began in, as that of an abandoned async generator does: this
        deadline stays the current one of the first context, which cannot be mended from the second.
        """
        self.at = inf if self.parent is None else self.parent.on(self.clock)
        self.fired = False

    def __repr__(self) -> str:
        return f"<Deadline in {self.remaining_seconds():.3f} s>"


ambient_deadline: ContextVar[Deadline | None] = ContextVar("mainstay_deadline", default=None)
"""The deadline of the running code; set by `timeout`, and by policies that keep timers of their own."""


def remaining_seconds() -> float | None:
    """Seconds left before the current deadline, negative once it has passed, None without one."""
    deadline = ambient_deadline.get()
    return None if deadline is None or deadline.at == inf else deadline.remaining_seconds()


def deadline_fired() -> bool:
    """Whether a deadline around the running code has cancelled it."""
    deadline = ambient_deadline.get()
    while deadline is not None:
        if deadline.fired:
            return True
        deadline = deadline.parent
    return False


def deadline_error(exceeded: DeadlineExceeded, cancellation: BaseException) -> Exception:
    """The error that a time limit raises instead of the cancellation by which it ended an attempt.

    A retry inside leaves the error of the attempt before in the cancellation's `last_error`, and work that was still
    waiting for its turn sets `no_effect` there. When the last attempt was never sent, the error of the one before is
    returned; otherwise `exceeded`, with that error as its cause.
    """
    last: Exception | None = cancellation.__dict__.pop("last_error", None)
    if last is not None and cancellation.__dict__.get("no_effect"):
        return last
    exceeded.__cause__ = cancellation if last is None else last
    return exceeded


class timeout:  # noqa: N801  used like a function: `async with timeout(2.0):`
    """Give the block `seconds` to finish; an earlier deadline around it stays in force.

    Raises:
        DeadlineExceeded: the time ran out. With `no_effect=True` when it had run out before the block began.
        ValueError: `seconds` is negative.
    """

    __slots__ = ("_cancelling", "_clock", "_deadline", "_seconds", "_task", "_timer", "_token")

    def __init__(self, seconds: float, *, clock: Clock = SYSTEM_CLOCK) -> None:
        if not seconds >= 0:
            msg = f"timeout({seconds!r}): seconds must not be negative"
            raise ValueError(msg)
        self._seconds = seconds
        self._clock = clock

    async def __aenter__(self) -> Deadline:
        task = cast("asyncio.Task[object]", asyncio.current_task())  # a coroutine is always run by one
        outer = ambient_deadline.get()
        at = self._clock.monotonic() + self._seconds
        if outer is not None:
            if outer.remaining_seconds() <= 0:
                msg = "the deadline had passed before this work began"
                raise DeadlineExceeded(msg, no_effect=True)
            at = min(at, outer.on(self._clock))
        self._task = task
        self._cancelling = task.cancelling()
        self._deadline = Deadline(at, self._clock, outer)
        self._timer: Timer = self._clock.call_later(self._seconds, self._fire)
        self._token: Token[Deadline | None] = ambient_deadline.set(self._deadline)
        return self._deadline

    def lift(self) -> None:
        """Let the rest of the block take as long as it likes, or as a deadline around it says."""
        self._timer.cancel()
        if not self._deadline.fired:
            self._deadline.release()

    def _fire(self) -> None:
        self._deadline.fired = True
        self._task.cancel()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        # The same accounting as asyncio's own: a cancellation that came from outside too stays a cancellation.
        expired = self._deadline.fired and self._task.uncancel() <= self._cancelling
        try:
            ambient_deadline.reset(self._token)
        except ValueError:
            self._deadline.release()
        if expired and error is not None and kind is asyncio.CancelledError:
            msg = f"no result within {self._seconds:g} s"
            raise deadline_error(DeadlineExceeded(msg), error)
