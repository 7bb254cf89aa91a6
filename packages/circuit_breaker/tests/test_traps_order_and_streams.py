"""The traps of orders and of streams; the others are in `test_traps.py`."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import pytest
import tenacity

from mainstay.circuit_breaker import (
    BreakerConfig,
    Budget,
    Bulkhead,
    BulkheadFull,
    CircuitBreaker,
    CircuitOpen,
    HarmfulOrderWarning,
    Hedge,
    Pipeline,
    RateLimit,
    RateLimited,
    State,
    Throttled,
    Timeout,
)
from mainstay.circuit_breaker.testing import HANG, Dependency, forced
from mainstay.core import DeadlineExceeded, Retry
from mainstay.core.testing import VirtualClock

PLAIN = BreakerConfig(minimum_calls=4, break_jitter=0, ramp_seconds=0, probe_successes=1)


class Boom(Exception):
    pass


async def trip(breaker: CircuitBreaker) -> None:
    """Fail until it opens."""
    while breaker.state is State.CLOSED:
        with pytest.raises(Boom):
            await breaker.call(Dependency(then=Boom))


def test_order() -> None:
    """Orders that defeat a policy are warned of, naming both and the remedy; the stated order is silent."""
    breaker, retry = CircuitBreaker("p"), Retry()
    with pytest.warns(HarmfulOrderWarning, match="breaker stands around retry.*put the breaker inside the retry"):
        Pipeline("p", breaker, retry)
    with pytest.warns(HarmfulOrderWarning, match="bulkhead stands around retry"):
        Pipeline("p", Bulkhead(1), retry)
    Pipeline("p", Timeout(5), retry, Budget(), Hedge(1), breaker, Bulkhead(1), Timeout(1))


async def test_order_rejections_are_not_retried_and_are_not_failures(clock: VirtualClock) -> None:
    """An open circuit and a full bulkhead are not tried again, and a bulkhead's rejections open no circuit."""
    breaker, bulkhead = CircuitBreaker("p", PLAIN, clock=clock), Bulkhead(1, clock=clock)
    guarded = Pipeline("p", Retry(attempts=5, clock=clock), breaker, bulkhead)
    dependency = Dependency()
    bulkhead.take()
    for _ in range(20):
        with pytest.raises(BulkheadFull):
            await guarded.call(dependency)
    assert (breaker.state, bulkhead.rejected, dependency.calls) == (State.CLOSED, 20, [])
    bulkhead.release()
    with forced(breaker, State.OPEN), pytest.raises(CircuitOpen):
        await guarded.call(dependency)
    assert (breaker.totals()["rejected"], dependency.calls) == (1, [])


async def test_order_a_rejected_retry_does_not_deny_the_first_attempt(clock: VirtualClock) -> None:
    """After an attempt that may have had an effect, the rejection of the next must not deny it."""
    breaker = CircuitBreaker("p", BreakerConfig(consecutive_failures=1), clock=clock)
    bulkhead = Bulkhead(1, clock=clock)
    guarded = Pipeline("p", Retry(attempts=3, wait=lambda _: 0.0, clock=clock), bulkhead)

    class Blocks(Dependency):
        async def __call__(self, *args: object, **kwargs: object) -> None:
            bulkhead.free = 0 - 1  # another call takes the place meanwhile
            raise Boom

    with pytest.raises(Boom) as failure:
        await guarded.call(Blocks())
    assert failure.value.__notes__ == ["gave up after 2 attempts"]
    with pytest.raises(Boom):
        await Pipeline("p", Retry(attempts=3, clock=clock), breaker).call(Dependency(then=Boom))
    assert breaker.totals()["failure"] == 1  # it opened: not tried again


async def test_generators_and_streams(clock: VirtualClock) -> None:
    """A stream settles at its end, an abandoned one nowhere; nothing is repeated once an item was seen."""
    breaker = CircuitBreaker("p", PLAIN, clock=clock)
    began = 0

    @Pipeline("p", Retry(attempts=3, wait=lambda _: 0.0, clock=clock), breaker)
    async def stream(fail_at: int, items: int = 3) -> AsyncIterator[int]:
        nonlocal began
        began += 1
        for item in range(items):
            if item == fail_at and (item or began == 1):
                raise Boom
            yield item

    items = stream(-1)
    assert await anext(items) == 0
    assert breaker.snapshot().calls == 0
    assert [item async for item in items] == [1, 2]
    assert breaker.snapshot().successes_total == 1

    abandoned = stream(-1)
    await anext(abandoned)
    await abandoned.aclose()  # type: ignore[attr-defined]  # it is a generator, typed by what it was declared as
    assert breaker.totals()["neutral"] == 1

    began = 0
    with pytest.raises(Boom):
        _ = [item async for item in stream(1)]
    assert began == 1

    began = 0
    assert [item async for item in stream(0)] == [0, 1, 2]
    assert began == 2
    assert breaker.totals() == {"success": 2, "failure": 2, "neutral": 1, "late": 0, "rejected": 0}


