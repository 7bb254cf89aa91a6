"""The database fails, the loop is blocked, tasks are cancelled: what was done stays done, and is not done again."""

import asyncio
import random
import threading
import time
from collections import Counter
from contextlib import asynccontextmanager

import pytest
import sqlalchemy as sa

from mainstay.core import Drain, FullJitter, MainstayError, Retry
from mainstay.core.testing import VirtualClock, eventually
from mainstay.database import CommitUnknown, Database, DatabaseUnavailable
from mainstay.workflow import (
    Done,
    NotInRun,
    RunParked,
    RunStateError,
    RunStatus,
    Unknown,
    WorkflowEngine,
    WorkflowFailed,
    WorkflowRouter,
    WorkflowSettings,
    current_step,
)
from mainstay.workflow._payloads import Payloads
from mainstay.workflow._worker import Worker
from mainstay.workflow.errors import Released
from mainstay.workflow.tables import history, runs
from mainstay.workflow.testing import workflows
from mainstay_servers import Postgres, fresh_database

QUICK = FullJitter(0.001, 0.002)
WAIT = 60.0


def nobody(*_args):
    """Nobody waits for what this worker ends."""


class Flaky:
    """A database of whose writes a fifth is refused, and a fifth committed without an answer; always the same ones."""

    def __init__(self, database: Database):
        self._database = database
        self._choose = random.Random(4)  # noqa: S311  the same in every run, on purpose

    def __getattr__(self, name):
        return getattr(self._database, name)

    async def write(self, statement, rows=({},), **options):
        if self._database.in_unit_of_work():
            await self._database.write(statement, rows, **options)
            return
        fate = self._choose.randrange(5)
        if fate == 0:
            raise DatabaseUnavailable
        await self._database.write(statement, rows, **options)
        if fate == 1:
            raise CommitUnknown

    @asynccontextmanager
    async def _unreliably(self, opened):
        fate = self._choose.randrange(5)
        async with opened as unit:
            yield unit
            if fate == 0:
                raise DatabaseUnavailable
        if fate == 1:
            raise CommitUnknown

    def batch(self, **options):
        return self._unreliably(self._database.batch(**options))

    def transaction(self):
        return self._unreliably(self._database.transaction())


@asynccontextmanager
async def worker_on(app, database, flows, **settings):
    """A worker of its own over another view of the database."""
    options = {"lease_seconds": 0.5, "poll_seconds": 0.02, **settings}
    drain = Drain()
    worker = Worker(
        database=database,
        clock=app.clock,
        settings=WorkflowSettings(**options),
        workflows=flows.workflows,
        steps=flows.steps,
        payloads=Payloads(),
        ended=nobody,
    )
    task = asyncio.create_task(worker.work(drain))
    try:
        yield task
    finally:
        drain.begin()
        await asyncio.gather(task, return_exceptions=True)


async def test_trap_2_a_recording_error_is_not_a_step_error(url):
    """Writes that fail, or succeed without an answer, are repeated; no step is executed twice for it."""
    flows = WorkflowRouter()
    executed: Counter[str] = Counter()
    ledger = sa.Table(
        "ledger", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True), sa.Column("n", sa.Integer)
    )

    @flows.step()
    async def hold(n: int) -> int:
        executed[current_step().key] += 1
        return n

    @hold.compensation
    async def release(outcome: Done[int] | Unknown, n: int) -> None:
        executed[current_step().key] += 1

    @flows.step(transactional=True, harmless=True, retry=Retry(10, QUICK))
    async def book(n: int) -> int:
        async with app.get(Database).transaction() as session:
            await session.execute(sa.insert(ledger).values(n=n))
        return n

    @flows.workflow(name="buy")
    async def buy(n: int) -> int:
        await flows.gather(hold(n), hold(n), hold(n))
        await book(n)
        await hold(n)
        raise LookupError

    async with workflows(flows, url=url, serve=False) as app:
        async with app.get(Database).engine.begin() as connection:
            await connection.run_sync(ledger.metadata.create_all)
        flaky = Flaky(app.get(Database))
        run = await buy.start(7, id="r")
        async with worker_on(app, flaky, flows):
            with pytest.raises(WorkflowFailed, match="LookupError"):
                await run.result(WAIT)
        assert [row.n for row in await app.get(Database).read(sa.select(ledger.c.n))] == [7]
    holds = {"r:0.0/hold:1", "r:0.1/hold:1", "r:0.2/hold:1", "r:hold:1"}
    assert executed == dict.fromkeys(holds | {f"{key}:compensation" for key in holds}, 1)


