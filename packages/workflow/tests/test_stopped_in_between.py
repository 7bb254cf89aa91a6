"""A stop, a cancellation or a time limit that comes between two moments that look like one."""

import asyncio
from contextlib import asynccontextmanager
from typing import Any

import pytest
import sqlalchemy as sa

from mainstay.core import App, FullJitter, Retry
from mainstay.core.testing import eventually
from mainstay.database import CommitUnknown, Database
from mainstay.workflow import (
    Done,
    RunParked,
    StepFailed,
    Unknown,
    WorkflowEngine,
    WorkflowFailed,
    WorkflowRouter,
)
from mainstay.workflow._history import StepState
from mainstay.workflow.tables import runs
from mainstay.workflow.testing import workflows

WAIT = 30.0
QUICK = Retry(attempts=3, wait=FullJitter(0.001, 0.002))


def lines_and_step(flows: WorkflowRouter) -> tuple[list[str], Any]:
    """A ledger, and a step that writes to it and is undone in it."""
    lines: list[str] = []

    @flows.step(retry=Retry(attempts=1))
    async def step(n: int) -> int:
        lines.append(str(n))
        return n

    @step.compensation
    async def undo(outcome: Done[int] | Unknown, n: int) -> None:
        lines.append(f"-{n}")

    return lines, step


async def until(condition: Any) -> None:
    """Wait for something that the worker does."""
    async with asyncio.timeout(WAIT):
        while not condition():  # noqa: ASYNC110  the worker's doing
            await asyncio.sleep(0.001)


async def test_a_cancellation_told_beside_a_transactional_pivot_does_not_undo_past_it(url: str) -> None:
    """A branch hears of the cancellation while the pivot commits in another one: then there is no way back."""
    flows, inside, go = WorkflowRouter(), asyncio.Event(), asyncio.Event()
    lines, step = lines_and_step(flows)

    @flows.step(transactional=True, pivot=True)
    async def pay(n: int) -> int:
        inside.set()
        await go.wait()
        lines.append("pay")
        return n

    async def then_pay(n: int) -> int:
        await step(3)  # so that the other branch waits before this one takes SQLite's writer
        return await pay(n)

    @flows.workflow(name="sell")
    async def sell(n: int) -> int:
        await step(1)
        await flows.gather(told.wait(), then_pay(n))
        return int(await step(2))

    told = flows.signal("told", int)
    async with workflows(flows, url=url) as app:
        run = await sell.start(1, id="r")
        await asyncio.wait_for(inside.wait(), WAIT)
        app.get(WorkflowEngine).worker.cancel("r")  # what `cancel` does after its commit; SQLite's writer is taken
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        go.set()
        await until(lambda: "pay" in lines)
        await told.send("r", 1)
        assert await run.result(WAIT) == 2
    assert lines == ["1", "3", "pay", "2"]


async def test_a_run_that_is_to_be_cancelled_does_not_park(url: str) -> None:
    """The cancellation was accepted while a step was executed; that step then asks for a person."""
    flows, inside, go = WorkflowRouter(), asyncio.Event(), asyncio.Event()
    lines, step = lines_and_step(flows)

    @flows.step(on_unknown="park")
    async def risky(n: int) -> int:
        inside.set()
        await go.wait()
        raise OSError(n)

    @risky.compensation
    async def undo_risky(outcome: Done[int] | Unknown, n: int) -> None:
        lines.append("-risky")

    @flows.workflow(name="sell")
    async def sell(n: int) -> int:
        await step(1)
        return await risky(n)

    async with workflows(flows, url=url, lease_seconds=60) as app:  # so the worker learns of nothing by looking around
        for here in (True, False):
            inside.clear()
            go.clear()
            lines.clear()
            run = await sell.start(1, id=f"r{here}")
            await asyncio.wait_for(inside.wait(), WAIT)
            if here:
                await run.cancel()
            else:
                await elsewhere(app, run.id)
            go.set()
            with pytest.raises(WorkflowFailed, match="cancelled"):
                await run.result(WAIT)
            assert lines == ["1", "-risky", "-1"]


async def elsewhere(app: App, run_id: str) -> None:
    """Cancel a run as another process does, so that this one's worker is not told."""
    worker = app.get(WorkflowEngine).worker
    real = worker.cancel
    worker.cancel = lambda id: None  # type: ignore[method-assign]  # noqa: A006  the parameter is named so
    try:
        await app.get(WorkflowEngine).cancel(run_id)
    finally:
        worker.cancel = real  # type: ignore[method-assign]  # as it was


async def test_a_signal_that_is_taken_while_the_time_limit_ends_is_not_lost(url: str) -> None:
    """The function's own limit fires while the receipt is committed: the message is received, not lost."""
    flows, reached, go = WorkflowRouter(), asyncio.Event(), asyncio.Event()
    told = flows.signal("told", str)
    tasks: list[asyncio.Task[Any]] = []

    @flows.workflow(name="wait")
    async def waits(n: int) -> str:
        tasks.append(asyncio.current_task())  # type: ignore[arg-type]  # there is one
        try:
            return await told.wait()
        except StepFailed:
            return "nothing, then " + await told.wait(0.2)

    async with workflows(flows, url=url) as app:
        database = app.get(Database)
        real = database.batch

        @asynccontextmanager
        async def batch(**options: Any) -> Any:
            async with real(**options):
                yield
            if options.get("route") == "r" and options.get("fence") and not reached.is_set():
                reached.set()
                await go.wait()

        await told.send("r", "hello")
        database.batch = batch  # type: ignore[method-assign]  # the one that the run calls
        run = await waits.start(1, id="r")
        await asyncio.wait_for(reached.wait(), WAIT)
        tasks[0].cancel()  # as a time limit does
        tasks[0].uncancel()
        go.set()
        assert "hello" in await run.result(WAIT)


