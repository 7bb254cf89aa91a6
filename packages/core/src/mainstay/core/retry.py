"""When to try again, and after how long: the policy and its loop.

The vocabulary is tenacity's: `wait`, `stop` and `retry` are callables over a `RetryState` that has the attributes of
tenacity's `RetryCallState`, so that its objects (`wait_random_exponential`, `stop_after_delay`, `retry_if_result`,
`|`, `&` and all) can be used as they are. The loop is ours: a call that does not fail costs no state object, no
iterator and no clock.
"""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, ParamSpec, Protocol, TypeVar, cast

from mainstay.core.clock import SYSTEM_CLOCK, Clock
from mainstay.core.deadline import remaining_seconds
from mainstay.core.errors import MainstayError

__all__ = [
    "Decide",
    "FullJitter",
    "Outcome",
    "Retry",
    "RetryState",
    "Wait",
    "note_attempts",
    "retry_if_retryable",
]

P = ParamSpec("P")
T = TypeVar("T")


class RetryState:
    """What is known after an attempt; the attributes that tenacity's objects read.

    Attributes:
        attempt_number: the attempt that just ended, from 1.
        outcome: a finished future with its result or its exception; `outcome.failed` says which.
        seconds_since_start: seconds from the first attempt's start to this one's end.
        idle_for: seconds spent waiting between attempts so far.
        upcoming_sleep: seconds that the next wait will take; 0.0 while `wait` has not been asked.
    """

    __slots__ = (
        "args",
        "attempt_number",
        "fn",
        "idle_for",
        "kwargs",
        "outcome",
        "seconds_since_start",
        "upcoming_sleep",
    )

    def __init__(
        self,
        attempt_number: int,
        outcome: Outcome,
        seconds_since_start: float,
        idle_for: float = 0.0,
    ) -> None:
        self.attempt_number = attempt_number
        self.outcome = outcome
        self.seconds_since_start = seconds_since_start
        self.idle_for = idle_for
        self.upcoming_sleep = 0.0
        self.fn: Callable[..., object] | None = None
        self.args: tuple[object, ...] = ()
        self.kwargs: dict[str, object] = {}


class Outcome(Future[Any]):
    """How an attempt ended."""

    @classmethod
    def of_error(cls, error: BaseException) -> Outcome:
        """The outcome of an attempt that raised `error`."""
        outcome = cls()
        outcome.set_exception(error)
        return outcome

    @classmethod
    def of_result(cls, result: object) -> Outcome:
        """The outcome of an attempt that returned `result`."""
        outcome = cls()
        outcome.set_result(result)
        return outcome

    @property
    def failed(self) -> bool:
        """Whether the attempt raised."""
        return self.exception() is not None


class Wait(Protocol):
    """Seconds to wait before the next attempt; tenacity's `wait_…` objects fit."""

    def __call__(self, retry_state: Any, /) -> float:
        """Seconds."""
        ...


class Decide(Protocol):
    """A yes or no over a state; tenacity's `stop_…` and `retry_if_…` objects fit."""

    def __call__(self, retry_state: Any, /) -> bool:
        """The decision."""
        ...


@dataclass(frozen=True, slots=True)
class FullJitter:
    """A random wait between 0 and `initial_seconds * multiplier ** (attempt - 1)`, at most `max_seconds`.

    The spread is what keeps many callers from coming back at the same moment (M. Brooker, "Exponential Backoff And
    Jitter", AWS Architecture Blog, 2015).
    """

    initial_seconds: float = 0.1
    max_seconds: float = 30.0
    multiplier: float = 2.0

    def __post_init__(self) -> None:
        for name in ("initial_seconds", "max_seconds"):
            if not 0 <= getattr(self, name) < float("inf"):
                msg = f"FullJitter.{name} is {getattr(self, name)!r}; it is a finite number of seconds, 0 or more"
                raise ValueError(msg)
        if not 1 <= self.multiplier < float("inf"):
            msg = f"FullJitter.multiplier is {self.multiplier!r}; it is 1 or more"
            raise ValueError(msg)

    def __call__(self, retry_state: RetryState, /) -> float:
        """Seconds to wait."""
        try:
            ceiling = self.initial_seconds * self.multiplier ** (retry_state.attempt_number - 1)
        except OverflowError:
            ceiling = self.max_seconds
        return random.uniform(0, min(ceiling, self.max_seconds))  # noqa: S311  spreads load, guards nothing


