"""Pipelines: blocks, callables, reuse, reload, refusals, and the generated text."""

import asyncio
import threading
import traceback
from collections.abc import Callable, Generator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from contextvars import copy_context

import pytest

from mainstay.circuit_breaker import (
    BreakerConfig,
    Budget,
    Bulkhead,
    Chaos,
    CircuitBreaker,
    CircuitOpen,
    Fallback,
    Fault,
    HarmfulOrderWarning,
    Hedge,
    KeyedBreaker,
    Pipeline,
    Policy,
    RateLimit,
    State,
    Timeout,
    _codegen,
)
from mainstay.circuit_breaker.pipeline import _HARMFUL
from mainstay.circuit_breaker.testing import Dependency, forced
from mainstay.core import DeadlineExceeded, Retry
from mainstay.core.testing import VirtualClock


class Boom(Exception):
    pass


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
    monkeypatch.setattr(_codegen, "_LOCKED", True)
    monkeypatch.setattr(_codegen, "_codes", {})
    breaker = CircuitBreaker("p", BreakerConfig(slow_seconds=1, minimum_calls=2))
    bulkhead = Bulkhead(1)
    guarded = Pipeline("p", breaker, bulkhead)
    assert "with circuit_0.lock:" in _codegen.text_of("async", guarded._layers())
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
        (Chaos("c", Fault(1, seconds=1)), "decorate a function"),
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

    for policy in (Timeout(1), Hedge(1), Fallback(value=1), Chaos("c", Fault(1, seconds=1))):
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


async def test_without_the_global_lock_calls_under_way_are_counted_under_the_circuits_lock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On an interpreter without it a circuit of a key is held and let go by methods that lock."""
    monkeypatch.setattr(_codegen, "_LOCKED", True)
    monkeypatch.setattr(_codegen, "_codes", {})
    hosts = KeyedBreaker("hosts", key=lambda host: host, max_keys=1)
    assert "under_way" not in _codegen.text_of("async", hosts._layers())
    hanging = Dependency()
    hanging.hold()
    call = asyncio.create_task(hosts.call(hanging, "a"))
    await asyncio.sleep(0)
    assert hosts.call_sync(lambda host: host, "b") == "b"
    assert ("a" in hosts, hosts["a"].under_way) == (True, 1)
    hanging.let_go()
    await call
    assert hosts["a"].under_way == 0
    assert hosts.totals()["success"] == 2
    assert "b" not in hosts


async def test_a_policy_stands_around_a_call_once(clock: VirtualClock) -> None:
    """A pipeline, a second decoration and a call through what decorates already are refused, and nothing is counted."""
    breaker = CircuitBreaker("p", clock=clock)
    nested = Pipeline("nested", breaker)
    other = Pipeline("other", Timeout(1, clock=clock))

    class Client:
        @breaker
        async def fetch(self) -> str:
            return "fetched"

    @other
    @breaker
    async def charge() -> str:
        return "charged"

    @breaker
    def plain() -> str:
        return "plain"

    with pytest.raises(ValueError, match=r"<CircuitBreaker 'p' closed> twice.*leave one out"):
        Pipeline("p", Retry(), breaker, nested)
    for around in (breaker, nested, other):
        with pytest.raises(TypeError, match=r"charge is decorated with .* already"):
            around(charge)
        with pytest.raises(TypeError, match="decorate with it, or call through it, not both"):
            await around.call(charge)
    with pytest.raises(TypeError, match="fetch is decorated"):
        await nested.call(Client().fetch)
    with pytest.raises(TypeError, match="plain is decorated"):
        nested.call_sync(plain)
    assert sum(breaker.totals().values()) == 0
    assert await Pipeline("third", Timeout(1, clock=clock)).call(charge) == "charged"
    assert (await other.call(Client().fetch), plain()) == ("fetched", "plain")


_PARTS: dict[str, Callable[[], Policy | Retry]] = {
    "breaker": lambda: CircuitBreaker("p"),
    "budget": Budget,
    "bulkhead": lambda: Bulkhead(1),
    "chaos": lambda: Chaos("c", Fault(1, seconds=1)),
    "fallback": lambda: Fallback(value=1),
    "hedge": lambda: Hedge(1),
    "rate_limit": lambda: RateLimit(1),
    "retry": Retry,
}


_ORDERS = [
    ("breaker", ("retry", "fallback", "hedge")),
    ("budget", ("retry", "fallback")),
    ("bulkhead", ("retry", "breaker", "fallback", "hedge")),
    ("chaos", ("breaker", "fallback")),
    ("hedge", ("retry", "fallback")),
    ("rate_limit", ("retry", "breaker", "fallback", "hedge")),
    ("retry", ("retry", "fallback")),
]


@pytest.mark.parametrize(("outer", "inner"), [(outer, inner) for outer, inners in _ORDERS for inner in inners])
def test_every_harmful_order_is_warned_of(outer: str, inner: str) -> None:
    """Each row of the table warns in its order and with its remedy, also with something between; no row is untested."""
    with pytest.warns(HarmfulOrderWarning, match=rf"{outer} stands around {inner}: .+; (put the|leave one)"):
        Pipeline("p", _PARTS[outer](), Timeout(1), _PARTS[inner]())
    assert {row[:2] for row in _HARMFUL} == {(outer, inner) for outer, inners in _ORDERS for inner in inners}


async def test_blocks_end_in_whatever_order_thread_and_context(clock: VirtualClock) -> None:
    """A generator's block ends as its own, interleaved with others, or driven by other threads; no place is lost."""
    bulkhead = Bulkhead(5, clock=clock)
    breaker = CircuitBreaker("p", BreakerConfig(slow_seconds=1, window_calls=10), clock=clock)

    @contextmanager
    def dependency(policy: Policy) -> Generator[None]:
        with policy:
            yield

    first, second = dependency(bulkhead), dependency(breaker)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert (bulkhead.under_way, breaker.totals()["success"]) == (0, 1)

    slow, quick = dependency(breaker), dependency(breaker)
    slow.__enter__()
    clock.tick(2)
    quick.__enter__()
    slow.__exit__(None, None, None)  # not the one that began last
    assert breaker.snapshot().slow == 1
    quick.__exit__(None, None, None)
    assert breaker.snapshot().slow == 1

    held = dependency(bulkhead)
    await asyncio.to_thread(held.__enter__)
    assert bulkhead.under_way == 1
    copy_context().run(held.__exit__, None, None, None)
    assert bulkhead.under_way == 0


