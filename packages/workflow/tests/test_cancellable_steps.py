"""A cancellation reaches into a step that says so, at once; what the step did is unknown, and undone."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest

from mainstay.core import Retry
from mainstay.workflow import (
    Done,
    RunStatus,
    Unknown,
    WorkflowEngine,
    WorkflowFailed,
    WorkflowRouter,
    current_step,
)
from mainstay.workflow._history import StepState
from mainstay.workflow.testing import explore, workflows

WAIT = 30.0
Body = Callable[["World"], Awaitable[int]]


class World:
    """Steps around one that would never end by itself.

    Attributes:
        lines: what was executed; `-` is a compensation, with the outcome that it was told.
        began: set once the step is being executed.
        body: what the step does.
    """

    def __init__(self, *, timeout_seconds: float | None = None, **options: Any) -> None:
        self.lines, self.began = list[str](), asyncio.Event()
        self.body: Body = _hangs
        self.flows = flows = WorkflowRouter()

        @flows.step()
        async def before(n: int) -> int:
            self.lines.append("before")
            return n

        @before.compensation
        async def undo_before(outcome: Done[int] | Unknown, n: int) -> None:
            self.lines.append("-before")

        @flows.step(retry=Retry(attempts=3), **options)
        async def slow(n: int) -> int:
            self.lines.append("slow")
            self.began.set()
            return await self.body(self)

        @slow.compensation
        async def undo_slow(outcome: Done[int] | Unknown, n: int) -> None:
            told = f"Done {outcome.result}" if isinstance(outcome, Done) else f"Unknown: {outcome.detail}"
            self.lines.append(f"-slow {told}")

        async def alone(n: int) -> int:
            return await slow(n)

        async def gathered(n: int) -> int:
            return sum(await flows.gather(slow(n), before(n)))

        async def grouped(n: int) -> int:
            async with asyncio.TaskGroup() as group:
                task = group.create_task(slow(n))
            return task.result()

        async def swallowed(n: int) -> int:
            with suppress(BaseException):
                return await slow(n)
            return await before(n)

        async def limited(n: int) -> int:
            async with asyncio.timeout(WAIT * 2):
                return await slow(n)

        self.act: dict[str, Callable[[int], Coroutine[Any, Any, int]]] = {
            "alone": alone,
            "gather": gathered,
            "TaskGroup": grouped,
            "swallowed": swallowed,
            "limit": limited,
        }
        self.shape = "alone"

        @flows.workflow(name="child")
        async def child(n: int) -> int:
            return await slow(n)

        self.act["child"] = child

        @flows.workflow(name="parent", timeout_seconds=timeout_seconds)
        async def parent(n: int) -> int:
            await before(n)
            return await self.act[self.shape](n) + await before(n)

        self.parent = parent


async def _hangs(world: World) -> int:
    await asyncio.get_running_loop().create_future()
    raise AssertionError


async def _answers(world: World) -> int:
    try:
        return await _hangs(world)
    except asyncio.CancelledError:
        return 7


async def _raises(world: World) -> int:
    try:
        return await _hangs(world)
    except asyncio.CancelledError:
        raise ConnectionError(7) from None


async def _holds(world: World) -> int:
    async with asyncio.TaskGroup() as group:
        group.create_task(_hangs(world))
    raise AssertionError


UNKNOWN = "-slow Unknown: Interrupted: the run was cancelled or ended while it was executed"


@pytest.mark.parametrize("shape", ["alone", "gather", "TaskGroup", "swallowed", "limit", "child"])
async def test_a_cancellation_ends_the_step(url: str, shape: str) -> None:
    """Its code is cancelled wherever it stands, it is not attempted again, and it is undone as unknown."""
    world = World(cancellable=True)
    world.shape = shape
    async with workflows(world.flows, url=url) as app:
        run = await world.parent.start(1, id="r")
        await world.began.wait()
        await run.cancel()
        with pytest.raises(WorkflowFailed, match="cancelled"):
            await run.result(WAIT)
        assert await run.status() is RunStatus.CANCELLED
        # The other branch of a gather may have been about to begin, and did not.
        branch = world.lines.count("before") - 1
        assert branch in ({0, 1} if shape == "gather" else {0})
        assert world.lines.count("slow") == world.lines.count(UNKNOWN) == 1
        assert world.lines.count("-before") == 1 + branch
        assert len(world.lines) == 4 + 2 * branch
        records = (await app.get(WorkflowEngine).history("r")).records.values()
        assert not any(record.maybe_twice for record in records)
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize(
    ("body", "told"),
    [(_answers, "-slow Done 7"), (_raises, "-slow Unknown: ConnectionError: 7"), (_holds, UNKNOWN)],
)
async def test_what_the_step_makes_of_it_counts(url: str, body: Body, told: str) -> None:
    """A result is one, an error is one; either way nothing new begins."""
    world = World(cancellable=True)
    world.body = body
    async with workflows(world.flows, url=url):
        run = await world.parent.start(1, id="r")
        await world.began.wait()
        await run.cancel()
        with pytest.raises(WorkflowFailed, match="cancelled"):
            await run.result(WAIT)
        assert world.lines == ["before", "slow", told, "-before"]


async def test_a_step_that_cancels_its_own_run(url: str) -> None:
    """It is ended where it waits next, or ends with its result."""
    world = World(cancellable=True)

    async def ends(world: World) -> int:
        await world.parent.handle(current_step().run_id).cancel()
        return 5

    world.body = ends
    async with workflows(world.flows, url=url):
        run = await world.parent.start(1, id="r")
        with pytest.raises(WorkflowFailed, match="cancelled"):
            await run.result(WAIT)
        assert world.lines[:2] == ["before", "slow"]
        assert world.lines[2] in {"-slow Done 5", UNKNOWN}
        assert world.lines[3:] == ["-before"]


async def test_the_time_limit_of_the_run_ends_it(url: str) -> None:
    """As a cancellation does; the run has failed."""
    world = World(cancellable=True, timeout_seconds=0.3)
    async with workflows(world.flows, url=url):
        run = await world.parent.start(1, id="r")
        with pytest.raises(WorkflowFailed, match="did not end within"):
            await run.result(WAIT)
        assert world.lines[:1] == ["before"] or not world.lines  # a busy machine may not have come so far
        assert world.lines[1:] in ([], ["slow", UNKNOWN, "-before"], ["-before"])


async def test_terminate_ends_it(url: str) -> None:
    """Its code is cancelled; nothing is undone, and nothing is written to the run that has ended."""
    world = World(cancellable=True)
    ended = asyncio.Event()

    async def tells(world: World) -> int:
        try:
            return await _hangs(world)
        finally:
            ended.set()

    world.body = tells
    async with workflows(world.flows, url=url) as app:
        engine, run = app.get(WorkflowEngine), await world.parent.start(1, id="r")
        await world.began.wait()
        await engine.terminate("r", reason="its provider is gone")
        async with asyncio.timeout(WAIT):
            await ended.wait()
        with pytest.raises(WorkflowFailed, match="terminated"):
            await run.result(WAIT)
        assert world.lines == ["before", "slow"]
        assert (await engine.history("r")).records["slow:1"].dangling


async def test_a_transactional_step_has_done_nothing(url: str) -> None:
    """Its transaction is rolled back, so it has no compensation to wait for."""
    world = World(cancellable=True, transactional=True)
    async with workflows(world.flows, url=url) as app:
        run = await world.parent.start(1, id="r")
        await world.began.wait()
        await _cancel(app, url)
        with pytest.raises(WorkflowFailed, match="cancelled"):
            await run.result(WAIT)
        assert world.lines == ["before", "slow", "-before"]


async def _cancel(app: Any, url: str) -> None:
    engine = app.get(WorkflowEngine)
    if url.startswith("sqlite"):  # its one writer is the step itself, so that the request comes by the worker alone
        engine.worker.cancel("r")
    else:
        await engine.cancel("r")


async def test_a_step_that_parks_waits_for_nobody(url: str) -> None:
    """Who cancels has decided already: undone as unknown, as after a crash."""
    world = World(cancellable=True, on_unknown="park")
    async with workflows(world.flows, url=url):
        run = await world.parent.start(1, id="r")
        await world.began.wait()
        await run.cancel()
        with pytest.raises(WorkflowFailed, match="cancelled"):
            await run.result(WAIT)
        assert world.lines == ["before", "slow", UNKNOWN, "-before"]


async def test_other_steps_are_waited_for(url: str) -> None:
    """Without the word a cancellation comes at the boundary, and the step's result is known."""
    world, go = World(), asyncio.Event()

    async def waits(world: World) -> int:
        await go.wait()
        return 3

    world.body = waits
    async with workflows(world.flows, url=url):
        run = await world.parent.start(1, id="r")
        await world.began.wait()
        await run.cancel()
        for _ in range(20):
            await asyncio.sleep(0)
        assert world.lines == ["before", "slow"]
        go.set()
        with pytest.raises(WorkflowFailed, match="cancelled"):
            await run.result(WAIT)
        assert world.lines == ["before", "slow", "-slow Done 3", "-before"]


