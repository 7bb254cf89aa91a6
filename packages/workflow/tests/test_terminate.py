"""A person ends a run as it was: at once, with its children, and nothing is undone."""

import asyncio
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from mainstay.cli import main
from mainstay.core import Drain, bind
from mainstay.core.testing import eventually
from mainstay.database import Database
from mainstay.workflow import (
    Done,
    RunNotFound,
    RunStateError,
    RunStatus,
    Unknown,
    WorkflowEngine,
    WorkflowFailed,
    WorkflowRouter,
    WorkflowSettings,
)
from mainstay.workflow._retention import Retention
from mainstay.workflow.tables import history, runs
from mainstay.workflow.testing import workflows

WAIT = 60.0


def service() -> tuple[WorkflowRouter, list[str], Any, asyncio.Event, asyncio.Event]:
    """A workflow whose second step waits in the middle for a gate, and a ledger of what it did and undid."""
    flows, lines = WorkflowRouter(), []
    inside, gate = asyncio.Event(), asyncio.Event()

    @flows.step()
    async def step(name: str) -> str:
        if name == "slow":
            inside.set()
            await gate.wait()
        lines.append(name)
        return name

    @step.compensation
    async def undo(outcome: Done[str] | Unknown, name: str) -> None:
        lines.append(f"-{name}")

    @flows.workflow(name="work")
    async def work(names: list[str]) -> str:
        try:
            for name in names:
                await step(name)
        finally:
            lines.append("left")
        return "".join(names)

    return flows, lines, work, inside, gate


async def entries(app: Any, id: str) -> list[tuple[str, str]]:
    """The run's history: kinds and steps."""
    query = sa.select(history.c.kind, history.c.step).where(history.c.run_id == id).order_by(history.c.seq)
    return [(row.kind, row.step) for row in await app.get(Database).read(query)]


async def test_a_run_is_ended_in_the_middle_of_a_step(url: str) -> None:
    """What it did stays, its step goes on to its end, and nothing of that is recorded or begun."""
    flows, lines, work, inside, gate = service()
    async with workflows(flows, url=url) as app:
        engine = app.get(WorkflowEngine)
        run = await work.start(["one", "slow", "two"], id="r")
        waiting = asyncio.create_task(run.result(WAIT))
        await asyncio.wait_for(inside.wait(), WAIT)
        before = await entries(app, "r")
        with bind(actor="ann"):
            await engine.terminate("r", reason="the provider is gone")
        with pytest.raises(
            WorkflowFailed, match="run r terminated with Terminated: ann: the provider is gone"
        ) as ended:
            await waiting
        assert (ended.value.error_type, await run.status()) == ("Terminated", RunStatus.TERMINATED)
        view = await engine.run("r")
        assert view.failure == {
            "type": "Terminated",
            "detail": "ann: the provider is gone",
            "reason": "the provider is gone",
            "by": "ann",
        }
        assert view.ended_at is not None
        gate.set()
        await eventually(lambda: "left" in lines)
        assert lines == ["one", "slow", "left"]
        assert await entries(app, "r") == before
        for refused in (engine.cancel("r"), engine.compensate("r"), engine.resume("r")):
            with pytest.raises(RunStateError, match="it is terminated"):
                await refused
        with pytest.raises(RunStateError, match="cannot be terminated: it is terminated"):
            await engine.terminate("r", reason="again")
        with pytest.raises(RunNotFound):
            await engine.terminate("nothing", reason="it is not there")
        with pytest.raises(ValueError, match="for a reason"):
            await engine.terminate("r", reason=" ")
        assert await (await work.start(["one"], id="next")).result(WAIT) == "one"


async def test_another_process_ends_it(shared: str) -> None:
    """The worker finds out by its look at the database, also while the run only waits, and begins nothing more."""
    flows, lines, work, inside, gate = service()
    async with workflows(flows, url=shared, lease_seconds=0.6):
        await work.start(["slow", "two"], id="r")
        await asyncio.wait_for(inside.wait(), WAIT)
        async with workflows(url=shared, serve=False) as other:
            await other.get(WorkflowEngine).terminate("r", reason="no")
        gate.set()
        await eventually(lambda: "left" in lines)
        assert lines == ["slow", "left"]


async def test_a_waiting_run_leaves_the_worker(shared: str) -> None:
    """A run that waits for a signal meets no write that the fence could refuse: the look at the database ends it."""
    flows = WorkflowRouter()
    told = flows.signal("told", int)

    @flows.workflow(name="listen")
    async def listen() -> int:
        return await told.wait()

    async with workflows(flows, url=shared, lease_seconds=0.6) as app:
        worker = app.get(WorkflowEngine).worker
        await listen.start(id="r")
        await eventually(lambda: worker.executes("r"))
        async with workflows(url=shared, serve=False) as other:
            await other.get(WorkflowEngine).terminate("r", reason="no")
        await eventually(lambda: not worker.executes("r"))
        with pytest.raises(RunStateError, match="it is terminated"):
            await told.send("r", 1)


