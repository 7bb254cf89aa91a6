"""A step that kills its worker, in real processes: its run is found and parked, and takes no others along."""

import asyncio
from pathlib import Path

import pytest
import sqlalchemy as sa

from mainstay.core.testing import VirtualClock, eventually
from mainstay.database import Database
from mainstay.workflow import RunParked, RunStatus, WorkflowEngine, WorkflowRouter
from mainstay.workflow._isolation import Isolation
from mainstay.workflow.tables import TAKE_OVER, Claims, history, runs
from mainstay.workflow.testing import workflows
from packages.workflow.tests.forked import Script

SCRIPT = Path(__file__).with_name("poison_process.py")
WAIT = 30.0


async def dies(url, directory):
    """Let a worker serve until a step kills it."""
    worker = Script(SCRIPT, url, directory, errors=directory / "log")
    try:
        assert await asyncio.to_thread(worker.wait, 60) == 9, (directory / "log").read_text()[-2000:]
    finally:
        worker.kill()
        worker.wait()


async def test_trap_9_a_step_that_kills_its_worker_is_parked(shared, tmp_path, there):
    """Each claim lets the step begin once more, which is no progress: after so many the run waits for a person."""
    async with there.app_for(shared).running():
        await there.poison.start(1, id="poison")
    for _ in range(there.CLAIMS + 1):  # the first has one claim more, since `work` got the run further
        await dies(shared, tmp_path)
    async with there.app_for(shared).running(serve=True):
        with pytest.raises(RunParked, match="its worker died each time"):
            await there.poison.handle("poison").result(WAIT)
    assert (tmp_path / "ledger").read_text().count("crash") == there.CLAIMS + 1


async def test_a_step_that_kills_its_worker_takes_no_others_along(shared, tmp_path, there):
    """Of six runs that die together only the one that kills is parked; the others complete without spent attempts."""
    async with there.app_for(shared).running():
        for n in range(3):
            await there.slow.start(n, id=f"slow{n}")
        await there.venom.start(1, id="poison")
        for n in range(3, 5):
            await there.slow.start(n, id=f"slow{n}")
    # Twice all six together, once half of them; then it is alone, and each death spends an attempt.
    for _ in range(3 + there.CLAIMS):
        await dies(shared, tmp_path)
    app = there.app_for(shared)
    async with app.running(serve=True):
        with pytest.raises(RunParked, match="its worker died each time"):
            await there.venom.handle("poison").result(WAIT)
        for n in range(5):
            assert await there.slow.handle(f"slow{n}").result(WAIT) == n
            assert (await app.get(WorkflowEngine).run(f"slow{n}")).attempts == 1
        assert [run.id for run in await app.get(WorkflowEngine).runs(RunStatus.PARKED)] == ["poison"]


flows = WorkflowRouter()


@flows.workflow(name="w")
async def w(n: int) -> int:
    """Do nothing."""
    return n


@pytest.mark.parametrize("killer", ["r000", "r617"])
async def test_one_run_of_a_thousand_is_alone_after_some_ten_deaths(url, killer):
    """Every death halves the company of the one that kills; a group without it gets further and is out of it."""
    claims = Claims({("w", 1): None})
    async with workflows(flows, url=url, serve=False) as app:
        database = app.get(Database)
        row = {"workflow": "w", "version": 1, "status": "queued", "epoch": 0, "attempts": 0, "progress": 0}
        row |= {"wake_at": 0.0, "cancel_requested": False, "input": "{}", "context": "{}"}
        await database.write(sa.insert(runs), [{"id": f"r{n:03}", **row} for n in range(1_000)])
        deaths, company = 0, 0
        while company != 1:
            owner = f"worker {deaths} {company}"
            (queue,) = await database.read(claims.waiting)
            values = {"owner": owner, "most": 1_000}
            claim = claims.claim
            if queue.company is not None:
                claim = claims.claim_suspects
                values = {"owner": owner, "most": Isolation.most(queue.company), "together": queue.company}
            async with database.transaction() as session:
                claimed = [row["id"] for row in (await session.execute(claim, values)).mappings()]
                if killer in claimed:
                    deaths, company = deaths + 1, len(claimed)
                    await session.execute(TAKE_OVER, {"dead": owner, "most": 1_000, "together": company})
                else:
                    ended = {"status": "completed", "worker": None}
                    await session.execute(sa.update(runs).where(runs.c.worker == owner).values(ended))
        assert 2 < deaths <= 12
        (found,) = await database.read(sa.select(runs.c.attempts, runs.c.deaths).where(runs.c.id == killer))
        assert (found.attempts, found.deaths) == (1, deaths), "only the death alone spends an attempt"


