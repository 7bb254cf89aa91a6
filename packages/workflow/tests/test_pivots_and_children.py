"""A cancellation around a pivot, children on every way of their parents, and circuits that stay open for long."""

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa

from mainstay.core import FullJitter, MainstayError, Retry
from mainstay.core.testing import VirtualClock
from mainstay.database import Database
from mainstay.workflow import (
    Done,
    Failed,
    RunParked,
    RunStateError,
    RunStatus,
    Unknown,
    WorkflowEngine,
    WorkflowFailed,
    WorkflowRouter,
)
from mainstay.workflow.tables import history
from mainstay.workflow.testing import workflows

WAIT = 60.0
QUICK = Retry(attempts=3, wait=FullJitter(0.001, 0.002))


def steps(flows: WorkflowRouter) -> tuple[list[str], Any]:
    """A ledger, and a step that writes to it and is undone in it."""
    lines: list[str] = []

    @flows.step(retry=Retry(attempts=1), failed_on=(LookupError,))
    async def step(n: int) -> int:
        if n < 0:
            raise LookupError(n)
        lines.append(str(n))
        return n

    @step.compensation
    async def undo(outcome: Done[int] | Unknown, n: int) -> None:
        if n > 0:
            lines.append(f"-{n}")

    return lines, step


async def status_is(run: Any, status: RunStatus) -> None:
    """Wait until the run is there."""
    async with asyncio.timeout(WAIT):
        while await run.status() is not status:  # noqa: ASYNC110  the worker's doing
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("on_unknown", "end", "expected"),
    [
        ("park", "done", "completed"),
        ("park", "failed", "cancelled"),
        ("park", "unknown", "parked"),
        ("probe", "found done", "completed"),
        ("probe", "found failed", "cancelled"),
        ("probe", "found unknown", "parked"),
        ("transactional", "done", "completed"),
        ("transactional", "failed", "cancelled"),
    ],
)
async def test_a_cancellation_during_a_pivot(url: str, on_unknown: Any, end: str, expected: str) -> None:
    """Accepted while the pivot is executed, it is carried out only once it is certain that the pivot did nothing.

    Of a transactional pivot that is certain: accepted before its commit, the commit is refused.
    """
    flows, inside, go, ends = WorkflowRouter(), asyncio.Event(), asyncio.Event(), [end]
    lines, step = steps(flows)
    options: dict[str, Any] = {"transactional": True} if on_unknown == "transactional" else {"on_unknown": on_unknown}

    @flows.step(pivot=True, failed_on=(LookupError,), retry=QUICK, **options)
    async def pay(n: int) -> int:
        inside.set()
        await go.wait()
        if ends[0] == "done":
            lines.append("pay")
            return n
        raise LookupError if ends[0] == "failed" else OSError

    if on_unknown == "probe":

        @pay.probe
        async def ask(n: int) -> Done[int] | Failed | Unknown:
            answers: dict[str, Done[int] | Failed | Unknown] = {
                "found done": Done(n),
                "found failed": Failed(),
                "found unknown": Unknown("no answer"),
            }
            return answers[ends[0]]

    @flows.workflow(name="sell")
    async def sell(n: int) -> int:
        await step(1)
        paid = await pay(n)
        await step(2)
        return int(paid)

    async with workflows(flows, url=url) as app:
        run, engine = await sell.start(7, id="r"), app.get(WorkflowEngine)
        await asyncio.wait_for(inside.wait(), WAIT)
        if on_unknown == "transactional":  # SQLite's writer is taken by the step
            cancelling = asyncio.create_task(run.cancel())
            await asyncio.sleep(0)
            go.set()
            (refusal,) = await asyncio.gather(cancelling, return_exceptions=True)
            if refusal is None:
                expected = "cancelled"
            else:
                assert isinstance(refusal, RunStateError)
        else:
            await run.cancel()
            go.set()
        if expected == "completed":
            assert await run.result(WAIT) == 7
            with pytest.raises(RunStateError):
                await run.cancel()
            with pytest.raises(RunStateError):
                await engine.compensate("r")
            assert [line for line in lines if line != "pay"] == ["1", "2"]
        elif expected == "cancelled":
            with pytest.raises(WorkflowFailed):
                await run.result(WAIT)
            assert [line for line in lines if line != "pay"] == ["1", "-1"]
        else:
            with pytest.raises(RunParked):
                await run.result(WAIT)
            with pytest.raises(RunStateError, match="may have taken effect"):
                await run.cancel()
            assert lines == ["1"]
            ends[0] = "done" if on_unknown == "park" else "found done"
            await engine.resume("r")
            assert await run.result(WAIT) == 7
            assert [line for line in lines if line != "pay"] == ["1", "2"]


