"""Each write of a run, repeated by a worker that does not have it any more: refused as a whole, and nothing changes."""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import pytest
import sqlalchemy as sa

from mainstay.core import Drain, FullJitter, MainstayError, Retry, once
from mainstay.core.testing import eventually
from mainstay.database import Conflict, Database, Fence, FenceLost
from mainstay.workflow import (
    Done,
    RunStatus,
    StepFailed,
    Unknown,
    WorkflowEngine,
    WorkflowRouter,
    WorkflowSettings,
    tables,
)
from mainstay.workflow._payloads import Payloads
from mainstay.workflow._worker import Worker
from mainstay.workflow.testing import workflows

WAIT = 60.0
QUICK = Retry(attempts=2, wait=FullJitter(0.001, 0.002))


@dataclass
class Written:
    """One write that counts as a whole: alone, a batch, or what joins a transaction."""

    fence: Fence | None
    parts: list[tuple[sa.UpdateBase, list[Mapping[str, Any]]]] = field(default_factory=list)

    async def again(self, database: Database) -> None:
        """Write it once more."""
        if len(self.parts) == 1:
            statement, rows = self.parts[0]
            await database.write(statement, rows, fence=self.fence)
            return
        async with database.batch(fence=self.fence):
            for statement, rows in self.parts:
                await database.write(statement, rows)


