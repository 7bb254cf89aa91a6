"""Runs that go on with new input, and without what they did before."""

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa

from mainstay.core import App, Retry, bind
from mainstay.core.testing import eventually
from mainstay.database import Database
from mainstay.workflow import (
    Done,
    NotInRun,
    RunConflict,
    RunParked,
    RunStatus,
    StepFailed,
    Unknown,
    WorkflowEngine,
    WorkflowFailed,
    WorkflowRouter,
    current_step,
)
from mainstay.workflow.tables import asks, history, runs, signals
from mainstay.workflow.testing import explore, workflows

WAIT = 60.0
ONCE = Retry(attempts=1)


def poller() -> tuple[WorkflowRouter, list[tuple[str, str]], Any]:
    """A workflow of three generations, and what its step did: a line for each, and its key."""
    flows, done = WorkflowRouter(), list[tuple[str, str]]()

    @flows.step(retry=ONCE)
    async def fetch(at: int) -> int:
        done.append((f"fetch {at}", current_step().key))
        return at + 1

    @fetch.compensation
    async def forget(outcome: Done[int] | Unknown, at: int) -> None:
        done.append((f"forget {at}", str(current_step().undoes)))

    @flows.workflow(name="poll")
    async def poll(at: int) -> str:
        after = await fetch(at)
        if after < 3:
            await poll.continue_with(after)
        return f"ended at {after}"

    return flows, done, poll


async def test_a_run_goes_on_with_new_input_under_its_id(url: str) -> None:
    """Each generation has its input, an empty history and keys of its own; a repeated start finds the run."""
    flows, done, poll = poller()
    async with workflows(flows, url=url) as app:
        run = await poll.start(0, id="p")
        assert await run.result(WAIT) == "ended at 3"
        assert done == [
            ("fetch 0", "p:fetch:1"),
            ("fetch 1", "p:fetch:1@2"),
            ("fetch 2", "p:fetch:1@3"),
        ]
        view = await app.get(WorkflowEngine).run("p")
        assert (view.generation, view.input, view.status) == (3, '{"at":2}', RunStatus.COMPLETED)
        assert list((await app.get(WorkflowEngine).history("p")).records) == ["fetch:1"]
        assert await (await poll.start(0, id="p")).result(WAIT) == "ended at 3"
        with pytest.raises(RunConflict):
            await poll.start(2, id="p")
        await app.get(WorkflowEngine).compensate("p")
        with pytest.raises(WorkflowFailed):
            await run.result(WAIT)
        assert done[3:] == [("forget 2", "p:fetch:1@3")], "what earlier generations did is final"


async def test_a_run_goes_on_wherever_its_worker_dies() -> None:
    """No generation is left out, and none has the keys of another."""
    flows, done, poll = poller()

    async def start(app: App) -> Any:
        done.clear()
        return await poll.start(0, id="p")

    async def check(handle: Any, app: App) -> None:
        assert await handle.result(WAIT) == "ended at 3"
        assert list(dict.fromkeys(done)) == [
            ("fetch 0", "p:fetch:1"),
            ("fetch 1", "p:fetch:1@2"),
            ("fetch 2", "p:fetch:1@3"),
        ]
        assert len(done) <= 4, "a kill repeats one step at most"

    assert await explore(flows, start=start, check=check) > 10


async def test_signals_children_and_ids_of_each_generation(url: str) -> None:
    """Signals that were not received are; children, runs and effects of another generation are others."""
    flows, seen = WorkflowRouter(), list[tuple[int, int, str]]()
    number = flows.signal("number", int)

    @flows.workflow(name="inner")
    async def inner(n: int) -> int:
        return n * 2

    @flows.workflow(name="outer")
    async def outer(left: int) -> int:
        got = await number.wait()
        doubled = await inner(7)
        started = await inner.start(7)
        seen.append((got, doubled, started.id))
        if left:
            await outer.continue_with(left - 1)
        return got

    async with workflows(flows, url=url) as app:
        for n in range(3):
            await number.send("o", n, id=f"m{n}")
        run = await outer.start(2, id="o")
        assert await run.result(WAIT) == 2
        await number.send("absent", 1)
        of_each = {got: (doubled, started) for got, doubled, started in seen}
        assert [doubled for doubled, _ in of_each.values()] == [14, 14, 14]
        assert len({started for _, started in of_each.values()}) == 3
        database = app.get(Database)
        children = await database.read(sa.select(runs.c.parent_generation).where(runs.c.parent == "o"))
        assert sorted(row.parent_generation for row in children) == [1, 2, 3]
        received = await database.read(sa.select(signals.c.id).where(signals.c.received_by.is_not(None)))
        assert len(received) == 3