class Family:
    """A parent, its child and its grandchild, each with a step before and after."""

    def __init__(self) -> None:
        self.flows = flows = WorkflowRouter()
        self.lines, step = steps(flows)
        self.told = told = flows.signal("told", int)
        self.risky_ends: list[bool] = []
        self.inside = asyncio.Event()

        @flows.step(on_unknown="park")
        async def risky(n: int) -> int:
            self.inside.set()
            raise OSError(n)

        @risky.compensation
        async def undo_risky(outcome: Done[int] | Unknown, n: int) -> None:
            self.lines.append(f"-risky {type(outcome).__name__}")

        @flows.workflow(name="grandchild")
        async def grandchild(how: str) -> int:
            await step(3)
            if how == "parks":
                await risky(1)
            if how == "fails":
                await step(-1)
            if how == "waits":
                self.inside.set()
                await told.wait()
            return 1

        @flows.workflow(name="child")
        async def child(how: str) -> int:
            await step(2)
            await grandchild(how)
            return int(await step(4))

        @flows.workflow(name="parent")
        async def parent(how: str) -> int:
            await step(1)
            try:
                await child(how)
            except WorkflowFailed:
                self.lines.append("caught")
            return int(await step(5))

        self.parent = parent


@pytest.mark.parametrize(("how", "of_risky"), [("waits", []), ("parks", ["-risky Unknown"])])
async def test_a_cancelled_parent_takes_its_family_back(url: str, how: str, of_risky: list[str]) -> None:
    """A grandchild waits, or waits for a person: all of it is undone, in reverse order."""
    family = Family()
    async with workflows(family.flows, url=url) as app:
        engine = app.get(WorkflowEngine)
        run = await family.parent.start(how, id=how)
        await asyncio.wait_for(family.inside.wait(), WAIT)
        if how == "parks":
            async with asyncio.timeout(WAIT):
                while not await engine.runs(RunStatus.PARKED):  # noqa: ASYNC110  the worker's doing
                    await asyncio.sleep(0.01)
        await run.cancel()
        with pytest.raises(WorkflowFailed, match="cancelled"):
            await run.result(WAIT)
        assert {view.status for view in await engine.runs()} == {RunStatus.CANCELLED}
    assert family.lines == ["1", "2", "3", *of_risky, "-3", "-2", "-1"]


async def test_a_completed_family_is_compensated(url: str) -> None:
    """The last first, through all generations."""
    family = Family()
    async with workflows(family.flows, url=url) as app:
        run = await family.parent.start("well", id="r")
        assert await run.result(WAIT) == 5
        await app.get(WorkflowEngine).compensate("r")
        with pytest.raises(WorkflowFailed, match="after its end"):
            await run.result(WAIT)
        assert {view.status for view in await app.get(WorkflowEngine).runs()} == {RunStatus.CANCELLED}
    assert family.lines == ["1", "2", "3", "4", "5", "-5", "-4", "-3", "-2", "-1"]


async def test_a_failed_grandchild_is_dealt_with_once(url: str) -> None:
    """It and its parent are undone; the one that catches that goes on."""
    family = Family()
    async with workflows(family.flows, url=url):
        run = await family.parent.start("fails", id="r")
        assert await run.result(WAIT) == 5
    assert [line for line in family.lines if line != "caught"] == ["1", "2", "3", "-3", "-2", "5"]


@pytest.mark.parametrize("seconds", [5.0, 60.0])
async def test_a_circuit_that_stays_open_does_not_grow_the_history(seconds: float) -> None:
    """Neither while the run waits in memory, nor where it leaves each time; nor in a compensation."""
    flows, clock, refused = WorkflowRouter(), VirtualClock(), {"charge": 0, "refund": 0}
    rows: set[int] = set()

    def refuse(what: str) -> None:
        refused[what] += 1
        if refused[what] <= 30:
            raise MainstayError(retryable=True, no_effect=True, retry_after_seconds=seconds)

    @flows.step(one_call=True, retry=Retry(attempts=1))
    async def charge(n: int) -> int:
        refuse("charge")
        return n

    @charge.compensation
    async def refund(outcome: Done[int] | Unknown, n: int) -> None:
        refuse("refund")

    @flows.workflow(name="sell")
    async def sell(n: int) -> int:
        await charge(n)
        raise ValueError

    async with workflows(flows, clock=clock) as app, asyncio.timeout(WAIT):
        run = await sell.start(1, id="r")
        while not (await run.status()).terminal:
            await clock.advance(seconds)
            entries = await app.get(Database).read(sa.select(sa.func.count()).select_from(history))
            rows.add(entries[0][0])
        assert await run.status() is RunStatus.FAILED
        record = (await app.get(WorkflowEngine).history("r")).records["charge:1"]
        assert not record.maybe_twice
        assert not record.dangling
    assert refused == {"charge": 31, "refund": 31}
    assert max(rows) <= 6