async def test_the_database_restarts_under_load(own_postgres):
    """While PostgreSQL is killed and comes back, every run completes and every step is executed once."""
    flows = WorkflowRouter()
    executed: Counter[str] = Counter()

    @flows.step(harmless=True)
    async def work(n: int) -> int:
        executed[current_step().key] += 1
        await asyncio.sleep(0.001)
        return n + 1

    @flows.workflow(name="load")
    async def load(n: int) -> int:
        for _ in range(20):
            n = await work(n)
        return n

    assert isinstance(own_postgres, Postgres)
    with fresh_database(own_postgres.url) as address:
        async with workflows(flows, url=address, lease_seconds=5.0):
            started = [await load.start(n, id=f"r{n}") for n in range(40)]
            async with asyncio.timeout(WAIT):
                while len(executed) < 200:  # noqa: ASYNC110  the runs make it true
                    await asyncio.sleep(0.001)
            own_postgres.kill()
            own_postgres.start()
            assert [await run.result(WAIT) for run in started] == [n + 20 for n in range(40)]
    assert len(executed) == 800
    assert set(executed.values()) == {1}


async def test_behind_a_transaction_pooler(pgbouncer):
    """Through PgBouncer, where no connection outlives a transaction, transactional steps and the way back work."""
    flows = WorkflowRouter()
    ledger = sa.Table(
        "ledger", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True), sa.Column("n", sa.Integer)
    )

    @flows.step(transactional=True)
    async def book(n: int) -> int:
        await app.get(Database).write(sa.insert(ledger), {"id": n, "n": n})
        return n

    @book.compensation
    async def unbook(outcome: Done[int] | Unknown, n: int) -> None:
        await app.get(Database).write(sa.delete(ledger).where(ledger.c.id == n))

    @flows.step(harmless=True)
    async def ship(n: int) -> int:
        if n % 2:
            raise LookupError(n)
        return n

    @flows.workflow(name="buy")
    async def buy(n: int) -> int:
        return await ship(await book(n))

    async with workflows(flows, url=pgbouncer) as app:
        async with app.get(Database).engine.begin() as connection:
            await connection.run_sync(ledger.metadata.create_all)
        started = await asyncio.gather(*(buy.start(n, id=f"r{n}") for n in range(30)))
        outcomes = await asyncio.gather(*(run.result(WAIT) for run in started), return_exceptions=True)
        assert [outcome for outcome in outcomes if isinstance(outcome, int)] == list(range(0, 30, 2))
        rows = await app.get(Database).read(sa.select(ledger.c.n).order_by(ledger.c.n))
        assert [row.n for row in rows] == list(range(0, 30, 2))


async def test_trap_7_a_blocked_loop_keeps_its_lease(url, tmp_path):
    """A step blocks the loop for three leases, in which a peer looks for the dead: each time the worker lives."""
    address = f"sqlite+aiosqlite:///{tmp_path / 'shared.db'}" if ":memory:" in url else url
    flows, there = WorkflowRouter(), WorkflowRouter()
    executed: list[str] = []
    blocked, looked = threading.Event(), threading.Event()

    def define(router, who):
        @router.step(harmless=True)
        async def block(n: int) -> int:
            executed.append(who)
            blocked.set()
            looked.wait(WAIT)  # what the test is about: the loop has no turn
            return n

        @router.workflow(name="block")
        async def blocking(n: int) -> int:
            return int(await block(n))

        return blocking

    blocking = define(flows, "first")
    define(there, "second")
    async with workflows(flows, url=address, lease_seconds=1.0):
        run = await blocking.start(1)
        looks = asyncio.create_task(asyncio.to_thread(_look_for_the_dead, there, address, blocked, looked))
        assert await run.result(WAIT) == 1
        assert await looks >= 3.0
    assert executed == ["first"]


def _look_for_the_dead(router, address, blocked, looked) -> float:
    """Look for dead workers while the other loop is blocked; between the first look and the last one, in seconds."""
    at: list[float] = []

    async def serve() -> None:
        async with workflows(router, url=address, lease_seconds=1.0) as app:
            takeover = app.get(WorkflowEngine).worker._takeover
            look_at = takeover._look_at

            async def look(name: str) -> None:
                await look_at(name)
                at.append(time.monotonic())

            takeover._look_at = look  # type: ignore[method-assign]  # of this peer alone
            await eventually(lambda: at and at[-1] - at[0] >= 3.0, seconds=WAIT)

    try:
        assert blocked.wait(WAIT)
        asyncio.run(serve())
    finally:
        looked.set()
    return at[-1] - at[0]