async def test_order_no_rejection_is_retried_or_a_failure(clock: VirtualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the rate limit and the budget reject is tried once and opens nothing."""
    monkeypatch.setattr("random.random", lambda: 0.0)
    breaker = CircuitBreaker("p", PLAIN, clock=clock)
    budget = Budget(throttle=2.0, clock=clock)
    limit = RateLimit(1, 1000, clock=clock)
    retry = Retry(attempts=5, wait=lambda _: 0.0, clock=clock)
    limited = Pipeline("p", retry, breaker, limit)
    await limited.call(Dependency())
    for _ in range(10):
        with pytest.raises(RateLimited):
            await limited.call(Dependency())
    assert limit.rejected == 10
    for _ in range(10):
        with pytest.raises(Boom):
            await budget.call(Dependency(Boom))
    throttled = Pipeline("p", retry, breaker, budget)
    for _ in range(10):
        with pytest.raises(Throttled):
            await throttled.call(Dependency())
    assert budget.rejected == 10
    assert breaker.totals() == {"success": 1, "failure": 0, "neutral": 20, "late": 0, "rejected": 0}


async def test_order_rejections_in_a_group_are_rejections(clock: VirtualClock) -> None:
    """A task group wraps what its tasks raise: only rejections are no failure and not retried, one failure is both."""
    breaker = CircuitBreaker("p", PLAIN, clock=clock)
    inner = CircuitBreaker("inner", clock=clock)
    inner.force_open()
    guarded = Pipeline("p", Retry(attempts=2, wait=lambda _: 0.0, clock=clock), breaker)
    ran = 0

    async def work(*others: Dependency) -> None:
        nonlocal ran
        ran += 1
        async with asyncio.TaskGroup() as group:
            group.create_task(inner.call(Dependency()))
            for other in others:
                group.create_task(other())

    with pytest.raises(ExceptionGroup):
        await guarded.call(work)
    assert (ran, breaker.totals()["neutral"]) == (1, 1)
    with pytest.raises(ExceptionGroup):
        await guarded.call(work, Dependency(then=Boom))
    assert (ran, breaker.totals()["failure"]) == (3, 2)


async def test_order_time_in_our_own_queue_is_no_failure(clock: VirtualClock) -> None:
    """A breaker around a time limit around a full bulkhead stays closed: nothing was sent, and the error says so."""
    breaker, bulkhead = CircuitBreaker("p", PLAIN, clock=clock), Bulkhead(1, queue=9, max_wait_seconds=60, clock=clock)
    guarded = Pipeline("p", breaker, Timeout(2, clock=clock), bulkhead)
    bulkhead.take()
    calls = [asyncio.create_task(guarded.call(Dependency())) for _ in range(5)]
    await clock.advance(2)
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert {(type(error), getattr(error, "no_effect", None)) for error in errors} == {(DeadlineExceeded, True)}
    assert (breaker.state, breaker.totals()["neutral"], len(bulkhead.waiting)) == (State.CLOSED, 5, 0)


async def test_order_a_deadline_during_a_retry_does_not_hide_the_last_real_error(clock: VirtualClock) -> None:
    """A retry cut short in the queue gives the real error, one cut short on its way a timeout caused by it."""
    bulkhead = Bulkhead(1, queue=1, max_wait_seconds=60, clock=clock)
    retry = Retry(attempts=3, wait=lambda _: 0.0, clock=clock)
    guarded = Pipeline("p", Timeout(5, clock=clock), retry, CircuitBreaker("p", clock=clock), bulkhead)

    async def once() -> None:
        bulkhead.free -= 1  # another call takes the place meanwhile
        raise Boom

    queued = asyncio.create_task(guarded.call(once))
    await clock.advance(5)
    with pytest.raises(Boom) as real:
        await queued
    assert real.value.__notes__ == ["gave up after 2 attempts"]
    bulkhead.release()
    hanging = asyncio.create_task(guarded.call(Dependency(Boom, HANG)))
    await clock.advance(5)
    with pytest.raises(DeadlineExceeded) as exceeded:
        await hanging
    assert isinstance(exceeded.value.__cause__, Boom)
    assert not exceeded.value.no_effect


async def test_order_a_result_that_was_not_good_enough_was_sent_all_the_same(clock: VirtualClock) -> None:
    """If the retry of a result waits in the queue when the time is up, the timeout does not deny the first attempt."""
    bulkhead = Bulkhead(1, queue=1, max_wait_seconds=60, clock=clock)
    again = Retry(attempts=3, wait=lambda _: 0.0, retry=tenacity.retry_if_result(lambda _: True), clock=clock)
    guarded = Pipeline("p", Timeout(5, clock=clock), again, bulkhead)

    async def once() -> None:
        bulkhead.free -= 1

    queued = asyncio.create_task(guarded.call(once))
    await clock.advance(5)
    with pytest.raises(DeadlineExceeded) as exceeded:
        await queued
    assert not exceeded.value.no_effect


async def test_generators_and_streams_have_no_result_to_judge(clock: VirtualClock) -> None:
    """A retry by result does not repeat a finished stream, and `failed_result` is asked about no stream and block."""
    breaker = CircuitBreaker("p", PLAIN, failed_result=lambda result: result.status >= 500, clock=clock)
    again = Retry(attempts=3, retry=tenacity.retry_if_result(lambda _: True), wait=lambda _: 0.0, clock=clock)

    @Pipeline("p", again, breaker)
    async def stream() -> AsyncIterator[int]:
        yield 1
        yield 2

    assert [item async for item in stream()] == [1, 2]
    async with breaker:
        pass
    with breaker:
        pass
    assert breaker.totals()["success"] == 3


async def test_generators_and_streams_are_sent_and_thrown_to(clock: VirtualClock) -> None:
    """What the consumer sends and throws reaches the generator, whose own answer decides."""
    breaker = CircuitBreaker("p", PLAIN, clock=clock)
    seen: list[object] = []

    @breaker
    async def stream() -> AsyncGenerator[str, str]:
        try:
            seen.append((yield "first"))
            yield "second"
        except Boom:
            yield "handled"

    items = stream()
    assert await anext(items) == "first"
    assert await items.asend("hello") == "second"
    assert await items.athrow(Boom()) == "handled"
    with pytest.raises(StopAsyncIteration):
        await anext(items)
    assert seen == ["hello"]
    assert breaker.totals()["success"] == 1

    @asynccontextmanager
    @breaker
    async def session() -> AsyncGenerator[int]:
        try:
            yield 1
        except Boom as error:
            seen.append(error)
            raise

    with pytest.raises(Boom) as boom:
        async with session() as value:
            assert value == 1
            raise Boom
    assert seen == ["hello", boom.value]
    assert breaker.totals()["failure"] == 1


async def test_generators_and_streams_do_not_answer_for_a_slow_consumer(clock: VirtualClock) -> None:
    """Slow is only what the stream itself takes, and a probe that yields items keeps its place."""
    config = BreakerConfig(
        minimum_calls=2, slow_seconds=1, slow_ratio=0.5, break_jitter=0, ramp_seconds=0, probe_successes=1
    )
    breaker = CircuitBreaker("p", config, clock=clock)

    @breaker
    async def stream(seconds: float, items: int = 2) -> AsyncIterator[int]:
        for item in range(items):
            clock.tick(seconds)
            yield item

    for _ in range(4):
        async for _ in stream(0):
            clock.tick(20)
    assert (breaker.snapshot().slow, breaker.state) == (0, State.CLOSED)
    with forced(breaker, State.HALF_OPEN):
        async for _ in stream(0, items=5):  # 100 s: its lease is 30
            clock.tick(20)
            with pytest.raises(CircuitOpen, match="half open"):
                await breaker.call(Dependency())
        assert breaker.snapshot().state is State.CLOSED
    for _ in range(2):
        async for _ in stream(0.6):
            pass
    assert breaker.snapshot().state is State.OPEN


async def test_order_a_deadline_during_a_pause_does_not_hide_the_last_real_error(clock: VirtualClock) -> None:
    """Where a pause lasts longer than foreseen, the timeout is caused by the error before it, with its attempts."""
    late = VirtualClock()  # stands still: the pause that should have ended in time does not
    retry = Retry(attempts=5, wait=lambda _: 1.0, clock=late)
    task = asyncio.create_task(Pipeline("p", Timeout(5, clock=clock), retry).call(Dependency(then=Boom)))
    await late.advance(1)
    await clock.advance(5)
    with pytest.raises(DeadlineExceeded) as exceeded:
        await task
    assert isinstance(exceeded.value.__cause__, Boom)
    assert exceeded.value.__cause__.__notes__ == ["gave up after 2 attempts"]
