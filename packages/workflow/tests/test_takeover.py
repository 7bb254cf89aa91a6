"""A worker freezes, dies or loses its lease: what it held delays itself alone, and who is alive goes on."""

import asyncio
import importlib.util
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import sqlalchemy as sa

from mainstay.core.testing import eventually
from mainstay.database import Database, FenceLost, upgrade
from mainstay.database.schema import SCHEMA as DATABASE
from mainstay.workflow import RunStatus, WorkflowEngine, WorkflowRouter
from mainstay.workflow.tables import APPEND_ONCE, RUN_FENCE, SCHEMA, runs
from mainstay.workflow.testing import workflows
from packages.workflow.tests.forked import Script

_SCRIPT = Path(__file__).with_name("frozen_process.py")
WAIT = 30.0
leases = sa.table("mainstay_database_leases", sa.column("name"), sa.column("epoch"), sa.column("expires_at"))


@pytest.fixture
def there():
    """The module that the worker processes run, loaded anew, since its router binds to one App at a time."""
    spec = importlib.util.spec_from_file_location("frozen_process", _SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start_worker(url, directory):
    """The process that freezes."""
    return Script(_SCRIPT, url, directory, errors=directory / "log")


async def test_a_row_that_a_frozen_worker_holds_delays_itself_alone(postgres, tmp_path, there):
    """Of its thirteen runs a peer takes over twelve as soon as the lease has ended, serving others meanwhile."""
    await upgrade(postgres, [DATABASE, SCHEMA])
    there.directory = tmp_path
    app = there.app_for(postgres)
    async with app.running():
        for n in range(there.RUNS):
            await there.w.start(n, id=f"r{n}")
        worker = start_worker(postgres, tmp_path)
        try:
            await eventually((tmp_path / "locked").exists, seconds=WAIT)
        except BaseException:
            worker.kill()
            raise
    try:
        app = there.app_for(postgres)
        async with app.running(serve=True):
            began = time.monotonic()
            started = [there.w.handle(f"r{n}") for n in range(there.RUNS)]
            assert [await run.result(WAIT) for run in started[1:]] == list(range(1, there.RUNS))
            bystander = await there.w.start(99, id="bystander")
            assert await bystander.result(WAIT) == 99
            # Far less than the lock is held for; the lease is 1 s, and looked for three times in it.
            assert time.monotonic() - began < 8.0
            assert await started[0].status() is RunStatus.RUNNING
            worker.kill()  # the server rolls its transaction back
            assert await started[0].result(WAIT) == 0
    finally:
        worker.send_signal(signal.SIGCONT)
        worker.kill()
        worker.wait()


async def steal(database: Database, name: str) -> None:
    """Take a worker's lease, as a peer does that believes it dead, and leave it expired."""
    await database.write(
        sa.update(leases).where(leases.c.name == name).values(epoch=leases.c.epoch + 1, expires_at=0.0)
    )


async def test_a_worker_goes_on_at_once_after_it_lost_its_lease(url):
    """It serves under a new identity while steps of the old one are executed, which take places and write nothing."""
    flows = WorkflowRouter()
    began: Counter[int] = Counter()
    gate = asyncio.Event()
    executing = most = 0

    @flows.step(harmless=True)
    async def slow(n: int) -> int:
        nonlocal executing, most
        began[n] += 1
        executing += 1
        most = max(most, executing)
        try:
            if began[n] == 1:
                await gate.wait()
            else:
                await asyncio.sleep(0.05)
        finally:
            executing -= 1
        return n * 10 + began[n]

    @flows.workflow(name="w")
    async def w(n: int) -> int:
        return await slow(n)

    async with workflows(flows, url=url, max_runs=3, max_unrecorded=2) as app:
        database, engine = app.get(Database), app.get(WorkflowEngine)
        old = [await w.start(n, id=f"old{n}") for n in range(2)]
        await eventually(lambda: len(began) == 2, seconds=WAIT)
        (row,) = await database.read(sa.select(runs.c.worker, runs.c.epoch).where(runs.c.id == "old0"))
        await steal(database, row.worker)
        await eventually(lambda: engine.worker.held and engine.worker.takes() is not None, seconds=WAIT)
        # What the old identity was executing is executed again, by the new one, before the old steps end.
        assert [await run.result(WAIT) for run in old] == [2, 12]
        assert most == 3, "steps of the lost lease take places, and no more are taken than there are"
        assert executing == 2
        entry = {"run_id": "old0", "seq": 99, "kind": "done", "step": "x:1", "position": 9, "body": None, "info": None}
        with pytest.raises(FenceLost):
            await database.write(APPEND_ONCE, entry, fence=RUN_FENCE.at("old0", row.epoch, row.worker))
        gate.set()
        await eventually(lambda: executing == 0, seconds=WAIT)
        assert [await run.result(WAIT) for run in old] == [2, 12]
        history = await engine.history("old0")
        assert [(record.key, record.output) for record in history.records.values()] == [("slow:1", "2")]
