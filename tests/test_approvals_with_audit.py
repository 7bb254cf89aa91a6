"""A decision and its audit entry commit or roll back together, though neither package knows of the other."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import sqlalchemy as sa

from mainstay.audit import AuditModule, AuditTrail, Entry
from mainstay.audit import tables as audit_tables
from mainstay.audit.tables import SCHEMA
from mainstay.audit.testing import settings as audit_settings
from mainstay.core import App, Feature, Module, bind
from mainstay.core.testing import eventually
from mainstay.database import Database
from mainstay.workflow import Approval, DecisionAttempt, DecisionDenied, Handle, WorkflowEngine, WorkflowRouter
from mainstay.workflow.testing import workflows

WAIT = 30.0


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Any) -> str:
    """The URL of a fresh database."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'audited.db'}"
    return str(request.getfixturevalue("postgres"))


@asynccontextmanager
async def asking(url: str, broken: list[str]) -> AsyncGenerator[tuple[App, Approval[int], Handle[str]], None]:
    """An App with a trail, in which a run asks; `broken` holds a word while the hook fails after its entry."""
    flows, trail = WorkflowRouter(), AuditTrail()

    async def record(attempt: DecisionAttempt[int]) -> None:
        await trail.write(
            "refund.decided",
            resource=f"run/{attempt.asked.run_id}",
            outcome="succeeded" if attempt.allowed else "denied",
            detail={"approved": attempt.approved, "reason": attempt.reason, "amount": attempt.asked.question},
        )
        if broken:
            raise LookupError(broken)

    refund = flows.approval("refund", int, may_decide=lambda _asked, actor: actor == "ann", on_decision=record)

    @flows.workflow(name="pay-back")
    async def pay_back(amount: int) -> str:
        decision = await refund.ask(amount)
        return f"{decision.approved} {decision.by}"

    modules: list[Module[Any, Any] | Feature] = [AuditModule.for_root(audit_settings()), AuditModule.for_feature(trail)]
    async with workflows(flows, url=url, modules=modules, schemas=[SCHEMA]) as app:
        run = await pay_back.start(700, id="r")
        await eventually(app.get(WorkflowEngine).approvals.waiting, seconds=WAIT)
        yield app, refund, run


async def entries(app: App) -> list[tuple[str, str, bool]]:
    """Outcome, actor and decision of the entries about the decision, sealed or not."""
    found: dict[Any, Entry] = {}
    for table in (audit_tables.pending, audit_tables.log):  # an entry moves from the first to the second
        for row in await app.get(Database).read(sa.select(table.c.entry_id, table.c.data)):
            found[row.entry_id] = Entry.from_bytes(bytes(row.data))
    return sorted(
        (entry.outcome, str(entry.actor), bool(entry.detail["approved"]))
        for entry in found.values()
        if entry.action == "refund.decided"
    )


async def test_decision_and_entry_share_their_commit(url: str) -> None:
    """Neither is there without the other; attempts of people who may not decide are there by themselves."""
    broken: list[str] = []
    async with asking(url, broken) as (app, refund, run):
        with bind(actor="eve"), pytest.raises(DecisionDenied):
            await refund.decide("r", approved=True)
        assert await entries(app) == [("denied", "eve", True)]
        with bind(actor="ann"):
            broken.append("after the entry")
            with pytest.raises(LookupError):
                await refund.decide("r", approved=True, reason="once")
            broken.clear()
            with pytest.raises(KeyError):
                async with app.get(Database).transaction():
                    await refund.decide("r", approved=True, reason="rolled back")
                    raise KeyError
            assert await entries(app) == [("denied", "eve", True)]
            assert len(await app.get(WorkflowEngine).approvals.waiting()) == 1
            await refund.decide("r", approved=False, reason="in the end")
        assert await run.result(WAIT) == "False ann"
        assert await entries(app) == [("denied", "eve", True), ("succeeded", "ann", False)]