async def test_a_run_whose_release_was_not_seen_is_executed_once(url: str) -> None:
    """The release is there, its answer is lost, and the same worker has the run again before it is repeated."""
    flows = WorkflowRouter()
    lines, _step = lines_and_step(flows)
    inside, go = asyncio.Event(), asyncio.Event()

    @flows.step(harmless=True, retry=QUICK)
    async def hold(n: int) -> int:
        lines.append("hold")
        inside.set()
        await go.wait()
        return n

    @flows.workflow(name="sleepy")
    async def sleepy(n: int) -> int:
        await flows.sleep(0.3)
        return await hold(n)

    async with workflows(flows, url=url, suspend_after_seconds=0.05) as app:
        database, worker = app.get(Database), app.get(WorkflowEngine).worker
        real, lost = database.batch, [0]

        @asynccontextmanager
        async def batch(**options: Any) -> Any:
            async with real(**options):
                yield
            found = await database.read(_state())
            if options.get("fence") and found and found[0].status == "queued" and not lost[0]:
                lost[0] = 1
                await until(inside.is_set)
                raise CommitUnknown

        database.batch = batch  # type: ignore[method-assign]  # the one that the run calls
        run = await sleepy.start(1, id="r")
        await asyncio.wait_for(inside.wait(), WAIT)
        await until(lambda: not [task for task in asyncio.all_tasks() if task.get_name() == "run r"][1:])
        assert worker.executes("r")
        go.set()
        assert await run.result(WAIT) == 1
    assert lines == ["hold"]


def _state() -> Any:
    return sa.select(runs.c.status).where(runs.c.id == "r")


async def test_nothing_ends_with_something_open(url: str) -> None:
    """A wait in a task that the function does not await is a mistake, and is said; the run is not completed."""
    flows = WorkflowRouter()
    tasks: list[asyncio.Task[None]] = []

    @flows.workflow(name="forgets")
    async def forgets(n: int) -> int:
        tasks.append(asyncio.create_task(flows.sleep(5)))
        await eventually(on_record, seconds=WAIT)
        return n

    async def on_record() -> bool:
        return "@sleep:1" in (await app.get(WorkflowEngine).history("r")).records

    async with workflows(flows, url=url) as app:
        run = await forgets.start(1, id="r")
        with pytest.raises(RunParked, match="@sleep:1"):
            await run.result(WAIT)
        history = await app.get(WorkflowEngine).history("r")
        assert history.records["@sleep:1"].state is StepState.OPEN


async def test_parents_that_wait_give_their_places_to_their_children(url: str) -> None:
    """Every place of the worker is a parent's: those that wait leave at once, and not after a while."""
    flows = WorkflowRouter()
    lines, step = lines_and_step(flows)

    @flows.workflow(name="grandchild")
    async def grandchild(n: int) -> int:
        return int(await step(n))

    @flows.workflow(name="child")
    async def child(n: int) -> int:
        return await grandchild(n)

    @flows.workflow(name="parent")
    async def parent(n: int) -> int:
        return await child(n)

    async with workflows(flows, url=url, max_runs=2, max_executing=1, suspend_after_seconds=3600):
        started = [await parent.start(n) for n in range(20)]
        assert [await run.result(WAIT) for run in started] == list(range(20))
    assert sorted(lines, key=int) == [str(n) for n in range(20)]


async def test_a_child_whose_pivot_did_not_happen_is_cancelled_with_its_parent(url: str) -> None:
    """While nobody knows, it is not cancelled; once it is known that nothing happened, it is."""
    flows, inside, go = WorkflowRouter(), asyncio.Event(), asyncio.Event()
    lines, step = lines_and_step(flows)
    never = flows.signal("never", int)

    @flows.step(pivot=True, on_unknown="park", failed_on=(LookupError,))
    async def pay(n: int) -> int:
        inside.set()
        await go.wait()
        raise LookupError(n)

    @flows.workflow(name="child")
    async def child(n: int) -> int:
        await step(2)
        try:
            return await pay(n)
        except StepFailed:
            return await never.wait()

    @flows.workflow(name="parent")
    async def parent(n: int) -> int:
        await step(1)
        return await child(n)

    async def looked() -> bool:
        views = await app.get(WorkflowEngine).runs()
        return any(view.parent == "r" and view.cancel_requested for view in views)

    async with workflows(flows, url=url) as app:
        run = await parent.start(1, id="r")
        await asyncio.wait_for(inside.wait(), WAIT)
        await run.cancel()
        await eventually(looked, seconds=WAIT)
        go.set()
        with pytest.raises(WorkflowFailed, match="cancelled"):
            await run.result(WAIT)
    assert lines == ["1", "2", "-2", "-1"]
