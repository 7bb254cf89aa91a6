"""Pipelines: blocks, callables, reuse, reload, refusals, and the generated text."""

import asyncio
import traceback

import pytest

from mainstay.circuit_breaker import (
    BreakerConfig,
    Bulkhead,
    Chaos,
    CircuitBreaker,
    CircuitOpen,
    Fallback,
    Fault,
    Hedge,
    KeyedBreaker,
    Pipeline,
    Policy,
    RateLimit,
    State,
    Timeout,
)
from mainstay.circuit_breaker import _admission as admission
from mainstay.circuit_breaker.testing import Dependency, forced
from mainstay.core import DeadlineExceeded, Retry
from mainstay.core.testing import VirtualClock


class Boom(Exception):
    pass


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


async def test_one_object_in_every_form(clock: VirtualClock) -> None:
    """The same pipeline decorates, runs callables and guards blocks, and all of it counts in one place."""
    breaker, bulkhead = CircuitBreaker("p", clock=clock), Bulkhead(1, clock=clock)
    guarded = Pipeline("p", breaker, RateLimit(1000, clock=clock), bulkhead)

    @guarded
    async def decorated(value: int) -> int:
        assert bulkhead.free == 0
        return value

    assert await decorated(1) == 1
    assert await guarded.call(Dependency(2)) == 2
    assert guarded(lambda: 3)() == 3
    assert guarded.call_sync(lambda: 4) == 4
    async with guarded:
        assert bulkhead.free == 0
    with guarded:
        assert bulkhead.free == 0
    assert breaker.totals()["success"] == 6
    with pytest.raises(Boom):
        async with guarded:
            raise Boom
    with pytest.raises(Boom), guarded:
        raise Boom
    assert (breaker.totals()["failure"], bulkhead.free) == (2, 1)
    with forced(breaker, State.OPEN):
        with pytest.raises(CircuitOpen), guarded:
            pytest.fail("the body must not run")
        with pytest.raises(CircuitOpen):
            async with guarded:
                pytest.fail("the body must not run")


async def test_blocks_of_many_tasks_and_nested_blocks(clock: VirtualClock) -> None:
    """Tasks that hold the same block at the same time do not mix them up, nor do nested ones; misuse is an error."""
    breaker, other = CircuitBreaker("p", clock=clock), CircuitBreaker("q", clock=clock)

    async def work(number: int) -> None:
        async with breaker, other:
            await asyncio.sleep(0)
            if number % 2:
                raise Boom
            await asyncio.sleep(0)

    await asyncio.gather(*(work(number) for number in range(10)), return_exceptions=True)
    for each in (breaker, other):
        assert (each.totals()["success"], each.totals()["failure"]) == (5, 5)
    with pytest.raises(RuntimeError, match="was not entered"):
        await breaker.__aexit__(None, None, None)


async def test_a_time_limit_guards_a_block(clock: VirtualClock) -> None:
    """`async with Timeout(…)` ends the block when the time is up."""

    async def block() -> None:
        async with Timeout(2, clock=clock):
            await asyncio.Event().wait()

    task = asyncio.create_task(block())
    await clock.advance(2)
    with pytest.raises(DeadlineExceeded):
        await task


async def test_pipelines_nest_and_share(clock: VirtualClock) -> None:
    """A pipeline stands in another as its policies would, and a policy in two of them counts for both."""
    breaker = CircuitBreaker("p", clock=clock)
    inner = Pipeline("inner", breaker, Timeout(1, clock=clock))
    outer = Pipeline("outer", Retry(attempts=2, wait=lambda _: 0.0, clock=clock), inner)
    assert repr(outer) == "<Pipeline 'outer' Retries → CircuitBreaker → Timeout>"
    assert list(outer.breakers()) == [breaker]
    await outer.call(Dependency(Boom, 1))
    await inner.call(Dependency(1))
    assert (breaker.totals()["success"], breaker.totals()["failure"]) == (2, 1)


