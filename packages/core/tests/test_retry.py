"""Retry: the policy, its loop, and tenacity's vocabulary."""

import asyncio
import random

import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st

from mainstay.core import (
    DeadlineExceeded,
    FullJitter,
    MainstayError,
    Outcome,
    Retry,
    RetryState,
    retry_if_retryable,
    timeout,
)
from mainstay.core.testing import VirtualClock


class Flaky:
    """Fails `times` times, then returns 'done'."""

    def __init__(self, times, error=OSError):
        self.calls = 0
        self._times = times
        self._error = error

    async def __call__(self, *args):
        return self.sync(*args)

    def sync(self, *args):
        self.calls += 1
        if self.calls <= self._times:
            raise self._error
        return ("done", *args)


def _count(calls):
    calls.append(None)
    return len(calls) - 1


def fixed(seconds):
    return lambda _state: seconds


async def run(clock, coroutine, seconds=100):
    task = asyncio.create_task(coroutine)
    await clock.advance(seconds)
    return await task


async def test_it_tries_again_until_it_works():
    """Arguments reach each attempt and the result comes back."""
    clock, flaky = VirtualClock(), Flaky(2)
    retry = Retry(attempts=3, wait=fixed(1), clock=clock)
    assert await run(clock, retry.call(flaky, 7)) == ("done", 7)
    assert flaky.calls == 3
    assert clock.monotonic() == 100


async def test_it_raises_the_last_error_itself_with_a_note():
    """No wrapper hides what happened; a note says how often it was tried."""
    clock, flaky = VirtualClock(), Flaky(9)
    with pytest.raises(OSError) as caught:  # noqa: PT011  the note below is the match
        await run(clock, Retry(attempts=4, wait=fixed(1), clock=clock).call(flaky))
    assert flaky.calls == 4
    assert caught.value.__notes__ == ["gave up after 4 attempts"]


async def test_a_rejection_does_not_hide_an_attempt_that_may_have_had_an_effect():
    """Of all attempts together it is not true that nothing happened, so the earlier error is what a caller sees."""
    answers = [OSError("reset"), MainstayError("open", no_effect=True, retryable=True)]
    clock = VirtualClock()

    async def call():
        raise answers[min(_count(calls), 1)]

    calls: list[None] = []
    retry = Retry(attempts=3, wait=fixed(1), clock=clock)
    with pytest.raises(OSError, match="reset") as caught:
        await run(clock, retry.call(call))
    assert caught.value.__cause__ is answers[1]

    def call_sync():
        raise answers[min(_count(calls), 1)]

    calls.clear()
    with pytest.raises(OSError, match="reset"):
        retry.call_sync(call_sync)
    with pytest.raises(MainstayError, match="open"):  # nothing but rejections: nothing happened
        retry.call_sync(call_sync)


async def test_one_attempt_never_retries():
    """Attempts counts the first call, and a first error carries no note."""
    flaky = Flaky(1)
    with pytest.raises(OSError) as caught:  # noqa: PT011  any OSError is ours
        await Retry(attempts=1).call(flaky)
    assert flaky.calls == 1
    assert not hasattr(caught.value, "__notes__")


async def test_what_is_not_retryable_is_not_retried():
    """A domain error decides by its own flag."""

    class Declined(MainstayError):
        code = "BIZ_DECLINED"
        status = 409
        title = "Declined"

    flaky = Flaky(9, Declined)
    with pytest.raises(Declined):
        await Retry(attempts=5).call(flaky)
    assert flaky.calls == 1


async def test_a_cancellation_is_never_retried():
    """Even a predicate that always says yes cannot retry a CancelledError."""
    calls = 0

    async def cancelled():
        nonlocal calls
        calls += 1
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await Retry(attempts=5, wait=fixed(0), retry=lambda _s: True).call(cancelled)
    assert calls == 1
    state = RetryState(1, Outcome.of_error(KeyboardInterrupt()), 0.0)
    assert Retry(retry=lambda _s: True).delay_seconds(state) is None


