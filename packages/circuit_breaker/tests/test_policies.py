"""Each policy by itself, on a virtual clock."""

import asyncio
import functools
import logging
import random
import re
import threading
from collections.abc import AsyncIterator, Callable
from math import inf, nan
from typing import Any

import pytest

from mainstay.circuit_breaker import (
    AdaptiveBulkhead,
    BreakerConfig,
    Budget,
    Bulkhead,
    BulkheadFull,
    Chaos,
    CircuitBreaker,
    Fallback,
    Fault,
    Hedge,
    KeyedBreaker,
    Pipeline,
    RateLimit,
    RateLimited,
    Retries,
    State,
    Timeout,
)
from mainstay.circuit_breaker.chaos import faults_now
from mainstay.circuit_breaker.testing import HANG, Call, Dependency, forced
from mainstay.core import DeadlineExceeded, FullJitter, MainstayError, Retry, remaining_seconds, timeout
from mainstay.core.testing import VirtualClock


class Boom(Exception):
    pass


# Timeout


async def test_timeout_cancels_only_what_is_late(clock: VirtualClock) -> None:
    """Calls that begin one second apart run out one second apart, those that end in time are left alone."""
    limit = Timeout(3, clock=clock)
    dependency = Dependency(HANG, "fine", HANG)
    calls = []
    for _ in range(3):
        calls.append(asyncio.create_task(limit.call(dependency)))
        await clock.advance(1)
    assert [call.done() for call in calls] == [True, True, False]
    with pytest.raises(DeadlineExceeded, match="timeout: no result within 3 s"):
        await calls[0]
    assert await calls[1] == "fine"
    await clock.advance(1.9)
    assert not calls[2].done()
    await clock.advance(0.1)
    with pytest.raises(DeadlineExceeded):
        await calls[2]


async def test_timeout_and_the_deadline_around_it(clock: VirtualClock) -> None:
    """An earlier deadline stays in force, inside as well as around; one that has passed refuses the call."""
    limit = Timeout(3, clock=clock)
    seen: list[float | None] = []

    async def look() -> None:
        seen.append(remaining_seconds())
        await asyncio.Event().wait()

    async def outer() -> None:
        async with timeout(2, clock=clock):
            await limit.call(look)

    task = asyncio.create_task(outer())
    await clock.advance(2)
    with pytest.raises(DeadlineExceeded, match="no result within 2 s"):
        await task
    assert seen == [2.0]

    with pytest.raises(DeadlineExceeded, match="had passed before") as refusal:
        async with timeout(0, clock=clock):
            await limit.call(look)
    assert refusal.value.no_effect
    assert len(seen) == 1


