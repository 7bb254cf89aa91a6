"""Starts inside units of work: begun once, after the commit, and no more at once than there is room for."""

import asyncio
from collections import Counter

import pytest
import sqlalchemy as sa

from mainstay.core import spawn
from mainstay.database import Database, FenceLost
from mainstay.workflow import WorkflowRouter, current_step
from mainstay.workflow.tables import APPEND_ONCE, RUN_FENCE, runs
from mainstay.workflow.testing import workflows

WAIT = 20.0


@pytest.mark.parametrize("kind", ["batch", "transaction"])
async def test_starts_in_one_unit_of_work_obey_max_runs(url, kind):
    """Of thirty runs that one commit starts, three are executed at once; the others wait in the queue."""
    flows, full = WorkflowRouter(), asyncio.Event()
    now = most = 0

    @flows.step(harmless=True)
    async def busy(n: int) -> int:
        nonlocal now, most
        now += 1
        most = max(most, now)
        if now == 3:
            full.set()
        await full.wait()
        await asyncio.sleep(0.01)  # others, if there is place for them, come in
        now -= 1
        return n

    @flows.workflow(name="w")
    async def w(n: int) -> int:
        return await busy(n)

    async with workflows(flows, url=url, max_runs=3) as app:
        database = app.get(Database)
        async with database.batch() if kind == "batch" else database.transaction():
            started = [await w.start(n) for n in range(30)]
        assert [await run.result(WAIT) for run in started] == list(range(30))
    assert most == 3


async def test_a_run_that_ended_before_the_batch_was_committed_is_not_executed_again(url):
    """A batch only collects: the same id may be started, executed and finished before its commit."""
    flows = WorkflowRouter()
    executed: Counter[str] = Counter()

    @flows.step(harmless=True)
    async def work(n: int) -> int:
        executed[current_step().key] += 1
        return n

    @flows.workflow(name="w")
    async def w(n: int) -> int:
        return await work(n)

    async def start_and_finish() -> None:
        assert await (await w.start(1, id="r")).result(WAIT) == 1

    async with workflows(flows, url=url) as app:
        database = app.get(Database)
        async with database.batch():
            await w.start(1, id="r")
            # Another request, with a context of its own, as a second delivery of the same message would make it.
            await spawn(start_and_finish(), name="another request")
        probe = await w.start(2, id="probe")  # what the commit began would by now have begun as well
        assert await probe.result(WAIT) == 2
        # Once more with the worker's own look at the queue behind it.
        assert await (await w.start(3, id="last")).result(WAIT) == 3
        (row,) = await database.read(sa.select(runs.c.status, runs.c.epoch).where(runs.c.id == "r"))
        assert (row.status, row.epoch) == ("completed", 1)
    assert executed == {"r:work:1": 1, "probe:work:1": 1, "last:work:1": 1}


@pytest.mark.parametrize("kind", ["batch", "transaction"])
async def test_what_is_rolled_back_is_not_begun(url, kind):
    """Neither a run of it nor a place that would stay taken."""
    flows = WorkflowRouter()
    executed: list[int] = []

    @flows.step(harmless=True)
    async def work(n: int) -> int:
        executed.append(n)
        return n

    @flows.workflow(name="w")
    async def w(n: int) -> int:
        return await work(n)

    async with workflows(flows, url=url, max_runs=2) as app:
        database = app.get(Database)
        with pytest.raises(LookupError):
            async with database.batch() if kind == "batch" else database.transaction():
                for n in range(5):
                    await w.start(n, id=f"r{n}")
                raise LookupError
        started = [await w.start(n) for n in range(10, 14)]
        assert [await run.result(WAIT) for run in started] == [10, 11, 12, 13]
    assert sorted(executed) == [10, 11, 12, 13]


async def test_a_run_that_has_ended_or_has_another_owner_cannot_be_written_to(url):
    """The fence of a run holds its owner, epoch and state: what only the epoch would let through is refused."""
    flows = WorkflowRouter()
    gate = asyncio.Event()

    @flows.step(harmless=True)
    async def work(n: int) -> int:
        await gate.wait()
        return n

    @flows.workflow(name="w")
    async def w(n: int) -> int:
        return await work(n)

    entry = {"run_id": "r", "seq": 99, "kind": "done", "step": "x:1", "position": 9, "body": None, "info": None}
    async with workflows(flows, url=url) as app:
        database = app.get(Database)
        run = await w.start(1, id="r")
        (row,) = await database.read(sa.select(runs.c.worker, runs.c.epoch).where(runs.c.id == "r"))
        own = RUN_FENCE.at("r", row.epoch, row.worker)
        for wrong in (RUN_FENCE.at("r", row.epoch, "another"), RUN_FENCE.at("r", row.epoch + 1, row.worker)):
            with pytest.raises(FenceLost):
                await database.write(APPEND_ONCE, entry, fence=wrong)
            with pytest.raises(FenceLost):
                async with database.transaction():
                    await database.write(APPEND_ONCE, entry, fence=wrong)
        await database.write(sa.update(runs).values(news=0), fence=own)  # its own is let through
        gate.set()
        assert await run.result(WAIT) == 1
        with pytest.raises(FenceLost):
            await database.write(APPEND_ONCE, entry, fence=own)
        with pytest.raises(FenceLost):
            async with database.transaction():
                await database.write(APPEND_ONCE, entry, fence=own)
