"""With very many ended and very many sleeping runs in the tables, every look at them goes through an index."""

import re
from collections.abc import AsyncGenerator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from mainstay.database import Database
from mainstay.workflow import RunStatus, WorkflowRouter
from mainstay.workflow._ended import EXPIRE, FROM_THE_FIRST, UNCLAIMED, Ended
from mainstay.workflow.engine import listed
from mainstay.workflow.tables import (
    CHILD,
    CLAIM,
    COMPANY,
    FIND,
    NEXT_SIGNAL,
    OF_WORKER,
    OPEN_ASKS,
    PARKED,
    ROUSE,
    STATES,
    TAKE_OVER,
    WORKERS,
    Claims,
    asks,
    runs,
    signals,
)
from mainstay.workflow.testing import workflows

ENDED, SLEEPING = 50_000, 20_000
CLAIMS = Claims({("work", 1): None, ("other", 2): 60.0})
ENDS = Ended({RunStatus.COMPLETED: 1e6, RunStatus.FAILED: 1e6})

LOOKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "what waits": (CLAIMS.waiting, {}),
    "the next that is due": (CLAIMS.next_due, {}),
    "a claim": (CLAIMS.claim, {"owner": "me", "most": 200}),
    "a claim of suspects": (CLAIMS.claim_suspects, {"owner": "me", "most": 200, "together": 4}),
    "runs of unknown workflows": (CLAIMS.unknown, {}),
    "workers": (WORKERS, {}),
    "those that wait for a person": (PARKED, {}),
    "the runs of a worker": (OF_WORKER, {"owner": "me"}),
    "the company of a dead worker": (COMPANY, {"dead": "me"}),
    "a take-over": (TAKE_OVER, {"dead": "me", "most": 1_000, "together": 3}),
    "a run": (FIND, {"run": "r7"}),
    "whose claim it is": (CLAIM, {"run": "r7"}),
    "results": (STATES, {"ids": [f"r{n}" for n in range(20)]}),
    "a child": (CHILD, {"run": "r7", "child": "r8"}),
    "news for a run": (ROUSE, {"run": "r7"}),
    "a signal": (NEXT_SIGNAL, {"run": "r7", "name": "told"}),
    "signals without a run": (UNCLAIMED, {"kept_seconds": 60.0, "most": 200}),
    "their deletion": (EXPIRE, {"kept_seconds": 60.0, "most": 200}),
    "ended runs": (ENDS.locked(RunStatus.COMPLETED), {**FROM_THE_FIRST, "most": 200}),
    "the newest runs": (listed(None, 50), {}),
    **{f"the newest that are {status}": (listed(status, 50), {}) for status in RunStatus},
    "what runs ask people": (OPEN_ASKS, {"most": 50}),
    "ended runs, later": (ENDS.of[RunStatus.FAILED], {"after": 7.5, "after_id": "r7", "most": 200}),
}


def row(n: int, **values: Any) -> dict[str, Any]:
    """A run; by default one that has ended."""
    return {
        "id": f"r{n}",
        "workflow": "work",
        "version": 1,
        "status": "completed" if n % 100 else "failed",
        "epoch": 1,
        "attempts": 1,
        "progress": 0,
        "wake_at": 0.0,
        "cancel_requested": False,
        "input": "{}",
        "context": "{}",
        "created_at": float(n),
        "ended_at": float(n),
        "parent": f"r{n + 1}" if n % 7 == 0 else None,
        "parent_generation": 1 if n % 7 == 0 else None,
        **values,
    }


@pytest.fixture(scope="module")
def flows() -> WorkflowRouter:
    """Nothing: what is looked at is written by hand."""
    return WorkflowRouter()