def test_timeout_works_in_one_loop_after_another() -> None:
    """A module-level Timeout is used by the loops of several runs, and by two threads at once."""
    limit = Timeout(0.05)

    async def late() -> None:
        with pytest.raises(DeadlineExceeded):
            await limit.call(Dependency(HANG))
        assert await limit.call(Dependency(1)) == 1

    for _ in range(2):
        asyncio.run(late())
    threads = [threading.Thread(target=lambda: asyncio.run(late())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(limit._watches) <= 3


# Bulkhead


async def test_bulkhead_queues_then_rejects(clock: VirtualClock) -> None:
    """One under way, one waiting, the third rejected; a call that waits too long is rejected as well."""
    bulkhead = Bulkhead(1, queue=1, max_wait_seconds=2, name="db", clock=clock)
    hang = Dependency(then="fine")
    hang.hold()
    first = asyncio.create_task(bulkhead.call(hang))
    second = asyncio.create_task(bulkhead.call(hang))
    await asyncio.sleep(0)
    with pytest.raises(BulkheadFull, match="db is full; try again in 2 s"):
        await bulkhead.call(hang)
    assert repr(bulkhead) == "<Bulkhead 'db' 1 of 1 under way, 1 waiting>"
    await clock.advance(2)
    with pytest.raises(BulkheadFull):
        await second
    third = asyncio.create_task(bulkhead.call(hang))
    await asyncio.sleep(0)
    hang.let_go()
    assert [await first, await third] == ["fine", "fine"]
    assert (bulkhead.free, bulkhead.rejected, hang.most_under_way) == (1, 2, 1)


async def test_bulkhead_waits_no_longer_than_the_deadline(clock: VirtualClock) -> None:
    """A caller with one second left waits one second, and a breaker around does not take that for a failure."""
    bulkhead = Bulkhead(1, queue=1, max_wait_seconds=60, clock=clock)
    breaker = CircuitBreaker("p", BreakerConfig(consecutive_failures=1), clock=clock)
    guarded = Pipeline("p", Timeout(1, clock=clock), breaker, bulkhead)
    bulkhead.take()
    task = asyncio.create_task(guarded.call(Dependency()))
    await clock.advance(1)
    with pytest.raises(DeadlineExceeded) as exceeded:
        await task
    assert exceeded.value.no_effect
    assert breaker.snapshot().state is State.CLOSED
    assert breaker.totals()["neutral"] == 1
    assert len(bulkhead.waiting) == 0


async def test_bulkhead_resizes(clock: VirtualClock) -> None:
    """A larger limit lets the queue in at once, a smaller one takes effect as calls end."""
    bulkhead = Bulkhead(1, queue=5, clock=clock)
    hang = Dependency()
    hang.hold()
    calls = [asyncio.create_task(bulkhead.call(hang)) for _ in range(4)]
    await asyncio.sleep(0)
    bulkhead.resize(3)
    await asyncio.sleep(0)
    assert hang.under_way == 3
    bulkhead.resize(1)
    assert (bulkhead.free, bulkhead.under_way) == (-2, 3)
    hang.let_go()
    await asyncio.gather(*calls)
    assert bulkhead.free == 1
    with pytest.raises(ValueError, match="limit is 0; it is an integer, 1 or more"):
        bulkhead.resize(0)


def test_bulkhead_for_threads() -> None:
    """A thread waits for its place, and is rejected when it waits in vain."""
    bulkhead = Bulkhead(1, queue=1, max_wait_seconds=0.05)
    inside, leave = threading.Event(), threading.Event()

    @bulkhead
    def call() -> None:
        inside.set()
        leave.wait(10)

    thread = threading.Thread(target=call)
    thread.start()
    inside.wait(10)
    with pytest.raises(BulkheadFull):
        call()
    leave.set()
    thread.join()
    call()
    assert bulkhead.free == 1


async def test_adaptive_bulkhead_aimd(clock: VirtualClock) -> None:
    """Answers in time add one for each limit of them, one burst of failures takes a tenth, and bounds hold."""
    bulkhead = AdaptiveBulkhead(10, minimum=8, maximum=12, algorithm="aimd", slow_seconds=1, queue=100, clock=clock)
    dependency = Dependency()
    dependency.hold()
    calls = [asyncio.create_task(bulkhead.call(dependency)) for _ in range(40)]
    await asyncio.sleep(0)
    dependency.let_go()
    await asyncio.gather(*calls)
    assert 11 <= bulkhead.limit <= 12
    for _ in range(3):
        before = bulkhead.limit
        failing = Dependency(then=Boom)
        failing.hold()
        calls = [asyncio.create_task(bulkhead.call(failing)) for _ in range(8)]
        await asyncio.sleep(0)
        failing.let_go()
        await asyncio.gather(*calls, return_exceptions=True)
        assert bulkhead.limit >= before - 2
    assert bulkhead.limit == 8
    assert bulkhead.free == 8


async def test_adaptive_bulkhead_gradient_shrinks_when_answers_get_slow(clock: VirtualClock) -> None:
    """Answers that take ten times as long as usual shrink the limit; answers as usual let it grow again."""
    bulkhead = AdaptiveBulkhead(20, maximum=100, clock=clock)

    async def run(seconds: float, times: int) -> None:
        async def work() -> None:
            await clock.sleep(seconds)

        for _ in range(times):
            calls = [asyncio.create_task(bulkhead.call(work)) for _ in range(bulkhead.limit)]
            await clock.advance(seconds)
            await asyncio.gather(*calls)

    await run(0.1, 20)
    usual = bulkhead.limit
    assert usual > 20
    await run(1.0, 3)
    slow = bulkhead.limit
    assert slow < usual
    await run(0.1, 60)
    assert bulkhead.limit > slow
    assert bulkhead.free == bulkhead.limit


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Timeout(0), "Timeout: seconds is 0; it is a number, more than 0"),
        (lambda: Bulkhead(0), "Bulkhead: limit is 0; it is an integer, 1 or more"),
        (lambda: Bulkhead(1, queue=-1), "queue is -1"),
        (lambda: Bulkhead(1, max_wait_seconds=-1), "max_wait_seconds is -1"),
        (lambda: AdaptiveBulkhead(5, minimum=9), "minimum is 9; it is an integer, 1 to limit"),
        (lambda: AdaptiveBulkhead(5, maximum=2), "maximum is 2; it is an integer, at least limit"),
        (lambda: AdaptiveBulkhead(5, algorithm="x"), "algorithm is 'x'"),  # type: ignore[arg-type]  # that is the test
        (lambda: RateLimit(0), "RateLimit: calls is 0"),
        (lambda: RateLimit(1, 0), "seconds is 0"),
        (lambda: RateLimit(1, burst=0), "burst is 0"),
        (lambda: RateLimit(1, max_wait_seconds=-1), "max_wait_seconds is -1"),
        (lambda: Budget(-1), "Budget: ratio is -1"),
        (lambda: Budget(throttle=1.0), "throttle is 1.0; it is more than 1"),
        (lambda: Budget(window_seconds=0), "window_seconds is 0"),
        (lambda: Hedge(0), "Hedge: after_seconds is 0"),
        (lambda: Hedge(percentile=1), "percentile is 1"),
        (Fallback, "nothing to fall back to"),
        (lambda: Fallback(last_good_seconds=1), "go together"),
        (lambda: Fallback(last_good_seconds=0, key=str), "last_good_seconds is 0"),
        (lambda: Fallback(value=1, max_keys=0), "max_keys is 0"),
        (lambda: Fault(0), "Fault: rate is 0"),
        (lambda: Fault(1, seconds=-1), "seconds is -1"),
        (lambda: Fault(1, error=Boom, result=1), "cannot both"),
        (lambda: Fault(1, error=TimeoutError()), r"Fault: error is TimeoutError\(\); it is a class or function"),  # type: ignore[arg-type]  # that is the test
        (lambda: Fault(0.1), r"Fault\(0.1\) does nothing"),
        (lambda: Chaos("c"), "has no faults"),
    ],
)
def test_impossible_arguments_are_refused(make, message: str) -> None:
    """Each impossible argument is refused where it is written, with its name, value and range."""
    with pytest.raises(ValueError, match=message):
        make()


