"""The traps that breakers elsewhere fall into: one test each, named after its trap."""

import asyncio
import contextvars
import datetime as dt
import gc
import sys
import threading
import time
import tracemalloc
import weakref
from collections.abc import AsyncIterator, Callable, Generator
from types import FrameType
from typing import Any, Self

import pytest
import tenacity

from mainstay.circuit_breaker import (
    BreakerConfig,
    Budget,
    Bulkhead,
    CircuitBreaker,
    CircuitOpen,
    Fallback,
    Hedge,
    KeyedBreaker,
    Pipeline,
    Policy,
    Retries,
    State,
    Throttled,
    Timeout,
    in_thread,
)
from mainstay.circuit_breaker._windows import CountWindow
from mainstay.circuit_breaker.testing import HANG, Dependency, forced
from mainstay.core import SYSTEM_CLOCK, DeadlineExceeded, Retry, bind, current
from mainstay.core.testing import VirtualClock

PLAIN = BreakerConfig(minimum_calls=4, break_jitter=0, ramp_seconds=0, probe_successes=1)


class Boom(Exception):
    pass


async def trip(breaker: CircuitBreaker) -> None:
    """Fail until it opens."""
    while breaker.state is State.CLOSED:
        with pytest.raises(Boom):
            await breaker.call(Dependency(then=Boom))


async def test_half_open_herd(clock: VirtualClock) -> None:
    """Of a hundred callers after the break exactly one gets through, and its cancellation frees the place."""
    breaker = CircuitBreaker("p", PLAIN, clock=clock)
    await trip(breaker)
    await clock.advance(5)
    dependency = Dependency(HANG, then="fine")
    callers = [asyncio.create_task(breaker.call(dependency)) for _ in range(100)]
    await asyncio.sleep(0)
    assert (len(dependency.calls), breaker.state) == (1, State.HALF_OPEN)
    probe, *others = callers
    assert {type(error) for error in await asyncio.gather(*others, return_exceptions=True)} == {CircuitOpen}
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    assert breaker.snapshot().state is State.HALF_OPEN
    assert await breaker.call(dependency) == "fine"
    assert breaker.snapshot().state is State.CLOSED


async def test_half_open_probe_lease(clock: VirtualClock) -> None:
    """A probe that hangs does not block for ever: after its lease the circuit opens for another, longer break."""
    breaker = CircuitBreaker("p", PLAIN, clock=clock)
    await trip(breaker)
    await clock.advance(5)
    hanging = asyncio.create_task(breaker.call(Dependency(HANG)))
    await clock.advance(29)
    with pytest.raises(CircuitOpen, match="half open"):
        await breaker.call(Dependency())
    await clock.advance(1)
    with pytest.raises(CircuitOpen) as rejection:
        await breaker.call(Dependency())
    assert (breaker.state, rejection.value.retry_after_seconds) == (State.OPEN, 10.0)
    await clock.advance(10)
    await breaker.call(Dependency())
    assert breaker.snapshot().state is State.CLOSED
    hanging.cancel()
    await asyncio.gather(hanging, return_exceptions=True)
    assert breaker.snapshot().state is State.CLOSED


@pytest.mark.parametrize("result", ["fine", Boom])
@pytest.mark.parametrize("when", [State.OPEN, State.HALF_OPEN, State.CLOSED])
async def test_late_results(clock: VirtualClock, when: State, result: object) -> None:
    """What began before the circuit opened neither closes nor re-opens it, whichever state it comes back to."""
    breaker = CircuitBreaker("p", PLAIN, clock=clock)
    late = Dependency(then=result)
    late.hold()
    calls = [asyncio.create_task(breaker.call(late)) for _ in range(10)]
    await asyncio.sleep(0)
    await trip(breaker)
    probe = Dependency(then="fine")
    probe.hold()
    probing = None
    if when is not State.OPEN:
        await clock.advance(5)
        probing = asyncio.create_task(breaker.call(probe))
        await asyncio.sleep(0)
    if when is State.CLOSED:
        probe.let_go()
        assert probing is not None
        await probing
    late.let_go()
    await asyncio.gather(*calls, return_exceptions=True)
    assert breaker.snapshot().state is when
    assert breaker.totals()["late"] == 10
    assert breaker.snapshot().failures == 0
    probe.let_go()
    if probing is not None:
        await probing


