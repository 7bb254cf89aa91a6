"""Ended runs and unclaimed signals are deleted once they are older than the settings keep them, and nothing else is."""

import asyncio
import logging
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa

from mainstay.core import App, Drain, Retry, spawn
from mainstay.core.testing import VirtualClock
from mainstay.database import Database
from mainstay.workflow import (
    Done,
    RunNotFound,
    RunParked,
    RunStatus,
    StepFailed,
    Unknown,
    WorkflowEngine,
    WorkflowFailed,
    WorkflowRouter,
    WorkflowSettings,
)
from mainstay.workflow._retention import Retention
from mainstay.workflow.tables import asks, history, runs, signals, values
from mainstay.workflow.testing import DyingDatabase, Killed, workflows

WAIT = 60.0
DAY = 86_400.0
KEPT: dict[str, Any] = {"keep_completed_days": 2, "keep_failed_days": 5}


def service() -> tuple[WorkflowRouter, Any, Any]:
    """A workflow that ends in every way, and a signal that it waits for where it is told to."""
    flows = WorkflowRouter()
    told = flows.signal("told", str)

    stage = flows.value("stage", str)
    question = flows.approval("question", str, may_decide=lambda _asked, _actor: True)

    @flows.step(retry=Retry(attempts=1), failed_on=(LookupError,), on_unknown="park")
    async def step(how: str) -> str:
        if how == "failed":
            raise LookupError
        if how == "parked":
            raise OSError
        return how

    @step.compensation
    async def undo(outcome: Done[str] | Unknown, how: str) -> None: ...

    @flows.workflow(name="work")
    async def work(how: str) -> str:
        await stage.set(how)
        with suppress(StepFailed):
            await question.ask(how, timeout_seconds=0.0)
        await step("first")
        if how in {"waits", "cancelled"}:
            return await told.wait()
        return await step(how)

    return flows, work, told


async def ended(app: App, work: Any, told: Any) -> None:
    """A run for each state, named by it, and one that had a signal."""
    async with asyncio.timeout(WAIT):
        for how in ("completed", "failed", "parked", "waits", "cancelled"):
            run = await work.start(how, id=how)
            if how == "cancelled":
                await run.cancel()
            if how in {"failed", "cancelled"}:
                with pytest.raises(WorkflowFailed):
                    await run.result()
            elif how == "parked":
                with pytest.raises(RunParked):
                    await run.result()
            elif how == "completed":
                await run.result()
        run = await work.start("waits", id="told")
        await told.send("told", "so")
        await run.result()


async def there(app: App) -> list[str]:
    """The ids of the runs that are kept; of none that is not there is anything left."""
    database = app.get(Database)
    ids = sorted(row.id for row in await database.read(sa.select(runs.c.id)))
    for column in (history.c.run_id, signals.c.run_id, values.c.run_id, asks.c.run_id):
        left = {row.run_id for row in await database.read(sa.select(column).distinct())}
        assert left <= set(ids)
    return ids


async def age(app: App, days: float, *ids: str) -> None:
    """Let runs have ended so much earlier; all of them where none is named."""
    aged = sa.update(runs).values(ended_at=runs.c.ended_at - days * DAY).where(runs.c.ended_at.is_not(None))
    await app.get(Database).write(aged.where(runs.c.id.in_(ids)) if ids else aged)


async def sweep(app: App, **kept: Any) -> None:
    """One look of the loop."""
    await Retention(database=app.get(Database), settings=WorkflowSettings(**kept)).sweep(Drain())