# Rate limit


async def test_rate_limit(clock: VirtualClock) -> None:
    """A burst of ten, then one each tenth of a second; the rejection knows when to come again."""
    limit = RateLimit(10, name="api", clock=clock)
    dependency = Dependency()
    for _ in range(10):
        await limit.call(dependency)
    with pytest.raises(RateLimited, match="api is used up") as rejection:
        await limit.call(dependency)
    assert rejection.value.retry_after_seconds == pytest.approx(0.1)
    await clock.advance(0.1)
    await limit.call(dependency)
    with pytest.raises(RateLimited):
        await limit.call(dependency)
    await clock.advance(5)
    for _ in range(10):
        await limit.call(dependency)
    assert (len(dependency.calls), limit.rejected) == (21, 2)


async def test_rate_limit_waits_for_its_turn_if_the_deadline_allows(clock: VirtualClock) -> None:
    """Over the rate calls wait in line, one behind the other; who has not the time is rejected at once."""
    limit = RateLimit(1, burst=1, max_wait_seconds=2, clock=clock)
    times: list[float] = []

    async def note() -> None:
        times.append(clock.monotonic())

    calls = [asyncio.create_task(limit.call(note)) for _ in range(4)]
    await asyncio.sleep(0)
    with pytest.raises(RateLimited):
        await calls[3]
    with pytest.raises(RateLimited):
        async with timeout(0.5, clock=clock):
            await limit.call(note)
    await clock.advance(2)
    await asyncio.gather(*calls[:3])
    assert times == [0.0, 1.0, 2.0]


def test_rate_limit_for_plain_functions(clock: VirtualClock) -> None:
    """A plain function blocks its thread until its turn."""
    limit = RateLimit(1, burst=1, max_wait_seconds=2, clock=clock)
    call = limit(Dependency().sync)
    call()
    call()
    assert clock.monotonic() == 1.0


async def test_rate_limit_changes_while_running(clock: VirtualClock) -> None:
    """Turns that were given are kept, the next ones come at the new rate; impossible numbers change nothing."""
    limit = RateLimit(1, burst=1, max_wait_seconds=5, clock=clock)
    times: list[float] = []

    async def note() -> None:
        times.append(clock.monotonic())

    calls = [asyncio.create_task(limit.call(note)) for _ in range(3)]
    await asyncio.sleep(0)
    limit.reload(10, burst=1, max_wait_seconds=5)
    calls += [asyncio.create_task(limit.call(note)) for _ in range(3)]
    await clock.advance(4)
    await asyncio.gather(*calls)
    assert times == pytest.approx([0.0, 1.0, 2.0, 3.0, 3.1, 3.2])
    with pytest.raises(ValueError, match="RateLimit: calls is 0"):
        limit.reload(0)
    assert repr(limit) == "<RateLimit 'rate limit' 10 a second>"


# Retries and their budget