async def test_cancellation(clock: VirtualClock) -> None:
    """Callers that go away count nowhere, a cancelled probe decides nothing, and a cancellation is never retried."""
    breaker = CircuitBreaker("p", PLAIN, clock=clock)
    hang = Dependency(then=HANG)
    guarded = Pipeline("p", Retry(attempts=5), breaker)
    for _ in range(10):
        task = asyncio.create_task(guarded.call(hang))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert len(hang.calls) == 10
    assert breaker.snapshot().state is State.CLOSED
    assert breaker.snapshot().calls == 0


async def test_cancellation_by_our_own_deadline_is_a_failure(clock: VirtualClock) -> None:
    """Twenty time-outs around a breaker open it, although all it sees is cancellations."""
    breaker = CircuitBreaker("p", PLAIN, clock=clock)
    guarded = Pipeline("p", Timeout(2, clock=clock), breaker)
    hang = Dependency(then=HANG)
    callers = [asyncio.create_task(guarded.call(hang)) for _ in range(4)]
    await clock.advance(2)
    assert {type(error) for error in await asyncio.gather(*callers, return_exceptions=True)} == {DeadlineExceeded}
    assert breaker.snapshot().state is State.OPEN


async def test_a_cancellation_that_meets_the_deadline_stays_a_cancellation(clock: VirtualClock) -> None:
    """When the caller cancels in the moment in which the time runs out, the caller gets the cancellation."""
    guarded = Timeout(2, clock=clock)
    task = asyncio.create_task(guarded.call(Dependency(then=HANG)))
    await asyncio.sleep(0)
    task.cancel()
    clock.tick(2)
    with pytest.raises(asyncio.CancelledError):
        await task


def test_locks_held_during_the_call() -> None:
    """Eight threads that each call for 50 ms through one breaker are inside the call at the same time."""
    breaker = CircuitBreaker("p")
    inside = threading.Barrier(8)

    @breaker
    def call() -> None:
        inside.wait(timeout=10)  # breaks unless all eight are here at once

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert breaker.totals()["success"] == 8


async def test_locks_held_while_listeners_run(clock: VirtualClock) -> None:
    """A listener may use the breaker it listens to: it runs outside the lock."""
    breaker = CircuitBreaker("p", PLAIN, clock=clock)
    seen: list[int] = []
    breaker.on_change(lambda _: seen.append(breaker.snapshot().failures_total))
    await trip(breaker)
    assert seen == [4]


async def test_sync_decorator_on_async_function(clock: VirtualClock) -> None:
    """Async functions count in every guise, and a plain function that returns an awaitable is refused."""
    breaker = CircuitBreaker("p", PLAIN, clock=clock)

    async def call() -> None:
        raise Boom

    class AsyncCallable:
        async def __call__(self) -> None:
            raise Boom

    import functools

    for fn in (call, functools.partial(call), AsyncCallable()):
        decorated = breaker(fn)
        with pytest.raises(Boom):
            await decorated()
    assert breaker.totals()["failure"] == 3
    sneaky = breaker(lambda: call())  # noqa: PLW0108  the point: a plain function that returns a coroutine
    with pytest.raises(TypeError, match="decorate the async function itself"):
        sneaky()  # type: ignore[unused-coroutine]  # that is the test


def test_sync_function_in_async_pipeline_and_generators_are_refused() -> None:
    """A plain function under a time limit, a generator function and a class are refused where they are decorated."""

    def plain() -> None: ...

    def generate() -> object:
        yield 1

    with pytest.raises(TypeError, match="in_thread"):
        Pipeline("p", Timeout(1))(plain)
    with pytest.raises(TypeError, match="in_thread"):
        Hedge(1)(plain)
    with pytest.raises(TypeError, match="async generator"):
        CircuitBreaker("p")(generate)
    with pytest.raises(TypeError, match="decorate the method"):
        CircuitBreaker("p")(Boom)
    with pytest.raises(TypeError, match="CircuitBreaker\\('payments'\\)"):
        CircuitBreaker(plain)  # type: ignore[arg-type]  # `@CircuitBreaker` without a name