@pytest.fixture
async def session(url: str, flows: WorkflowRouter) -> AsyncGenerator[AsyncSession, None]:
    """A unit of work on a database with many runs."""
    async with workflows(flows, url=url, serve=False) as app:
        database = app.get(Database)
        sleeping: dict[str, Any] = {"status": "queued", "ended_at": None, "wake_at": 1e11}
        for first in range(0, ENDED + SLEEPING, 5_000):
            values = sleeping if first >= ENDED else {}
            await database.write(sa.insert(runs), [row(n, **values) for n in range(first, first + 5_000)])
        few = [row(ENDED + SLEEPING + n, status="queued", ended_at=None) for n in range(20)]
        few += [row(ENDED + SLEEPING + 20 + n, status="running", worker="me", ended_at=None) for n in range(20)]
        await database.write(sa.insert(runs), few)
        sent = [
            {"run_id": f"r{n}", "id": "m", "name": "told", "body": "1", "received_by": "@signal told:1" if n else None}
            for n in range(20_000)
        ]
        await database.write(sa.insert(signals), sent)
        asked = [
            {"run_id": f"r{n}", "id": "a", "name": "ask", "place": "ask:1", "question": "1", "open": n < 20}
            for n in range(20_000)
        ]
        await database.write(sa.insert(asks), asked)
        async with database.transaction() as session:
            await session.execute(sa.text("ANALYZE"))
            yield session


async def plan_of(session: AsyncSession, statement: Any, values: dict[str, Any]) -> str:
    """How the database executes a statement, as it is sent."""
    connection = await session.connection()
    sent: list[tuple[str, Any]] = []

    def keep(_connection: Any, _cursor: Any, text: str, parameters: Any, *_rest: Any) -> None:
        sent.append((text, parameters))

    engine = connection.sync_connection.engine  # type: ignore[union-attr]  # it is open
    sa.event.listen(engine, "before_cursor_execute", keep)
    try:
        await session.execute(statement, values)
    finally:
        sa.event.remove(engine, "before_cursor_execute", keep)
    explain = "EXPLAIN " if connection.dialect.name == "postgresql" else "EXPLAIN QUERY PLAN "
    found = await connection.exec_driver_sql(explain + sent[-1][0], sent[-1][1])
    return "\n".join(str(line[-1]) for line in found)


async def test_every_look_goes_through_an_index(session: AsyncSession) -> None:
    """No statement of the loops and of those who wait reads a whole table of runs or signals."""
    plans = {what: await plan_of(session, *look) for what, look in LOOKS.items()}
    tables = "runs|signals|asks"
    whole = re.compile(rf"Seq Scan on mainstay_workflow_({tables})|SCAN (?!.* USING )\S*_?({tables}|parents|children)")
    assert {what: plan for what, plan in plans.items() if whole.search(plan)} == {}


async def test_runs_that_sleep_cost_a_look_nothing(session: AsyncSession) -> None:
    """What is due is found by its time in the index, without a look at what is due later."""
    for what in ("what waits", "the next that is due", "a claim"):
        plan = await plan_of(session, *LOOKS[what])
        # Each time that the queue is read; what is claimed is then updated by its id.
        for node in re.findall(
            r".*USING INDEX mainstay_workflow_runs_queue.*|.* using mainstay_workflow_runs_queue.*\n.*", plan
        ):
            assert re.search(r"Index Cond: \(\(?wake_at|\(wake_at[<>]\?\)", node), f"{what}:\n{plan}"


async def test_a_list_is_read_in_its_order(session: AsyncSession) -> None:
    """So many rows as are listed are read of those that there are, and what is sorted is no more than that."""
    for status in (None, *RunStatus):
        plan = await plan_of(session, listed(status, 50), {})
        read = re.findall(r"_listed[^\n]*", plan)
        assert read, f"{status}:\n{plan}"
        if session.get_bind().dialect.name == "postgresql":
            sorted_rows = [int(rows) for rows in re.findall(r"Sort  \(cost=\S+ rows=(\d+)", plan)]
            assert all(rows <= 50 * len(read) for rows in sorted_rows), f"{status}:\n{plan}"
        else:  # those of each state are found in their order
            assert plan.count("USE TEMP B-TREE FOR ORDER BY") == 1, plan


async def test_a_claim_looks_once_into_each_history(session: AsyncSession) -> None:
    """How far a run got is asked for those that are claimed, and of each once."""
    plan = await plan_of(session, *LOOKS["a claim"])
    assert len(re.findall(r"(?:SEARCH| on) mainstay_workflow_history", plan)) == 1, plan
    assert re.search(r"runs_pkey|autoindex_mainstay_workflow_runs_1 \(id=\?\)", plan), plan