async def test_retry_budget_bounds_an_outage(clock: VirtualClock) -> None:
    """During an outage a hundred calls of three attempts each make 120 attempts, not 300."""
    budget = Budget(0.2, per_second=0.0, throttle=None, clock=clock)
    guarded = Pipeline("p", Retries(Retry(attempts=3, wait=lambda _: 0.0, clock=clock), budget=budget))
    dependency = Dependency(then=Boom)
    for _ in range(100):
        with pytest.raises(Boom):
            await guarded.call(dependency)
    assert len(dependency.calls) == 120
    assert budget.refused > 0


async def test_retry_waits_as_long_as_the_error_asks_and_as_the_deadline_allows(clock: VirtualClock) -> None:
    """`retry_after_seconds` is honoured; a wait past the deadline is not begun, and the real error comes out."""

    class Busy(MainstayError):
        code = "EXT_BUSY"
        status = 503
        title = "Busy"
        retryable = True

    retry = Retry(attempts=2, wait=FullJitter(0.1), clock=clock)
    dependency = Dependency(Busy(retry_after_seconds=5), "fine")
    task = asyncio.create_task(Pipeline("p", retry).call(dependency))
    await clock.advance(4.9)
    assert not task.done()
    await clock.advance(0.1)
    assert await task == "fine"
    guarded = Pipeline("p", Timeout(4, clock=clock), retry)
    with pytest.raises(Busy):
        await guarded.call(Dependency(Busy(retry_after_seconds=5), "fine"))


def test_retry_of_plain_functions_and_by_result(clock: VirtualClock) -> None:
    """A plain function is tried again on its thread; by result, the last one is returned as it is."""
    dependency = Dependency(Boom, 1)
    assert Retries(Retry(attempts=2, wait=lambda _: 3.0, clock=clock)).call_sync(dependency.sync) == 1
    assert clock.monotonic() == 3.0
    by_result = Retry(attempts=3, wait=lambda _: 1.0, retry=lambda state: state.outcome.result() is None, clock=clock)
    dependency = Dependency(then=None)
    assert Retries(by_result).call_sync(dependency.sync) is None
    assert (len(dependency.calls), clock.monotonic()) == (3, 5.0)


async def test_nothing_is_retried_while_the_circuit_recovers(clock: VirtualClock) -> None:
    """Half open and ramping, each failure is final: retries would eat the share that recovery leaves."""
    breaker = CircuitBreaker("p", BreakerConfig(minimum_calls=100), clock=clock)
    guarded = Pipeline("p", Retry(attempts=5, wait=lambda _: 0.0, clock=clock), breaker)
    for state in (State.HALF_OPEN, State.RAMPING):
        dependency = Dependency(then=Boom)
        with forced(breaker, state), pytest.raises(Boom):
            await guarded.call(dependency)
        assert len(dependency.calls) == 1


