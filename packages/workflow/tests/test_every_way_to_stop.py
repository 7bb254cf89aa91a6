"""A run that was stopped in the middle of anything goes on to the same ledger and result as one that was not."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, cast

import pytest

from mainstay.core import SYSTEM_CLOCK, App, Clock, Retry, derived_id, once
from mainstay.core.testing import VirtualClock
from mainstay.workflow import Done, RunStatus, Unknown, WorkflowEngine, WorkflowRouter, current_step
from mainstay.workflow._history import StepState
from mainstay.workflow.errors import ControlFlow, Parked, Released, Suspended
from mainstay.workflow.testing import workflows

WAIT = 30.0
Act = Callable[[], Awaitable[int]]


class Case:
    """A workflow of one shape around one primitive, and what it did outside.

    Attributes:
        ledger: what was executed, by run: steps by number, and `-` for a compensation.
        began: set once the primitive is in the middle of something.
        go: until it is set, the primitive stays there.
    """

    def __init__(self, shape: str, primitive: str) -> None:
        self.ledger: dict[str, list[str]] = {}
        self.began, self.go = asyncio.Event(), asyncio.Event()
        self.flows = flows = WorkflowRouter()
        self.told = flows.signal("told", int)

        @flows.step(retry=Retry(attempts=1))
        async def step(n: int) -> int:
            self._write(str(n))
            return n

        @step.compensation
        async def undo_step(outcome: Done[int] | Unknown, n: int) -> None:
            self._write(f"-{n}")

        @flows.step(retry=Retry(attempts=1))
        async def slow(n: int) -> int:
            self._write(str(n))
            await self._held()
            return n

        @slow.compensation
        async def undo_slow(outcome: Done[int] | Unknown, n: int) -> None:
            self._write(f"-{n}")

        @flows.workflow(name="child")
        async def child(n: int) -> int:
            return await slow(n) + await step(n + 1)

        async def effect(key: str | None) -> None:
            self.ledger.setdefault(str(key).partition(":")[0], []).append("once")
            await self._held()

        async def by_once() -> int:
            await once("effect", effect, transactional=False)
            return 50

        async def by_sleep() -> int:
            await flows.sleep(5)
            return 50

        async def by_gather() -> int:
            return sum(await flows.gather(slow(50), step(51), by_sleep()))

        self.step = step
        self.act: Act = {
            "step": lambda: slow(50),
            "sleep": by_sleep,
            "signal": self.told.wait,
            "child": lambda: child(50),
            "gather": by_gather,
            "once": by_once,
        }[primitive]
        self.waits = {"sleep": "@sleep:1", "signal": "@signal told:1"}.get(primitive)
        self.prefix = {"gathered": "0.0/"}.get(shape, "")
        self.side_by_side = "gather" in shape + primitive
        around = SHAPES[shape]

        @flows.workflow(name="parent")
        async def parent(n: int) -> int:
            await step(1)
            return await around(self) + await step(9) if shape != "returns in finally" else await around(self)

        self.parent = parent
        self.child_key = f"{self.prefix}@child child:1" if primitive == "child" else None

    def _write(self, line: str) -> None:
        self.ledger.setdefault(current_step().run_id, []).append(line)

    async def _held(self) -> None:
        self.began.set()
        await self.go.wait()

    def of(self, run_id: str) -> list[str]:
        """What a run and its child did."""
        child = [] if self.child_key is None else self.ledger.get(str(derived_id(f"{run_id}:{self.child_key}")), [])
        return [*self.ledger.get(run_id, []), "|", *child]


async def _plain(case: Case) -> int:
    return await case.act() + await case.step(2)


async def _finally(case: Case) -> int:
    try:
        got = await case.act()
    finally:
        await case.step(2)
    return got


async def _context(case: Case) -> int:
    @asynccontextmanager
    async def lock() -> AsyncGenerator[None]:
        await case.step(2)
        try:
            yield
        finally:
            await case.step(3)

    async with lock():
        return await case.act()


async def _bare(case: Case) -> int:
    try:
        got = await case.act()
    except:  # noqa: E722  what users write
        got = await case.step(3)
    return got + await case.step(2)


async def _base(case: Case) -> int:
    try:
        return await case.act()
    except BaseException:
        await case.step(3)
        raise
    finally:
        with suppress(BaseException):
            await case.step(2)


async def _returns(case: Case) -> int:
    got = 7
    try:
        got = await case.act()
        got += await case.step(2)
    finally:
        return got  # noqa: B012  what users write


async def _group(case: Case) -> int:
    async with asyncio.TaskGroup() as group:
        task: asyncio.Task[int] = group.create_task(cast("Coroutine[Any, Any, int]", case.act()))
    return task.result() + int(await case.step(2))


async def _gathered(case: Case) -> int:
    async def second() -> int:
        return await case.step(2) + await case.step(3)

    return sum(await case.flows.gather(case.act(), second()))


async def _swallows(case: Case) -> int:
    got = 0
    while not got:
        try:
            got = await case.act()
        except BaseException:  # noqa: BLE001, S112  what users write
            continue
    return got + await case.step(2)


async def _nested(case: Case) -> int:
    async def innermost() -> int:
        return await case.act()

    async def inner() -> int:
        return await innermost() + await case.step(2)

    return await inner() + await case.step(3)


SHAPES = {
    "plain": _plain,
    "step in finally": _finally,
    "async with": _context,
    "bare except": _bare,
    "except BaseException": _base,
    "returns in finally": _returns,
    "TaskGroup": _group,
    "gathered": _gathered,
    "swallows everything": _swallows,
    "nested": _nested,
}
PRIMITIVES = ("step", "sleep", "signal", "child", "gather", "once")
STOPS = ("suspension", "parking", "release", "cancellation")


async def in_the_middle(case: Case, app: App, run_id: str) -> None:
    """Wait until the primitive is in the middle of what it does."""
    if case.waits is None:
        await case.began.wait()
        return
    while True:
        record = (await app.get(WorkflowEngine).history(run_id)).records.get(case.prefix + case.waits)
        if record is not None and record.seq:
            return
        await asyncio.sleep(0)


async def ended(app: App, run: Any) -> RunStatus:
    """Let time pass until the run has ended, or waits for a person."""
    while True:
        status: RunStatus = await run.status()
        if (status.terminal or status.waits_for_a_person) and not app.get(WorkflowEngine).worker.executes(run.id):
            return status
        if isinstance(app.clock, VirtualClock):
            await app.clock.advance(5)
        else:
            await asyncio.sleep(0.01)


async def undisturbed(case: Case, app: App) -> tuple[list[str], int]:
    """What a run that nobody stops does, and its result."""
    case.go.set()
    run = await case.parent.start(1, id="calm")
    if case.waits == "@signal told:1":
        await case.told.send("calm", 50)
    assert await ended(app, run) is RunStatus.COMPLETED
    return case.of("calm"), await run.result()


def signal_for(stop: str, clock: Clock) -> ControlFlow:
    """What a run is told."""
    if stop == "suspension":
        return Suspended(clock.monotonic() + 1)
    return Parked("by the test") if stop == "parking" else Released()


async def stopped(case: Case, app: App, stop: str) -> tuple[list[str], int | None]:
    """Stop a run in the middle of its primitive; what it has done in the end, and its result."""
    case.go.clear()
    case.began.clear()
    engine, run = app.get(WorkflowEngine), await case.parent.start(1, id=stop)
    await in_the_middle(case, app, stop)
    if stop == "cancellation":
        await run.cancel()
    else:
        engine.worker._identity.runs[stop][0].stop(signal_for(stop, app.clock))  # type: ignore[union-attr]  # it serves
    done = case.of(stop).index("|")
    for _ in range(20):
        await asyncio.sleep(0)  # it may do what it likes; it is told all the same
    case.go.set()
    if stop != "cancellation" and case.waits == "@signal told:1":
        await case.told.send(stop, 50)
    status = await ended(app, run)
    if stop == "parking":
        assert status is RunStatus.PARKED, stop
        await engine.resume(stop)
        status = await ended(app, run)
    if stop == "cancellation":
        assert status is RunStatus.CANCELLED
        check_undone(case.of(stop), None if case.side_by_side else done)
        return [], None
    assert status is RunStatus.COMPLETED, stop
    records = (await engine.history(stop)).records.values()
    assert [record.key for record in records if record.state is StepState.OPEN] == [], stop
    assert not any(record.maybe_twice or record.dangling for record in records), stop
    return case.of(stop), await run.result()


async def every_stop(shape: str, primitive: str, url: str, clock: Clock) -> None:
    """Compare a run that nobody stops with one for each way to stop it."""
    case = Case(shape, primitive)
    async with asyncio.timeout(WAIT), workflows(case.flows, url=url, clock=clock) as app:
        lines, result = await undisturbed(case, app)
        for stop in STOPS:
            mine, got = await stopped(case, app, stop)
            if stop != "cancellation":
                assert got == result, stop
                assert order(mine, case) == order(lines, case), stop
    assert asyncio.all_tasks() == {asyncio.current_task()}


def order(lines: list[str], case: Case) -> list[str]:
    """The lines in their order; branches side by side have none."""
    return sorted(lines) if case.side_by_side else lines


def check_undone(lines: list[str], done: int | None) -> None:
    """Nothing new was begun, and all of it was undone in reverse order."""
    parts = " ".join(lines).split("|")
    for part in parts:
        forward = [line for line in part.split() if line[0] != "-"]
        back = [line[1:] for line in part.split() if line[0] == "-"]
        assert sorted(back) == sorted(line for line in forward if line != "once"), lines
    # The child goes on until its parent, on its way back, comes to it; a branch may have been about to begin.
    forward = [line for line in lines[: lines.index("|")] if line[0] != "-"]
    assert "9" not in forward
    assert done is None or len(forward) == done, lines


@pytest.mark.parametrize("primitive", PRIMITIVES)
@pytest.mark.parametrize("shape", SHAPES)
async def test_a_stop_changes_nothing(shape: str, primitive: str) -> None:
    """Each step once, nothing in the cleanup, nothing completed with something open, and no task is left."""
    await every_stop(shape, primitive, "sqlite+aiosqlite:///:memory:", VirtualClock())


@pytest.mark.parametrize(("shape", "primitive"), [("step in finally", "step"), ("TaskGroup", "child")])
async def test_a_stop_changes_nothing_on_postgres(postgres: str, shape: str, primitive: str) -> None:
    """The same on a server, in its time."""
    await every_stop(shape, primitive, postgres, SYSTEM_CLOCK)
