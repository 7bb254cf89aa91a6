"""Limits on load: calls in a stretch of time, and what may be added to a dependency that is not well."""

from __future__ import annotations

import random
import threading
from functools import partial
from math import inf
from typing import Any

from mainstay.circuit_breaker._checks import require
from mainstay.circuit_breaker._verdicts import Verdict, judge
from mainstay.circuit_breaker._windows import TimeWindow
from mainstay.circuit_breaker.errors import RateLimited, Throttled
from mainstay.circuit_breaker.policy import Layer, Policy
from mainstay.circuit_breaker.retries import IsWell
from mainstay.core import SYSTEM_CLOCK, Clock, remaining_seconds

__all__ = ["Budget", "RateLimit"]


class RateLimit(Policy):
    """At most `calls` in `seconds`, evenly: the generic cell rate algorithm, which needs one number of memory.

    Args:
        calls: how many are let through in `seconds`. >= 1
        seconds: > 0
        burst: calls that may follow each other at once after a pause; by default `calls`. >= 1
        max_wait_seconds: a call over the rate waits for its turn if that comes within this time (and within the
            caller's deadline), else it is rejected. A turn whose caller goes away is used up. >= 0
        name: in rejections.
        clock: measures and waits; tests pass a `VirtualClock`.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        calls: int,
        seconds: float = 1.0,
        *,
        burst: int | None = None,
        max_wait_seconds: float = 0.0,
        name: str = "rate limit",
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.name = name
        self.clock = clock
        self.rejected = 0
        self._due = -inf  # when the next call would come if all came evenly
        self._lock = threading.Lock()
        self.reload(calls, seconds, burst=burst, max_wait_seconds=max_wait_seconds)

    def __repr__(self) -> str:
        return f"<RateLimit {self.name!r} {1 / self._interval:g} a second>"

    def reload(
        self, calls: int, seconds: float = 1.0, *, burst: int | None = None, max_wait_seconds: float = 0.0
    ) -> None:
        """Use other numbers from now on; turns that were given are kept.

        Args:
            calls, seconds, burst, max_wait_seconds: as for `RateLimit`.

        Raises:
            ValueError: a number out of its range.
        """
        burst = calls if burst is None else burst
        require("RateLimit", "calls", calls, "1 or more", holds=calls >= 1)
        require("RateLimit", "seconds", seconds, "more than 0, and finite", holds=0 < seconds < inf)
        require("RateLimit", "burst", burst, "1 or more", holds=burst >= 1)
        wait = max_wait_seconds
        require("RateLimit", "max_wait_seconds", wait, "0 or more, and finite", holds=0 <= wait < inf)
        with self._lock:
            self.max_wait_seconds = max_wait_seconds
            self._interval = seconds / calls
            self._ahead = (burst - 1) * self._interval

    def take(self) -> float:
        """Take a turn and return the seconds until it comes.

        Raises:
            RateLimited: it would come too late.
        """
        with self._lock:
            now = self.clock.monotonic()
            due = max(self._due, now)
            wait = max(0.0, due - self._ahead - now)
            if wait > 0:
                left = remaining_seconds()
                if wait > self.max_wait_seconds or (left is not None and wait >= left):
                    self.rejected += 1
                    raise RateLimited(self.name, "used up", wait)
            self._due = due + self._interval
            return wait

    def _layers(self) -> tuple[Layer, ...]:
        names: dict[str, object] = {"take": self.take, "pause": self.clock.sleep, "pause_sync": self.clock.block}
        return (Layer("rate_limit", (), self, names),)


class Budget(Policy):
    """What may be added to the load of one dependency, by everything in this process that calls it.

    Retries and hedges ask it before each attempt beyond the first (`Retries(…, budget=budget)`,
    `Hedge(budget=budget)`). In a pipeline, inside the retry, it also throttles: when the dependency answers fewer than
    one in `throttle` calls, the client itself rejects just so many that about `throttle` times the answered ones are
    sent (B. Beyer and others, "Site Reliability Engineering", 2016, chapter 21). While it does, no attempt beyond the
    first is granted. While a circuit inside it recovers, that circuit's ramp decides alone. A caller that leaves and a
    rejection by a policy inside say nothing: such a call counts as not sent.

    Args:
        ratio: attempts beyond the first, for each call. >= 0
        per_second: attempts beyond the first that are always allowed, so that a quiet client can retry. >= 0
        throttle: how many calls are sent for each answered one at worst; None never throttles. > 1
        window_seconds: how far back it looks; several times the slowest call, or throttling sees only calls under way.
            > 0
        name: in rejections.
        clock: measures; tests pass a `VirtualClock`.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        ratio: float = 0.2,
        *,
        per_second: float = 1.0,
        throttle: float | None = 2.0,
        window_seconds: float = 30.0,
        name: str = "budget",
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        require("Budget", "ratio", ratio, "0 or more, and finite", holds=0 <= ratio < inf)
        require("Budget", "per_second", per_second, "0 or more, and finite", holds=0 <= per_second < inf)
        require("Budget", "throttle", throttle, "more than 1, or None", holds=throttle is None or throttle > 1)
        require("Budget", "window_seconds", window_seconds, "more than 0", holds=0 < window_seconds < inf)
        self.name = name
        self.ratio = ratio
        self.per_second = per_second
        self.throttle = throttle
        self.window_seconds = window_seconds
        self.clock = clock
        self.rejected = 0
        self.refused = 0
        self._lock = threading.Lock()
        now = clock.monotonic()
        # Of the windows' counters the first holds calls and attempts, the second what was granted and answered, the
        # third the attempts that say nothing.
        self._extras = TimeWindow(window_seconds, 0, now)
        self._answers = TimeWindow(window_seconds, 0, now)

    def __repr__(self) -> str:
        return f"<Budget {self.name!r} {self.ratio:g} a call>"

    def deposit(self) -> None:
        """A call begins."""
        with self._lock:
            self._extras.turn(self.clock.monotonic())
            self._extras.successes += 1

    def grant(self) -> bool:
        """Whether one more attempt may be made; counts it if so."""
        with self._lock:
            now = self.clock.monotonic()
            everything, granted, _ = self._extras.totals(now)
            # A call that an open or recovering circuit refused is none that extra attempts could be a share of.
            calls = max(0, everything - granted - self._answers.totals(now)[2])
            allowed = self.ratio * calls + self.per_second * self.window_seconds
            # Where first attempts are throttled, there is nothing to spare for others.
            if granted + 1 > allowed or self._excess() > 0:
                self.refused += 1
                return False
            self._extras.failures += 1
            return True

    def _request(self, is_well: IsWell | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count an attempt, before it is made: those that hang must count too.

        Raises:
            Throttled: too few of the recent ones were answered.
        """
        # While a circuit recovers, its probes and its ramp say how much is sent: what was not answered before says
        # nothing about the dependency that has come back.
        recovering = is_well is not None and not is_well(args, kwargs)
        with self._lock:
            reject = self._excess()
            self._answers.successes += 1
            if recovering or reject <= 0 or random.random() >= reject:  # noqa: S311  spreads load, guards nothing
                return
            self.rejected += 1
        raise Throttled(self.name, "throttled", self.window_seconds / 10)

    def _excess(self) -> float:
        """Share of the attempts that is more than the answers justify. Under the lock."""
        everything, answered, unsaid = self._answers.totals(self.clock.monotonic())
        sent = everything - answered - unsaid
        if self.throttle is None or sent < _FEW:
            return 0.0
        return (sent - self.throttle * answered) / (sent + 1)

    def _accepted(self) -> None:
        """An attempt was answered."""
        with self._lock:
            self._answers.turn(self.clock.monotonic())
            self._answers.failures += 1

    def _raised(self, error: BaseException) -> None:
        """An attempt ended with `error`."""
        verdict = judge(error)
        if verdict is Verdict.ANSWER:
            self._accepted()
        elif verdict is Verdict.NEUTRAL:  # the caller left, or a policy inside refused: as if it had not been sent
            with self._lock:
                self._answers.mark_slow(self.clock.monotonic())

    def _layers(self) -> tuple[Layer, ...]:
        return (self._layer(None),)

    def _layer(self, is_well: IsWell | None) -> Layer:
        """The layer; `is_well` says of a call's arguments whether every circuit inside is closed."""
        names: dict[str, object] = {
            "request": partial(self._request, is_well),
            "accepted": self._accepted,
            "raised": self._raised,
        }
        return Layer("budget", (), self, names)


_FEW = 10
"""Attempts below which a share of answers says nothing."""
