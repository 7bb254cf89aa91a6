"""How many calls may be under way at the same time: a fixed limit, or one that finds itself."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from typing import Literal

from mainstay.circuit_breaker._admission import Layer, Policy
from mainstay.circuit_breaker.errors import BulkheadFull
from mainstay.core import SYSTEM_CLOCK, Clock, deadline_fired, remaining_seconds


class _Place:
    """Somebody in the queue: a task of some event loop, or a thread."""

    __slots__ = ("_event", "_future", "_loop", "granted")

    def __init__(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self.granted = False
        self._loop = loop
        self._future = None if loop is None else loop.create_future()
        self._event = threading.Event() if loop is None else None

    def wake(self) -> None:
        """Tell whoever waits; from any thread."""
        if self._event is not None:
            self._event.set()
            return
        assert self._loop is not None
        try:
            here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            here = False
        if here:
            self._resolve()
        else:
            try:
                self._loop.call_soon_threadsafe(self._resolve)
            except RuntimeError:  # the loop is closed, and with it the task is gone
                self.granted = False
                raise

    def _resolve(self) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    async def reached(self, seconds: float, clock: Clock) -> None:
        """Until woken or `seconds` have passed."""
        future = self._future
        assert future is not None
        timer = clock.call_later(seconds, self._resolve)
        try:
            await future
        finally:
            timer.cancel()

    def reached_sync(self, seconds: float) -> None:
        """Until woken or `seconds` have passed, blocking the thread."""
        assert self._event is not None
        self._event.wait(seconds)


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

    kind: Literal["bulkhead"] = "bulkhead"

    def __init__(
        self,
        limit: int,
        *,
        queue: int = 0,
        max_wait_seconds: float = 1.0,
        name: str = "bulkhead",
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        _require(type(self).__name__, "limit", limit, limit >= 1, "1 or more")
        _require(type(self).__name__, "queue", queue, queue >= 0, "0 or more")
        _require(
            type(self).__name__,
            "max_wait_seconds",
            max_wait_seconds,
            0 <= max_wait_seconds < float("inf"),
            "0 or more, and finite",
        )
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
        return f"<{type(self).__name__} {self.name!r} {self.limit - self.free} of {self.limit} under way, {len(self.waiting)} waiting>"

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
            BulkheadFull: the queue is full, or nobody left in time.
        """
        place = self._stand(asyncio.get_running_loop())
        if place is None:
            return
        seconds = self._patience()
        try:
            if seconds > 0:
                await place.reached(seconds, self.clock)
        except BaseException as error:
            self._step_out(place, keep=False)
            if isinstance(error, asyncio.CancelledError) and deadline_fired():
                # The time ran out in our own queue. To the breaker around it this says nothing of the dependency.
                error.no_effect = True  # type: ignore[attr-defined]  # carried by the instance, read by Rules.judge
            raise
        self._step_out(place, keep=True)

    def wait_sync(self) -> None:
        """`wait`, blocking the thread."""
        place = self._stand(None)
        if place is None:
            return
        try:
            place.reached_sync(self._patience())
        except BaseException:
            self._step_out(place, keep=False)
            raise
        self._step_out(place, keep=True)

    def resize(self, limit: int) -> None:
        """Allow another number of calls from now on; those under way are not disturbed.

        Raises:
            ValueError: `limit` is below 1.
        """
        _require(type(self).__name__, "limit", limit, limit >= 1, "1 or more")
        with self._lock:
            self.free += limit - self.limit
            self.limit = limit
            self._serve()

    def release(self) -> None:
        """Give a place back: to the first in the queue, or for whoever comes."""
        with self._lock:
            self.free += 1
            self._serve()

    def _stand(self, loop: asyncio.AbstractEventLoop | None) -> _Place | None:
        with self._lock:
            if self.free > 0 and not self.waiting:
                self.free -= 1
                return None
            if len(self.waiting) >= self.queue or self.max_wait_seconds == 0:
                self.rejected += 1
                raise BulkheadFull(self.name, "full", self.max_wait_seconds or None)
            place = _Place(loop)
            self.waiting.append(place)
            # A place may have been given back between the caller's look and our joining the queue.
            self._serve()
            return place

    def _serve(self) -> None:
        """Under the lock."""
        while self.free > 0 and self.waiting:
            place = self.waiting.popleft()
            place.granted = True
            self.free -= 1
            try:
                place.wake()
            except RuntimeError:
                self.free += 1

    def _step_out(self, place: _Place, *, keep: bool) -> None:
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
        raise BulkheadFull(self.name, "full", self.max_wait_seconds)

    def _patience(self) -> float:
        left = remaining_seconds()
        return self.max_wait_seconds if left is None else min(self.max_wait_seconds, max(left, 0.0))

    def _layers(self) -> tuple[Layer, ...]:
        names: dict[str, object] = {"bulkhead": self, "take": self.take, "release": self.release}
        return (Layer(self, "bulkhead", (False,), names | {"queue": self.wait, "queue_sync": self.wait_sync}),)


def _require(owner: str, field: str, value: object, holds: bool, range_: str) -> None:  # noqa: FBT001  internal
    if not holds:
        msg = f"{owner}: {field} is {value!r}; it is {range_}"
        raise ValueError(msg)
