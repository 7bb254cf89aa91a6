"""What policies cost on every call: beside what a person would write by hand, and beside the peers."""

import asyncio
import contextlib
import gc
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable

from benchmarks.circuit_breaker import by_hand
from benchmarks.rows import Peers, Round, Row, compare, row
from mainstay.circuit_breaker import (
    BreakerConfig,
    Bulkhead,
    CircuitBreaker,
    CircuitOpen,
    KeyedBreaker,
    Pipeline,
    Retries,
    Timeout,
)
from mainstay.core import Retry

Plain = Callable[[int], object]
Async = Callable[[int], Awaitable[object]]


def work(value: int) -> int:
    return value


async def work_async(value: int) -> int:
    return value


def plain(one: Plain, calls: int) -> Round:
    def measure() -> float:
        assert one(1) == 1
        started = time.perf_counter()
        for _ in range(calls):
            one(1)
        return (time.perf_counter() - started) / calls * 1e9

    return measure


def awaited(one: Async, calls: int) -> Round:
    async def measure() -> float:
        assert await one(1) == 1
        started = time.perf_counter()
        for _ in range(calls):
            await one(1)
        return (time.perf_counter() - started) / calls * 1e9

    return measure


def failing(window_calls: int, calls: int) -> Round:
    """Calls that fail, where the window is full."""
    config = BreakerConfig(window_calls=window_calls, failure_ratio=None, consecutive_failures=1_000_000)
    breaker = CircuitBreaker("failing", config)

    @breaker
    def fail() -> None:
        raise by_hand.Boom

    succeed = breaker(work)
    for number in range(window_calls):
        succeed(number)

    def measure() -> float:
        failures = breaker.totals()["failure"]
        started = time.perf_counter()
        for _ in range(calls):
            with contextlib.suppress(by_hand.Boom):
                fail()
        took = (time.perf_counter() - started) / calls * 1e9
        assert breaker.totals()["failure"] == failures + calls
        succeed(1)
        return took

    return measure


async def rejecting(one: Async, calls: int) -> float:
    rejections = 0
    started = time.perf_counter()
    for _ in range(calls):
        try:
            await one(1)
        except CircuitOpen:
            rejections += 1
    took = (time.perf_counter() - started) / calls * 1e9
    assert rejections == calls
    return took


def opened() -> Async:
    """A function whose circuit is open: through a failure, as it happens, for the longest break there is."""
    config = BreakerConfig(consecutive_failures=1, break_seconds=1e6, max_break_seconds=1e6)
    breaker = CircuitBreaker("open", config)

    def fail() -> None:
        raise by_hand.Boom

    with contextlib.suppress(by_hand.Boom):
        breaker.call_sync(fail)
    return breaker(work_async)


async def raising(value: int) -> None:
    name = "open"
    raise CircuitOpen(name, name, float(value))


def beyond_raising(calls: int) -> Round:
    """What a rejection costs more than raising the same exception, measured in one round."""
    closed = opened()

    async def measure() -> float:
        return await rejecting(closed, calls) - await rejecting(raising, calls)

    return measure


def bytes_each(make: Callable[[], list[object]]) -> float:
    make()
    gc.collect()
    tracemalloc.start()
    made = make()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size / len(made)


def circuits(number: int) -> list[object]:
    breaker = KeyedBreaker("memory", key=work, max_keys=number)
    return [breaker[key] for key in range(number)]


def keyed(keys: int) -> tuple[float, int]:
    """MiB of a breaker that met twice as many keys as it may keep, and the number it kept."""
    gc.collect()
    tracemalloc.start()
    breaker = KeyedBreaker("hosts", key=work, max_keys=keys)
    call = breaker(work)
    for number in range(2 * keys):
        call(number)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size / 2**20, len(breaker)