async def test_wall_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wall clock that jumps by a year either way, by any of its names, ends no break and empties no window."""
    breaker = CircuitBreaker("p", BreakerConfig(minimum_calls=4, slow_seconds=1))
    guarded = Pipeline("p", Timeout(5), Retry(attempts=1), breaker, Bulkhead(2))
    now = time.time()
    jumped = 0.0

    class Jumping(dt.datetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> Self:
            return cls.fromtimestamp(now + jumped, tz)

    monkeypatch.setattr(time, "time", lambda: now + jumped)
    monkeypatch.setattr(time, "time_ns", lambda: int((now + jumped) * 1e9))
    for name, module in list(sys.modules.items()):
        if name.startswith("mainstay.") and hasattr(module, "datetime"):
            monkeypatch.setattr(module, "datetime", Jumping)
    assert (SYSTEM_CLOCK.now() - dt.datetime.fromtimestamp(now, dt.UTC)).total_seconds() == 0
    for seconds in (0.0, 31e6, -31e6, 31e6):
        jumped = seconds
        with pytest.raises(Boom):
            await guarded.call(Dependency(Boom))
    assert breaker.snapshot().state is State.OPEN
    for seconds in (31e6, -31e6):
        jumped = seconds
        with pytest.raises(CircuitOpen):
            await guarded.call(Dependency("fine"))


async def test_timeouts_on_sync_code() -> None:
    """Blocking code under a time limit takes `in_thread`: the caller goes on in time, the thread has its context."""
    release = threading.Event()
    tenants: list[str | None] = []

    @Timeout(0.05)
    @in_thread
    def block() -> None:
        tenants.append(current().tenant)
        release.wait(timeout=10)

    with bind(tenant="acme"), pytest.raises(DeadlineExceeded):
        await block()
    release.set()
    assert tenants == ["acme"]


async def test_context_variables(clock: VirtualClock) -> None:
    """A hedged attempt sees the caller's context variables; what it sets does not come back, from either attempt."""
    variable = contextvars.ContextVar("variable", default="default")
    variable.set("caller's")
    seen: list[str] = []

    async def attempt() -> None:
        seen.append(variable.get())
        variable.set(f"attempt {len(seen)}")
        if len(seen) == 1:
            await asyncio.Event().wait()

    hedge = Hedge(1, clock=clock)
    task = asyncio.create_task(hedge.call(attempt))
    await clock.advance(1)
    await task
    assert seen == ["caller's", "caller's"]
    assert variable.get() == "caller's"
    await hedge.drained()


async def test_client_throttling(clock: VirtualClock) -> None:
    """Calls count before they are made: a dependency that only hangs is throttled although no call has ended."""
    budget = Budget(throttle=2.0, clock=clock)
    hang = Dependency(then=HANG)
    calls = [asyncio.create_task(budget.call(hang)) for _ in range(500)]
    await asyncio.sleep(0)
    throttled = [call for call in calls if call.done() and isinstance(call.exception(), Throttled)]
    assert len(throttled) > 400
    assert len(hang.calls) + len(throttled) == 500
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    await clock.advance(31)
    assert await budget.call(Dependency("fine")) == "fine"


async def test_client_throttling_is_not_blinded_by_what_says_nothing(clock: VirtualClock) -> None:
    """Callers that leave and rejections by a breaker inside are no answers: after them failures throttle as ever."""
    budget = Budget(throttle=2.0, clock=clock)
    breaker = CircuitBreaker("p", PLAIN, clock=clock)
    guarded = Pipeline("p", budget, breaker)
    leaving = [asyncio.create_task(guarded.call(Dependency(then=HANG))) for _ in range(9)]
    await asyncio.sleep(0)
    for call in leaving:
        call.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    with forced(breaker, State.OPEN):
        await asyncio.gather(*(guarded.call(Dependency()) for _ in range(500)), return_exceptions=True)
    assert budget.rejected == 0
    breaker.disable()
    failing = Dependency(then=Boom)
    await asyncio.gather(*(guarded.call(failing) for _ in range(500)), return_exceptions=True)
    assert len(failing.calls) < 100
    assert len(failing.calls) + budget.rejected == 500