def dead(name: str, **values: object) -> sa.Update:
    """Make the queued runs those of a worker that is dead."""
    gone = {"status": "running", "worker": f"mainstay-workflow {name}", "attempts": 1, "epoch": 1, **values}
    return sa.update(runs).where(runs.c.status == "queued").values(gone)


async def test_a_busy_worker_takes_nothing_else_while_suspects_wait_or_are_executed(url):
    """It lets its own runs end, executes a group of half the company, and goes on when those have got further."""
    router = WorkflowRouter()
    gates = {name: asyncio.Event() for name in ("busy", "s0", "s1", "s2", "s3", "late")}
    at: list[str] = []

    @router.step(harmless=True)
    async def stay(name: str) -> str:
        at.append(name)
        await gates[name].wait()
        return name

    @router.step(harmless=True)
    async def last(name: str) -> str:
        at.append(f"{name} further")
        await gates["late"].wait()
        return name

    @router.workflow(name="g")
    async def g(name: str) -> str:
        await stay(name)
        return await last(name)

    async with workflows(router, url=url, suspend_after_seconds=3_600, lease_seconds=5) as app:
        database = app.get(Database)
        await g.start("busy", id="busy")
        await eventually(lambda: at == ["busy"], seconds=WAIT)
        async with database.transaction():
            for n in range(4):
                await g.start(f"s{n}", id=f"s{n}")
            await database.write(dead("gone", deaths=1))
        worker = app.get(WorkflowEngine).worker
        await eventually(lambda: worker.takes() is None, seconds=WAIT)
        await g.start("late", id="late")
        assert at == ["busy"]
        gates["busy"].set()
        gates["late"].set()
        await eventually(lambda: len(at) == 4, seconds=WAIT)
        assert at[:2] == ["busy", "busy further"]
        first = at[2:]
        assert all(name.startswith("s") for name in first), "two of the four, and not the run that came late"
        gates[first[0]].set()
        await eventually(lambda: f"{first[0]} further" in at, seconds=WAIT)
        assert await g.handle(first[0]).result(WAIT) == first[0]
        assert len(at) == 5, "the other one of the group is still by itself"
        for gate in gates.values():
            gate.set()
        for name in ("busy", "s0", "s1", "s2", "s3", "late"):
            assert await g.handle(name).result(WAIT) == name


async def test_a_suspect_that_only_waits_keeps_no_others_from_the_worker(shared):
    """It waits elsewhere than in the worker's memory, and its isolation of 40 minutes is over at once."""
    router = WorkflowRouter()
    paid = router.signal("paid", str)

    @router.workflow(name="waits")
    async def waits() -> str:
        return await paid.wait()

    @router.workflow(name="bystands")
    async def bystands(n: int) -> int:
        return n

    async with workflows(router, url=shared, serve=False) as app:
        await waits.start(id="suspect")
        suspected = {"deaths": 2, "company": 2}
        await app.get(Database).write(sa.update(runs).where(runs.c.id == "suspect").values(suspected))
    async with workflows(router, url=shared, suspend_after_seconds=3_600, lease_seconds=600) as app:
        engine = app.get(WorkflowEngine)
        await eventually(lambda: engine.worker.executes("suspect"), seconds=WAIT)
        assert await (await bystands.start(7)).result(WAIT) == 7
        await paid.send("suspect", "in full")
        assert await waits.handle("suspect").result(WAIT) == "in full"


async def test_an_isolation_ends_when_its_runs_get_further_leave_or_have_lived_for_long(url):
    """A run that died more often is isolated for twice as long for every death."""
    clock = VirtualClock()
    async with workflows(flows, url=url, serve=False) as app:
        database = app.get(Database)
        async with database.transaction():
            for name in "abc":
                await w.start(1, id=name)
        isolation = Isolation(database=database, clock=clock, seconds=5.0)
        assert isolation.begin([{"id": "a", "deaths": 1}]) == 0
        assert not await isolation.lasts({"a"})
        assert isolation.begin([{"id": "a", "deaths": 2}, {"id": "b", "deaths": 3}, {"id": "c", "deaths": 500}]) == 3
        assert await isolation.lasts({"a", "b"})
        await clock.advance(20.0)
        assert await isolation.lasts({"a", "b"})
        assert not await isolation.lasts({"a"})
        assert isolation.begin([{"id": "c", "deaths": 500}]) == 1
        assert await isolation.lasts({"c"})
        entry = {"run_id": "c", "seq": 1, "kind": "done", "step": "x:1"}
        await database.write(sa.insert(history).values(**entry))
        assert not await isolation.lasts({"c"})