async def test_a_pivot_beside_it_lets_the_run_go_on(url: str) -> None:
    """A deadline that a pivot overtakes is none: the step that it had ended is attempted again."""
    flows, lines, began, paying = WorkflowRouter(), list[str](), asyncio.Event(), asyncio.Event()
    go, paid = asyncio.Event(), asyncio.Event()

    @flows.step(cancellable=True)
    async def slow(n: int) -> int:
        lines.append("slow")
        if lines.count("slow") == 1:
            began.set()
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                go.set()
                await paid.wait()
        return n

    @slow.compensation
    async def undo_slow(outcome: Done[int] | Unknown, n: int) -> None:
        lines.append("-slow")

    @flows.step(pivot=True, transactional=True)
    async def pay(n: int) -> int:
        paying.set()
        await go.wait()
        lines.append("pay")
        return n

    @flows.workflow(name="sell")
    async def sell(n: int) -> int:
        async def second() -> int:
            try:
                return await pay(n)
            finally:
                paid.set()

        return sum(await flows.gather(slow(n), second()))

    async with workflows(flows, url=url) as app:
        run = await sell.start(1, id="r")
        await began.wait()
        await paying.wait()
        app.get(WorkflowEngine).worker.cancel("r")  # as a deadline comes: the database has no part in it
        assert await run.result(WAIT) == 2
        assert lines == ["slow", "pay", "slow"]


