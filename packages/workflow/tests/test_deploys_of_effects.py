"""Releases that call an effect of another package, a start, a signal or a decision with other arguments."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, Field

from mainstay.core import App, bind, once
from mainstay.core.testing import eventually
from mainstay.workflow import RunStatus, WorkflowEngine, WorkflowRouter
from mainstay.workflow.testing import workflows

WAIT = 60.0
KINDS = ["published", "written", "start", "by name", "batch", "send", "decide"]
KEYS = {
    "published": "@publish:1",
    "written": "@write:1",
    "start": "@start:other:1",
    "by name": "@start:other:1",
    "batch": "@start_batch:1",
    "send": "@send:news:1",
    "decide": "@decide:refund:1",
}


class Order(BaseModel):
    """An order, in the release that is replaced."""

    name: str
    tags: set[str] = Field(default_factory=set)


class LaterOrder(BaseModel):
    """The same once a field has been added."""

    name: str
    tags: set[str] = Field(default_factory=set)
    currency: str = "EUR"


class Release:
    """The code of one release: a workflow for each kind, which waits once it has had its effect."""

    def __init__(self, name: str, done: list[str], order: type[Any] = Order) -> None:
        self.flows = flows = WorkflowRouter()
        self.told = told = flows.signal("told", str)
        news = flows.signal("news", order)
        refund = flows.approval("refund", str, may_decide=lambda _asked, _actor: True)
        made: Any = order(name=name, tags={f"tag {number}" for number in range(20)})

        @flows.workflow(name="other")
        async def other(of: order, more: int = 0) -> str:  # type: ignore[valid-type]  # each release has its own
            await told.wait()
            return str(made.name)

        @flows.workflow(name="asks")
        async def asks(of: str) -> bool:
            return (await refund.ask(of)).approved

        async def effect(key: str | None) -> None:
            done.append(key or "")

        acts: dict[str, Callable[[], Awaitable[Any]]] = {
            "published": lambda: once("publish", effect, transactional=False, arguments=lambda: self.given([made])),
            "written": lambda: once("write", effect, transactional=True, arguments=lambda: self.given([made])),
            "start": lambda: other.start(made, id="started"),
            "by name": lambda: engine().start_by_name("other", json.loads(made_json()), id="named"),
            "batch": lambda: engine().start_batch([other.input(made).named("in-a-batch")]),
            "send": lambda: news.send("listens", made),
            "decide": lambda: refund.decide("asks", approved=True, reason=name),
        }

        def engine() -> WorkflowEngine:
            return flows.binding.get()

        def made_json() -> str:
            return json.dumps({"of": {"name": made.name, "tags": sorted(made.tags)}})

        self.asks, self.acts = asks, {kind: self._workflow(kind, acts[kind]) for kind in KINDS}

    def given(self, order: Any) -> object:
        """The arguments with a moment that nobody gave, which is another one each time."""

        class Noted(BaseModel):
            orders: list[Any]
            at: datetime = Field(default_factory=lambda: datetime.now(UTC))

        return Noted(orders=order)

    def _workflow(self, kind: str, act: Callable[[], Awaitable[Any]]) -> Any:
        @self.flows.workflow(name=kind.replace(" ", "-"))
        async def acts() -> str:
            await act()
            return await self.told.wait()

        return acts


async def to_their_wait(shared: str, done: list[str]) -> None:
    """The first release: all kinds have had their effect, and wait."""
    first = Release("a", done)
    async with asyncio.timeout(WAIT), workflows(first.flows, url=shared) as app:
        await first.asks.start("?", id="asks")
        await eventually(lambda: waits_for_a_decision(app), seconds=WAIT)
        for kind in KINDS:
            with bind(actor="eva"):
                await first.acts[kind].start(id=kind.replace(" ", "-"))
        for kind in KINDS:
            await eventually(lambda kind=kind: waiting(app, kind.replace(" ", "-")), seconds=WAIT)


async def waits_for_a_decision(app: App) -> bool:
    """Whether the ask is there."""
    return bool(await app.get(WorkflowEngine).approvals.waiting())


async def waiting(app: App, id: str) -> bool:
    """Whether the run waits for its signal."""
    records = (await app.get(WorkflowEngine).history(id)).records
    return "@signal told:1" in records and records["@signal told:1"].seq > 0


async def test_other_arguments_park(shared: str) -> None:
    """The note names the effect, and nothing of what it was called with; the old code goes on, and repeats nothing."""
    done: list[str] = []
    await to_their_wait(shared, done)
    second = Release("secret", done)
    async with asyncio.timeout(WAIT), workflows(second.flows, url=shared) as app:
        engine = app.get(WorkflowEngine)
        for kind in KINDS:
            await second.told.send(kind.replace(" ", "-"), "go on")
        for kind in KINDS:
            run_id = kind.replace(" ", "-")
            await eventually(lambda run_id=run_id: stopped(app, run_id), seconds=WAIT)
            view = await engine.run(run_id)
            assert view.status is RunStatus.PARKED, kind
            assert f"the function called {KEYS[kind]} with other arguments than its record has" in (view.note or "")
            assert "secret" not in (view.note or "")
    third = Release("a", done)
    async with asyncio.timeout(WAIT), workflows(third.flows, url=shared) as app:
        await ended(app, third, resumed=True)
    assert sorted(done) == ["published:@publish:1", "written:@write:1"]


async def test_what_is_only_written_otherwise_goes_on(shared: str) -> None:
    """A field with a default that was added, a set in another order, and a moment that is filled in."""
    done: list[str] = []
    await to_their_wait(shared, done)
    second = Release("a", done, LaterOrder)
    async with asyncio.timeout(WAIT), workflows(second.flows, url=shared) as app:
        for kind in KINDS:
            await second.told.send(kind.replace(" ", "-"), "go on")
        await ended(app, second, resumed=False)
    assert sorted(done) == ["published:@publish:1", "written:@write:1"]


async def stopped(app: App, id: str) -> bool:
    """Whether the run has ended, or waits for a person."""
    status = await app.get(WorkflowEngine).status(id)
    return status.terminal or status.waits_for_a_person


async def ended(app: App, release: Release, *, resumed: bool) -> None:
    """Every run goes to its end, and each effect was had once."""
    engine = app.get(WorkflowEngine)
    for kind in KINDS:
        if resumed:
            await engine.resume(kind.replace(" ", "-"))
    for kind in KINDS:
        assert await release.acts[kind].handle(kind.replace(" ", "-")).result(WAIT) == "go on"
    assert await release.asks.handle("asks").result(WAIT) is True
    found = {view.id for view in await engine.runs() if view.workflow == "other"}
    assert found == {"started", "named", "in-a-batch"}
