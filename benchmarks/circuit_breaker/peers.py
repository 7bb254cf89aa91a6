"""The peers' side: nanoseconds a call, each library used as its documentation shows."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import aiobreaker
import circuitbreaker
import hyx.bulkhead
import hyx.circuitbreaker
import hyx.retry
import hyx.timeout
import interlock
import purgatory
import pybreaker
import pyresilience
import stamina
import tenacity

from benchmarks.peer import serve


class Boom(Exception):
    pass


def work(value: int) -> int:
    return value


async def work_async(value: int) -> int:
    return value


def plain(one: Callable[[int], object]) -> Callable[[int], float]:
    """A round of `calls` calls; the first one is not timed and asserts the result."""

    def measure(calls: int) -> float:
        assert one(1) == 1
        started = time.perf_counter()
        for _ in range(calls):
            one(1)
        return (time.perf_counter() - started) / calls * 1e9

    return measure


def awaited(one: Callable[[int], Awaitable[object]]) -> Callable[[int], Awaitable[float]]:
    async def measure(calls: int) -> float:
        assert await one(1) == 1
        started = time.perf_counter()
        for _ in range(calls):
            await one(1)
        return (time.perf_counter() - started) / calls * 1e9

    return measure


def stacked(make: Callable[[], Any]) -> Callable[[int], Awaitable[float]]:
    """Like `awaited`, for what can only be made where an event loop runs."""

    async def measure(calls: int) -> float:
        return await awaited(make())(calls)

    return measure


def rejected(one: Callable[[int], Awaitable[object]], error: type[BaseException]) -> Callable[[int], Awaitable[float]]:
    async def measure(calls: int) -> float:
        rejections = 0
        started = time.perf_counter()
        for _ in range(calls):
            try:
                await one(1)
            except error:
                rejections += 1
        took = (time.perf_counter() - started) / calls * 1e9
        assert rejections == calls
        return took

    return measure


def opened_circuitbreaker() -> Any:
    breaker = circuitbreaker.CircuitBreaker(failure_threshold=1, recovery_timeout=10**6, name="open")

    def fail() -> None:
        raise Boom

    with contextlib.suppress(Boom):
        breaker.call(fail)
    return breaker(work_async)


def opened_aiobreaker() -> Any:
    breaker = aiobreaker.CircuitBreaker(timeout_duration=timedelta(days=9))
    decorated = breaker(work_async)
    breaker.open()
    return decorated


def opened_interlock() -> Any:
    breaker = interlock.CircuitBreaker(name="open", config=interlock.Config())
    breaker.force_open()
    return breaker(work_async)


def stack_of_single_libraries() -> Any:
    places = asyncio.Semaphore(100)

    async def limited(value: int) -> int:
        async with asyncio.timeout(30):
            return await work_async(value)

    retried = tenacity.retry(stop=tenacity.stop_after_attempt(3), retry=tenacity.retry_if_exception_type(Boom))(limited)
    guarded = circuitbreaker.CircuitBreaker(name="stack")(retried)

    async def call(value: int) -> Any:
        async with places:
            return await guarded(value)

    return call


def stack_of_hyx() -> Any:
    call: Any = hyx.timeout.timeout(30)(work_async)
    call = hyx.retry.retry(on=Boom, attempts=3)(call)
    call = hyx.circuitbreaker.consecutive_breaker()(call)
    return hyx.bulkhead.bulkhead(max_concurrency=100, max_capacity=200)(call)


def stack_of_pyresilience() -> Any:
    return pyresilience.resilient(
        retry=pyresilience.RetryConfig(),
        timeout=pyresilience.TimeoutConfig(),
        circuit_breaker=pyresilience.CircuitBreakerConfig(),
        bulkhead=pyresilience.BulkheadConfig(max_concurrent=100),
    )(work_async)


def stack_of_interlock() -> Any:
    breaker = interlock.CircuitBreaker(name="stack", config=interlock.Config())
    return (
        interlock.Pipeline.builder()
        .retry(attempts=3)
        .circuit_breaker(breaker)
        .bulkhead(100)
        .timeout(30.0)
        .build()(work_async)
    )


def main() -> None:
    once = tenacity.stop_after_attempt(3)
    when = tenacity.retry_if_exception_type(Boom)
    serve(
        {
            "closed async circuitbreaker": awaited(circuitbreaker.CircuitBreaker(name="a")(work_async)),
            "closed async aiobreaker": awaited(aiobreaker.CircuitBreaker()(work_async)),
            "closed async purgatory": awaited(purgatory.AsyncCircuitBreakerFactory()("a")(work_async)),
            "closed async hyx": awaited(hyx.circuitbreaker.consecutive_breaker()(work_async)),
            "closed async interlock-cb": awaited(
                interlock.CircuitBreaker(name="a", config=interlock.Config())(work_async)
            ),
            "closed async pyresilience": awaited(
                pyresilience.resilient(circuit_breaker=pyresilience.CircuitBreakerConfig())(work_async)
            ),
            "closed sync pybreaker": plain(pybreaker.CircuitBreaker()(work)),
            "closed sync circuitbreaker": plain(circuitbreaker.CircuitBreaker(name="s")(work)),
            "closed sync aiobreaker": plain(aiobreaker.CircuitBreaker()(work)),
            "closed sync purgatory": plain(purgatory.SyncCircuitBreakerFactory()("s")(work)),
            "closed sync interlock-cb": plain(interlock.CircuitBreaker(name="s", config=interlock.Config())(work)),
            "closed sync pyresilience": plain(
                pyresilience.resilient(circuit_breaker=pyresilience.CircuitBreakerConfig())(work)
            ),
            "open circuitbreaker": rejected(opened_circuitbreaker(), circuitbreaker.CircuitBreakerError),
            "open aiobreaker": rejected(opened_aiobreaker(), aiobreaker.CircuitBreakerError),
            "open interlock-cb": rejected(opened_interlock(), interlock.CircuitOpenError),
            "retry tenacity": awaited(tenacity.retry(stop=once, retry=when)(work_async)),
            "retry stamina": awaited(stamina.retry(on=Boom, attempts=3)(work_async)),
            "retry hyx": awaited(hyx.retry.retry(on=Boom, attempts=3)(work_async)),
            "four Semaphore + circuitbreaker + tenacity + asyncio.timeout": awaited(stack_of_single_libraries()),
            "four hyx": stacked(stack_of_hyx),
            "four pyresilience": awaited(stack_of_pyresilience()),
            "four interlock-cb": awaited(stack_of_interlock()),
        }
    )


if __name__ == "__main__":
    main()
