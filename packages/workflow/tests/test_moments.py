"""A worker dies at every moment of a run, and another one takes it over: nothing is lost, nothing is left half done."""

import asyncio
from collections import Counter

import pytest
import sqlalchemy as sa

from mainstay.core import App, Drain, FullJitter, Retry, once
from mainstay.database import Database
from mainstay.workflow import (
    Done,
    Failed,
    Handle,
    RunStatus,
    StepFailed,
    Unknown,
    WorkflowRouter,
    WorkflowSettings,
    current_step,
)
from mainstay.workflow._payloads import Payloads
from mainstay.workflow._worker import Worker
from mainstay.workflow.testing import DyingDatabase, Killed, explore, workflows

QUICK = FullJitter(0.001, 0.002)


class Provider:
    """The other side: it honours idempotency keys, and remembers what it was asked."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.effects: dict[str, int] = {}
        self.asked: Counter[str] = Counter()
        self.undone: set[str] = set()

    def charge(self, n):
        key = current_step().key
        assert key not in self.undone, "a late original after its compensation"
        self.asked[key] += 1
        self.effects[key] = n

    def refund(self):
        key = current_step().undoes
        assert key is not None
        self.undone.add(key)
        self.effects.pop(key, None)


def saga(provider: Provider, *, fails: bool):
    flows = WorkflowRouter()
    retry = Retry(attempts=2, wait=QUICK)

    @flows.step(retry=retry)
    async def hold(n: int) -> int:
        provider.charge(n)
        return n + 1

    @hold.compensation
    async def release(outcome: Done[int] | Unknown, n: int) -> None:
        provider.refund()

    @flows.step(retry=retry)
    async def charge(n: int) -> int:
        provider.charge(n)
        if fails:
            raise OSError(n)
        return n + 1

    @charge.compensation
    async def refund(outcome: Done[int] | Unknown, n: int) -> None:
        provider.refund()

    @flows.workflow(name="buy")
    async def buy(n: int) -> int:
        both = await flows.gather(hold(n), hold(n))
        return await charge(both[0])

    return flows, buy


async def test_trap_1_forward_at_every_moment():
    """Whenever the worker dies, the run completes, each effect is there once, and one death repeats a step once."""
    provider = Provider()
    flows, buy = saga(provider, fails=False)

    async def start(_app):
        provider.reset()
        return await buy.start(1, id="r")

    async def check(run, _app):
        assert await run.status() is RunStatus.COMPLETED
        assert await run.result() == 3
        assert provider.effects == {"r:0.0/hold:1": 1, "r:0.1/hold:1": 1, "r:charge:1": 2}
        assert max(provider.asked.values()) <= 2

    assert await explore(flows, start=start, check=check) >= 14


async def test_back_at_every_moment():
    """Whenever the worker dies, the failing run leaves nothing, and no original comes after its compensation."""
    provider = Provider()
    flows, buy = saga(provider, fails=True)

    async def start(_app):
        provider.reset()
        return await buy.start(1, id="r")

    async def check(run, _app):
        assert await run.status() is RunStatus.FAILED
        assert provider.effects == {}
        assert provider.undone == {"r:0.0/hold:1", "r:0.1/hold:1", "r:charge:1"}
        assert provider.asked["r:charge:1"] <= 3

    assert await explore(flows, start=start, check=check) >= 24


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
async def test_trap_4_exactly_once_at_every_moment(kind, tmp_path, request):
    """A transactional step and a transactional effect are there exactly once, whenever the worker dies."""
    flows = WorkflowRouter()
    ledger = sa.Table(
        "ledger",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("what", sa.String(100)),
    )
    insert = sa.insert(ledger).values(what=sa.bindparam("what"))
    databases: list[Database] = []

    @flows.step(transactional=True)
    async def book(n: int) -> int:
        await databases[-1].write(insert, {"what": f"book {n}"})
        return n

    @book.compensation
    async def unbook(outcome: Done[int] | Unknown, n: int) -> None:
        await databases[-1].write(insert, {"what": f"unbook {n}"})

    @flows.step(harmless=True)
    async def look(n: int) -> int:
        return n

    @flows.workflow(name="book")
    async def booking(n: int) -> int:
        async def publish(key):
            await databases[-1].write(insert, {"what": key})

        await look(n)
        await book(n)
        await once("publish", publish, transactional=True)
        await book(n + 1)
        raise LookupError

    async def prepare(app):
        databases.append(app.get(Database))
        async with databases[-1].engine.begin() as connection:
            await connection.run_sync(ledger.metadata.drop_all)
            await connection.run_sync(ledger.metadata.create_all)

    numbers = iter(range(1_000_000))
    if kind == "postgres":
        address = request.getfixturevalue("postgres")
        runs = sa.text("truncate mainstay_workflow_runs, mainstay_workflow_history")
    else:
        address = ""

    def url():
        return address or f"sqlite+aiosqlite:///{tmp_path / f'{next(numbers)}.db'}"

    async def start(app):
        await prepare(app)
        if kind == "postgres":
            async with app.get(Database).engine.begin() as connection:
                await connection.execute(runs)
        return await booking.start(1, id="r")

    async def check(run, app):
        assert await run.status() is RunStatus.FAILED
        rows = await app.get(Database).read(sa.select(ledger.c.what).order_by(ledger.c.id))
        assert [row.what for row in rows] == ["book 1", "r:@publish:1", "book 2", "unbook 2", "unbook 1"]

    assert await explore(flows, start=start, check=check, url=url) >= 16


async def test_trap_3_a_probe_at_every_moment():
    """A step with a probe is never attempted again where its effect is there, whenever the worker dies."""
    flows = WorkflowRouter()
    charged: list[int] = []

    @flows.step(harmless=True, on_unknown="probe", retry=Retry(3, QUICK))
    async def charge(n: int) -> int:
        charged.append(n)
        if len(charged) == 1:
            raise OSError(n)
        return n

    @charge.probe
    async def ask(n: int) -> Done[int] | Failed | Unknown:
        return Done(n) if charged else Failed()

    @flows.workflow(name="buy")
    async def buy(n: int) -> int:
        return await charge(n)

    async def start(_app):
        charged.clear()
        return await buy.start(5)

    async def check(run, _app):
        assert await run.result() == 5
        assert charged == [5]

    assert await explore(flows, start=start, check=check) >= 6


async def test_another_way_at_every_moment():
    """A function that catches StepFailed takes the same way after every death."""
    flows = WorkflowRouter()
    provider = Provider()

    @flows.step(failed_on=(LookupError,))
    async def first(n: int) -> int:
        raise LookupError(n)

    @first.compensation
    async def undo_first(outcome: Done[int] | Unknown, n: int) -> None:
        assert isinstance(outcome, Unknown), "only an attempt that a death cut off may have happened"

    @flows.step(harmless=True)
    async def second(n: int) -> int:
        provider.charge(n)
        return n

    @flows.workflow(name="buy")
    async def buy(n: int) -> str:
        try:
            await first(n)
        except StepFailed as error:
            await flows.sleep(0.001)
            return f"{error.detail} {await second(n)}"
        return "first"

    async def start(_app):
        provider.reset()
        return await buy.start(5, id="r")

    async def check(run, _app):
        assert await run.result() == "5 5"
        assert provider.effects == {"r:second:1": 5}

    assert await explore(flows, start=start, check=check) >= 10


async def test_trap_20_a_run_of_three_steps_costs_five_commits():
    """The claim, an intent for each step with the result of the one before, and the end: nothing else is written."""
    flows = WorkflowRouter()

    @flows.step(harmless=True)
    async def work(n: int) -> int:
        return n + 1

    @flows.workflow(name="three")
    async def three(n: int) -> int:
        return await work(await work(await work(n)))

    async with workflows(flows, serve=False) as app:
        run = await three.start(1)
        counting = DyingDatabase(app.get(Database), None, after=False)
        drain = Drain()
        worker = Worker(
            database=counting,  # type: ignore[arg-type]  # it stands in for a Database
            clock=app.clock,
            settings=WorkflowSettings(),
            workflows=flows.workflows,
            steps=flows.steps,
            payloads=Payloads(),
            ended=lambda *_: None,
        )
        task = asyncio.create_task(worker.work(drain))
        assert await run.result(10) == 4
        drain.begin()
        await task
    assert counting.moments == 5


async def test_the_dead_do_nothing_more():
    """After its moment a dying database refuses everything."""
    async with workflows() as app:
        for after in (False, True):
            dying = DyingDatabase(app.get(Database), 1, after=after)
            with pytest.raises(Killed):
                async with dying.batch():
                    pass
            for act in (dying.read(sa.select(1)), dying.write(sa.delete(sa.table("nothing")))):
                with pytest.raises(Killed):
                    await act
            with pytest.raises(Killed):
                async with dying.transaction():
                    pass
            assert dying.dead.is_set()
            assert dying.dialect == "sqlite"
        await asyncio.sleep(0)


async def test_what_cannot_be_explored_is_named() -> None:
    """A list of modules, which all moments would share, and a run that waits for longer than the test."""
    flows = WorkflowRouter()

    @flows.workflow(name="sleep")
    async def sleep() -> None:
        await flows.sleep(86_400)

    async def start(_app: App) -> Handle[None]:
        return await sleep.start(id="long")

    async def check(_run: Handle[None], _app: App) -> None: ...

    with pytest.raises(TypeError, match=r"explore: modules is a function .* modules=lambda: \[\.\.\.\]"):
        await explore(flows, start=start, check=check, modules=[])  # type: ignore[arg-type]  # the mistake
    with pytest.raises(TimeoutError, match=r"run 'long' is \w+ after 0.2 seconds: .* timeout_seconds"):
        await explore(flows, start=start, check=check, timeout_seconds=0.2)