async def test_blocks_in_exit_stacks_end_as_their_own_task_began_them(clock: VirtualClock) -> None:
    """A stack enters and leaves in frames of its own; its blocks are told apart by task and thread."""
    breaker = CircuitBreaker("p", BreakerConfig(slow_seconds=1, window_calls=10), clock=clock)

    async def work(seconds: float) -> None:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(breaker)
            await clock.sleep(seconds)

    tasks = [asyncio.create_task(work(seconds)) for seconds in (0.5, 2, 0.7)]
    await clock.advance(2)
    await asyncio.gather(*tasks)
    assert (breaker.snapshot().calls, breaker.snapshot().slow) == (3, 1)

    bulkhead = Bulkhead(5)
    inside = threading.Barrier(3)

    def block() -> None:
        with ExitStack() as stack:
            stack.enter_context(bulkhead)
            inside.wait(timeout=10)

    await asyncio.gather(*(asyncio.to_thread(block) for _ in range(3)))
    assert (bulkhead.under_way, bulkhead._blocks) == (0, {})
    bulkhead.__enter__()  # left by another task than entered it: the place is given back all the same

    async def leave() -> None:
        bulkhead.__exit__(None, None, None)

    await asyncio.create_task(leave())
    assert bulkhead.under_way == 0
    with pytest.raises(RuntimeError, match="was not entered"):
        bulkhead.__exit__(None, None, None)


async def test_a_first_use_that_meets_a_reload_has_the_new_shape(
    clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reload between looking at the policies and being known to them is not missed."""
    breaker = CircuitBreaker("p", BreakerConfig(minimum_calls=5), clock=clock)
    code = _codegen.code_of

    def reload_meanwhile(*shape: object) -> object:
        monkeypatch.setattr("mainstay.circuit_breaker.policy.code_of", code)
        breaker.reload(BreakerConfig(minimum_calls=5, slow_seconds=1))
        return code(*shape)  # type: ignore[arg-type]  # as they came

    monkeypatch.setattr("mainstay.circuit_breaker.policy.code_of", reload_meanwhile)

    @breaker
    async def call() -> None:
        clock.tick(2)

    await call()
    assert breaker.snapshot().slow == 1


def test_method_descriptors_are_refused_where_they_are_decorated() -> None:
    """A policy above `@staticmethod` or `@classmethod` would lose the binding: the message says where it goes."""
    breaker = CircuitBreaker("p")

    def fn() -> None: ...

    for descriptor in (staticmethod(fn), classmethod(fn)):  # type: ignore[var-annotated,arg-type]  # that is the test
        with pytest.raises(TypeError, match=f"goes below @{type(descriptor).__name__}"):
            breaker(descriptor)  # type: ignore[type-var]  # that is the test


async def test_circuits_with_keys_stop_retries_and_hedges(clock: VirtualClock) -> None:
    """While the circuit of the call's own key is not closed, nothing is sent again for it; for another key it is."""
    breaker = KeyedBreaker("k", key=lambda host: host, clock=clock)
    retrying = Pipeline("p", Retry(attempts=3, wait=lambda _: 0.0, clock=clock), breaker)
    hedged = Pipeline("p", Hedge(1, clock=clock), breaker)
    for host, attempts in (("ramping", 1), ("closed", 3)):
        with forced(breaker["ramping"], State.RAMPING):
            failing = Dependency(then=Boom)
            with pytest.raises(Boom):
                await retrying.call(failing, host)
            assert len(failing.calls) == attempts
        for form in ("called", "decorated"):
            hanging = Dependency(then="late")
            hanging.hold()
            with forced(breaker["ramping"], State.RAMPING):
                call = asyncio.create_task(hedged.call(hanging, host) if form == "called" else hedged(hanging)(host))
                await clock.advance(1)
                assert len(hanging.calls) == min(attempts, 2)
                call.cancel()
                await asyncio.gather(call, return_exceptions=True)