async def test_each_state_is_kept_for_its_days(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """A run that has not ended is never deleted, however old; one whose state has no limit is kept for ever."""
    flows, work, told = service()
    async with workflows(flows, url=url) as app:
        await ended(app, work, told)
        everything = ["cancelled", "completed", "failed", "parked", "told", "waits"]
        await age(app, 1.9)
        await sweep(app, **KEPT)
        assert await there(app) == everything
        await age(app, 0.2)
        with caplog.at_level(logging.INFO, logger="mainstay.workflow"):
            await sweep(app, **KEPT)
        assert "deleted runs that are kept no longer: 2 completed" in caplog.text
        assert await there(app) == ["cancelled", "failed", "parked", "waits"]
        await age(app, 100)
        await sweep(app)
        assert await there(app) == ["cancelled", "failed", "parked", "waits"]
        await sweep(app, **KEPT)
        assert await there(app) == ["cancelled", "parked", "waits"]
        await app.get(WorkflowEngine).cancel("waits")
        with pytest.raises(WorkflowFailed):
            await work.handle("waits").result(WAIT)


async def test_days_pass() -> None:
    """A worker that serves for days deletes by itself."""
    flows, work, _ = service()
    clock = VirtualClock()
    async with workflows(flows, clock=clock, **KEPT) as app:
        await (await work.start("completed", id="r")).result(WAIT)
        await clock.advance(1.9 * DAY)
        assert await there(app) == ["r"]
        await clock.advance(0.2 * DAY)
        async with asyncio.timeout(WAIT):
            while await there(app):
                await clock.advance(1)


async def test_a_deleted_run_frees_its_id(url: str) -> None:
    """The id names a run for as long as that is kept; after that there is none, and another may have it."""
    flows, work, _ = service()
    async with workflows(flows, url=url) as app:
        await (await work.start("completed", id="r")).result(WAIT)
        await age(app, 3)
        await sweep(app, **KEPT)
        with pytest.raises(RunNotFound):
            await work.handle("r").result(WAIT)
        assert await (await work.start("other", id="r")).result(WAIT) == "other"


async def test_many_go_in_small_transactions(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """A sweep goes on until nothing is left, some at a time; it stops when the worker does."""
    flows, _, _ = service()
    async with workflows(flows, url=url, serve=False) as app:
        database = app.get(Database)
        await database.write(sa.insert(runs), [old_run(n) for n in range(450)])
        stopped = Drain()
        stopped.begin()
        await Retention(database=database, settings=WorkflowSettings(**KEPT)).sweep(stopped)
        assert len(await there(app)) == 450
        with caplog.at_level(logging.INFO, logger="mainstay.workflow"):
            await sweep(app, **KEPT)
        assert await there(app) == []
        assert "450 completed" in caplog.text


def old_run(n: int, **values: Any) -> dict[str, Any]:
    """A row of a run that has ended long ago."""
    return {
        "id": f"r{n}",
        "workflow": "work",
        "version": 1,
        "status": "completed",
        "epoch": 1,
        "attempts": 1,
        "progress": 0,
        "wake_at": 0.0,
        "cancel_requested": False,
        "input": '{"how":"x"}',
        "output": '"x"',
        "context": "{}",
        "created_at": float(n),
        "ended_at": float(n),
        **values,
    }


@pytest.mark.parametrize("after", [False, True])
async def test_a_kill_leaves_whole_runs(url: str, after: bool) -> None:
    """Whenever the process dies, a run is there with all that is its, or nothing of it is; the next sweep goes on."""
    flows, _, _ = service()
    async with workflows(flows, url=url, serve=False) as app:
        database = app.get(Database)
        for at in (1, 2):
            rows = [old_run(n, status="failed" if n else "completed") for n in range(2)]
            entries = [
                {"run_id": row["id"], "seq": seq, "kind": "done", "step": f"step:{seq}"}
                for row in rows
                for seq in (1, 2)
            ]
            await database.write(sa.insert(runs), rows)
            await database.write(sa.insert(history), entries)
            dying: Any = DyingDatabase(database, at, after=after)
            with pytest.raises(Killed):
                await Retention(database=dying, settings=WorkflowSettings(**KEPT)).sweep(Drain())
            left = await there(app)
            assert len(left) == 2 - (at if after else at - 1)
            assert len(await database.read(sa.select(history.c.seq))) == 2 * len(left)
            await sweep(app, **KEPT)
            assert await there(app) == []


async def test_one_process_deletes_at_a_time(shared: str) -> None:
    """While another holds the lease, a sweep leaves everything where it is."""
    flows, _, _ = service()
    async with workflows(flows, url=shared, serve=False) as app:
        database = app.get(Database)
        await database.write(sa.insert(runs), [old_run(n) for n in range(3)])
        lease = await database.lease("mainstay-workflow retention", seconds=5)
        assert lease is not None
        await sweep(app, **KEPT)
        assert len(await there(app)) == 3
        await lease.release()
        await sweep(app, **KEPT)
        assert await there(app) == []


async def test_a_row_that_is_held_is_passed_over(postgres: str) -> None:
    """What another transaction holds is not waited for."""
    flows, _, _ = service()
    async with workflows(flows, url=postgres, serve=False) as app:
        database = app.get(Database)
        await database.write(sa.insert(runs), [old_run(n) for n in range(3)])
        async with database.transaction() as session:
            await session.execute(sa.select(runs.c.id).where(runs.c.id == "r1").with_for_update())
            await asyncio.wait_for(spawn(sweep(app, **KEPT), name="sweep"), WAIT)
        assert await there(app) == ["r1"]
        await sweep(app, **KEPT)
        assert await there(app) == []


async def test_a_family_goes_together(url: str) -> None:
    """A child is kept as long as its parent, and a parent as long as its children."""
    flows = WorkflowRouter()
    go = flows.signal("go", bool)
    undone = list[int]()

    @flows.step(retry=Retry(attempts=1))
    async def step(n: int) -> int:
        return n

    @step.compensation
    async def undo(outcome: Done[int] | Unknown, n: int) -> None:
        undone.append(n)

    @flows.workflow(name="inner")
    async def inner(n: int) -> int:
        return await step(n)

    @flows.workflow(name="outer")
    async def outer(n: int) -> int:
        n = await inner(n)
        await go.wait()
        return n

    async with workflows(flows, url=url) as app:
        engine = app.get(WorkflowEngine)
        run, other = await outer.start(1, id="a"), await outer.start(2, id="b")
        async with asyncio.timeout(WAIT):
            while len(await engine.runs(RunStatus.COMPLETED)) < 2:  # noqa: ASYNC110  the worker's doing
                await asyncio.sleep(0.005)
        await age(app, 100)
        await sweep(app, **KEPT)
        assert len(await there(app)) == 4, "the parents have not ended, and may need to undo their children"
        for each in (run, other):
            await go.send(each.id, True)
            await each.result(WAIT)
        await engine.compensate("a")
        with pytest.raises(WorkflowFailed):
            await run.result(WAIT)
        assert undone == [1]
        await age(app, 3)
        kept = KEPT | {"keep_cancelled_days": 5}
        await sweep(app, **kept)
        assert [await engine.status(each) for each in await there(app)] == [RunStatus.CANCELLED] * 2
        await age(app, 3)
        await sweep(app, **kept)
        assert await there(app) == []
        assert await (await outer.start(7, id="b")).status() is not RunStatus.COMPLETED
        await go.send("b", True)
        assert await outer.handle("b").result(WAIT) == 7, "not the result of the child of the run before"


async def test_a_child_that_is_gone_is_not_taken_for_undone(url: str) -> None:
    """Where a parent is compensated after its child was deleted by hand, a person is told."""
    flows = WorkflowRouter()

    @flows.workflow(name="inner")
    async def inner(n: int) -> int:
        return n

    @flows.workflow(name="outer")
    async def outer(n: int) -> int:
        return await inner(n)

    async with workflows(flows, url=url) as app:
        run = await outer.start(1, id="o")
        await run.result(WAIT)
        await app.get(Database).write(sa.delete(runs).where(runs.c.parent == "o"))
        await app.get(WorkflowEngine).compensate("o")
        with pytest.raises(RunParked, match="is kept no longer, so it cannot be undone here"):
            await run.result(WAIT)


async def test_children_of_an_earlier_generation_go_by_their_own_age(url: str) -> None:
    """A run that lives for ever does not keep every child that it ever had."""
    flows = WorkflowRouter()
    go = flows.signal("go", bool)

    @flows.workflow(name="inner")
    async def inner(n: int) -> int:
        return n

    @flows.workflow(name="outer")
    async def outer(n: int) -> int:
        await inner(n)
        if n == 1:
            await outer.continue_with(2)
        await go.wait()
        return n

    async with workflows(flows, url=url) as app:
        engine = app.get(WorkflowEngine)
        await outer.start(1, id="o")
        async with asyncio.timeout(WAIT):
            while len(await engine.runs(RunStatus.COMPLETED)) < 2:  # noqa: ASYNC110  the worker's doing
                await asyncio.sleep(0.005)
        await age(app, 3)
        await sweep(app, **KEPT)
        left = await app.get(Database).read(sa.select(runs.c.parent_generation).where(runs.c.parent == "o"))
        assert [row.parent_generation for row in left] == [2]


async def test_signals_that_no_run_claims_expire(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """One to a run that is never started is kept for its days; one to a run that there is stays for as long as that."""
    flows, work, told = service()
    async with workflows(flows, url=url, serve=False) as app:
        database = app.get(Database)
        await work.start("waits", id="there")
        for run_id in ("there", "absent", "late"):
            await told.send(run_id, "so", id="m")
        await database.write(sa.update(signals).where(signals.c.run_id != "late").values(at=signals.c.at - 31 * DAY))
        await sweep(app, keep_signals_days=40)
        assert len(await database.read(sa.select(signals.c.id))) == 3
        await sweep(app)
        left = await database.read(sa.select(signals.c.run_id).order_by(signals.c.run_id))
        assert [row.run_id for row in left] == ["late", "there"]
        assert "1 signals had expired" in caplog.text
        assert "told for run absent" in caplog.text