async def test_client_throttling_window_holds_the_slow_answers(clock: VirtualClock) -> None:
    """Where the window is several times the slowest answer, calls under way are not taken for unanswered ones."""
    budget = Budget(throttle=2.0, window_seconds=30, clock=clock)

    async def slow() -> None:
        await clock.sleep(5)

    calls = []
    for _ in range(60):
        calls += [asyncio.create_task(budget.call(slow)) for _ in range(9)]
        await clock.advance(5)
    await asyncio.gather(*calls)
    assert budget.rejected == 0


async def test_semaphores(clock: VirtualClock) -> None:
    """A waiter cancelled in the moment in which it gets the place passes it on: no place is ever lost."""
    bulkhead = Bulkhead(1, queue=10, max_wait_seconds=60, clock=clock)
    assert bulkhead.take()
    waiters = [asyncio.create_task(bulkhead.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    bulkhead.release()  # granted to the first, which has not run yet
    waiters[0].cancel()
    await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await waiters[0]
    await waiters[1]
    waiters[2].cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiters[2]
    assert (bulkhead.under_way, len(bulkhead.waiting)) == (1, 0)
    bulkhead.release()
    assert bulkhead.free == 1


async def test_retry_engines(clock: VirtualClock) -> None:
    """Tenacity's own objects decide, and even one that would retry a cancellation cannot make the loop do it."""
    clocked = Retry(
        attempts=10,
        wait=tenacity.wait_fixed(2) + tenacity.wait_fixed(1),
        retry=tenacity.retry_if_not_exception_type(KeyError)
        | tenacity.retry_if_result(lambda result: result == "busy"),
        stop=tenacity.stop_after_delay(10) | tenacity.stop_after_attempt(4),
        clock=clock,
    )
    guarded = Pipeline("p", clocked)
    dependency = Dependency(Boom, "busy", "fine")
    task = asyncio.create_task(guarded.call(dependency))
    await clock.advance(6)
    assert await task == "fine"
    task = asyncio.create_task(guarded.call(Dependency(then=Boom)))
    await clock.advance(9)
    with pytest.raises(Boom):
        await task
    hang = Dependency(then=HANG)
    task = asyncio.create_task(guarded.call(hang))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(hang.calls) == 1


async def test_memory(clock: VirtualClock) -> None:
    """Eight thousand keys keep to a bound of one thousand, failures stay, and a circuit is below one KiB."""
    breaker = KeyedBreaker("hosts", PLAIN, key=lambda host: host, max_keys=1000, clock=clock)

    @breaker
    async def call(host: int) -> None:
        if host < 10:
            raise Boom

    for host in [host for host in range(10) for _ in range(4)]:
        with pytest.raises(Boom):
            await call(host)
    for host in range(10, 8_000):
        await call(host)
    assert len(breaker) == 1000
    assert all(breaker[host].state is State.OPEN for host in range(10))
    assert breaker.totals()["success"] == 7_990
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    many = KeyedBreaker("many", PLAIN, key=lambda host: host, max_keys=2000)
    for host in range(2000):
        many[host]
    each = (tracemalloc.get_traced_memory()[0] - before) / 2000
    tracemalloc.stop()
    assert each < 1024


async def test_memory_a_circuit_with_calls_under_way_is_never_evicted(clock: VirtualClock) -> None:
    """A provider that hangs is what eviction must not forget: its calls are counted when they fail at last."""
    hosts = KeyedBreaker("hosts", PLAIN, key=lambda host: host, max_keys=2, clock=clock)
    hanging = Dependency(then=Boom)
    hanging.hold()

    @hosts
    async def call(host: str) -> None:
        if host == "hangs":
            await hanging()

    calls = [asyncio.create_task(call("hangs")) for _ in range(4)]
    await asyncio.sleep(0)
    for number in range(100):
        await call(f"healthy {number}")
    hanging.let_go()
    assert {type(error) for error in await asyncio.gather(*calls, return_exceptions=True)} == {Boom}
    assert (hosts["hangs"].state, hosts["hangs"].under_way) == (State.OPEN, 0)
    assert hosts.totals() == {"success": 100, "failure": 4, "neutral": 0, "late": 0, "rejected": 0}


async def test_memory_a_closed_circuit_with_failures_is_never_evicted(clock: VirtualClock) -> None:
    """Failures below the threshold are kept while other keys come and go, so that the next one opens the circuit."""
    hosts = KeyedBreaker("hosts", PLAIN, key=lambda host: host, max_keys=2, clock=clock)

    @hosts
    async def call(host: str) -> None:
        if host == "bad":
            raise Boom

    for round_ in range(4):
        with pytest.raises(Boom):
            await call("bad")
        for number in range(10):
            await call(f"healthy {round_} {number}")
    assert hosts["bad"].state is State.OPEN


@pytest.mark.parametrize(
    "policy",
    [
        CircuitBreaker("p"),
        Retries(Retry(attempts=2, wait=lambda _: 0.0)),
        Retries(Retry(attempts=2, wait=lambda _: 0.0, retry=lambda state: state.outcome.failed)),
        Timeout(5),
        Bulkhead(5),
        Fallback(last_good_seconds=5, key=lambda: None),
        Hedge(1),
        Budget(),
    ],
    ids=repr,
)
async def test_cost_of_errors_leaves_no_garbage(policy: Policy) -> None:
    """An error is freed with its last reference: an outage must not feed the cycle collector."""

    class Own(Exception):
        pass

    async def fail() -> None:
        raise Own

    async def once() -> weakref.ref[Own]:
        try:
            await policy.call(fail)
        except Own as error:
            return weakref.ref(error)
        pytest.fail("it did not raise")

    gc.disable()
    try:
        alive = await once()
        await asyncio.sleep(0)  # a hedge's task is done, and the loop lets go of it
        assert alive() is None
    finally:
        gc.enable()


async def test_cost_of_rejections_leaves_no_garbage() -> None:
    """A rejection is freed with its last reference too, in every state that rejects."""
    breaker = CircuitBreaker("p", PLAIN)

    async def once() -> weakref.ref[CircuitOpen]:
        try:
            await breaker.call(Dependency())
        except CircuitOpen as error:
            return weakref.ref(error)
        pytest.fail("it did not raise")

    gc.disable()
    try:
        for state in (State.OPEN, State.FORCED_OPEN, State.HALF_OPEN):
            with forced(breaker, state):
                if state is State.HALF_OPEN:
                    breaker.circuit._admit()
                assert (await once())() is None
    finally:
        gc.enable()


async def test_cost() -> None:
    """A success costs the same for a window of a hundred calls and of a million: the generated code is the same."""
    from mainstay.circuit_breaker._codegen import text_of

    short = CircuitBreaker("p", BreakerConfig(window_calls=100))
    long = CircuitBreaker("p", BreakerConfig(window_calls=1_000_000))
    text = text_of("async", short._layers())
    assert text == text_of("async", long._layers())
    assert "lock" not in text
    assert text.count("now_0()") == 1  # on the way of a call that is rejected
    assert text.count("await") == 1


def test_cost_of_failures_does_not_grow_with_the_window() -> None:
    """A failure runs the same few lines, and the window holds as little, for a hundred calls and for a million."""

    def lines_and_bytes(size: int) -> tuple[int, int]:
        breaker = CircuitBreaker("p", BreakerConfig(window_calls=size, failure_ratio=None, consecutive_failures=10**6))
        window = breaker.circuit.window
        assert isinstance(window, CountWindow)

        @breaker
        def fail() -> None:
            raise Boom

        def once() -> None:
            with pytest.raises(Boom):
                fail()

        for _ in range(50):
            window.successes += size // 40  # as the fast path does it
            once()
        once()
        lines = 0

        def count(frame: FrameType, event: str, arg: object) -> Any:
            nonlocal lines
            lines += event == "line" and "mainstay" in frame.f_code.co_filename
            return count

        before = sys.gettrace()
        sys.settrace(count)
        try:
            once()
        finally:
            sys.settrace(before)
        return lines, sys.getsizeof(window._failed) + sys.getsizeof(window._slow)

    lines, _ = lines_and_bytes(100)
    long_lines, long_bytes = lines_and_bytes(1_000_000)
    assert 10 < long_lines <= lines
    assert long_bytes < 200


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
async def test_cancellation_is_not_the_only_thing_that_is_never_retried(
    clock: VirtualClock, interruption: type[BaseException]
) -> None:
    """What is no `Exception` ends the call at once, also where the policy would retry, and counts nowhere."""
    breaker = CircuitBreaker("p", PLAIN, clock=clock)
    guarded = Pipeline("p", Retry(attempts=5, retry=lambda _: True, clock=clock), breaker)
    dependency = Dependency(then=interruption)
    with pytest.raises(interruption):
        await guarded.call(dependency)
    with pytest.raises(interruption):
        guarded.call_sync(dependency.sync)
    assert len(dependency.calls) == 2
    assert breaker.totals()["neutral"] == 2


async def test_sync_decorator_on_a_function_that_returns_any_awaitable() -> None:
    """A task, a gathering future and an object with `__await__` are refused like a coroutine, and count nowhere."""
    breaker = CircuitBreaker("p", PLAIN)

    class Awaitable:
        def __await__(self) -> Generator[None]:
            yield

    async def work() -> None: ...

    begun: list[asyncio.Future[Any]] = []

    def begin(future: asyncio.Future[Any]) -> object:
        begun.append(future)
        return future

    sneaky: list[Callable[[], object]] = [
        lambda: begin(asyncio.create_task(work())),
        lambda: begin(asyncio.gather(work())),
        lambda: begin(asyncio.get_running_loop().create_future()),
        Awaitable,
    ]
    for fn in sneaky:
        with pytest.raises(TypeError, match="decorate the async function itself"):
            breaker.call_sync(fn)
    with pytest.raises(TypeError, match="decorate the async function itself"):
        breaker(lambda: begin(asyncio.create_task(work())))()
    begun[2].cancel()
    await asyncio.gather(*begun, return_exceptions=True)
    assert breaker.totals() == {"success": 0, "failure": 0, "neutral": 5, "late": 0, "rejected": 0}


async def test_sync_function_given_to_call_and_generators_are_refused_once(clock: VirtualClock) -> None:
    """The wrong kind of callable runs once at most, counts nowhere, and no fallback hides the mistake."""
    breaker = CircuitBreaker("p", PLAIN, clock=clock)
    guarded = Pipeline("p", Fallback(value="instead"), Retry(attempts=3, wait=lambda _: 0.0, clock=clock), breaker)
    ran = 0

    def plain() -> int:
        nonlocal ran
        ran += 1
        return 1

    def generate() -> Generator[int]:
        yield 1

    async def stream() -> AsyncIterator[int]:
        yield 1

    for fn, remedy in ((plain, "use `call_sync`"), (generate, "return a list"), (stream, "decorate it")):
        with pytest.raises(TypeError, match=remedy) as refusal:
            await guarded.call(fn)  # type: ignore[arg-type]  # that is the test
        assert not hasattr(refusal.value, "__notes__")
    for fn in (generate, stream):
        with pytest.raises(TypeError, match="return a list"):
            guarded.call_sync(fn)
    assert ran == 1
    assert breaker.totals() == {"success": 0, "failure": 0, "neutral": 5, "late": 0, "rejected": 0}
    assert await guarded.call(lambda: asyncio.ensure_future(Dependency("fine")())) == "fine"


async def test_context_variables_of_a_thread_and_of_an_only_attempt(clock: VirtualClock) -> None:
    """A threaded attempt sets nothing for its caller, nor does a hedged one before there is anything to hedge by."""
    variable = contextvars.ContextVar("variable", default="default")

    @in_thread
    def block() -> str:
        before = variable.get()
        variable.set("the thread's")
        return before

    async def attempt() -> None:
        variable.set("the attempt's")

    variable.set("caller's")
    assert await Timeout(5)(block)() == "caller's"
    hedge = Hedge(clock=clock)
    for _ in range(30):
        await hedge.call(attempt)
    assert hedge.delay_seconds() is not None
    assert variable.get() == "caller's"