async def test_it_honours_retry_after():
    """The wait is never shorter than what the other side asked for."""
    clock = VirtualClock()
    error = MainstayError("busy", retryable=True, retry_after_seconds=7.0)
    state = RetryState(1, Outcome.of_error(error), 0.0)
    assert Retry(wait=fixed(1), clock=clock).delay_seconds(state) == 7.0
    assert Retry(wait=fixed(9), clock=clock).delay_seconds(state) == 9.0


async def test_results_can_be_worth_another_attempt():
    """A predicate over results retries, and the last result stands when attempts run out."""
    clock, answers = VirtualClock(), iter([1, 2, 3, 4])

    async def answer():
        return next(answers)

    retry = Retry(attempts=3, wait=fixed(1), retry=lambda s: s.outcome.result() < 3, clock=clock)
    assert await run(clock, retry.call(answer)) == 3
    answers = iter([0, 0, 0, 0])
    assert await run(clock, retry.call(answer)) == 0
    assert next(answers) == 0


async def test_a_wait_that_cannot_end_in_time_is_not_begun():
    """Inside a deadline the real error surfaces at once instead of a timeout later."""
    clock, flaky = VirtualClock(), Flaky(9)
    with pytest.raises(OSError):  # noqa: PT011  any OSError is ours
        async with timeout(5, clock=clock):
            await Retry(attempts=5, wait=fixed(6), clock=clock).call(flaky)
    assert flaky.calls == 1
    assert clock.monotonic() == 0


async def test_stop_gives_up_before_attempts_run_out():
    """Stop sees how long it has been and how long the next wait would be."""
    clock, flaky = VirtualClock(), Flaky(9)
    seen = []

    def stop(state):
        seen.append((state.seconds_since_start, state.idle_for, state.upcoming_sleep))
        return state.seconds_since_start + state.upcoming_sleep > 5

    with pytest.raises(OSError):  # noqa: PT011  any OSError is ours
        await run(clock, Retry(attempts=9, wait=fixed(2), stop=stop, clock=clock).call(flaky))
    assert seen == [(0, 0, 2), (2, 2, 2), (4, 4, 2)]


async def test_tenacity_s_objects_fit_as_they_are():
    """wait, stop and retry of tenacity, and their combinations, drive this loop."""
    clock, flaky = VirtualClock(), Flaky(9)
    retry = Retry(
        attempts=99,
        wait=tenacity.wait_fixed(1) + tenacity.wait_incrementing(start=0, increment=1),
        stop=tenacity.stop_after_attempt(4) | tenacity.stop_after_delay(60),
        retry=tenacity.retry_if_exception_type(OSError),
        clock=clock,
    )
    with pytest.raises(OSError):  # noqa: PT011  any OSError is ours
        await run(clock, retry.call(flaky))
    assert flaky.calls == 4
    by_result = Retry(wait=tenacity.wait_none(), retry=tenacity.retry_if_result(lambda r: r is None), clock=clock)
    answers = iter([None, None, 3])

    async def answer():
        return next(answers)

    assert await by_result.call(answer) == 3
    flaky = Flaky(9)
    soon = Retry(attempts=99, wait=tenacity.wait_fixed(4), stop=tenacity.stop_before_delay(10), clock=clock)
    with pytest.raises(OSError):  # noqa: PT011  any OSError is ours
        await run(clock, soon.call(flaky))
    assert flaky.calls == 3


def test_the_loop_for_plain_functions_does_the_same():
    """call_sync retries, gives up, and retries results on a blocking clock."""
    clock, flaky = VirtualClock(), Flaky(2)
    retry = Retry(attempts=3, wait=fixed(2), clock=clock)
    assert retry.call_sync(flaky.sync, 1) == ("done", 1)
    assert clock.monotonic() == 4
    with pytest.raises(OSError) as caught:  # noqa: PT011  the note below is the match
        retry.call_sync(Flaky(9).sync)
    assert caught.value.__notes__ == ["gave up after 3 attempts"]
    answers = iter([1, 1, 5, 1, 1, 1])
    choosy = Retry(attempts=3, wait=fixed(1), retry=lambda s: s.outcome.result() < 5, clock=clock)
    assert choosy.call_sync(lambda: next(answers)) == 5
    assert choosy.call_sync(lambda: next(answers)) == 1


