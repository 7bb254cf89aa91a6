"""One deadline for everything that happens inside it.

`asyncio.timeout` tells nobody below it that the cancellation is its own: a breaker inside sees a `CancelledError`
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


class Deadline:
    """A moment on a clock's monotonic time, and whether it has already cancelled what runs inside it."""

    __slots__ = ("_clock", "_parent", "at", "fired")

    def __init__(self, at: float, clock: Clock, parent: Deadline | None) -> None:
        self.at = at
        self.fired = False
        self._clock = clock
        self._parent = parent

    def remaining_seconds(self) -> float:
        """Seconds left; negative once it has passed."""
        return self.at - self._clock.monotonic()

    def on(self, clock: Clock) -> float:
        """The moment on another clock's monotonic time; readings of two clocks do not compare."""
        return self.at if clock is self._clock else clock.monotonic() + self.remaining_seconds()

    def __repr__(self) -> str:
        return f"<Deadline in {self.remaining_seconds():.3f} s>"


_current: ContextVar[Deadline | None] = ContextVar("mainstay_deadline", default=None)


def remaining_seconds() -> float | None:
    """Seconds left before the current deadline, negative once it has passed, None without one."""
    deadline = _current.get()
    return None if deadline is None or deadline.at == inf else deadline.remaining_seconds()


def deadline_fired() -> bool:
    """Whether a deadline around the running code has cancelled it."""
    deadline = _current.get()
    while deadline is not None:
        if deadline.fired:
            return True
        deadline = deadline._parent
    return False


def what_failed(exceeded: DeadlineExceeded, cancellation: BaseException) -> Exception:
    """What a time limit raises for the cancellation by which it ended an attempt.

    A retry inside leaves the error of the attempt before in `last_error`, and whoever only waited its turn says so with
    `no_effect`. If the last attempt was never sent, the one before is what failed; else that is the cause.
    """
    last: Exception | None = cancellation.__dict__.pop("last_error", None)
    if last is not None and cancellation.__dict__.get("no_effect"):
        return last
    exceeded.__cause__ = cancellation if last is None else last
    return exceeded


def forsake(deadline: Deadline) -> None:
    """The block ended in another context than it began, as that of an abandoned async generator does.

    The consumer's context cannot be mended from there: this deadline stays the current one in it, and from now on says
    what the one around it does.
    """
    deadline.at = inf if deadline._parent is None else deadline._parent.on(deadline._clock)
    deadline.fired = False


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
        outer = _current.get()
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
        self._token: Token[Deadline | None] = _current.set(self._deadline)
        return self._deadline

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
        # The same accounting as asyncio's own: only a cancellation that nobody else asked for becomes a timeout.
        expired = self._deadline.fired and self._task.uncancel() <= self._cancelling
        try:
            _current.reset(self._token)
        except ValueError:
            forsake(self._deadline)
        if expired and error is not None and kind is asyncio.CancelledError:
            msg = f"no result within {self._seconds:g} s"
            raise what_failed(DeadlineExceeded(msg), error)