async def test_throttling_sends_about_twice_what_is_answered(
    clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a hundred calls a second, to what can answer ten, about twenty are sent: a factor of two."""
    monkeypatch.setattr(random, "random", random.Random(7).random)  # noqa: S311  makes the choices repeatable
    budget = Budget(throttle=2.0, window_seconds=10, clock=clock)
    sent = answered = 0

    async def call() -> None:
        nonlocal sent, answered
        sent += 1
        if answered >= 10 * clock.monotonic():
            raise Boom
        answered += 1

    for _ in range(4000):
        clock.tick(0.01)
        await asyncio.gather(budget.call(call), return_exceptions=True)
    assert 600 < sent < 1300
    assert answered > 300
    assert budget.rejected == 4000 - sent


# Fallback


async def test_fallback_value_function_and_rejections(clock: VirtualClock) -> None:
    """A value or a function answers for the error, also for a rejection; what is not in `on` comes out."""
    breaker = CircuitBreaker("p", clock=clock)
    guarded = Pipeline("p", Fallback(value=[]), breaker)
    assert await guarded.call(Dependency(Boom)) == []
    with forced(breaker, State.OPEN):
        assert await guarded.call(Dependency("fine")) == []

    async def apologise(error: Exception, name: str) -> str:
        return f"{type(error).__name__} for {name}"

    assert await Fallback(function=apologise).call(Dependency(Boom), "ann") == "Boom for ann"
    plain = Fallback(function=lambda error, name: f"sorry, {name}")
    assert plain.call_sync(Dependency(Boom).sync, "ann") == "sorry, ann"
    with pytest.raises(Boom):
        await Fallback(value=1, on=(KeyError,)).call(Dependency(Boom))
    with pytest.raises(TypeError, match="give it a plain one"):
        Fallback(function=apologise)(lambda: None)
    with pytest.raises(TypeError, match="Exception classes"):
        Fallback(value=1, on=(asyncio.CancelledError,))  # type: ignore[arg-type]  # that is the test


async def test_fallback_last_good_is_per_key_and_ages(clock: VirtualClock) -> None:
    """The last good result stands in for the same key only, until it is too old; the oldest key makes room."""
    fallback = Fallback(last_good_seconds=10, key=lambda name: name, max_keys=2, clock=clock)
    healthy = True

    @fallback
    async def price(name: str) -> str:
        if not healthy:
            raise Boom
        return f"price of {name}"

    for name in ("a", "b", "c"):
        await price(name)
    healthy = False
    assert await price("c") == "price of c"
    with pytest.raises(Boom):
        await price("a")
    await clock.advance(10.5)
    with pytest.raises(Boom):
        await price("c")
    assert fallback.used == 1


async def test_a_cancellation_gets_no_fallback() -> None:
    """A call that was cancelled wants no answer."""
    task = asyncio.create_task(Fallback(value=1).call(Dependency(HANG)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# Hedge


async def test_hedge_second_attempt_wins_and_the_first_is_cancelled(clock: VirtualClock) -> None:
    """After a second without an answer another attempt is sent and wins; the first is cancelled and neutral."""
    breaker = CircuitBreaker("p", clock=clock)
    hedge = Hedge(1, clock=clock)
    dependency = Dependency(HANG, "fine")
    task = asyncio.create_task(Pipeline("p", hedge, breaker).call(dependency, 7))
    await clock.advance(0.9)
    assert len(dependency.calls) == 1
    await clock.advance(0.1)
    assert await task == "fine"
    await hedge.drained()
    assert (hedge.sent, hedge.won, dependency.under_way) == (1, 1, 0)
    assert dependency.calls == [Call((7,)), Call((7,))]
    assert breaker.totals() == {"success": 1, "failure": 0, "neutral": 1, "late": 0, "rejected": 0}


async def test_hedge_outcomes(clock: VirtualClock) -> None:
    """A quick answer sends no second, a quick failure is final, and of two failures the first's error comes out."""
    hedge = Hedge(1, budget=Budget(1.0, clock=clock), clock=clock)
    quick = Dependency("fine")
    assert await hedge.call(quick) == "fine"
    with pytest.raises(Boom):
        await hedge.call(Dependency(Boom))
    assert hedge.sent == 0

    class First(Exception):
        pass

    gate = asyncio.Event()
    number = 0

    async def fail() -> None:
        nonlocal number
        number += 1
        mine = number
        await gate.wait()
        raise First if mine == 1 else Boom

    task = asyncio.create_task(hedge.call(fail))
    await clock.advance(1)
    gate.set()
    with pytest.raises(First):
        await task
    assert number == 2


async def test_hedge_cancelled_by_the_caller_cancels_both(clock: VirtualClock) -> None:
    """No attempt survives its caller."""
    hedge = Hedge(1, clock=clock)
    dependency = Dependency(then=HANG)
    task = asyncio.create_task(hedge.call(dependency))
    await clock.advance(1)
    assert dependency.under_way == 2
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await hedge.drained()
    assert dependency.under_way == 0


async def test_hedge_by_percentile_with_a_budget(clock: VirtualClock) -> None:
    """The delay is learned from answers; when everything gets slow, hedges stay within a tenth of the calls."""
    hedge = Hedge(clock=clock)

    async def work(seconds: float) -> None:
        await clock.sleep(seconds)

    for number in range(100):
        task = asyncio.create_task(hedge.call(work, 0.1 + number % 20 / 100))
        await clock.advance(0.3)
        await task
    assert hedge.sent <= 10
    assert hedge.delay_seconds() == pytest.approx(0.29, abs=0.02)
    before = hedge.sent
    slow = [asyncio.create_task(hedge.call(work, 5.0)) for _ in range(200)]
    await clock.advance(5)
    await asyncio.gather(*slow)
    assert 10 <= hedge.sent - before <= 35


async def test_hedge_is_not_sent_while_a_circuit_inside_recovers_or_past_the_deadline(clock: VirtualClock) -> None:
    """Half open there is no second attempt, nor when the caller's deadline comes first."""
    breaker = CircuitBreaker("p", clock=clock)
    hedge = Hedge(1, clock=clock)
    guarded = Pipeline("p", hedge, breaker)
    dependency = Dependency(HANG, HANG)
    with forced(breaker, State.HALF_OPEN):
        task = asyncio.create_task(guarded.call(dependency))
        await clock.advance(2)
        assert len(dependency.calls) == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    with pytest.raises(DeadlineExceeded):
        task = asyncio.create_task(Pipeline("p", Timeout(1, clock=clock), hedge).call(dependency))
        await clock.advance(1)
        await task
    assert len(dependency.calls) == 2


# Chaos


async def test_chaos_is_off_until_it_is_on_and_ends_by_itself(
    clock: VirtualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Off it does nothing; on it injects by rate, says so in the log, and goes off with its time, said as well."""
    chaos = Chaos("game day", Fault(0.5, error=Boom), seed=1, clock=clock)
    dependency = Dependency()
    for _ in range(100):
        await chaos.call(dependency)
    assert (len(dependency.calls), chaos.injected, faults_now()) == (100, 0, [])
    with caplog.at_level(logging.WARNING), chaos.on(seconds=60, reason="drill"):
        assert faults_now() == ["game day"]
        results = await asyncio.gather(*(chaos.call(dependency) for _ in range(1000)), return_exceptions=True)
        failed = sum(isinstance(result, Boom) for result in results)
        assert 400 < failed < 600
        assert failed == chaos.injected
        with pytest.raises(RuntimeError, match="on already"), chaos.on(seconds=1, reason="again"):
            pass
        await clock.advance(60)
        assert faults_now() == []
        for _ in range(50):
            await chaos.call(dependency)
        assert not chaos.is_on
    assert [record.message.split(" after")[0] for record in caplog.records] == [
        "chaos game day is ON for at most 60 s: drill",
        "chaos game day is off",
    ]


async def test_chaos_latency_and_results(clock: VirtualClock) -> None:
    """A fault can hold a call up, and can answer in place of the dependency; plain functions too."""
    dependency = Dependency(then="real")
    slow = Chaos("slow", Fault(1, seconds=3), clock=clock)
    with slow.on(seconds=60, reason="drill"):
        task = asyncio.create_task(slow.call(dependency))
        await clock.advance(2.9)
        assert not task.done()
        await clock.advance(0.1)
        assert await task == "real"
        assert slow.call_sync(dependency.sync) == "real"
    fake = Chaos("fake", Fault(1, result="fake"), clock=clock)
    with fake.on(seconds=60, reason="drill"):
        assert await fake.call(dependency) == "fake"
        assert fake.call_sync(dependency.sync) == "fake"
    assert await fake.call(dependency) == "real"


@pytest.mark.parametrize(("seconds", "reason"), [(0, "x"), (3601, "x"), (float("inf"), "x"), (5, " ")])
def test_chaos_cannot_be_left_on(seconds: float, reason: str) -> None:
    """There is no way to switch it on without an end and a reason."""
    with (
        pytest.raises(ValueError, match=r"Chaos.on: (seconds|reason) is"),
        Chaos("c", Fault(1, seconds=1)).on(seconds=seconds, reason=reason),
    ):
        pass


async def test_chaos_is_off_when_its_time_is_over_whether_or_not_anybody_calls(clock: VirtualClock) -> None:
    """It says so itself, may be switched on again, and the end of the first block leaves the second alone."""
    chaos = Chaos("drill", Fault(1, error=Boom), clock=clock)
    with pytest.raises(TypeError, match="takes faults, such as Fault"):
        Chaos("drill", 0.1)  # type: ignore[arg-type]  # that is the test
    first = chaos.on(seconds=5, reason="first")
    first.__enter__()
    await clock.advance(5)
    assert (chaos.is_on, repr(chaos)) == (False, "<Chaos 'drill' off>")
    with chaos.on(seconds=5, reason="second"):
        assert first.__exit__(None, None, None) is False
        assert chaos.is_on
        with pytest.raises(Boom):
            await chaos.call(Dependency())
    assert not chaos.is_on


# All together


async def test_recovery_in_one_budget_with_throttling_retries_and_hedges(clock: VirtualClock) -> None:
    """After an outage a dependency gets its probes, then the ramp's share, then all; retries and hedges add nothing."""
    config = BreakerConfig(
        window_seconds=5, break_seconds=2, max_break_seconds=2, break_jitter=0, ramp_seconds=10, ramp_start=0.1
    )
    breaker = CircuitBreaker("p", config, clock=clock)
    budget = Budget(0.2, per_second=0, throttle=2.0, window_seconds=10, clock=clock)
    guarded = Pipeline(
        "p",
        Retries(Retry(attempts=3, wait=lambda _: 0.0, clock=clock), budget=budget),
        budget,
        Hedge(0.05, budget=budget, clock=clock),
        breaker,
    )
    reached: list[float] = []
    down = False

    async def dependency() -> None:
        reached.append(clock.monotonic())
        if down:
            raise Boom
        await clock.sleep(0.1)  # slow enough for a hedge each

    calls: list[asyncio.Task[None]] = []

    async def second() -> tuple[int, int]:
        """A hundred calls in a second: how many of them reached the dependency, and how many more might have."""
        before, extras = len(reached), budget._extras.failures
        for _ in range(100):
            calls.append(asyncio.create_task(guarded.call(dependency)))
            await clock.advance(0.01)
        return len(reached) - before, budget._extras.failures - extras

    well = [await second() for _ in range(10)]
    assert sum(sent for sent, _ in well) <= 1200  # hedges, a fifth at most
    assert sum(extra for _, extra in well) >= 100
    down = True
    while breaker.state is State.CLOSED:
        sent, _ = await second()
        assert sent <= 120
    for _ in range(6):
        sent, extra = await second()
        assert (sent <= 1, extra) == (True, 0)  # a probe
    down = False
    seconds = []
    while breaker.snapshot().state is not State.CLOSED:
        seconds.append(await second())
    closing = seconds.pop()
    ramping = [sent for sent, _ in seconds if sent > 2]
    assert len(ramping) == 9
    for number, sent in enumerate(ramping):
        assert sent <= 10 * (number + 2)  # the ramp's share, and nothing beside it
    # Extra attempts are a share of what the ramp let through, not of what it refused.
    closed = [closing, *[await second() for _ in range(3)]]
    assert sum(extra for _, extra in closed) <= 0.2 * (sum(ramping) + 400)
    assert closed[-1][0] >= 100
    assert budget.rejected < 10
    assert breaker.snapshot().state is State.CLOSED
    await clock.advance(1)
    await asyncio.gather(*calls, return_exceptions=True)


async def test_timeout_of_an_abandoned_generator_cancels_nobody(clock: VirtualClock) -> None:
    """A generator closed in another task takes its time limit with it, and the consumer has all its time again."""
    limit = Timeout(2, clock=clock)

    async def pages(block: Timeout | timeout) -> AsyncIterator[int]:
        async with block:
            yield 1

    async def consume(block: Timeout | timeout) -> float | None:
        generator = pages(block)
        await anext(generator)
        await asyncio.create_task(generator.aclose())  # type: ignore[attr-defined]  # as the loop does when it is gone
        await clock.sleep(5)
        return remaining_seconds()

    for block in (limit, timeout(2, clock=clock)):
        consumer = asyncio.create_task(consume(block))
        await clock.advance(5)
        assert await consumer is None
    async with timeout(100, clock=clock):
        consumer = asyncio.create_task(consume(limit))
        await clock.advance(5)
        assert await consumer == 95
    assert limit._watch is not None
    assert not limit._watch.under_way


async def test_timeout_is_reloaded_while_calls_are_under_way(clock: VirtualClock) -> None:
    """What began keeps its time, what begins has the new one and is not held up by the old."""
    limit = Timeout(10, clock=clock)
    call = limit(Dependency(then=HANG))
    before = asyncio.create_task(call())
    await asyncio.sleep(0)
    limit.reload(1)
    after = asyncio.create_task(call())
    await clock.advance(1)
    with pytest.raises(DeadlineExceeded, match="no result within 1 s"):
        await after
    assert (limit.seconds, before.done()) == (1, False)
    await clock.advance(9)
    with pytest.raises(DeadlineExceeded, match="no result within 10 s"):
        await before
    with pytest.raises(ValueError, match="seconds is 0"):
        limit.reload(0)
    with pytest.raises(AttributeError):
        limit.seconds = 5  # type: ignore[misc]  # that is the test


async def test_retries_are_reloaded_while_calls_are_under_way(clock: VirtualClock) -> None:
    """Decorated functions go by the new policy, and a call under way does when it next fails."""
    retries = Retries(Retry(attempts=5, wait=lambda _: 1.0, clock=clock))
    dependency = Dependency(then=Boom)
    call = Pipeline("p", retries)(dependency)
    under_way = asyncio.create_task(call())
    await clock.advance(2)
    assert len(dependency.calls) == 3
    retries.reload(Retry(attempts=2, retry=lambda state: state.outcome.failed, wait=lambda _: 0.0, clock=clock))
    await clock.advance(1)
    with pytest.raises(Boom):
        await under_way
    assert len(dependency.calls) == 4
    with pytest.raises(Boom):
        await call()
    assert (len(dependency.calls), retries.policy.attempts) == (6, 2)
    with pytest.raises(TypeError, match=r"policy is 3; it is a Retry, such as Retry\(attempts=3\)"):
        retries.reload(3)  # type: ignore[arg-type]  # that is the test


async def test_retry_notes_the_attempts_once() -> None:
    """An error that is raised again and again, as a cached one is, does not gather a note for each call."""
    error = Boom()
    retries = Retries(Retry(attempts=2, wait=lambda _: 0.0))
    for _ in range(5):
        with pytest.raises(Boom):
            await retries.call(Dependency(then=error))
    assert error.__notes__ == ["gave up after 2 attempts"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        # The types are wrong on purpose: callers may be unchecked.
        (lambda: Bulkhead(2.5), "Bulkhead: limit is 2.5; it is an integer, 1 or more"),  # type: ignore[arg-type]
        (lambda: Bulkhead(inf), "limit is inf"),  # type: ignore[arg-type]
        (lambda: Bulkhead("3"), "limit is '3'"),  # type: ignore[arg-type]
        (lambda: Bulkhead(1, queue=0.5), "queue is 0.5; it is an integer, 0 or more"),  # type: ignore[arg-type]
        (lambda: Bulkhead(1, max_wait_seconds="1"), "max_wait_seconds is '1'; it is a number"),  # type: ignore[arg-type]
        (lambda: Timeout("5"), "Timeout: seconds is '5'; it is a number, more than 0"),  # type: ignore[arg-type]
        (lambda: Timeout(None), "Timeout: seconds is None"),  # type: ignore[arg-type]
        (lambda: Hedge("1"), "after_seconds is '1'"),  # type: ignore[arg-type]
        (lambda: Fallback(value=1, max_keys=nan), "max_keys is nan"),  # type: ignore[arg-type]
        (lambda: Retries(3), "Retries: policy is 3; it is a Retry"),  # type: ignore[arg-type,unused-ignore]
        (lambda: CircuitBreaker("p", failed_result=500), "failed_result is 500; it is a function"),  # type: ignore[arg-type]
        (lambda: KeyedBreaker("p", key="host"), "key is 'host'; it is a function"),  # type: ignore[arg-type]
        (lambda: Fallback(function=5), "Fallback: function is 5"),  # type: ignore[arg-type]
    ],
)
def test_arguments_of_the_wrong_type_are_refused(make: Callable[[], object], message: str) -> None:
    """A number of the wrong type and something that cannot be called are refused like an impossible number."""
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        make()


async def _says(*_: object) -> bool:
    return True


class _Says:
    async def __call__(self, *_: object) -> str:
        return "instead"


says: Any = _says  # untyped, as callers may be
says_object: Any = _Says()


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: CircuitBreaker("p", failed_result=says), "failed_result"),
        (lambda: CircuitBreaker("p", failed_result=functools.partial(says)), "failed_result"),
        (lambda: CircuitBreaker("p", failed_result=says_object), "failed_result"),
        (lambda: CircuitBreaker("p").on_change(says), "listener"),
        (lambda: KeyedBreaker("p", key=says), "key"),
        (lambda: Fallback(last_good_seconds=1, key=says), "key"),
        (lambda: Retry(retry=says), "Retry.retry"),
    ],
)
def test_async_functions_that_nobody_would_await_are_refused(make: Callable[[], object], field: str) -> None:
    """Where a plain answer is needed a coroutine would always be true: refused where it is given."""
    with pytest.raises(TypeError, match=f"{field} is an async function"):
        make()