@pytest.mark.parametrize("state", ["queued", "parked", "compensation_failed"])
async def test_a_run_in_each_state_can_be_ended(url: str, state: str) -> None:
    """What it was on its way back from is kept beside the reason."""
    flows, _, work, _, _ = service()
    async with workflows(flows, url=url, serve=False) as app:
        await work.start(["one"], id="r")
        before = {"type": "X", "detail": "y"}
        async with app.get(Database).transaction() as session:
            await session.execute(sa.update(runs).values(status=state, failure=json.dumps(before)))
        await app.get(WorkflowEngine).terminate("r", reason="no")
        view = await app.get(WorkflowEngine).run("r")
        assert view.status is RunStatus.TERMINATED
        settings = WorkflowSettings(keep_terminated_days=1)
        await Retention(database=app.get(Database), settings=settings).sweep(Drain())
        assert await app.get(WorkflowEngine).status("r") is RunStatus.TERMINATED
        async with app.get(Database).transaction() as session:
            await session.execute(sa.update(runs).values(ended_at=runs.c.ended_at - 86_401))
        await Retention(database=app.get(Database), settings=settings).sweep(Drain())
        assert await app.get(WorkflowEngine).runs() == []
        assert view.failure == {"type": "Terminated", "detail": "no", "reason": "no", "before": before}


def family() -> tuple[WorkflowRouter, list[str], Any]:
    """A parent, its child and its grandchild, which waits for a signal."""
    flows, lines = WorkflowRouter(), []
    told = flows.signal("told", int)

    @flows.step()
    async def step(name: str) -> None:
        lines.append(name)

    @step.compensation
    async def undo(outcome: Done[None] | Unknown, name: str) -> None:
        lines.append(f"-{name}")

    @flows.workflow(name="grandchild")
    async def grandchild() -> None:
        await step("grandchild")
        await told.wait()

    @flows.workflow(name="child")
    async def child() -> None:
        await step("child")
        await grandchild()

    @flows.workflow(name="parent")
    async def parent() -> None:
        await step("parent")
        await child()

    return flows, lines, parent


async def test_children_end_with_it(url: str) -> None:
    """The whole family, and nobody's steps are undone."""
    flows, lines, parent = family()
    async with workflows(flows, url=url) as app:
        engine = app.get(WorkflowEngine)
        await parent.start(id="r")
        await eventually(lambda: len(lines) == 3)
        await engine.terminate("r", reason="no")
        views = await engine.runs(RunStatus.TERMINATED)
        assert {view.workflow for view in views} == {"parent", "child", "grandchild"}
        assert all((view.failure or {})["reason"] == "no" for view in views)
        await eventually(lambda: not any(engine.worker.executes(view.id) for view in views))
        assert lines == ["parent", "child", "grandchild"]


async def test_a_parent_passes_over_a_terminated_child(url: str) -> None:
    """It fails with the child's end, undoes its own steps, and does not wait for a child that cannot be undone."""
    flows, lines, parent = family()
    async with workflows(flows, url=url) as app:
        engine = app.get(WorkflowEngine)
        run = await parent.start(id="r")
        await eventually(lambda: len(lines) == 3)
        (child,) = [view for view in await engine.runs() if view.workflow == "child"]
        await engine.terminate(child.id, reason="no")
        with pytest.raises(WorkflowFailed, match="run r failed with WorkflowFailed"):
            await run.result(WAIT)
        assert await run.status() is RunStatus.FAILED
        assert lines == ["parent", "child", "grandchild", "-parent"]


async def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """It keeps who decided and why; a run that has ended is an error with exit code 2."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'runs.db'}"
    flows, _, work, _, _ = service()
    async with workflows(flows, url=url, serve=False) as app:
        await work.start(["one"], id="r")
        await app.get(Database).write(sa.update(runs).values(status="parked", note="find out; then resume the run"))

    def terminate(*options: str) -> int:
        return main(["workflow", "terminate", "r", "--url", url, "--as", "ann", "--reason", "a mistake", *options])

    assert await asyncio.to_thread(terminate, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"run": "r", "detail": "r is terminated: what it did is not undone"}
    assert await asyncio.to_thread(terminate) == 2
    assert "run 'r' cannot be terminated: it is terminated" in capsys.readouterr().err
    assert await asyncio.to_thread(main, ["workflow", "show", "r", "--url", url]) == 0
    shown = capsys.readouterr().out
    assert "failure   Terminated: ann: a mistake" in shown
    assert "resume" not in shown  # what it was parked for is over
    assert await asyncio.to_thread(main, ["workflow", "list", "--url", url, "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert listed["note"] == "Terminated: ann: a mistake"


async def test_a_child_that_ends_at_the_same_moment(postgres: str) -> None:
    """The end of a child holds the child and then its parent, terminate the other way round: it is tried again."""
    flows, inside, gate = WorkflowRouter(), asyncio.Event(), asyncio.Event()

    @flows.step(harmless=True)
    async def slow() -> None:
        inside.set()
        await gate.wait()

    @flows.workflow(name="inner")
    async def inner() -> None:
        await slow()

    @flows.workflow(name="outer")
    async def outer() -> None:
        await inner()

    held = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'transactionid'"
    async with workflows(flows, url=postgres) as app:
        database, engine = app.get(Database), app.get(WorkflowEngine)
        run = await outer.start(id="o")
        await asyncio.wait_for(inside.wait(), WAIT)

        async def is_held() -> bool:
            return bool((await database.read(sa.text(held)))[0][0])

        async with database.engine.connect() as ending:
            await ending.execute(sa.update(runs).where(runs.c.parent == "o").values(note=None))
            terminating = asyncio.create_task(engine.terminate("o", reason="both at once"))
            await eventually(is_held, seconds=WAIT)
            with suppress(DBAPIError):  # the database may choose this one
                await ending.execute(sa.update(runs).where(runs.c.id == "o").values(note=None))
            await ending.rollback()
        await terminating
        assert await run.status() is RunStatus.TERMINATED
        ended = await database.read(sa.select(runs.c.status).where(runs.c.parent == "o"))
        assert [row.status for row in ended] == ["terminated"]
        gate.set()
