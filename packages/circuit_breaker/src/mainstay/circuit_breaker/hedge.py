"""A second attempt when the first is late: whoever answers first wins, the other is cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from math import inf
from typing import Any

from mainstay.circuit_breaker._admission import Layer, Policy, require
from mainstay.circuit_breaker.circuit import Circuit
from mainstay.circuit_breaker.limits import Budget
from mainstay.circuit_breaker.retries import Grants
from mainstay.core import SYSTEM_CLOCK, Clock, remaining_seconds


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

    No hedge is sent while a circuit inside it is not closed, or when the caller's deadline would come first. Each
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
        require("Hedge", "after_seconds", after, "more than 0, or None", holds=after is None or 0 < after < inf)
        require("Hedge", "percentile", percentile, "more than 0 and below 1", holds=0 < percentile < 1)
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
        """When a second attempt would be sent; None while nobody knows."""
        return self._late if self.after_seconds is None else self.after_seconds

    async def _race(
        self,
        inside: Sequence[Circuit],
        fn: Callable[..., Awaitable[Any]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run `fn`, twice if the first is late."""
        started = self.clock.monotonic()
        delay = self.delay_seconds()
        left = remaining_seconds()
        if delay is None or (left is not None and delay >= left):
            result = await fn(*args, **kwargs)
            self._learn(self.clock.monotonic() - started)
            return result
        attempts = [asyncio.ensure_future(fn(*args, **kwargs))]
        late = asyncio.get_running_loop().create_future()
        timer = self.clock.call_later(delay, lambda: None if late.done() else late.set_result(None))
        try:
            await asyncio.wait((attempts[0], late), return_when=asyncio.FIRST_COMPLETED)
            if not attempts[0].done() and all(circuit.window is not None for circuit in inside) and self.budget.grant():
                self.sent += 1
                attempts.append(asyncio.ensure_future(fn(*args, **kwargs)))
            winner = await _first_success(attempts)
            self.won += winner > 0
            # Where the second won, the first would have taken longer than this: the least that is known of it.
            self._learn(self.clock.monotonic() - started)
            return attempts[winner].result()
        finally:
            timer.cancel()
            self._abandon(attempts)
            # An error's traceback holds this frame: if it held the tasks, they and the error would be a cycle.
            attempts.clear()

    def _abandon(self, attempts: list[asyncio.Task[Any]]) -> None:
        for attempt in attempts:
            if not attempt.done():
                attempt.cancel()
                self._losers.add(attempt)
                attempt.add_done_callback(self._bury)

    def _bury(self, loser: asyncio.Task[Any]) -> None:
        self._losers.discard(loser)
        if not loser.cancelled():
            loser.exception()  # it lost: nobody else will ask

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
        return (self._layer(()),)

    def _layer(self, inside: Sequence[Circuit], *, deposits: bool = True) -> Layer:
        """The layer, with the circuits that stand inside it; a retry around it may already count the calls."""
        circuits = tuple(inside)

        def race(fn: Callable[..., Awaitable[Any]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Awaitable[Any]:
            if deposits:
                self.budget.deposit()
            return self._race(circuits, fn, args, kwargs)

        return Layer(self, "hedge", (), {"race": race})


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
    return attempt.cancelled() or getattr(attempt.exception(), "no_effect", False) is True