async def test_messages_that_were_received_are_forgotten_after_a_while(url: str) -> None:
    """A run that lives for ever does not keep every message that it ever received, only those that may be repeated."""
    flows = WorkflowRouter()
    number = flows.signal("number", int)

    @flows.workflow(name="sum")
    async def add(total: int, left: int) -> int:
        total += await number.wait()
        if left:
            await add.continue_with(total, left - 1)
        return total

    async with workflows(flows, url=url, serve=False, keep_signals_days=2) as app:
        for n in (1, 2, 4):
            await number.send("s", n, id=f"m{n}")
        aged = sa.update(signals).where(signals.c.id == "m1").values(at=signals.c.at - 3 * 86_400)
        await app.get(Database).write(aged)
        run = await add.start(0, 2, id="s")
    if ":memory:" in url:
        return  # gone with the App
    async with workflows(flows, url=url, keep_signals_days=2) as app:
        run = add.handle("s")
        assert await run.result(WAIT) == 7
        left = await app.get(Database).read(sa.select(signals.c.id).order_by(signals.c.number))
        assert [row.id for row in left] == ["m2", "m4"]


async def test_what_earlier_generations_asked_is_forgotten_with_its_decision(url: str) -> None:
    """A run that asks people for ever keeps only the asks whose decision somebody may send again."""
    flows = WorkflowRouter()
    go_on = flows.approval("go-on", int, may_decide=lambda _asked, _actor: True)

    @flows.workflow(name="ask")
    async def ask(n: int) -> int:
        await go_on.ask(n)
        if n < 4:
            await ask.continue_with(n + 1)
        return n

    async with workflows(flows, url=url) as app:
        database, approvals = app.get(Database), app.get(WorkflowEngine).approvals
        run = await ask.start(1, id="a")
        for n in (1, 2, 3, 4):

            async def asked(n: int = n) -> bool:
                return [view.question for view in await approvals.waiting()] == [str(n)]

            await eventually(asked, seconds=WAIT)
            await database.write(sa.update(signals).where(signals.c.body != "x").values(at=signals.c.at - 30 * 86_400))
            with bind(actor="eva"):
                await go_on.decide("a", approved=True, place="go-on:1")
        assert await run.result(WAIT) == 4
        left = await database.read(sa.select(asks.c.question).order_by(asks.c.asked_at))
        # The commit that forgets a decision may leave its ask to the next one.
        assert [row.question for row in left] in (["3", "4"], ["2", "3", "4"])


async def test_a_step_in_doubt_is_undone_before_the_run_goes_on(url: str) -> None:
    """An unknown step is not left behind, as at any end; one that is done is final."""
    flows, lines = WorkflowRouter(), list[str]()

    @flows.step(retry=ONCE)
    async def step(n: int) -> None:
        lines.append(f"{n}")
        if n == 2:
            raise OSError

    @step.compensation
    async def undo(outcome: Done[None] | Unknown, n: int) -> None:
        lines.append(f"-{n} {type(outcome).__name__}")

    @flows.workflow(name="doubt")
    async def doubt(n: int) -> None:
        if n:
            return
        await step(1)
        with pytest.raises(StepFailed):
            await step(2)
        await doubt.continue_with(1)

    async with workflows(flows, url=url):
        await (await doubt.start(0)).result(WAIT)
        assert lines == ["1", "2", "-2 Unknown"]


async def test_a_cancellation_comes_before_the_next_generation(url: str) -> None:
    """One that was asked for cancels the generation that it meets, and not one that begins after it."""
    flows, inside, go, lines = WorkflowRouter(), asyncio.Event(), asyncio.Event(), list[str]()

    @flows.step(retry=ONCE)
    async def step(n: int) -> None:
        lines.append(f"{n}")
        inside.set()
        await go.wait()

    @step.compensation
    async def undo(outcome: Done[None] | Unknown, n: int) -> None:
        lines.append(f"-{n}")

    @flows.workflow(name="going")
    async def going(n: int) -> None:
        await step(n)
        await going.continue_with(n + 1)

    async with workflows(flows, url=url):
        run = await going.start(0)
        await inside.wait()
        await run.cancel()
        go.set()
        with pytest.raises(WorkflowFailed):
            await run.result(WAIT)
        assert lines == ["0", "-0"]


