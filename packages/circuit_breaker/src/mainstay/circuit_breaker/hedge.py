"""A second attempt when the first is late: the first answer wins, the other attempt is cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from math import inf
from typing import Any

from mainstay.circuit_breaker._checks import is_number, require
from mainstay.circuit_breaker._verdicts import denies
from mainstay.circuit_breaker.limits import Budget
from mainstay.circuit_breaker.policy import Layer, Policy
from mainstay.circuit_breaker.retries import Grants, IsWell
from mainstay.core import SYSTEM_CLOCK, Clock, remaining_seconds

__all__ = ["Hedge"]


class Hedge(Policy):
    """Send a second attempt when the first has not answered after `after_seconds`. For calls that may be repeated.

    The first success wins. A failure waits for the other attempt, if there is one. The loser is cancelled, which is
    neutral to the policies around it.

    Args:
        after_seconds: when the second attempt is sent. None: at the `percentile` of recent answers, and none before
            there are twenty of them. > 0
        percentile: of recent answers' seconds. (0, 1)
        budget: what hedges may add to the load. By default one of its own, of a tenth of the calls: when everything
            gets slow, everything is late, and a hedge for each call would double the load at the worst moment.
        clock: measures and waits; tests pass a `VirtualClock`.

    Raises:
        ValueError: a number out of its range.

    No hedge is sent while a circuit inside it is not closed, or when the caller's deadline would come first. Every
    attempt runs in a task of its own with a copy of the context: context variables that it sets do not come back.
    """

    def __init__(
        self,
        after_seconds: float | None = None,
        *,
        percentile: float = 0.95,
        budget: Grants | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        after = after_seconds
        in_range = after is None or (is_number(after) and 0 < after < inf)
        require("Hedge", "after_seconds", after, "a number, more than 0, or None", holds=in_range)
        in_range = is_number(percentile) and 0 < percentile < 1
        require("Hedge", "percentile", percentile, "a number, more than 0 and below 1", holds=in_range)
        self.after_seconds = after_seconds
        self.percentile = percentile
        self.budget = Budget(0.1, per_second=0.1, throttle=None, clock=clock) if budget is None else budget
        self.clock = clock
        self.sent = 0
        self.won = 0
        self._recent: deque[float] = deque(maxlen=200)
        self._late: float | None = None  # the percentile of `_recent`
        self._since = 0
        self._lock = threading.Lock()
        self._losers: set[asyncio.Task[Any]] = set()

    def __repr__(self) -> str:
        return f"<Hedge sent {self.sent}, won {self.won}>"

    async def drained(self) -> None:
        """Wait until every cancelled loser of this event loop has ended; for tests and for stopping."""
        loop = asyncio.get_running_loop()
        mine = [loser for loser in self._losers if loser.get_loop() is loop]
        if mine:
            await asyncio.wait(mine)

    def delay_seconds(self) -> float | None:
        """When a second attempt would be sent; None while it is not known."""
        return self._late if self.after_seconds is None else self.after_seconds

    async def _race(
        self,
        is_well: Callable[[], bool],
        attempt: Callable[[], Awaitable[Any]],
    ) -> Any:
        """Run `attempt`, twice if the first is late."""
        started = self.clock.monotonic()
        delay = self.delay_seconds()
        left = remaining_seconds()
        attempts = [asyncio.ensure_future(attempt())]
        try:
            if delay is not None and (left is None or delay < left):
                await self._until_late(attempts[0], delay)
                if not attempts[0].done() and is_well() and self.budget.grant():
                    self.sent += 1
                    attempts.append(asyncio.ensure_future(attempt()))
            winner = await _first_success(attempts)
            self.won += winner > 0
            # Where the second won, the first would have taken longer than this: the least that is known of it.
            self._learn(self.clock.monotonic() - started)
            return attempts[winner].result()
        finally:
            self._abandon(attempts)
            # An error's traceback holds this frame: if it held the tasks, they and the error would be a cycle.
            attempts.clear()

    async def _until_late(self, attempt: asyncio.Task[Any], seconds: float) -> None:
        """Until `attempt` has ended or `seconds` have passed."""
        late = asyncio.get_running_loop().create_future()
        timer = self.clock.call_later(seconds, lambda: None if late.done() else late.set_result(None))
        try:
            await asyncio.wait((attempt, late), return_when=asyncio.FIRST_COMPLETED)
        finally:
            timer.cancel()

    def _abandon(self, attempts: list[asyncio.Task[Any]]) -> None:
        for attempt in attempts:
            if not attempt.done():
                attempt.cancel()
                self._losers.add(attempt)
                attempt.add_done_callback(self._bury)

    def _bury(self, loser: asyncio.Task[Any]) -> None:
        self._losers.discard(loser)
        if not loser.cancelled():
            loser.exception()  # it lost: no one else will ask

    def _learn(self, seconds: float) -> None:
        if self.after_seconds is not None:
            return
        with self._lock:
            self._recent.append(seconds)
            self._since += 1
            if self._since >= _RENEW and len(self._recent) >= _KNOWN:
                self._since = 0
                ordered = sorted(self._recent)
                self._late = ordered[min(len(ordered) - 1, int(self.percentile * len(ordered)))]

    def _layers(self) -> tuple[Layer, ...]:
        return (self._layer(None),)

    def _layer(self, is_well: IsWell | None, *, deposits: bool = True) -> Layer:
        """The layer.

        Args:
            is_well: says of a call's arguments whether every circuit inside is closed.
            deposits: False where a retry around it already counts the calls.
        """

        def race(
            fn: Callable[..., Awaitable[Any]],
            runs: tuple[Any, ...],  # the callable that `fn` is to run, if it is not the function itself
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
        ) -> Awaitable[Any]:
            if deposits:
                self.budget.deposit()
            return self._race(lambda: is_well is None or is_well(args, kwargs), lambda: fn(*runs, *args, **kwargs))

        return Layer("hedge", (), self, {"race": race})


_KNOWN = 20
"""Answers below which a percentile says nothing."""
_RENEW = 10
"""Answers after which the percentile is worked out again."""


async def _first_success(attempts: list[asyncio.Task[Any]]) -> int:
    """Which attempt succeeds first; if none does, the one whose error is to be raised."""
    running = set(attempts)
    while running:
        done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for number, attempt in enumerate(attempts):
            if attempt in done and not attempt.cancelled() and attempt.exception() is None:
                return number
    # An error that denies any effect must not hide one that does not.
    return min(range(len(attempts)), key=lambda number: _denies(attempts[number]))


def _denies(attempt: asyncio.Task[Any]) -> bool:
    error = None if attempt.cancelled() else attempt.exception()
    return error is None or denies(error)
