"""A person lets a parked run go on from an earlier step: attempted again, and nothing of it is forgotten."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from mainstay.cli import main
from mainstay.core import Retry
from mainstay.workflow import (
    Done,
    RunNotFound,
    RunParked,
    RunStateError,
    Unknown,
    WorkflowEngine,
    WorkflowFailed,
    WorkflowRouter,
    current_step,
)
from mainstay.workflow.testing import workflows

WAIT = 60.0


def service() -> tuple[WorkflowRouter, list[str], dict[str, Any], Any]:
    """Three steps, of which the last parks until its provider is there; what they do is decided by `world`."""
    flows, lines = WorkflowRouter(), list[str]()
    world: dict[str, Any] = {"rate": 1, "there": False, "first": "works"}

    @flows.step(harmless=True)
    async def before(n: int) -> int:
        lines.append("before")
        return n

    @flows.step(retry=Retry(attempts=1), failed_on=(LookupError,))
    async def rate(n: int) -> int:
        if world["first"] == "fails":
            raise LookupError(n)
        lines.append(f"rate {current_step().key}")
        return int(world["rate"])

    @rate.compensation
    async def unrate(outcome: Done[int] | Unknown, n: int) -> None:
        lines.append(f"-rate {type(outcome).__name__}")

    @flows.step(transactional=True, harmless=True)
    async def book(n: int) -> int:
        lines.append("book")
        return n

    @flows.step(retry=Retry(attempts=1), exhausted="park", harmless=True)
    async def send(n: int) -> int:
        if not world["there"]:
            raise OSError(n)
        lines.append("send")
        return n

    @flows.workflow(name="work")
    async def work(n: int) -> int:
        await before(n)
        rated = await rate(n)
        await book(n)
        if rated == 3:
            return 3
        await send(n)
        return rated

    return flows, lines, world, work


async def parked(work: Any) -> Any:
    """A run that is parked at its last step."""
    run = await work.start(1, id="r")
    with pytest.raises(RunParked):
        await run.result(WAIT)
    return run


async def test_it_goes_on_from_there(url: str) -> None:
    """The step is attempted again under its key and its new result counts; what is certain is not repeated."""
    flows, lines, world, work = service()
    async with workflows(flows, url=url) as app:
        run = await parked(work)
        world |= {"rate": 2, "there": True}
        await app.get(WorkflowEngine).retry_from("r", "rate:1")
        assert await run.result(WAIT) == 2
        assert lines == ["before", "rate r:rate:1", "book", "rate r:rate:1", "send"]


async def test_a_branch_may_end_otherwise_after_it(url: str) -> None:
    """The end of a branch with a result is forgotten with what led to it: now the branch fails, and that counts."""
    flows, world, over = WorkflowRouter(), {"rate": 1, "there": 0}, asyncio.Event()

    @flows.step(harmless=True)
    async def rate(n: int) -> int:
        return world["rate"]

    @flows.step(retry=Retry(attempts=1), exhausted="park", harmless=True)
    async def send(n: int) -> int:
        await over.wait()
        return n // world["there"]

    @flows.workflow(name="work")
    async def work(n: int) -> str:
        async def rated() -> float:
            rate_now = await rate(n)
            over.set()
            return n / rate_now

        try:
            return str(await flows.gather(rated(), send(n)))
        except ZeroDivisionError:
            return "no rate"

    async with workflows(flows, url=url) as app:
        run = await parked(work)
        assert "0.0/@end:0" in (await app.get(WorkflowEngine).history("r")).records
        world |= {"rate": 0, "there": 1}
        await app.get(WorkflowEngine).retry_from("r", "0.0/rate:1")
        assert await run.result(WAIT) == "no rate"


async def test_what_it_did_before_is_undone(url: str) -> None:
    """A new attempt that certainly does nothing says nothing about the one before: cancelled, the run undoes that."""
    flows, lines, world, work = service()
    async with workflows(flows, url=url) as app:
        run = await parked(work)
        world["first"] = "fails"
        await app.get(WorkflowEngine).retry_from("r", "rate:1")
        with pytest.raises(RunParked, match=r"rate ended with LookupError: 1 \(it may have happened\) before book:1"):
            await run.result(WAIT)
        await run.cancel()
        with pytest.raises(WorkflowFailed, match="cancelled"):
            await run.result(WAIT)
        assert lines == ["before", "rate r:rate:1", "book", "-rate Unknown"]


async def test_a_function_that_takes_another_way_is_parked(url: str) -> None:
    """It would forget a step; a retry that answers as before takes it on."""
    flows, lines, world, work = service()
    async with workflows(flows, url=url) as app:
        run = await parked(work)
        world |= {"rate": 3, "there": True}
        await app.get(WorkflowEngine).retry_from("r", "rate:1")
        with pytest.raises(RunParked, match="the function ended before send:1, which is in its record"):
            await run.result(WAIT)
        world["rate"] = 2
        await app.get(WorkflowEngine).retry_from("r", "rate:1")
        assert await run.result(WAIT) == 2
        assert lines.count("rate r:rate:1") == 3


async def test_what_cannot_be_retried_is_refused(url: str) -> None:
    """Each refusal names its reason and changes nothing."""
    flows, lines, world, work = service()
    world["there"] = True
    paid = list[int]()

    @flows.step(pivot=True, on_unknown="park")
    async def pay(n: int) -> int:
        paid.append(n)
        return n

    @flows.step(retry=Retry(attempts=1), exhausted="park", after_pivot=True)
    async def tell(n: int) -> None:
        raise OSError(n)

    @flows.step(harmless=True)
    async def look(n: int) -> int:
        return n

    @flows.workflow(name="sell")
    async def sell(n: int) -> None:
        await look(n)
        await pay(n)
        await tell(n)

    async with workflows(flows, url=url) as app:
        engine = app.get(WorkflowEngine)
        with pytest.raises(RunNotFound):
            await engine.retry_from("r", "rate:1")
        await (await work.start(1, id="done")).result(WAIT)
        with pytest.raises(RunStateError, match="it is completed, and not parked"):
            await engine.retry_from("done", "rate:1")
        world["there"] = False
        await parked(work)
        for step in ("rate:2", "nothing"):
            with pytest.raises(RunStateError, match="it has no such step"):
                await engine.retry_from("r", step)
        with pytest.raises(RunStateError, match="transactional, and done exactly once"):
            await engine.retry_from("r", "book:1")
        with pytest.raises(RunParked):
            await (await sell.start(1, id="s")).result(WAIT)
        for step in ("look:1", "pay:1"):
            with pytest.raises(RunStateError, match="its pivot pay:1 took effect or may have"):
                await engine.retry_from("s", step)
        assert (paid, lines.count("rate r:rate:1")) == ([1], 1)


async def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """It lets the run go on; what is refused is an error with exit code 2."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'runs.db'}"
    flows, _, world, work = service()

    def retry(step: str, *options: str) -> int:
        return main(["workflow", "retry", "r", "--from", step, "--url", url, *options])

    async with workflows(flows, url=url):
        run = await parked(work)
        assert await asyncio.to_thread(retry, "nothing") == 2
        assert "run 'r' cannot be retried from nothing: it has no such step" in capsys.readouterr().err
        world |= {"rate": 2, "there": True}
        assert await asyncio.to_thread(retry, "rate:1", "--json") == 0
        assert json.loads(capsys.readouterr().out)["run"] == "r"
        assert await run.result(WAIT) == 2
