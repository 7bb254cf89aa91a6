"""Retrying, as a policy: core's `Retry` decides whether and when, this adds what a sick dependency needs.

- A rejection by a policy inside (an open circuit, a full bulkhead) is not retried: it is an answer to all attempts.
- Nothing is retried while a circuit inside is not closed: during an outage and a recovery, load is what it needs least.
- A `Budget` bounds what retries add to the load of all calls together.
- What comes out is the truth about all attempts. If the first one timed out and the second was rejected, the
  rejection's `no_effect` would be a lie; the first one's error is raised.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from mainstay.circuit_breaker._admission import Layer, Policy
from mainstay.circuit_breaker.circuit import Circuit
from mainstay.circuit_breaker.errors import Rejected
from mainstay.core import Clock, FullJitter, MainstayError, Outcome, Retry, RetryState, retry_if_retryable


class Grants(Protocol):
    """What retries and hedges ask for leave: a `Budget`."""

    def deposit(self) -> None:
        """A call begins."""
        ...

    def grant(self) -> bool:
        """Whether one more attempt may be made."""
        ...


class Trial:
    """What is known of a call that has failed at least once."""

    __slots__ = ("attempts", "delay", "error", "started", "waited")

    def __init__(self, started: float) -> None:
        self.attempts = 0
        self.started = started
        self.waited = 0.0
        self.delay: float | None = None
        self.error: BaseException | None = None

    def take_error(self) -> BaseException:
        """The error to raise, which this then no longer holds."""
        error, self.error = self.error, None
        assert error is not None  # noqa: S101  asked only after an attempt that raised
        return error


class Retries(Policy):
    """Try again, as `policy` says.

    Args:
        policy: how often and when; `mainstay.core.Retry`, which takes tenacity's `wait`, `stop` and `retry` objects.
        budget: shared by everything that calls the same dependency.

    In a pipeline a bare `Retry(…)` stands for `Retries(Retry(…))`.
    """

    def __init__(self, policy: Retry | None = None, *, budget: Grants | None = None) -> None:
        self.policy = Retry() if policy is None else policy
        self.budget = budget

    def __repr__(self) -> str:
        return f"<Retries {self.policy.attempts} attempts>"

    def _layers(self) -> tuple[Layer, ...]:
        return (self._layer(()),)

    def _layer(self, inside: Sequence[Circuit]) -> Layer:
        """The layer, with the circuits that stand inside it."""
        loop = Attempts(self.policy, self.budget, tuple(inside))
        clock = self.policy.clock
        names: dict[str, object] = {
            "again": loop.again,
            "again_with": loop.again_with,
            "pause": clock.sleep,
            "pause_sync": clock.block,
            "now": loop.now,
            "deposit": None if self.budget is None else self.budget.deposit,
        }
        return Layer(
            self,
            "retry",
            (_measures(self.policy), self.policy.retry is not retry_if_retryable, bool(self.budget)),
            names,
        )


def _measures(policy: Retry) -> bool:
    """Whether anything may ask how long the call has taken since its first attempt."""
    return policy.stop is not None or not isinstance(policy.wait, FullJitter) or policy.retry is not retry_if_retryable


class Attempts:
    """The decisions of one retry layer."""

    __slots__ = ("_budget", "_inside", "_policy", "now")

    def __init__(self, policy: Retry, budget: Grants | None, inside: tuple[Circuit, ...]) -> None:
        self._policy = policy
        self._budget = budget
        self._inside = inside
        self.now: Callable[[], float] = time.monotonic if type(policy.clock) is Clock else policy.clock.monotonic

    def again(self, trial: Trial | None, error: Exception, started: float | None = None) -> Trial:
        """After an attempt that raised: `delay` is the wait before the next, or None; then `error` is to be raised."""
        trial = self._next(trial, started)
        # An earlier attempt may have had an effect. An error that denies one must not hide it.
        if trial.error is None or getattr(error, "no_effect", False) is not True or _denies(trial.error):
            trial.error = error
        trial.delay = None if isinstance(error, Rejected) else self._delay(trial, Outcome.of_error(error))
        if trial.delay is None and trial.attempts > 1:
            trial.error.add_note(f"gave up after {trial.attempts} attempts")
        return trial

    def again_with(self, trial: Trial | None, result: object, started: float | None = None) -> Trial:
        """After an attempt that returned."""
        trial = self._next(trial, started)
        trial.delay = self._delay(trial, Outcome.of_result(result))
        return trial

    def _next(self, trial: Trial | None, started: float | None) -> Trial:
        if trial is None:
            trial = Trial(self.now() if started is None else started)
        trial.attempts += 1
        return trial

    def _delay(self, trial: Trial, outcome: Outcome) -> float | None:
        state = RetryState(trial.attempts, outcome, self.now() - trial.started, trial.waited)
        delay = self._policy.delay_seconds(state)
        if delay is None:
            return None
        if any(circuit.window is None for circuit in self._inside):
            return None
        if self._budget is not None and not self._budget.grant():
            return None
        trial.waited += delay
        return delay


def _denies(error: BaseException) -> bool:
    return isinstance(error, MainstayError) and error.no_effect
