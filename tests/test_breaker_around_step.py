"""A rejection by a policy around a step is no attempt of it; one from inside a step says nothing about the step."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mainstay.circuit_breaker import Bulkhead, CircuitBreaker, Pipeline
from mainstay.core import Retry
from mainstay.workflow import Done, Unknown, WorkflowEngine, WorkflowFailed, WorkflowRouter, class_step, saga
from mainstay.workflow.testing import workflows

WAIT = 30.0


def alone(breaker: CircuitBreaker) -> Any:
    """The breaker itself."""
    return breaker


def in_a_pipeline(breaker: CircuitBreaker) -> Any:
    """The breaker among other policies."""
    return Pipeline("p", breaker, Bulkhead(8))


@pytest.mark.parametrize("policy", [alone, in_a_pipeline])
async def test_a_rejection_around_a_step_is_waited_out(policy: Callable[[CircuitBreaker], Any]) -> None:
    """Its own code was never entered: no attempt is spent, however long the breaker is open by hand."""
    breaker, flows, calls = CircuitBreaker("payments"), WorkflowRouter(), list[int]()

    @flows.step(retry=Retry(attempts=1), harmless=True)
    @policy(breaker)
    async def charge(n: int) -> int:
        calls.append(n)
        return n

    @flows.workflow(name="sell", version=1)
    async def sell(n: int) -> int:
        return int(await charge(n))

    breaker.force_open(retry_after_seconds=0.01)
    async with workflows(flows) as app:
        run = await sell.start(1, id="r")
        async with asyncio.timeout(WAIT):
            while breaker.totals()["rejected"] < 5:  # noqa: ASYNC110  the worker's doing
                await asyncio.sleep(0.01)
        breaker.reset()
        assert await run.result(WAIT) == 1
        record = (await app.get(WorkflowEngine).history("r")).records["charge:1"]
        assert record.attempts == 0
    assert calls == [1]


async def test_a_rejection_around_the_method_of_a_step_class_is_waited_out() -> None:
    """What makes a step of the object stands between, and tries nothing."""
    breaker, flows, calls = CircuitBreaker("payments"), WorkflowRouter(), list[int]()

    class Charge:
        @breaker
        async def execute(self, n: int) -> int:
            calls.append(n)
            return n

    step = class_step(Charge(), flows.step(retry=Retry(attempts=1), harmless=True))
    sell = saga(flows, "sell", step)
    breaker.force_open(retry_after_seconds=0.01)
    async with workflows(flows) as app:
        run = await sell.start(1, id="r")
        async with asyncio.timeout(WAIT):
            while breaker.totals()["rejected"] < 5:  # noqa: ASYNC110  the worker's doing
                await asyncio.sleep(0.01)
        breaker.reset()
        assert await run.result(WAIT) == 1
        assert (await app.get(WorkflowEngine).history("r")).records["Charge:1"].attempts == 0
    assert calls == [1]


def rejected_inside(breaker: CircuitBreaker, charged: list[str]) -> Callable[[int], Awaitable[int]]:
    """A step that charges, and is then rejected by a breaker inside."""

    async def charge(n: int) -> int:
        charged.append("charge")
        await breaker.call(asyncio.sleep, 0)
        return n

    return charge


def rejected_inside_its_own(breaker: CircuitBreaker, charged: list[str]) -> Callable[[int], Awaitable[int]]:
    """The same with a policy around it as well, which let it through."""
    return Bulkhead(8)(rejected_inside(breaker, charged))


def tried_by_hand(breaker: CircuitBreaker, charged: list[str]) -> Callable[[int], Awaitable[int]]:
    """A policy around it, and around that a loop that is none of ours: its first attempt charged."""

    @breaker
    async def charge(n: int) -> int:
        breaker.disable()
        charged.append("charge")
        breaker.force_open(retry_after_seconds=0.01)
        msg = "lost"
        raise OSError(msg)

    async def loop(n: int) -> int:
        breaker.reset()
        try:
            return await charge(n)
        except OSError:
            return await charge(n)

    loop.__wrapped__ = charge  # type: ignore[attr-defined]  # as functools.wraps does
    return loop


@pytest.mark.parametrize("make", [rejected_inside, rejected_inside_its_own, tried_by_hand])
async def test_a_rejection_inside_a_step_does_not_speak_for_it(
    make: Callable[[CircuitBreaker, list[str]], Callable[[int], Awaitable[int]]],
) -> None:
    """The provider was charged before it: the step is unknown, and compensated."""
    breaker, flows, lines = CircuitBreaker("ledger"), WorkflowRouter(), list[str]()
    breaker.force_open(retry_after_seconds=0.01)
    charge = flows.step(retry=Retry(attempts=1))(make(breaker, lines))

    @charge.compensation
    async def refund(outcome: Done[int] | Unknown, n: int) -> None:
        lines.append(f"refund {type(outcome).__name__}")

    @flows.workflow(name="sell", version=1)
    async def sell(n: int) -> int:
        return await charge(n)

    async with workflows(flows):
        run = await sell.start(1, id="r")
        with pytest.raises(WorkflowFailed):
            await run.result(WAIT)
    assert lines == ["charge", "refund Unknown"]