async def test_a_crash_at_every_moment() -> None:
    """Cancelled while it is executed, and its worker dies: what it did is undone, in order."""
    world = World(cancellable=True)

    async def cancels(world: World) -> int:
        await world.parent.handle(current_step().run_id).cancel()
        return await _hangs(world)

    world.body = cancels

    async def start(app: Any) -> Any:
        world.lines.clear()
        return await world.parent.start(1, id="r")

    async def check(run: Any, app: Any) -> None:
        assert await run.status() is RunStatus.CANCELLED
        records = (await app.get(WorkflowEngine).history("r")).records
        undone = [records[f"{key}:compensation"] for key in ("slow:1", "before:1")]
        assert [record.state for record in undone] == [StepState.DONE, StepState.DONE]
        assert undone[0].seq < undone[1].seq
        assert world.lines[:2] == ["before", "slow"] or world.lines[:3] == ["before", "before", "slow"]

    assert await explore(world.flows, start=start, check=check) > 5


def test_what_cannot_be_cancelled_is_refused() -> None:
    """A thread cannot be stopped, and a run is not cancelled during a pivot or after it."""
    flows = WorkflowRouter()
    with pytest.raises(TypeError, match="which cannot be stopped, so leave cancellable=True out"):

        @flows.step(cancellable=True, harmless=True)
        def plain(n: int) -> int:
            return n

    kinds: tuple[dict[str, Any], ...] = ({"pivot": True, "on_unknown": "park"}, {"after_pivot": True})
    for options in kinds:
        with pytest.raises(TypeError, match="never cancelled during a pivot or after it"):
            flows.step(cancellable=True, **options)