class Listening:
    """A view of a database that keeps all that is written through it."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._batch: ContextVar[Written | None] = ContextVar("batch", default=None)
        self.written: list[Written] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._database, name)

    async def write(self, statement: sa.UpdateBase, rows: Any = ({},), **options: Any) -> None:
        """`Database.write`."""
        several: list[Mapping[str, Any]] = [dict(row) for row in ([rows] if isinstance(rows, Mapping) else rows)]
        unit = self._batch.get()
        if unit is None:
            unit = Written(options.get("fence"))
            self.written.append(unit)
        unit.parts.append((statement, several))
        await self._database.write(statement, rows, **options)

    @asynccontextmanager
    async def batch(self, **options: Any) -> AsyncGenerator[None]:
        """`Database.batch`."""
        unit = Written(options.get("fence"))
        token = self._batch.set(unit)
        try:
            async with self._database.batch(**options):
                yield
        finally:
            self._batch.reset(token)
        self.written.append(unit)


@asynccontextmanager
async def worker_on(app: Any, database: Listening, flows: WorkflowRouter) -> AsyncGenerator[None]:
    """A worker whose writes are listened to."""
    drain = Drain()
    worker = Worker(
        database=database,  # type: ignore[arg-type]  # it stands in for a Database
        clock=app.clock,
        settings=WorkflowSettings(lease_seconds=30.0, poll_seconds=0.02, suspend_after_seconds=0.05, max_attempts=2),
        workflows=flows.workflows,
        steps=flows.steps,
        payloads=Payloads(),
        ended=lambda *_: None,
    )
    task = asyncio.create_task(worker.work(drain))
    try:
        yield
    finally:
        drain.begin()
        await task


class Rejected(MainstayError):
    """The other side was not asked."""

    code = "EXT_REJECTED_BY_A_TEST"
    status = 503
    title = "Rejected by a test"
    no_effect = True
    retry_after_seconds = 0.01


def everything() -> tuple[WorkflowRouter, list[Any]]:
    """Workflows that make a worker write all that it ever writes."""
    flows, rejections = WorkflowRouter(), [3]
    question = flows.approval("question", int, may_decide=lambda _asked, _actor: True)
    told, stage = flows.signal("told", int), flows.value("stage", int)

    @flows.step(retry=QUICK)
    async def charge(n: int) -> int:
        await stage.set(n)
        return n

    @charge.compensation
    async def refund(outcome: Done[int] | Unknown, n: int) -> None: ...

    @flows.step(transactional=True, harmless=True)
    async def book(n: int) -> int:
        return n

    @flows.step(transactional=True, harmless=True)
    async def book_slowly(n: int) -> int:
        await asyncio.sleep(60)
        return n

    @flows.step(harmless=True, one_call=True)
    async def rejected(n: int) -> int:
        if rejections[0]:
            rejections[0] -= 1
            raise Rejected
        return n

    @flows.step(harmless=True, on_unknown="park", retry=Retry(attempts=1))
    async def lost(n: int) -> int:
        raise OSError(n)

    @flows.workflow(name="child")
    async def child(n: int) -> int:
        return await charge(n)

    async def publish(key: str | None) -> None: ...

    @flows.workflow(name="sells")
    async def sells(n: int) -> int:
        await stage.set(n)
        with suppress(StepFailed):
            await question.ask(n, timeout_seconds=0.01, escalate_after_seconds=0.0)
        await flows.gather(charge(n), charge(n))
        await book(n)
        await rejected(n)
        await once("publish", publish, transactional=True)
        try:
            async with asyncio.timeout(0.02):
                await book_slowly(n)
        except (StepFailed, TimeoutError):
            await flows.now()
        await flows.sleep(0.2)  # for longer than the run stays in memory
        await told.send("sells", n)
        await told.wait()
        await child(n)
        raise LookupError(n)

    @flows.workflow(name="parks")
    async def parks(n: int) -> int:
        return await lost(n)

    @flows.workflow(name="ends")
    async def ends(n: int) -> int:
        return await charge(n)

    return flows, [sells, parks, ends]


async def snapshot(database: Database) -> list[Any]:
    """All rows of the package."""
    return [
        [tuple(row) for row in await database.read(sa.select(table).order_by(*table.primary_key))]
        for table in tables.SCHEMA.metadata.sorted_tables
    ]


class Undo(Exception):
    """The transaction is rolled back."""


async def put(database: Database, run: object, **state: Any) -> None:
    """Bring the row of a run into a state."""
    await database.write(sa.update(tables.runs).where(tables.runs.c.id == run).values(**state))


async def goes_through(written: Written, database: Database) -> bool:
    """Whether the write is not refused by its fence; nothing of it stays."""
    try:
        async with database.transaction():
            await written.again(database)
            raise Undo
    except (Undo, Conflict):  # an entry that is there already is refused as well, but not for its fence
        return True
    except FenceLost:
        return False


def statements(written: Iterable[Written]) -> set[int]:
    """The identities of the statements."""
    return {id(statement) for each in written for statement, _ in each.parts}


async def test_each_write_of_a_run_is_refused_where_the_run_is_anothers(url: str) -> None:
    """With a stale epoch, a wrong owner or an ended run each write is refused; as the run's own it goes through."""
    flows, defined = everything()
    async with workflows(flows, url=url, serve=False) as app:
        database, engine = app.get(Database), app.get(WorkflowEngine)
        view = Listening(database)
        for workflow in defined:
            await workflow.start(1, id=workflow.name)
        await defined[2].start(2, id="poison")
        await put(database, "poison", attempts=7)  # claimed too often, and parked by the worker
        async with worker_on(app, view, flows):
            for run in ["sells", "ends", "parks", "poison"]:
                await eventually(lambda run=run: settled(engine, run), seconds=WAIT)
        assert await engine.status("sells") is RunStatus.FAILED
        fenced = [each for each in view.written if each.fence is not None and each.fence.on is tables.RUN_FENCE]
        dialect = database.dialect
        expected = [
            tables.APPEND[dialect],
            tables.APPEND_ONCE,
            tables.FORGET,
            tables.START_QUIETLY[dialect],
            tables.RECEIVE,
            tables.FAIL,
            tables.UNDO_ENDED,
            tables.RELEASE,
            tables.PARK,
            tables.END,
            tables.ROUSE,
        ]
        assert {id(statement) for statement in expected} <= statements(fenced), "a kind of write was not seen"
        others = [each for each in view.written if each.fence is None]
        assert statements(others) <= {id(tables.SEND[dialect]), id(tables.ROUSE)}, "a write of a run has no fence"
        for written in fenced:
            await is_refused(written, database)


async def is_refused(written: Written, database: Database) -> None:
    """As the run's own it goes through; with one difference it is refused, and changes nothing."""
    fence = written.fence
    assert fence is not None
    mine = {"epoch": fence.epoch, "worker": fence.owner, "status": "running", "output": None, "failure": None}
    await put(database, fence.id, **mine)
    assert await goes_through(written, database), written
    for other in (
        {"epoch": fence.epoch + 1},
        {"worker": "somebody else"},
        {"worker": None},
        {"status": "completed"},
        {"status": "parked"},
        {"status": "queued"},
    ):
        await put(database, fence.id, **{**mine, **other})
        before = await snapshot(database)
        with pytest.raises(FenceLost):
            await written.again(database)
        assert not await goes_through(written, database), "within a transaction"
        assert await snapshot(database) == before, (written, other)


async def settled(engine: WorkflowEngine, run: str) -> bool:
    """Whether the run has ended or waits for a person."""
    status = await engine.status(run)
    return status.terminal or status.waits_for_a_person
