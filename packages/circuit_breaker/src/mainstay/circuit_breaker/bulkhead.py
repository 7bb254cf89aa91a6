"""How many calls may be under way at the same time: a fixed limit, or one that finds itself."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from math import inf
from typing import TypeVar

from mainstay.circuit_breaker._checks import is_number, is_whole, require
from mainstay.circuit_breaker.errors import BulkheadFull
from mainstay.circuit_breaker.policy import Layer, Policy
from mainstay.core import SYSTEM_CLOCK, Clock, DeadlineExceeded, deadline_fired, remaining_seconds

__all__ = ["Bulkhead"]


class _Place:
    """A call in the queue."""

    __slots__ = ("granted",)

    def __init__(self) -> None:
        self.granted = False

    def wake(self) -> None:
        """Tell the waiting call; from any thread."""
        raise NotImplementedError


class _TaskPlace(_Place):
    __slots__ = ("_future", "_loop")

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[None] = self._loop.create_future()

    def wake(self) -> None:
        try:
            here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            here = False
        if here:
            self._resolve()
        else:
            self._loop.call_soon_threadsafe(self._resolve)

    def _resolve(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    async def reached(self, seconds: float, clock: Clock) -> None:
        """Until woken or `seconds` have passed."""
        timer = clock.call_later(seconds, self._resolve)
        try:
            await self._future
        finally:
            timer.cancel()


class _ThreadPlace(_Place):
    __slots__ = ("_event",)

    def __init__(self) -> None:
        super().__init__()
        self._event = threading.Event()

    def wake(self) -> None:
        self._event.set()

    def reached(self, seconds: float) -> None:
        """Until woken or `seconds` have passed, blocking the thread."""
        self._event.wait(seconds)


P = TypeVar("P", bound=_Place)


class Bulkhead(Policy):
    """At most `limit` calls at a time; more wait in a bounded queue for a bounded time, or are rejected.

    Args:
        limit: calls under way at the same time. >= 1
        queue: calls that may wait. >= 0
        max_wait_seconds: how long one waits at most. A caller whose deadline is sooner waits no longer than that. >= 0
        name: in rejections.
        clock: measures the wait of async callers; tests pass a `VirtualClock`.

    Raises:
        ValueError: a number out of its range.

    Places are given in the order of arrival, to tasks and threads alike. A wait that is cancelled gives its place on.
    """

    def __init__(
        self,
        limit: int,
        *,
        queue: int = 0,
        max_wait_seconds: float = 1.0,
        name: str = "bulkhead",
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        who = type(self).__name__
        require(who, "limit", limit, "an integer, 1 or more", holds=is_whole(limit) and limit >= 1)
        require(who, "queue", queue, "an integer, 0 or more", holds=is_whole(queue) and queue >= 0)
        in_range = is_number(max_wait_seconds) and 0 <= max_wait_seconds < inf
        require(who, "max_wait_seconds", max_wait_seconds, "a number, 0 or more, and finite", holds=in_range)
        self.name = name
        self.limit = limit
        self.queue = queue
        self.max_wait_seconds = max_wait_seconds
        self.clock = clock
        self.free = limit
        self.waiting: deque[_Place] = deque()
        self.rejected = 0
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        waiting = len(self.waiting)
        return f"<{type(self).__name__} {self.name!r} {self.under_way} of {self.limit} under way, {waiting} waiting>"

    @property
    def under_way(self) -> int:
        """Calls under way now."""
        return self.limit - self.free

    def take(self) -> bool:
        """Take a place if one is free."""
        with self._lock:
            if self.free > 0:
                self.free -= 1
                return True
            return False

    async def wait(self) -> None:
        """Take a place when one becomes free.

        Raises:
            BulkheadFull: the queue is full, or no place became free in time.
            DeadlineExceeded: the caller's deadline came first.
        """
        place = self._stand(_TaskPlace)
        if place is None:
            return
        left = remaining_seconds()
        try:
            if (seconds := self._patience(left)) > 0:
                await place.reached(seconds, self.clock)
        except BaseException as error:
            self._step_out(place, keep=False)
            if isinstance(error, asyncio.CancelledError) and deadline_fired():
                # The time ran out in our own queue. To the breaker around it this says nothing of the dependency.
                error.no_effect = True  # type: ignore[attr-defined]  # carried by the instance, read by `judge`
            raise
        self._step_out(place, keep=True, left=left)

    def wait_sync(self) -> None:
        """`wait`, blocking the thread."""
        place = self._stand(_ThreadPlace)
        if place is None:
            return
        left = remaining_seconds()
        try:
            place.reached(self._patience(left))
        except BaseException:
            self._step_out(place, keep=False)
            raise
        self._step_out(place, keep=True, left=left)

    def resize(self, limit: int) -> None:
        """Allow another number of calls from now on; those under way are not disturbed.

        Raises:
            ValueError: `limit` is below 1, or no integer.
        """
        in_range = is_whole(limit) and limit >= 1
        require(type(self).__name__, "limit", limit, "an integer, 1 or more", holds=in_range)
        with self._lock:
            self.free += limit - self.limit
            self.limit = limit
            self._serve()

    def release(self) -> None:
        """Give a place back: to the first in the queue, or for the next call."""
        with self._lock:
            self.free += 1
            self._serve()

    def _stand(self, kind: type[P]) -> P | None:
        with self._lock:
            if not self.waiting and self.free > 0:
                self.free -= 1
                return None
            if len(self.waiting) >= self.queue or self.max_wait_seconds == 0:
                self.rejected += 1
                raise BulkheadFull(self.name, "full", self.max_wait_seconds or None)
            place = kind()
            self.waiting.append(place)
            # A place may have been given back between the caller's look and our joining the queue.
            self._serve()
            return place

    def _serve(self) -> None:
        """Under the lock."""
        while self.waiting:
            # A call that finds a place free takes it without the lock: nothing may come between looking and taking.
            if self.free > 0:
                self.free -= 1
            else:
                return
            place = self.waiting.popleft()
            try:
                place.wake()
            except RuntimeError:  # its loop is closed, and with it the task is gone
                self.free += 1
            else:
                place.granted = True

    def _step_out(self, place: _Place, *, keep: bool, left: float | None = None) -> None:
        """Leave the queue, with the place if it was granted and is to be kept; `left` was the caller's time."""
        with self._lock:
            if place.granted:
                if keep:
                    return
                self.free += 1
                self._serve()
                return
            self.waiting.remove(place)
            if not keep:
                return
            self.rejected += 1
        if left is not None and left <= self.max_wait_seconds:
            # The same as when the deadline's own timer is the first to ring.
            msg = f"{self.name}: the deadline passed before a place became free"
            raise DeadlineExceeded(msg, no_effect=True)
        raise BulkheadFull(self.name, "full", self.max_wait_seconds)

    def _patience(self, left: float | None) -> float:
        return self.max_wait_seconds if left is None else min(self.max_wait_seconds, max(left, 0.0))

    def _layers(self) -> tuple[Layer, ...]:
        names: dict[str, object] = {"bulkhead": self, "take": self.take, "release": self.release}
        return (Layer("bulkhead", (False,), self, names | {"queue": self.wait, "queue_sync": self.wait_sync}),)