async def test_fallback_awaits_an_async_function_in_any_guise() -> None:
    """An object with an async `__call__` is awaited; a plain function that returns a coroutine is refused."""
    failing = Dependency(then=Boom)
    assert await Fallback(function=_Says()).call(failing) == "instead"
    with pytest.raises(TypeError, match="returned an awaitable"):
        await Fallback(function=lambda _: _says()).call(failing)


async def test_bulkhead_is_left_at_a_deadline_that_cancels_nobody(clock: VirtualClock) -> None:
    """A task that outlives its time limit, and a thread, wait no longer than that either, and get the same error."""
    bulkhead = Bulkhead(1, queue=1, max_wait_seconds=60, clock=clock)
    bulkhead.take()
    async with timeout(1, clock=clock):
        outliving = asyncio.create_task(bulkhead.call(Dependency()))
    await clock.advance(1)
    with pytest.raises(DeadlineExceeded, match="bulkhead: the deadline passed before a place became free") as exceeded:
        await outliving
    assert exceeded.value.no_effect
    async with timeout(0.01, clock=clock):
        with pytest.raises(DeadlineExceeded, match="the deadline passed"):
            bulkhead.call_sync(Dependency().sync)
    with pytest.raises(BulkheadFull):
        bulkhead.max_wait_seconds = 0.01
        bulkhead.call_sync(Dependency().sync)
    assert len(bulkhead.waiting) == 0
