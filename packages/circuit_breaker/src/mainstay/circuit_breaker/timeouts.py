"""A time limit for the work inside it, as a policy.

It is `mainstay.core.timeout` with the same meaning: the deadline is ambient, what it cancels is a failure to every
policy inside, and `DeadlineExceeded` comes out. What differs is the timer. One timer of the loop's own for each call
costs more than all the other policies together, and nearly all are cancelled unfired. But the calls under one `Timeout`
all get the same number of seconds, so they expire in the order in which they begin: a dictionary, which keeps that
order, holds those under way, and one timer watches the oldest.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from asyncio import current_task, get_running_loop
from collections.abc import Callable
from contextvars import Token
from math import inf
from typing import Any, ParamSpec, TypeVar, cast

from mainstay.circuit_breaker._checks import is_number, require
from mainstay.circuit_breaker.policy import Layer, Policy
from mainstay.core import SYSTEM_CLOCK, Clock, Deadline, DeadlineExceeded, Timer, ambient_deadline, deadline_error

__all__ = ["Timeout", "in_thread"]

P = ParamSpec("P")
T = TypeVar("T")


def _checked(seconds: float) -> float:
    in_range = is_number(seconds) and 0 < seconds < inf
    require("Timeout", "seconds", seconds, "a number, more than 0, and finite", holds=in_range)
    return seconds


class _Limit(Deadline):
    """The deadline of one call."""

    __slots__ = ("cancelling", "due", "task", "token", "watch")

    def __init__(  # noqa: PLR0917  keywords cost time here; and it sets what Deadline's own would: a call of it would cost as much as all of this
        self, at: float, clock: Clock, parent: Deadline | None, due: float, task: asyncio.Task[object], watch: _Watch
    ) -> None:
        self.at = at
        self.fired = False
        self.clock = clock
        self.parent = parent
        self.due = due
        self.task = task
        self.cancelling = task.cancelling()
        self.watch = watch
        self.token: Token[Deadline | None]


class _Watch:
    """The calls under way in one event loop, oldest first, and the timer that watches the oldest."""

    __slots__ = ("clock", "loop", "seconds", "timer", "under_way")

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Clock, seconds: float) -> None:
        self.loop = loop
        self.clock = clock
        self.seconds = seconds
        self.timer: Timer | None = None
        self.under_way: dict[_Limit, None] = {}

    def fire(self) -> None:
        """Cancel what is due, and watch the next."""
        now = self.clock.monotonic()
        self.timer = None
        while self.under_way:
            oldest = next(iter(self.under_way))
            # A loop may call a little early, by its clock's resolution.
            if oldest.due > now + 1e-6:
                self.timer = self.clock.call_later(oldest.due - now, self.fire)
                return
            del self.under_way[oldest]
            oldest.fired = True
            oldest.task.cancel()


class Timeout(Policy):
    """Give the call `seconds` to finish, queueing and retries inside it included; an earlier deadline stays in force.

    Args:
        seconds: > 0.
        name: in the error.
        clock: measures; tests pass a `VirtualClock`.

    Raises:
        ValueError: `seconds` is not positive.

    A call raises `DeadlineExceeded` when its time runs out, with `no_effect=True` when it had run out before. Plain
    functions are refused, since a thread cannot be cancelled: see `in_thread`.
    """

    def __init__(self, seconds: float, *, name: str = "timeout", clock: Clock = SYSTEM_CLOCK) -> None:
        self._seconds = _checked(seconds)
        self.name = name
        self.clock = clock
        self._watch: _Watch | None = None
        self._lock = threading.Lock()
        self._watches: dict[asyncio.AbstractEventLoop, _Watch] = {}

    def __repr__(self) -> str:
        return f"<Timeout {self.name!r} {self._seconds:g} s>"

    @property
    def seconds(self) -> float:
        """How long a call may take; changed by `reload`."""
        return self._seconds

    def reload(self, seconds: float) -> None:
        """Give calls that begin from now on `seconds`; those under way keep what they were given.

        Raises:
            ValueError: `seconds` is not positive.
        """
        _checked(seconds)
        with self._lock:
            self._seconds = seconds
            # New watches, since the calls of one all get the same time. Those under way hold on to theirs.
            self._watches = {}
            self._watch = None

    def _begin(self) -> _Limit:
        """Start the time of the running task's call.

        Raises:
            DeadlineExceeded: an outer deadline has already passed.
        """
        loop = get_running_loop()
        watch = self._watch
        if watch is None or watch.loop is not loop:
            watch = self._enter(loop)
        task = cast("asyncio.Task[object]", current_task(loop))
        outer = ambient_deadline.get()
        at = due = self.clock.monotonic() + watch.seconds
        if outer is not None:
            if outer.remaining_seconds() <= 0:
                msg = f"{self.name}: the deadline had passed before this work began"
                raise DeadlineExceeded(msg, no_effect=True)
            at = min(at, outer.on(self.clock))
        limit = _Limit(at, self.clock, outer, due, task, watch)
        watch.under_way[limit] = None
        if watch.timer is None:
            watch.timer = self.clock.call_later(watch.seconds, watch.fire)
        limit.token = ambient_deadline.set(limit)
        return limit

    def _end(self, limit: _Limit, error: BaseException | None = None) -> None:
        """Stop the time.

        Raises:
            DeadlineExceeded: `error` is the cancellation by this very limit.
        """
        expired = False
        if not limit.fired:
            del limit.watch.under_way[limit]
        else:
            # The same accounting as asyncio's own: a cancellation that came from outside too stays a cancellation.
            expired = limit.task.uncancel() <= limit.cancelling
        try:
            ambient_deadline.reset(limit.token)
        except ValueError:
            limit.release()
        if expired and isinstance(error, asyncio.CancelledError):
            msg = f"{self.name}: no result within {limit.watch.seconds:g} s"
            # A queue of ours in which the time ran out has said so.
            raise deadline_error(DeadlineExceeded(msg, no_effect=getattr(error, "no_effect", False)), error)

    def _enter(self, loop: asyncio.AbstractEventLoop) -> _Watch:
        with self._lock:
            for other in [known for known in self._watches if known.is_closed()]:
                del self._watches[other]
            watch = self._watches.get(loop)
            if watch is None:
                watch = self._watches[loop] = _Watch(loop, self.clock, self._seconds)
            self._watch = watch
            return watch

    def _layers(self) -> tuple[Layer, ...]:
        return (Layer("timeout", (), self, {"begin": self._begin, "end": self._end}),)


def in_thread(fn: Callable[P, T]) -> Callable[P, Any]:
    """Make an async function of a blocking one: it runs in a thread, with the caller's context.

    For `Timeout` and `Hedge`, which need something that can be cancelled. A thread cannot be: when the time is up the
    caller goes on, and the thread finishes its work unheard. Give the work a time limit of its own as well.
    """

    @functools.wraps(fn)
    async def threaded(*args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.to_thread(fn, *args, **kwargs)

    return threaded