async def test_a_hedge_in_the_middle_keeps_what_is_outside_and_inside(clock: VirtualClock) -> None:
    """Outside the hedge there is one call, inside it two, for decorated functions and for callables."""
    outside, inside = CircuitBreaker("outside", clock=clock), CircuitBreaker("inside", clock=clock)
    with pytest.warns(UserWarning, match="breaker stands around hedge"):
        guarded = Pipeline("p", outside, Hedge(1, clock=clock), inside)
    first = asyncio.Event()
    for run in (lambda fn: guarded.call(fn, 1), lambda fn: guarded(fn)(1)):
        number = 0

        async def call(value: int) -> int:
            nonlocal number
            number += 1
            if number == 1:
                await first.wait()
            return value

        task = asyncio.create_task(run(call))
        await clock.advance(1)
        assert await task == 1
        assert number == 2
    await asyncio.sleep(0)
    assert outside.totals()["success"] == 2
    assert (inside.totals()["success"], inside.totals()["neutral"]) == (2, 2)


async def test_reload_changes_the_shape_of_what_is_decorated(clock: VirtualClock) -> None:
    """A reload applies to functions decorated before it, keeps the window, and calls under way go on."""
    breaker = CircuitBreaker("p", BreakerConfig(minimum_calls=2, break_jitter=0), clock=clock)
    guarded = Pipeline("p", Retry(attempts=1), breaker)
    dependency = Dependency()

    @guarded
    async def call(seconds: float) -> None:
        await clock.sleep(seconds)
        await dependency()

    under_way = asyncio.create_task(call(5))
    for _ in range(3):
        await call(0)
    with pytest.raises(Boom):
        await breaker.call(Dependency(Boom))
    breaker.reload(BreakerConfig(minimum_calls=6, slow_seconds=1, slow_ratio=0.5, window_calls=20))
    snapshot = breaker.snapshot()
    assert (snapshot.calls, snapshot.failures) == (4, 1)  # what the window held is kept
    await clock.advance(5)
    await under_way
    assert breaker.snapshot().calls == 5
    for _ in range(5):
        task = asyncio.create_task(call(2))
        await clock.advance(2)
        await task
    assert breaker.snapshot().state is State.OPEN
    assert "took longer than 1 s" in breaker.reason
    assert breaker.totals()["success"] == 9
    breaker.reset()
    under_way = asyncio.create_task(call(50))
    await asyncio.sleep(0)
    breaker.reload(BreakerConfig())  # what is under way was compiled to compare with a limit that is no more
    task = asyncio.create_task(call(50))
    await clock.advance(50)
    await task
    await under_way
    assert breaker.snapshot().slow == 0


async def test_results_can_be_failures_and_the_predicate_may_fail(clock: VirtualClock) -> None:
    """A result that is judged bad counts and is returned; a predicate that raises counts as a failure and is seen."""
    breaker = CircuitBreaker(
        "p",
        BreakerConfig(minimum_calls=3, slow_seconds=1),
        failed_result=lambda result: result["status"] >= 500,
        clock=clock,
    )
    assert await breaker.call(Dependency({"status": 503})) == {"status": 503}
    assert breaker.call_sync(lambda: {"status": 200}) == {"status": 200}
    with pytest.raises(TypeError):
        await breaker.call(Dependency(None))
    assert breaker.snapshot().state is State.OPEN
    assert (breaker.totals()["success"], breaker.totals()["failure"]) == (1, 2)


async def test_exceptions_chosen_by_the_caller(clock: VirtualClock) -> None:
    """`failures` says what counts, `answers` what does not; anything else is an answer."""
    breaker = CircuitBreaker("p", failures=(OSError,), answers=(FileNotFoundError,), clock=clock)
    for error in (OSError, FileNotFoundError, Boom):
        with pytest.raises(error):
            await breaker.call(Dependency(error))
    assert (breaker.totals()["failure"], breaker.totals()["success"]) == (1, 2)
    with pytest.raises(TypeError, match="failures is a tuple of Exception classes"):
        CircuitBreaker("p", failures=OSError)  # type: ignore[arg-type]  # that is the test
    with pytest.raises(TypeError, match="answers is a tuple"):
        CircuitBreaker("p", answers=(KeyboardInterrupt,))


