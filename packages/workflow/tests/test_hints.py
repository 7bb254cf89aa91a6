"""Processes tell each other what is new: none waits for its next look, and a lost hint costs no more than that look."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from mainstay.core import App
from mainstay.core.testing import eventually
from mainstay.database import Database
from mainstay.workflow import RunStatus, WorkflowEngine, WorkflowFailed, WorkflowRouter, _results
from mainstay.workflow.testing import workflows

WAIT = 30.0
LATE = 60.0  # the next look, after the test has failed


def service(gate: asyncio.Event) -> tuple[WorkflowRouter, Any, Any]:
    """Routers belong to one App, so each App of a test has its own."""
    flows = WorkflowRouter()
    go = flows.signal("go", int)

    @flows.step(harmless=True, cancellable=True)
    async def step(n: int) -> int:
        await gate.wait()
        return n

    @flows.workflow(name="w")
    async def w(n: int) -> int:
        if n == 0:
            return await go.wait()
        return await step(n)

    return flows, w, go


@asynccontextmanager
async def starter_and_worker(url: str, gate: asyncio.Event) -> AsyncGenerator[tuple[App, Any, Any, App]]:
    """An App that only starts runs and waits for them, and another that executes them and looks very seldom."""
    flows, w, go = service(gate)
    async with (
        workflows(flows, url=url, serve=False) as starter,
        workflows(service(gate)[0], url=url, poll_seconds=LATE, lease_seconds=3 * LATE) as worker,
    ):
        for app in (starter, worker):
            with app.get(Database).listen("mainstay_workflow_ended", lambda _: None):
                await eventually(lambda app=app: app.get(Database).hears_others, seconds=WAIT)
        await eventually(lambda: worker.get(WorkflowEngine).worker.serving, seconds=WAIT)
        yield starter, w, go, worker


@pytest.fixture(autouse=True)
def looks_at_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for a result looks once, and then relies on hints."""
    monkeypatch.setattr(_results, "_FIRST_LOOK_SECONDS", LATE)
    monkeypatch.setattr(_results, "_SLOWEST_LOOK_SECONDS", LATE)


async def test_starts_signals_and_results_are_told(postgres: str) -> None:
    """A run begins when it is started, goes on when its signal comes, and its end is known, each in another process."""
    gate = asyncio.Event()
    gate.set()
    async with asyncio.timeout(WAIT), starter_and_worker(postgres, gate) as (app, w, go, _):
        assert await (await w.start(3)).result() == 3
        waits = await w.start(0, id="waits")
        result = asyncio.create_task(waits.result())
        await go.send("waits", 5)
        assert await result == 5
        engine = app.get(WorkflowEngine)
        many = await engine.start_batch(w.input(n) for n in range(1, 200))
        assert await asyncio.gather(*(run.result() for run in many)) == list(range(1, 200))
        assert await engine.ended(await engine.start_by_name("w", {"n": 7}), WAIT) == "7"


async def test_a_cancellation_is_told(postgres: str) -> None:
    """The worker that executes the run looks at once, and not at its next look around."""
    gate = asyncio.Event()
    async with asyncio.timeout(WAIT), starter_and_worker(postgres, gate) as (app, w, _, worker):
        run = await w.start(1, id="r")
        await eventually(lambda: worker.get(WorkflowEngine).worker.executes("r"), seconds=WAIT)
        result = asyncio.create_task(run.result())
        await app.get(WorkflowEngine).cancel("r")
        with pytest.raises(WorkflowFailed):
            await result
        assert await run.status() is RunStatus.CANCELLED


async def test_lost_hints_cost_the_next_look(postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any, as behind a pooler or on SQLite, looking finds everything."""
    monkeypatch.setattr(_results, "_FIRST_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(Database, "notify", lambda *_: None)
    gate = asyncio.Event()
    gate.set()
    flows, w, _ = service(gate)
    async with (
        asyncio.timeout(WAIT),
        workflows(flows, url=postgres, serve=False),
        workflows(service(gate)[0], url=postgres, poll_seconds=0.05),
    ):
        assert await (await w.start(3)).result() == 3
