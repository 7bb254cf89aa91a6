"""A saga that publishes is tested as it runs: with the other modules of its App, and with a death at every moment."""

from typing import Any

import pytest
import sqlalchemy as sa

from mainstay.core import App, Feature, MainstayError, Module
from mainstay.database import Database
from mainstay.events import Event, EventPublisher, EventRouter, EventsModule, EventsSettings
from mainstay.observability.errors import status_of
from mainstay.workflow import (
    ApprovalConflict,
    DecisionDenied,
    Handle,
    RunConflict,
    RunNotFound,
    RunStateError,
    RunStatus,
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


@pytest.mark.parametrize(
    ("error", "status"),
    [(RunNotFound, 404), (RunStateError, 409), (RunConflict, 409), (ApprovalConflict, 409), (DecisionDenied, 403)],
)
def test_what_an_engine_refuses_has_its_status_over_http(error: type[MainstayError], status: int) -> None:
    """A run that is there and cannot be resumed is no run that is missing."""
    assert status_of(error("refused")) == status
