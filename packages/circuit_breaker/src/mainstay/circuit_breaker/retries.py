"""Retrying, as a policy: core's `Retry` decides whether and when, this adds what a sick dependency needs.

- A rejection by a policy inside (an open circuit, a full bulkhead) is not retried: it is an answer to all attempts.
- Nothing is retried while a circuit inside is not closed: during an outage and a recovery, load is what it needs least.
- A `Budget` bounds what retries add to the load of all calls together.
- What comes out is the truth about all attempts. If the first one timed out and the second was rejected, the
  rejection's `no_effect` would be a lie; the first one's error is raised.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol, cast

from mainstay.circuit_breaker._verdicts import denies, is_final
from mainstay.circuit_breaker.policy import Layer, Policy
from mainstay.core import Clock, FullJitter, Outcome, Retry, RetryState, note_attempts, retry_if_retryable

__all__ = ["Retries"]

IsWell = Callable[[tuple[Any, ...], dict[str, Any]], bool]


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

    def cut_short(self, cancellation: BaseException, begun: int) -> None:
        """The next attempt was cancelled, `begun` (1) or not (0): a time limit is to know how the one before failed."""
        error, self.error = self.error, None
        if not isinstance(cancellation, asyncio.CancelledError):
            return
        if error is None:  # the one before had a result: something was sent
            cancellation.no_effect = False  # type: ignore[attr-defined]  # carried by the instance
        else:
            note_attempts(error, self.attempts + begun)
            cancellation.last_error = error  # type: ignore[attr-defined]  # the same

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

    Raises:
        TypeError: `policy` is no `Retry`.

    In a pipeline a bare `Retry(…)` stands for `Retries(Retry(…))`.
    """

    def __init__(self, policy: Retry | None = None, *, budget: Grants | None = None) -> None:
        self._policy = Retry() if policy is None else _checked(policy)
        self.budget = budget

    def __repr__(self) -> str:
        return f"<Retries {self._policy.attempts} attempts>"

    @property
    def policy(self) -> Retry:
        """How often and when; changed by `reload`."""
        return self._policy

    def reload(self, policy: Retry) -> None:
        """Try again as `policy` says from now on; calls under way go by it too, the next time they fail.

        Raises:
            TypeError: `policy` is no `Retry`.
        """
        self._policy = _checked(policy)
        self._recompile()

    def _layers(self) -> tuple[Layer, ...]:
        return (self._layer(None),)

    def _layer(self, is_well: IsWell | None) -> Layer:
        """The layer; `is_well` says of a call's arguments whether every circuit inside is closed."""
        loop = Attempts(self._policy, self.budget, is_well)
        clock = self._policy.clock
        names: dict[str, object] = {
            "again": loop.again,
            "again_with": loop.again_with,
            "pause": clock.sleep,
            "pause_sync": clock.block,
            "now": loop.now,
            "deposit": None if self.budget is None else self.budget.deposit,
        }
        return Layer(
            "retry",
            (_measures(self._policy), self._policy.retry is not retry_if_retryable, self.budget is not None),
            self,
            names,
        )


def _checked(policy: Retry) -> Retry:
    if not isinstance(cast("object", policy), Retry):
        msg = f"Retries: policy is {policy!r}; it is a Retry, such as Retry(attempts=3)"
        raise TypeError(msg)
    return policy


def _measures(policy: Retry) -> bool:
    """Whether anything may ask how long the call has taken since its first attempt."""
    return policy.stop is not None or not isinstance(policy.wait, FullJitter) or policy.retry is not retry_if_retryable


class Attempts:
    """The decisions of one retry layer."""

    __slots__ = ("_budget", "_is_well", "_policy", "now")

    def __init__(self, policy: Retry, budget: Grants | None, is_well: IsWell | None) -> None:
        self._policy = policy
        self._budget = budget
        self._is_well = is_well
        self.now: Callable[[], float] = time.monotonic if type(policy.clock) is Clock else policy.clock.monotonic

    def again(
        self,
        trial: Trial | None,
        error: Exception,
        started: float | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Trial:
        """After an attempt that raised: `delay` is the wait before the next, or None; then `error` is to be raised."""
        trial = self._next(trial, started)
        # An earlier attempt may have had an effect. An error that denies one must not hide it.
        if trial.error is None or not denies(error) or denies(trial.error):
            trial.error = error
        trial.delay = None if is_final(error) else self._delay(trial, Outcome.of_error(error), args, kwargs)
        if trial.delay is None:
            note_attempts(trial.error, trial.attempts)
        return trial

    def again_with(
        self,
        trial: Trial | None,
        result: object,
        started: float | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Trial:
        """After an attempt that returned."""
        trial = self._next(trial, started)
        trial.delay = self._delay(trial, Outcome.of_result(result), args, kwargs)
        return trial

    def _next(self, trial: Trial | None, started: float | None) -> Trial:
        if trial is None:
            trial = Trial(self.now() if started is None else started)
        trial.attempts += 1
        return trial

    def _delay(self, trial: Trial, outcome: Outcome, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
        state = RetryState(trial.attempts, outcome, self.now() - trial.started, trial.waited)
        delay = self._policy.delay_seconds(state)
        if delay is None:
            return None
        if self._is_well is not None and not self._is_well(args, kwargs):
            return None
        if self._budget is not None and not self._budget.grant():
            return None
        trial.waited += delay
        return delay