async def test_tracebacks_show_the_generated_lines() -> None:
    """An error's traceback leads through readable lines, and a decorated function keeps its name."""

    @CircuitBreaker("p")
    async def charge() -> None:
        raise Boom

    with pytest.raises(Boom) as failure:
        await charge()
    text = "".join(traceback.format_exception(failure.value))
    assert "result = await fn(*args, **kwargs)" in text
    assert charge.__name__ == "charge"


async def test_without_the_global_lock_the_same_lines_stand_under_the_circuits_lock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On an interpreter without it the generated code locks, and counts the same."""
    monkeypatch.setattr(admission, "_LOCKED", True)
    monkeypatch.setattr(admission, "_codes", {})
    breaker = CircuitBreaker("p", BreakerConfig(slow_seconds=1, minimum_calls=2))
    bulkhead = Bulkhead(1)
    guarded = Pipeline("p", breaker, bulkhead)
    assert "with circuit_0.lock:" in admission.text_of("async", guarded._layers())
    assert await guarded.call(Dependency(1)) == 1
    assert guarded.call_sync(lambda: 2) == 2
    with pytest.raises(Boom):
        await guarded.call(Dependency(Boom))
    assert (breaker.totals()["success"], breaker.totals()["failure"], bulkhead.free) == (2, 1, 1)
    with forced(breaker, State.RAMPING):
        await guarded.call(Dependency(1))
    assert breaker.totals()["success"] == 3


@pytest.mark.parametrize(
    ("policy", "remedy"),
    [
        (Retry(), "decorate a function"),
        (Hedge(1), "decorate a function"),
        (Fallback(value=1), "decorate a function"),
        (Chaos("c", Fault(1)), "decorate a function"),
        (KeyedBreaker("k", key=str), "no key for a `with` block"),
    ],
)
async def test_blocks_refuse_what_would_need_to_repeat_or_skip_them(policy: Policy | Retry, remedy: str) -> None:
    """What cannot be done with a block is refused with what to write instead."""
    guarded = Pipeline("p", policy)
    with pytest.raises(TypeError, match=remedy):
        async with guarded:
            pytest.fail("the body must not run")
    with pytest.raises(TypeError, match=r"decorate a function|make the function async"), guarded:
        pytest.fail("the body must not run")


def test_streams_refuse_what_cannot_stand_around_them() -> None:
    """A time limit, a hedge or a fallback around a stream is refused."""

    async def stream():
        yield 1

    for policy in (Timeout(1), Hedge(1), Fallback(value=1), Chaos("c", Fault(1))):
        with pytest.raises(TypeError, match="put it around each call inside"):
            policy(stream)


def test_pipelines_refuse_what_is_none() -> None:
    """No name, no policies, something that is no policy: refused, with an example."""
    with pytest.raises(TypeError, match="write Pipeline\\('payments', …\\)"):
        Pipeline(Timeout(1))  # type: ignore[arg-type]  # that is the test
    with pytest.raises(ValueError, match="has no policies"):
        Pipeline("p")
    with pytest.raises(TypeError, match="takes policies, such as Timeout"):
        Pipeline("p", 5)  # type: ignore[arg-type]  # that is the test
    with pytest.raises(TypeError, match="decorates a function, not 5"):
        Timeout(1)(5)  # type: ignore[type-var]  # that is the test


def test_an_async_callable_is_refused_by_call_sync() -> None:
    """What comes back to be awaited would count as a success before it began."""
    with pytest.raises(TypeError, match="decorate the async function itself"):
        CircuitBreaker("p").call_sync(Dependency(1))  # type: ignore[unused-coroutine]  # that is the test