def retry_if_retryable(retry_state: RetryState, /) -> bool:
    """The default: the attempt raised an `Exception`, and no `MainstayError` that says it is not retryable."""
    error = retry_state.outcome.exception()
    return error.retryable if isinstance(error, MainstayError) else isinstance(error, Exception)


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and when to try again.

    Args:
        attempts: the most calls there will be, the first included; 1 never retries.
        wait: seconds before the next attempt; exponential with full jitter by default. An error's `retry_after_seconds`
            is honoured: the wait is never shorter.
        retry: which outcomes are worth another attempt. An exception that is no `Exception`, a cancellation above
            all, is never retried, even where this returns True.
        stop: gives up earlier than `attempts` does, for example `tenacity.stop_after_delay(30)`.
        clock: measures and waits; tests pass a virtual one.

    Raises:
        ValueError: `attempts` is below 1, or no integer.
        TypeError: `wait`, `retry` or `stop` is no plain callable.

    The last error is raised as it is, with a note that says how many attempts there were; except that one with
    `no_effect` gives way to an earlier one without, since of all the attempts together it would not be true. A wait
    that would not end before the current deadline is not begun.
    """

    attempts: int = 3
    wait: Wait = field(default_factory=FullJitter)
    retry: Decide = retry_if_retryable
    stop: Decide | None = None
    clock: Clock = field(default=SYSTEM_CLOCK, repr=False, compare=False)

    def __post_init__(self) -> None:
        attempts = cast("object", self.attempts)  # callers may be unchecked
        if not isinstance(attempts, int) or attempts < 1:
            msg = f"Retry.attempts is {attempts!r}; the first call counts, so it is an integer, 1 or more"
            raise ValueError(msg)
        for name, decision in (("wait", self.wait), ("retry", self.retry), ("stop", self.stop)):
            if decision is None and name == "stop":
                continue
            example = {"wait": "FullJitter()", "retry": "retry_if_retryable", "stop": "tenacity.stop_after_delay(30)"}
            if not callable(cast("object", decision)):
                msg = f"Retry.{name} is {decision!r}; it is called with a RetryState, such as {example[name]}"
                raise TypeError(msg)
            if inspect.iscoroutinefunction(decision) or inspect.iscoroutinefunction(type(decision).__call__):
                msg = f"Retry.{name} is an async function, which is not awaited here; give it a plain one"
                raise TypeError(msg)

    def delay_seconds(self, state: RetryState) -> float | None:
        """Seconds until the next attempt, or None: the outcome stands."""
        error = state.outcome.exception()
        if error is not None and not isinstance(error, Exception):
            return None
        if not self.retry(state) or state.attempt_number >= self.attempts:
            return None
        delay = self.wait(state)
        hint = getattr(error, "retry_after_seconds", None)
        if isinstance(hint, int | float):
            delay = max(delay, hint)
        state.upcoming_sleep = delay
        if self.stop is not None and self.stop(state):
            return None
        left = remaining_seconds()
        return None if left is not None and delay >= left else delay

    async def call(self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Await `fn(*args, **kwargs)`, again and again until an outcome stands."""
        attempt, waited, started = 0, 0.0, self.clock.monotonic()
        real: Exception | None = None
        try:
            while True:
                attempt += 1
                try:
                    result = await fn(*args, **kwargs)
                except Exception as error:
                    delay = self._delay_after(Outcome.of_error(error), attempt, waited, started)
                    if delay is None:
                        note_attempts(error, attempt)
                        if real is not None and _says_nothing_happened(error):
                            raise real from error
                        raise
                    if not _says_nothing_happened(error):
                        real = error
                else:
                    if self.retry is retry_if_retryable:  # a result is never worth another attempt: build no state
                        return result
                    delay = self._delay_after(Outcome.of_result(result), attempt, waited, started)
                    if delay is None:
                        return result
                waited += delay
                await self.clock.sleep(delay)
        except asyncio.CancelledError as cancellation:
            if real is not None:
                note_attempts(real, attempt)
                cancellation.last_error = real  # type: ignore[attr-defined]  # for the time limit that it may be due to
            raise
        finally:
            real = None  # its traceback holds this frame

    def call_sync(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """`call` for a plain function, on a thread that may block while it waits."""
        attempt, waited, started = 0, 0.0, self.clock.monotonic()
        real: Exception | None = None
        while True:
            attempt += 1
            try:
                result = fn(*args, **kwargs)
            except Exception as error:
                delay = self._delay_after(Outcome.of_error(error), attempt, waited, started)
                if delay is None:
                    note_attempts(error, attempt)
                    if real is not None and _says_nothing_happened(error):
                        raise real from error
                    raise
                if not _says_nothing_happened(error):
                    real = error
            else:
                if self.retry is retry_if_retryable:
                    return result
                delay = self._delay_after(Outcome.of_result(result), attempt, waited, started)
                if delay is None:
                    return result
            waited += delay
            self.clock.block(delay)

    def _delay_after(self, outcome: Outcome, attempt: int, waited: float, started: float) -> float | None:
        return self.delay_seconds(RetryState(attempt, outcome, self.clock.monotonic() - started, waited))


def _says_nothing_happened(error: Exception) -> bool:
    return isinstance(error, MainstayError) and error.no_effect


def note_attempts(error: BaseException, attempts: int) -> None:
    """Note at `error` how many attempts there were; once, also where the same instance is raised again and again."""
    note = f"gave up after {attempts} attempts"
    if attempts > 1 and note not in getattr(error, "__notes__", ()):
        error.add_note(note)
