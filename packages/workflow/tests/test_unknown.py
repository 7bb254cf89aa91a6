"""What may have happened is compensated, also where the last error says that the last thing did not happen."""

import time
from contextlib import asynccontextmanager

import pytest
import sqlalchemy as sa

from mainstay.core import Retry, timeout
from mainstay.database import CommitUnknown, Database
from mainstay.workflow import Done, Unknown, WorkflowFailed, WorkflowRouter
from mainstay.workflow.tables import history
from mainstay.workflow.testing import workflows

_paid = sa.Table("paid", sa.MetaData(), sa.Column("n", sa.Integer), sa.Column("attempt", sa.Integer))


async def test_a_deadline_that_had_passed_inside_a_step_leaves_it_unknown(url):
    """Code that blocked past its deadline after its effect, and then could not begin another, did have that effect."""
    flows = WorkflowRouter()
    log: list[object] = []

    @flows.step(retry=Retry(1), timeout_seconds=0.05)
    async def charge(n: int) -> int:
        log.append("charged")
        time.sleep(0.1)  # noqa: ASYNC251  the loop has no turn in which the deadline could cancel anything
        async with timeout(1):
            return n

    @charge.compensation
    async def refund(outcome: Done[int] | Unknown, n: int) -> None:
        log.append(type(outcome))

    @flows.workflow(name="buy")
    async def buy(n: int) -> int:
        return await charge(n)

    async with workflows(flows, url=url):
        run = await buy.start(1)
        with pytest.raises(WorkflowFailed, match="it may have happened"):
            await run.result(20)
    assert log == ["charged", Unknown]


class _Cut(Exception):
    """The connection is cut off with the commit on its way."""


def _late(db: Database, attempts: int):
    """Let the commit of the next unit of work arrive only before the one after it, or after so many attempts."""
    real = db.transaction
    kept: list[list[dict[str, object]]] = []
    units = 0

    @asynccontextmanager
    async def transaction():
        nonlocal kept, units
        units += 1
        if units == 1:
            try:
                async with real() as session:
                    yield session
                    kept += [
                        [dict(row) for row in (await session.execute(sa.select(table))).mappings()]
                        for table in (_paid, history)
                    ]
                    raise _Cut
            except _Cut:
                msg = "the connection was lost while committing"
                raise CommitUnknown(msg) from None
        if units == attempts:
            async with real() as session:
                for table, rows in zip((_paid, history), kept, strict=True):
                    await session.execute(sa.insert(table), rows)
        async with real() as session:
            yield session

    return transaction


def _paying():
    flows = WorkflowRouter()
    calls: list[object] = []
    databases: list[Database] = []

    @flows.step(transactional=True, retry=Retry(attempts=1))
    async def pay(n: int) -> int:
        calls.append("pay")
        await databases[0].write(sa.insert(_paid), {"n": n, "attempt": len(calls)})
        return len(calls)

    @pay.compensation
    async def refund(outcome: Done[int] | Unknown, n: int) -> None:
        calls.append(type(outcome))

    @flows.workflow(name="pay")
    async def paying(n: int) -> int:
        return await pay(n)

    return flows, paying, calls, databases


async def test_trap_4_a_commit_that_arrives_late_is_not_doubled(url):
    """The next attempt at a transactional step meets the entry of the first one, and takes its result."""
    flows, paying, calls, databases = _paying()
    async with workflows(flows, url=url) as app:
        db = app.get(Database)
        async with db.transaction() as session:
            await (await session.connection()).run_sync(_paid.metadata.create_all)
        databases.append(db)
        db.transaction = _late(db, attempts=2)  # type: ignore[method-assign]  # the one that the engine calls
        run = await paying.start(1)
        assert await run.result(20) == 1
        assert [tuple(row) for row in await db.read(sa.select(_paid))] == [(1, 1)]
    assert calls == ["pay", "pay"]


async def test_trap_4_a_commit_that_never_arrives_is_repeated(url):
    """Only the transaction: the step is never unknown, and the database is no reason to spend its one attempt."""
    flows, paying, calls, databases = _paying()
    async with workflows(flows, url=url) as app:
        db = app.get(Database)
        async with db.transaction() as session:
            await (await session.connection()).run_sync(_paid.metadata.create_all)
        databases.append(db)
        db.transaction = _late(db, attempts=99)  # type: ignore[method-assign]  # the one that the engine calls
        run = await paying.start(1)
        assert await run.result(20) == 2
        assert [tuple(row) for row in await db.read(sa.select(_paid))] == [(1, 2)]
    assert calls == ["pay", "pay"]