@pytest.mark.parametrize("how", ["in a branch", "with work left", "in a unit of work", "as another", "with less read"])
async def test_what_cannot_go_on_is_parked(url: str, how: str) -> None:
    """The note says why; nothing of the history is forgotten."""
    flows, fewer = WorkflowRouter(), list[int]()

    @flows.step(retry=ONCE, harmless=True)
    async def step(n: int) -> None: ...

    @flows.workflow(name="another")
    async def another(n: int) -> None: ...

    @flows.workflow(name="going")
    async def going(n: int) -> None:
        if n:
            return
        if how == "with less read":
            if not fewer:
                await step(0)
                fewer.append(1)
                await flows.sleep(60)
            await going.continue_with(1)
        await step(0)
        if how == "in a branch":
            await flows.gather(step(1), going.continue_with(1))
        elif how == "with work left":
            left = asyncio.ensure_future(flows.sleep(0.4))  # too short to leave the memory for
            await asyncio.sleep(0)  # it has begun
            try:
                await going.continue_with(1)
            finally:
                await asyncio.gather(left, return_exceptions=True)
        elif how == "in a unit of work":
            async with database.transaction():
                await going.continue_with(1)
        else:
            await another.continue_with(1)

    async with workflows(flows, url=url, suspend_after_seconds=0.5) as app:
        database, engine = app.get(Database), app.get(WorkflowEngine)
        run = await going.start(0, id="g")
        if how == "with less read":
            async with asyncio.timeout(WAIT):
                while await run.status() is not RunStatus.WAITING:  # noqa: ASYNC110  the worker's doing
                    await asyncio.sleep(0.005)
            await database.write(sa.update(runs).values(wake_at=0.0))
        with pytest.raises(RunParked) as caught:
            await run.result(WAIT)
        expected = {
            "in a branch": "beside what the function is still doing",
            "with work left": "beside what the function is still doing",
            "in a unit of work": "inside db.transaction()",
            "as another": "a run stays one of 'going'",
            "with less read": "before step:1, which is in its record",
        }
        assert expected[how] in str(caught.value)
        assert "step:1" in (await engine.history("g")).records


async def test_what_the_function_does_after_it_went_on_decides_nothing(url: str) -> None:
    """The end is remembered, as every other: swallowed in a bare except, in a finally, and by a return."""
    flows, ran = WorkflowRouter(), list[int]()

    @flows.step(retry=ONCE, harmless=True)
    async def step(n: int) -> None:
        ran.append(n)

    @flows.workflow(name="stubborn")
    async def stubborn(n: int) -> int:
        try:
            if n < 2:
                await stubborn.continue_with(n + 1)
        except BaseException:  # noqa: BLE001  what is tested
            await step(-1)
        finally:
            if n < 2:
                await step(-2)
                return -1  # noqa: B012  what is tested
        await step(n)
        return n

    async with workflows(flows, url=url) as app:
        assert await (await stubborn.start(0)).result(WAIT) == 2
        assert ran == [2]
        assert len(await app.get(Database).read(sa.select(history.c.seq))) > 0


async def test_a_run_goes_on_as_a_newer_version(url: str) -> None:
    """A run that lives for ever comes to the new code at a boundary that it chooses."""
    flows = WorkflowRouter()

    @flows.workflow(name="v", version=2)
    async def second(at: str) -> str:
        return f"second {at}"

    @flows.workflow(name="v", version=1)
    async def first(at: int) -> str:
        await second.continue_with(str(at))

    async with workflows(flows, url=url) as app:
        run = await first.start(1, id="v")
        assert await run.result(WAIT) == "second 1"
        assert (await app.get(WorkflowEngine).run("v")).version == 2
        assert (await first.start(1, id="v")).id == "v"


async def test_only_a_run_goes_on() -> None:
    """Outside a run there is nothing to go on with."""
    flows, _, poll = poller()
    async with workflows(flows):
        with pytest.raises(NotInRun, match="outside a run"):
            await poll.continue_with(1)
