"""A saga that publishes is tested as it runs: with the other modules of its App, and with a death at every moment."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from fastapi import FastAPI

from mainstay.audit import AuditModule, AuditTrail
from mainstay.audit.testing import settings as audit_settings
from mainstay.audit.testing import written
from mainstay.core import App, Feature, MainstayError, Module
from mainstay.core.testing import eventually
from mainstay.database import Database
from mainstay.events import Event, EventPublisher, EventRouter, EventsModule, EventsSettings
from mainstay.observability.fastapi import instrument
from mainstay.workflow import (
    ApprovalConflict,
    DecisionDenied,
    Handle,
    RunConflict,
    RunNotFound,
    RunStateError,
    RunStatus,
    Signal,
    WorkflowEngine,
    WorkflowRouter,
)
from mainstay.workflow.testing import explore, workflows

events, flows = EventRouter(), WorkflowRouter()


class Sold(Event, type="shop.sold", version="1.0", key="n"):
    """Something was sold."""

    n: int


@flows.step(harmless=True)
async def count(n: int) -> int:
    """Count."""
    return n + 1


@flows.workflow(name="sell-and-tell")
async def sell(n: int) -> int:
    """Sell, and tell."""
    counted = await count(n)
    await events.publish(Sold(n=counted))
    return await count(counted)


def others() -> list[Module[Any, Any] | Feature]:
    """What the App has besides."""
    return [EventsModule.for_root(EventsSettings(transport="sql")), EventsModule.for_feature(events)]


async def test_a_saga_that_publishes_dies_at_every_moment() -> None:
    """Whenever its worker dies, the event is in the log once."""

    async def start(_app: App) -> Handle[int]:
        return await sell.start(1, id="r")

    async def check(run: Handle[int], app: App) -> None:
        assert await run.status() is RunStatus.COMPLETED
        (row,) = await app.get(Database).read(sa.text("select count(*) from mainstay_events_log"))
        assert row[0] == 1

    assert await explore(flows, start=start, check=check, modules=others) >= 8


async def test_a_failed_check_says_at_which_moment() -> None:
    """The note names the write that the worker died at."""

    async def start(_app: App) -> Handle[int]:
        return await sell.start(1, id="r")

    async def check(_run: Handle[int], _app: App) -> None:
        raise AssertionError

    with pytest.raises(AssertionError) as caught:
        await explore(flows, start=start, check=check, modules=others)
    assert caught.value.__notes__ == ["the worker died just before write 1 became durable"]


async def test_workflows_takes_the_modules_of_the_service() -> None:
    """What the saga publishes is published, with the router of the service."""
    async with workflows(flows, modules=others()) as app:
        assert await (await sell.start(1)).result(10) == 3
        assert app.get(EventPublisher) is not None


@pytest.mark.parametrize("changed", ["the event", "the entry"])
async def test_a_release_that_publishes_or_audits_something_else_parks(tmp_path: Path, changed: str) -> None:
    """What is on record is not what the function says now: a person decides, and the old code ends the run."""

    @asynccontextmanager
    async def release(event: int, entry: int) -> AsyncGenerator[tuple[App, Signal[str], Any]]:
        publishes, trail, flows = EventRouter(), AuditTrail(), WorkflowRouter()
        told = flows.signal("told", str)

        @flows.workflow(name="tells")
        async def tells() -> str:
            await publishes.publish(Sold(n=event))
            await trail.write("shop.sold", resource="shop/1", detail={"n": entry})
            return await told.wait()

        modules: list[Module[Any, Any] | Feature] = [
            EventsModule.for_root(EventsSettings(transport="sql")),
            EventsModule.for_feature(publishes),
            AuditModule.for_root(audit_settings()),
            AuditModule.for_feature(trail),
        ]
        async with workflows(flows, url=f"sqlite+aiosqlite:///{tmp_path / 'shop.db'}", modules=modules) as app:
            yield app, told, tells

    async def reached(app: App) -> bool:
        return "@signal told:1" in (await app.get(WorkflowEngine).history("r")).records

    async def parked(app: App) -> bool:
        return await app.get(WorkflowEngine).status("r") is RunStatus.PARKED

    async with release(1, 1) as (app, _, tells):
        await tells.start(id="r")
        await eventually(lambda: reached(app), seconds=30)
    async with release(*((2, 1) if changed == "the event" else (1, 2))) as (app, told, _):
        await told.send("r", "done")
        await eventually(lambda: parked(app), seconds=30)
        place = "@publish:shop.sold:1" if changed == "the event" else "@audit:shop.sold:1"
        said = f"the function called {place} with other arguments than its record has"
        assert said in str((await app.get(WorkflowEngine).run("r")).note)
    async with release(1, 1) as (app, _, tells):
        await app.get(WorkflowEngine).resume("r")
        assert await tells.handle("r").result(30) == "done"
        (row,) = await app.get(Database).read(sa.text("select count(*) from mainstay_events_log"))
        assert row[0] == 1
        assert [entry.detail for entry in await written(app.get(Database), "shop.sold")] == [{"n": 1}]


class Owed(MainstayError):
    """A reader owes a fee."""

    code = "BIZ_FEES_OWED"
    status = 402
    title = "Fees owed"
    public_message = "Pay what you owe first."


async def test_a_run_that_fails_is_the_problem_of_what_failed_it() -> None:
    """Over HTTP the code and the message of an error in a step arrive, through a step, a run and its parent."""
    router = WorkflowRouter()

    @router.step(harmless=True, failed_on=(Owed,))
    async def check(n: int) -> int:
        msg = f"reader {n}"
        raise Owed(msg)

    @router.workflow(name="lend")
    async def lend(n: int) -> int:
        return await check(n)

    @router.workflow(name="lend-many")
    async def lend_many(n: int) -> int:
        return await lend(n)

    api = FastAPI()

    @api.post("/loans/{n}")
    async def loan(n: int, *, many: bool) -> int:
        return await (await (lend_many if many else lend).start(n)).result(60.0)

    instrument(api)
    async with (
        workflows(router),
        httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://shop") as client,
    ):
        for many in ("false", "true"):
            response = await client.post(f"/loans/7?many={many}")
            problem = response.json()
            assert (response.status_code, problem["code"]) == (402, "BIZ_FEES_OWED")
            assert problem["detail"] == "Pay what you owe first."
            assert "reader 7" not in response.text


@pytest.mark.parametrize(
    ("error", "status"),
    [(RunNotFound, 404), (RunStateError, 409), (RunConflict, 409), (ApprovalConflict, 409), (DecisionDenied, 403)],
)
def test_what_an_engine_refuses_has_its_status_over_http(error: type[MainstayError], status: int) -> None:
    """A run that is there and cannot be resumed is no run that is missing."""
    assert error("refused").status == status
