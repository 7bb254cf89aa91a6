"""What the circuits of one breaker share: its name, its configuration, what counts as a failure, its listeners."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from mainstay.circuit_breaker._verdicts import Errors, Verdict, judge
from mainstay.circuit_breaker.settings import BreakerConfig
from mainstay.circuit_breaker.states import State, StateChange
from mainstay.core import Clock

_log = logging.getLogger("mainstay.circuit_breaker")

_NO_MOVES = (0,) * len(State)
_PLACES = {state: place for place, state in enumerate(State)}


class Rules:
    """What the circuits of one breaker share."""

    __slots__ = (
        "answers",
        "clock",
        "config",
        "failed_result",
        "failures",
        "listeners",
        "moves",
        "name",
        "now",
        "own_config",
    )

    def __init__(
        self,
        name: str,
        config: BreakerConfig | None,
        *,
        failures: Errors,
        answers: Errors,
        failed_result: Callable[[Any], bool] | None,
        clock: Clock,
    ) -> None:
        self.name = name
        self.own_config = config  # what the breaker was written with, if anything
        self.config = config or BreakerConfig()
        self.failures = failures
        self.answers = answers
        self.failed_result = failed_result
        self.use(clock)
        self.listeners: tuple[Callable[[StateChange], object], ...] = ()
        self.moves: Sequence[int] = _NO_MOVES  # how often a circuit entered each state, in their order

    def use(self, clock: Clock) -> None:
        """Measure with `clock`, without a layer of Python around the system's."""
        self.clock = clock
        self.now: Callable[[], float] = time.monotonic if type(clock) is Clock else clock.monotonic

    def judge(self, error: BaseException) -> Verdict:
        """What `error` says about the dependency."""
        return judge(error, self.failures, self.answers)

    def break_seconds(self, breaks: int) -> float:
        """The length of the break that follows `breaks` earlier ones without a recovery."""
        config = self.config
        try:
            seconds = min(config.break_seconds * config.break_growth**breaks, config.max_break_seconds)
        except OverflowError:
            seconds = config.max_break_seconds
        return seconds * (1 + config.break_jitter * random.uniform(-1, 1))  # noqa: S311  spreads load, guards nothing

    def announce(self, change: StateChange | None) -> None:
        """Log, count and tell the listeners; what a listener raises reaches no caller."""
        if change is None:
            return
        if not isinstance(self.moves, list):
            self.moves = list(self.moves)
        self.moves[_PLACES[change.after]] += 1
        level = logging.WARNING if change.after in {State.OPEN, State.FORCED_OPEN} else logging.INFO
        of = change.name if change.key is None else f"{change.name}[{change.key}]"
        facts = {
            "breaker": change.name,
            "key": None if change.key is None else str(change.key),
            "before": change.before.value,
            "after": change.after.value,
            "reason": change.reason,
            "break_seconds": change.break_seconds,
        }
        _log.log(level, "circuit %s: %s, was %s: %s", of, change.after, change.before, change.reason, extra=facts)
        for listener in self.listeners:
            try:
                listener(change)
            except Exception:  # noqa: BLE001  any error belongs to the listener
                _log.exception("a listener of circuit %s failed", change.name)