async def test_trap_3_a_cancelled_step_is_recorded_first(tmp_path):
    """A worker that is cancelled while a result is on its way to the database writes it before it goes."""
    flows = WorkflowRouter()
    executed: list[int] = []
    at_work, held, further = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @flows.step(harmless=True)
    async def work(n: int) -> int:
        executed.append(n)
        if n == 1:
            at_work.set()
            await held.wait()
        return n + 1

    @flows.workflow(name="work")
    async def working(n: int) -> int:
        n = await work(n)
        await further.wait()
        return await work(n)

    address = f"sqlite+aiosqlite:///{tmp_path / 'test.db'}"
    async with workflows(flows, url=address, serve=False) as app:
        engine = app.get(WorkflowEngine)
        run = await working.start(1, id="r")
        worker = asyncio.create_task(engine.worker.work(Drain()))
        await asyncio.wait_for(at_work.wait(), WAIT)
        executed_run = engine.worker._run("r")
        assert executed_run is not None
        recording = executed_run._recording
        async with app.get(Database).transaction():  # nobody else writes now
            held.set()
            await eventually(recording._turn.locked, seconds=WAIT)  # the result is on its way
            worker.cancel()
            (executing,) = (task for run, task in engine.worker._executing() if run is executed_run)
            await eventually(executing.cancelling, seconds=WAIT)
            assert not worker.done()
        await asyncio.gather(worker, return_exceptions=True)
        further.set()
        assert (await engine.history("r")).records["work:1"].state == "done"
        view = await engine.run("r")
        assert (view.status, view.attempts) == (RunStatus.QUEUED, 0)
        drain = Drain()
        worker = asyncio.create_task(engine.worker.work(drain))
        assert await run.result(WAIT) == 3
        drain.begin()
        await worker
    assert executed == [1, 2]


async def test_a_step_cut_off_by_the_end_of_the_drain_is_repeated(url):
    """A step that is still running when the worker is cancelled is unknown, and is attempted again with its key."""
    flows = WorkflowRouter()
    keys: list[str] = []
    begun = asyncio.Event()

    @flows.step(harmless=True)
    async def work(n: int) -> int:
        keys.append(current_step().key)
        begun.set()
        if len(keys) == 1:
            await asyncio.sleep(60)
        return n

    @flows.workflow(name="work")
    async def working(n: int) -> int:
        one, _ = await flows.gather(work(n), flows.sleep(0))
        return int(one)

    async with workflows(flows, url=url, serve=False) as app:
        engine = app.get(WorkflowEngine)
        run = await working.start(1, id="r")
        drain = Drain()
        worker = asyncio.create_task(engine.worker.work(drain))
        await begun.wait()
        drain.begin()
        executed_run = engine.worker._run("r")
        assert executed_run is not None
        await eventually(lambda: isinstance(executed_run.told, Released), seconds=WAIT)
        worker.cancel()
        await asyncio.gather(worker, return_exceptions=True)
        assert (await engine.history("r")).records["0.0/work:1"].dangling
        again = Drain()
        worker = asyncio.create_task(engine.worker.work(again))
        assert await run.result(WAIT) == 1
        again.begin()
        await worker
    assert keys == ["r:0.0/work:1"] * 2


@pytest.mark.parametrize("end", ["succeeds", "fails", "would be tried again"])
async def test_trap_5_who_lost_the_run_neither_records_nor_compensates(url, end):
    """A run whose epoch has moved on while a step was executed is dropped: no result, no failure, no compensation."""
    flows = WorkflowRouter()
    log: list[str] = []
    begun, go = asyncio.Event(), asyncio.Event()

    @flows.step(retry=Retry(attempts=5 if end == "would be tried again" else 1))
    async def work(n: int) -> int:
        log.append("work")
        begun.set()
        await go.wait()
        if end != "succeeds":
            raise MainstayError(retryable=True)
        return n

    @work.compensation
    async def undo(outcome: Done[int] | Unknown, n: int) -> None:
        log.append("undo")

    @flows.workflow(name="work")
    async def working(n: int) -> int:
        return await work(n)

    async with workflows(flows, url=url) as app:
        db = app.get(Database)
        await working.start(1, id="r")
        await begun.wait()
        async with db.transaction() as session:  # as a peer would that thinks this worker dead
            await session.execute(sa.update(runs).values(epoch=runs.c.epoch + 1, worker="somebody else"))
        go.set()
        async with asyncio.timeout(WAIT):
            while app.get(WorkflowEngine).worker.executes("r"):  # noqa: ASYNC110  the worker drops it
                await asyncio.sleep(0.001)
        kinds = [row.kind for row in await db.read(sa.select(history.c.kind))]
    assert log == ["work"]
    assert kinds == ["intent"]