@given(st.integers(1, 5_000), st.floats(0, 100), st.floats(0, 100), st.floats(1, 10))
def test_full_jitter_stays_between_zero_and_its_ceiling(attempt, initial, most, multiplier):
    """No attempt number, however large, overflows or exceeds the maximum."""
    wait = FullJitter(initial, most, multiplier)
    assert 0 <= wait(RetryState(attempt, Outcome.of_result(None), 0.0)) <= most


def test_full_jitter_spreads():
    """Waits of the same attempt differ, and later ones may be longer: callers do not come back together."""
    random.seed(7)
    wait, outcome = FullJitter(1, 1_000, 2), Outcome.of_result(None)
    first = [wait(RetryState(1, outcome, 0.0)) for _ in range(200)]
    fifth = [wait(RetryState(5, outcome, 0.0)) for _ in range(200)]
    assert len(set(first)) == 200
    assert max(first) <= 1 < max(fifth) <= 16
    assert 6 < sum(fifth) / 200 < 10


@pytest.mark.parametrize(
    "make",
    [
        lambda: Retry(attempts=0),
        lambda: FullJitter(initial_seconds=-1),
        lambda: FullJitter(max_seconds=float("inf")),
        lambda: FullJitter(multiplier=0.5),
    ],
)
def test_impossible_policies_are_refused_where_they_are_written(make):
    """A wrong number names its field and range."""
    with pytest.raises(ValueError, match="or more"):
        make()


def test_the_default_predicate():
    """Exceptions are retried unless they say no; results and deadlines as they are."""
    assert retry_if_retryable(RetryState(1, Outcome.of_error(OSError()), 0.0))
    assert retry_if_retryable(RetryState(1, Outcome.of_error(DeadlineExceeded()), 0.0))
    assert not retry_if_retryable(RetryState(1, Outcome.of_error(MainstayError()), 0.0))
    assert not retry_if_retryable(RetryState(1, Outcome.of_result(1), 0.0))
    assert Outcome.of_error(OSError()).failed
    assert not Outcome.of_result(1).failed


async def test_a_deadline_during_a_retry_has_the_last_error_as_its_cause():
    """An attempt that hangs until the time is up does not hide how the one before it failed."""
    clock = VirtualClock()
    attempts = 0

    async def attempt():
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise OSError
        await clock.sleep(60)

    async def call():
        async with timeout(5, clock=clock):
            await Retry(wait=lambda _: 0.0, clock=clock).call(attempt)

    task = asyncio.create_task(call())
    await clock.advance(5)
    with pytest.raises(DeadlineExceeded) as exceeded:
        await task
    assert isinstance(exceeded.value.__cause__, OSError)
    assert exceeded.value.__cause__.__notes__ == ["gave up after 2 attempts"]


async def test_an_error_that_is_raised_again_and_again_has_one_note():
    """A cached error instance does not gather a note for each call."""
    error = OSError("no route")
    retry = Retry(attempts=2, wait=lambda _: 0.0)

    async def fail():
        raise error

    for _ in range(3):
        with pytest.raises(OSError, match="no route"):
            await retry.call(fail)
    assert error.__notes__ == ["gave up after 2 attempts"]


@pytest.mark.parametrize("attempts", [0, 2.5, float("nan"), "3"])
def test_attempts_are_counted_in_whole_numbers(attempts):
    """What cannot be counted to is refused, with the range."""
    with pytest.raises(ValueError, match=r"Retry.attempts is .* an integer, 1 or more"):
        Retry(attempts=attempts)


async def _decide(_):
    return True


class _Decides:
    async def __call__(self, _):
        return True


@pytest.mark.parametrize("decision", [_decide, _Decides(), 0.1])
@pytest.mark.parametrize("field", ["wait", "retry", "stop"])
def test_decisions_are_plain_callables(field, decision):
    """A number in the place of a callable, or one that would not be awaited, is refused before it hides an error."""
    with pytest.raises(TypeError, match=f"Retry.{field} is"):
        Retry(**{field: decision})
