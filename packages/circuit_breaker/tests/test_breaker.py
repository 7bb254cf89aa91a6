"""The state machine of one circuit, on a virtual clock."""

import asyncio

import pytest

from mainstay.circuit_breaker import BreakerConfig, CircuitBreaker, CircuitOpen, State, StateChange
from mainstay.core import MainstayError
from mainstay.core.testing import VirtualClock

QUICK = BreakerConfig(minimum_calls=4, break_jitter=0, ramp_seconds=0, probe_successes=1)


class Boom(Exception):
    pass


async def fine(value: object = None) -> object:
    return value


async def broken() -> None:
    raise Boom


async def fail(breaker: CircuitBreaker, times: int) -> None:
    for _ in range(times):
        with pytest.raises(Boom):
            await breaker.call(broken)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


async def test_it_opens_at_the_ratio_and_not_below_the_minimum(clock: VirtualClock) -> None:
    """Three failures of three calls leave it closed, because a ratio of three says nothing; the fourth opens it."""
    breaker = CircuitBreaker("p", QUICK, clock=clock)
    await fail(breaker, 3)
    assert breaker.snapshot().state is State.CLOSED
    await fail(breaker, 1)
    assert breaker.snapshot().state is State.OPEN
    with pytest.raises(CircuitOpen) as rejection:
        await breaker.call(fine)
    assert (rejection.value.name, rejection.value.state, rejection.value.retry_after_seconds) == ("p", "open", 5.0)
    assert rejection.value.no_effect
    assert "p is open; try again in 5 s" in str(rejection.value)


async def test_successes_dilute_the_ratio(clock: VirtualClock) -> None:
    """Six successes and five failures are below one half; the sixth failure is one half and opens it."""
    breaker = CircuitBreaker("p", QUICK, clock=clock)
    for _ in range(6):
        await breaker.call(fine)
    await fail(breaker, 5)
    assert breaker.snapshot().state is State.CLOSED
    await fail(breaker, 1)
    assert breaker.snapshot().state is State.OPEN


async def test_old_calls_leave_a_time_window(clock: VirtualClock) -> None:
    """Failures older than the window do not count towards the next ones."""
    breaker = CircuitBreaker("p", QUICK, clock=clock)
    await fail(breaker, 3)
    await clock.advance(61)
    await fail(breaker, 3)
    assert breaker.snapshot().state is State.CLOSED
    assert breaker.snapshot().calls == 3


async def test_old_calls_leave_a_count_window(clock: VirtualClock) -> None:
    """Of a window of ten calls only the last ten count, however many there were."""
    breaker = CircuitBreaker("p", QUICK.model_copy(update={"window_calls": 10}), clock=clock)
    await fail(breaker, 3)
    for _ in range(9):
        await breaker.call(fine)
    snapshot = breaker.snapshot()
    assert (snapshot.calls, snapshot.failures) == (10, 1)
    await fail(breaker, 3)
    assert breaker.snapshot().state is State.CLOSED  # the old one has left: 3 of 10
    assert breaker.snapshot().failures == 3
    await fail(breaker, 2)
    assert breaker.snapshot().state is State.OPEN


async def test_recovery_probe_by_probe(clock: VirtualClock) -> None:
    """After the break one probe goes through; its success closes, its failure opens again, for longer."""
    breaker = CircuitBreaker("p", QUICK, clock=clock)
    await fail(breaker, 4)
    await clock.advance(5)
    await fail(breaker, 1)
    assert breaker.snapshot().state is State.OPEN
    assert breaker.snapshot().retry_after_seconds == 10.0
    await clock.advance(10)
    assert await breaker.call(fine, 7) == 7
    assert breaker.snapshot().state is State.CLOSED
    await fail(breaker, 4)
    assert breaker.snapshot().retry_after_seconds == 5.0  # recovered once: the next break is the first again


async def test_listeners_hear_every_change_in_order(clock: VirtualClock) -> None:
    """A listener gets before, after and the numbers that led to it; one that raises disturbs nobody."""
    breaker = CircuitBreaker("p", QUICK, clock=clock)
    heard: list[StateChange] = []
    breaker.on_change(lambda change: 1 / 0)
    breaker.on_change(heard.append)
    await fail(breaker, 4)
    await clock.advance(5)
    await breaker.call(fine)
    assert [(change.before, change.after) for change in heard] == [
        (State.CLOSED, State.OPEN),
        (State.OPEN, State.HALF_OPEN),
        (State.HALF_OPEN, State.CLOSED),
    ]
    assert heard[0].reason == "4 of 4 calls failed"
    assert heard[0].break_seconds == 5.0


def test_plain_functions(clock: VirtualClock) -> None:
    """The same object decorates plain functions."""
    breaker = CircuitBreaker("p", QUICK, clock=clock)

    @breaker
    def divide(a: int, b: int) -> float:
        """Divide."""
        return a / b

    assert divide(6, 3) == 2
    assert divide.__doc__ == "Divide."
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            divide(1, 0)
    with pytest.raises(CircuitOpen):
        divide(6, 3)


class Declined(MainstayError):
    code = "BIZ_DECLINED"


async def test_a_refusal_is_an_answer(clock: VirtualClock) -> None:
    """A dependency that declines a card works: such errors count as successes, and end half open too."""
    breaker = CircuitBreaker("p", QUICK, clock=clock)

    async def decline() -> None:
        raise Declined

    await fail(breaker, 4)
    await clock.advance(5)
    with pytest.raises(Declined):
        await breaker.call(decline)
    assert breaker.snapshot().state is State.CLOSED
    assert breaker.totals()["success"] == 1
    for _ in range(20):
        with pytest.raises(Declined):
            await breaker.call(decline)
    assert breaker.snapshot().state is State.CLOSED


async def test_a_cancelled_caller_is_neutral(clock: VirtualClock) -> None:
    """Twenty callers who go away open nothing and are counted as neutral."""
    breaker = CircuitBreaker("p", QUICK, clock=clock)

    async def hang() -> None:
        await asyncio.Event().wait()

    for _ in range(20):
        task = asyncio.create_task(breaker.call(hang))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert breaker.snapshot().state is State.CLOSED
    assert breaker.totals() == {"success": 0, "failure": 0, "neutral": 20, "late": 0, "rejected": 0}
