"""Deadlines: who cancelled what, and what that means to the policies inside."""

import asyncio

import pytest

from mainstay.core import (
    SYSTEM_CLOCK,
    Context,
    DeadlineExceeded,
    bind,
    current,
    deadline_fired,
    remaining_seconds,
    timeout,
)
from mainstay.core.testing import VirtualClock


@pytest.fixture
def clock():
    return VirtualClock()


async def hang():
    await asyncio.get_running_loop().create_future()


class Policy:
    """Counts the way a breaker does."""

    def __init__(self):
        self.failures = self.neutral = 0

    async def call(self, work):
        try:
            await work()
        except asyncio.CancelledError:
            if deadline_fired():
                self.failures += 1
            else:
                self.neutral += 1
            raise


async def test_twenty_step_timeouts_around_a_breaker_count_as_failures(clock):
    """A provider that hangs must open the circuit, although every one of its calls ends in a cancellation."""
    policy = Policy()
    for _ in range(20):

        async def step():
            async with timeout(0.5, clock=clock):
                await policy.call(hang)

        task = asyncio.create_task(step())
        await clock.advance(0.5)
        with pytest.raises(DeadlineExceeded, match=r"within 0\.5 s"):
            await task
    assert (policy.failures, policy.neutral) == (20, 0)


async def test_a_caller_that_goes_away_is_neutral(clock):
    """A cancellation from outside says nothing about what was called."""
    policy = Policy()

    async def step():
        async with timeout(5, clock=clock):
            await policy.call(hang)

    task = asyncio.create_task(step())
    await clock.advance(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (policy.failures, policy.neutral) == (0, 1)


async def test_a_deadline_reaches_into_child_tasks(clock):
    """When the deadline cancels a parent that waits for children, the children see a failure, too."""
    policies = [Policy(), Policy()]

    async def step():
        async with timeout(1, clock=clock):
            await asyncio.gather(*(policy.call(hang) for policy in policies))

    task = asyncio.create_task(step())
    await clock.advance(1)
    with pytest.raises(DeadlineExceeded):
        await task
    assert [policy.failures for policy in policies] == [1, 1]


async def test_a_cancellation_beside_the_timeout_is_not_lost(clock):
    """A cancellation in the moment in which time runs out: the cancellation wins, as with asyncio's own timeout."""

    async def step():
        async with timeout(1, clock=clock):
            await hang()

    task = asyncio.create_task(step())
    await clock.advance(0.5)
    clock.tick(0.5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_outer_deadline_limits_the_inner(clock):
    """An inner timeout cannot buy time, and it is the outer one that raises."""
    seen = []

    async def step():
        async with timeout(1, clock=clock):
            try:
                async with timeout(60, clock=clock):
                    seen.append(remaining_seconds())
                    await hang()
            except DeadlineExceeded:
                pytest.fail("it is the outer deadline that has passed")

    task = asyncio.create_task(step())
    await clock.advance(1)
    with pytest.raises(DeadlineExceeded, match="within 1 s"):
        await task
    assert seen == [1.0]


async def test_an_inner_timeout_leaves_the_outer_intact(clock):
    """After an inner timeout is handled, work goes on under the outer deadline, and nothing counts as fired."""
    seen = []

    async def step():
        async with timeout(10, clock=clock):
            try:
                async with timeout(1, clock=clock):
                    await hang()
            except DeadlineExceeded:
                seen.append((deadline_fired(), remaining_seconds()))

    task = asyncio.create_task(step())
    await clock.advance(1)
    await task
    assert seen == [(False, 9.0)]


async def test_work_that_cannot_begin_says_that_nothing_happened():
    """Code that blocks the loop past its deadline finds it passed at the next one: failed for sure, not unknown."""
    with pytest.raises(DeadlineExceeded, match="before this work began") as caught:
        async with timeout(0.01):
            SYSTEM_CLOCK.block(0.02)
            async with timeout(5):
                pytest.fail("must not begin")
    assert caught.value.no_effect


async def test_the_body_s_own_errors_pass_and_the_context_returns(clock):
    """Errors of the block are its own, and neither the timer nor the deadline outlives it."""
    with bind(actor="ann"):
        with pytest.raises(ZeroDivisionError):
            async with timeout(1, clock=clock) as deadline:
                assert current() == Context(actor="ann")
                assert "in 1.000 s" in repr(deadline)
                _ = 1 / 0
        assert current() == Context(actor="ann")
    await clock.advance(5)
    assert not deadline_fired()
    assert remaining_seconds() is None


async def test_it_times_real_waits():
    """With the system's clock the event loop ends the wait."""
    with pytest.raises(DeadlineExceeded):
        async with timeout(0.01):
            await hang()


@pytest.mark.parametrize("seconds", [-1, float("nan")])
def test_a_negative_timeout_is_refused(seconds):
    """A wrong number is an error where it is written."""
    with pytest.raises(ValueError, match="must not be negative"):
        timeout(seconds)


async def test_a_block_that_ends_in_another_context_leaves_no_deadline_behind(clock):
    """An abandoned async generator is closed by another task: its consumer is not cancelled, and has its time again."""

    async def pages():
        async with timeout(2, clock=clock):
            yield 1

    async def consume():
        generator = pages()
        await anext(generator)
        assert remaining_seconds() == 2
        await asyncio.create_task(generator.aclose())
        await clock.sleep(5)
        return remaining_seconds(), deadline_fired()

    task = asyncio.create_task(consume())
    await clock.advance(5)
    assert await task == (None, False)
    async with timeout(100, clock=clock):
        task = asyncio.create_task(consume())
        await clock.advance(5)
        assert await task == (95, False)


async def test_a_deadline_holds_inside_a_limit_of_another_clock(clock):
    """Two clocks may be years apart: what is compared is the time left."""
    async with timeout(5, clock=clock), timeout(60) as real:
        assert real.remaining_seconds() == pytest.approx(5, abs=1)
    async with timeout(60, clock=clock), timeout(5) as real:
        assert real.remaining_seconds() == pytest.approx(5, abs=1)