async def rows(quick: bool) -> AsyncIterator[Row]:  # noqa: FBT001  the runner's contract
    rounds, calls = (3, 5_000) if quick else (11, 50_000)
    peer_calls = calls // 4
    counted = CircuitBreaker("counted", BreakerConfig(window_calls=100))(work_async)
    timed = CircuitBreaker("timed")(work_async)
    everything = CircuitBreaker("everything", BreakerConfig(slow_seconds=1.0))(work_async)
    timed_sync = CircuitBreaker("timed")(work)
    everything_sync = CircuitBreaker("everything", BreakerConfig(slow_seconds=1.0))(work)
    million = CircuitBreaker("million", BreakerConfig(window_calls=1_000_000))(work_async)
    retried = Retries(Retry(attempts=3))(work_async)
    four = Pipeline("four", Retry(attempts=3), CircuitBreaker("four"), Bulkhead(100), Timeout(30))(work_async)

    async def beside(name: str, subject: Round, peer: str, theirs: Round) -> Row:
        return await compare(name, "ns/call", subject, peer=(peer, theirs), rounds=rounds)

    hand = "by hand, same features"
    count_by_hand = awaited(by_hand.counting(work_async), calls)
    time_by_hand = awaited(by_hand.timing(work_async), calls)
    time_by_hand_sync = plain(by_hand.timing_sync(work), calls)
    bare, bare_sync = awaited(by_hand.bare(work_async), calls), plain(by_hand.bare_sync(work), calls)
    four_by_hand = awaited(by_hand.four(work_async), calls // 4)
    for name, subject, peer, theirs in (
        ("breaker closed, async, window of calls", awaited(counted, calls), hand, count_by_hand),
        ("breaker closed, async, window of seconds", awaited(timed, calls), hand, time_by_hand),
        ("breaker closed, async, everything on", awaited(everything, calls), "by hand, bare", bare),
        ("breaker closed, sync, window of seconds", plain(timed_sync, calls), hand, time_by_hand_sync),
        ("breaker closed, sync, everything on", plain(everything_sync, calls), "by hand, bare", bare_sync),
        ("window of 1,000,000 calls", awaited(million, calls), "window of 100", awaited(counted, calls)),
        ("four policies, nothing going wrong", awaited(four, calls // 4), "fused by hand", four_by_hand),
    ):
        yield await beside(name, subject, peer, theirs)
    name = "a failure, window of 1,000,000 calls"
    short, long = failing(100, calls // 4), failing(1_000_000, calls // 4)
    yield await beside(name, long, "window of 100", short)
    name = "four policies, nothing going wrong, absolute"
    yield await compare(name, "ns/call", awaited(four, calls // 4), rounds=rounds)
    yield await compare("rejection, beyond raising it", "ns/call", beyond_raising(calls // 4), rounds=rounds)

    with Peers("circuit_breaker") as peers:
        for library in ("circuitbreaker", "aiobreaker", "purgatory", "hyx", "interlock-cb", "pyresilience"):
            theirs = peers(f"closed async {library}", peer_calls)
            yield await beside(f"breaker closed, async, beside {library}", awaited(timed, calls), library, theirs)
        for library in ("pybreaker", "circuitbreaker", "aiobreaker", "purgatory", "interlock-cb", "pyresilience"):
            theirs = peers(f"closed sync {library}", peer_calls)
            yield await beside(f"breaker closed, sync, beside {library}", plain(timed_sync, calls), library, theirs)
        closed = opened()
        for library in ("circuitbreaker", "aiobreaker", "interlock-cb"):
            theirs = peers(f"open {library}", peer_calls)
            yield await beside(f"rejection, beside {library}", lambda: rejecting(closed, calls // 4), library, theirs)
        for library in ("hyx", "stamina", "tenacity"):
            theirs = peers(f"retry {library}", peer_calls // 4)
            yield await beside(f"retry, no failure, beside {library}", awaited(retried, calls), library, theirs)
        for stack in (
            "pyresilience",
            "hyx",
            "interlock-cb",
            "Semaphore + circuitbreaker + tenacity + asyncio.timeout",
        ):
            theirs = peers(f"four {stack}", peer_calls // 4)
            yield await beside(f"four policies, beside {stack}", awaited(four, calls // 4), stack, theirs)

    number = 1_000 if quick else 10_000
    config = BreakerConfig()
    breakers = bytes_each(lambda: [CircuitBreaker("memory", config) for _ in range(number)])
    yield row("memory of a breaker", "bytes", breakers)
    yield row("memory of a circuit of a keyed breaker", "bytes", bytes_each(lambda: circuits(number)))
    keys = 10_000 if quick else 100_000
    size, kept = await asyncio.to_thread(keyed, keys)
    assert kept == keys
    yield row(f"memory of {keys:,} keyed circuits after {2 * keys:,} keys", "MiB", size)