async def test_a_run_that_nobody_executes_is_found(url):
    """A run that is this worker's in the table and in no memory goes back into the queue by itself."""
    flows = WorkflowRouter()

    @flows.workflow(name="plain")
    async def plain(n: int) -> int:
        return n

    async with workflows(flows, url=url, lease_seconds=0.5) as app:
        engine = app.get(WorkflowEngine)
        identity = engine.worker.takes()
        assert identity is not None
        run = await plain.start(1, id="r")
        await run.result(WAIT)
        async with app.get(Database).transaction() as session:
            lost = {"status": "running", "worker": identity.lease.name, "output": None}
            await session.execute(sa.update(runs).values(**lost))
        assert await run.result(WAIT) == 1
        assert (await engine.run("r")).attempts >= 1


async def test_trap_12_one_of_many_resumes_wins(url):
    """Twenty people resume one parked run: one does, the others are told, and the step runs once more."""
    flows = WorkflowRouter()
    tried: list[int] = []

    @flows.step(harmless=True, on_unknown="park")
    async def work(n: int) -> int:
        tried.append(n)
        if len(tried) == 1:
            raise OSError(n)
        return n

    @flows.workflow(name="work")
    async def working(n: int) -> int:
        return await work(n)

    async with workflows(flows, url=url) as app:
        run = await working.start(1, id="r")
        with pytest.raises(RunParked):
            await run.result(WAIT)
        engine = app.get(WorkflowEngine)
        outcomes = await asyncio.gather(*(engine.resume("r") for _ in range(20)), return_exceptions=True)
        assert outcomes.count(None) == 1
        assert sum(isinstance(outcome, RunStateError) for outcome in outcomes) == 19
        assert await run.result(WAIT) == 1
    assert len(tried) == 2


async def test_a_long_sleep_leaves_memory_and_comes_back(url):
    """A run that sleeps for longer than the limit is in the queue meanwhile, not in the worker; others go on."""
    flows = WorkflowRouter()
    log: list[str] = []

    @flows.step(harmless=True)
    async def work(n: int) -> int:
        log.append(f"work {n}")
        return n

    @flows.workflow(name="sleepy")
    async def sleepy(n: int) -> int:
        await work(n)
        await flows.gather(flows.sleep(0.3), work(n + 1), flows.sleep(3600 if n == 5 else 0.2))
        return await work(n + 2)

    async with workflows(flows, url=url, suspend_after_seconds=0.1, max_runs=1) as app:
        engine = app.get(WorkflowEngine)
        run = await sleepy.start(1, id="r")
        async with asyncio.timeout(WAIT):
            while "work 2" not in log or engine.worker.executes("r"):  # noqa: ASYNC110  the worker lets go of it
                await asyncio.sleep(0.001)
        assert (await engine.run("r")).attempts == 0
        assert await run.result(WAIT) == 3
        long = await sleepy.start(5, id="long")
        async with asyncio.timeout(WAIT):
            while "work 6" not in log or engine.worker.executes("long"):  # noqa: ASYNC110  the worker lets go of it
                await asyncio.sleep(0.001)
        await long.cancel()
        with pytest.raises(WorkflowFailed, match="cancelled"):
            await long.result(WAIT)
    assert log == ["work 1", "work 2", "work 3", "work 5", "work 6"]


async def test_a_virtual_clock_moves_every_wait():
    """In tests, an hour of sleeping and of waiting between attempts takes no time."""
    flows = WorkflowRouter()
    clock = VirtualClock()
    tried: list[float] = []

    @flows.step(harmless=True, retry=Retry(2, wait=lambda _state: 1800.0))
    async def work(n: int) -> int:
        tried.append(clock.monotonic())
        if len(tried) == 1:
            raise MainstayError(retryable=True, no_effect=True)
        return n

    @flows.workflow(name="sleepy")
    async def sleepy(n: int) -> int:
        await flows.sleep(3600)
        return await work(n)

    async with workflows(flows, clock=clock):
        run = await sleepy.start(1)
        await clock.advance(5400)
        async with asyncio.timeout(WAIT):
            assert await run.result() == 1
    assert tried == pytest.approx([3600, 5400], abs=0.001)


async def test_sleeping_outside_a_run_is_refused():
    """`flows.sleep` belongs into workflow functions, and takes a number of seconds that passes."""
    flows = WorkflowRouter()
    with pytest.raises(NotInRun, match=r"asyncio\.sleep"):
        await flows.sleep(1)
    for bad in (-1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="a finite number of seconds"):
            await flows.sleep(bad)
