"""What the shared parts cost on every call: context, deadline, retry, ids."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar

import tenacity

from benchmarks.rows import Row, compare
from mainstay.core import Retry, bind, timeout, uuid7


async def rows(quick: bool) -> AsyncIterator[Row]:  # noqa: FBT001  the runner's contract
    rounds, calls = (3, 5_000) if quick else (9, 50_000)
    variable: ContextVar[str | None] = ContextVar("actor", default=None)
    retry = Retry(attempts=3)
    tenacious = tenacity.AsyncRetrying(stop=tenacity.stop_after_attempt(3))

    async def work(value: int) -> int:
        return value

    def per_call(one: Callable[[], object]) -> Callable[[], float]:
        def measure() -> float:
            started = time.perf_counter()
            for _ in range(calls):
                one()
            return (time.perf_counter() - started) / calls * 1e9

        return measure

    def per_await(one: Callable[[], Awaitable[object]]) -> Callable[[], Awaitable[float]]:
        async def measure() -> float:
            started = time.perf_counter()
            for _ in range(calls):
                await one()
            return (time.perf_counter() - started) / calls * 1e9

        return measure

    def bound() -> None:
        with bind(actor="ann"):
            pass

    def bare_variable() -> None:
        variable.reset(variable.set("ann"))

    async def with_ours() -> None:
        async with timeout(5):
            pass

    async def with_asyncio() -> None:
        async with asyncio.timeout(5):  # noqa: ASYNC100  its own cost is what is measured
            pass

    async def retry_ours() -> None:
        assert await retry.call(work, 1) == 1

    async def retry_tenacity() -> None:
        assert await tenacious(work, 1) == 1

    yield await compare(
        "bind and leave a context field",
        "ns/call",
        per_call(bound),
        peer=("ContextVar", per_call(bare_variable)),
        rounds=rounds,
    )
    yield await compare(
        "timeout around nothing",
        "ns/call",
        per_await(with_ours),
        peer=("asyncio.timeout", per_await(with_asyncio)),
        rounds=rounds,
    )
    yield await compare(
        "retry, no failure",
        "ns/call",
        per_await(retry_ours),
        peer=("tenacity", per_await(retry_tenacity)),
        rounds=rounds,
    )
    yield await compare("uuid7", "ns/call", per_call(uuid7), peer=("uuid.uuid4", per_call(uuid.uuid4)), rounds=rounds)
