"""What only goes wrong where packages meet: traps that others fell into, each a test that a naive joint would fail."""

import asyncio
from collections.abc import Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from mainstay.audit import AuditModule, AuditTrail
from mainstay.audit import tables as audit_tables
from mainstay.audit.testing import settings as audit_settings
from mainstay.audit.testing import written
from mainstay.circuit_breaker import BreakerConfig, CircuitBreaker, CircuitOpen, State
from mainstay.core import App, Retry, bind, current
from mainstay.core.testing import VirtualClock, eventually
from mainstay.database import Database, DatabaseModule, DatabaseSettings, upgrade
from mainstay.database.schema import SCHEMA as LEASES
from mainstay.events import Event, EventRouter, EventsModule, EventsSettings
from mainstay.events.tables import SCHEMA as EVENTS
from mainstay.workflow import WorkflowFailed, WorkflowModule, WorkflowRouter, WorkflowSettings
from mainstay.workflow.testing import workflows

FIRST: ContextVar[str] = ContextVar("first", default="nobody's")


class Told(Event, type="traps.told", key="name"):
    name: str


def _database(url: str, **values: Any) -> DatabaseModule:
    return DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url), **values))


async def test_prototype_05_nothing_that_lives_on_carries_the_context_of_who_started_it() -> None:
    """Recorder, consumers, workers and sealers outlive the first publisher, and know nothing of him."""
    events, flows, trail = EventRouter(), WorkflowRouter(), AuditTrail()
    seen: list[tuple[str, str | None, str | None]] = []

    @events.on(Told, group="traps")
    async def hear(_event: Told) -> None:
        seen.append((FIRST.get(), current().correlation_id, current().actor))

    @flows.step(harmless=True)
    async def tell(name: str) -> str:
        seen.append((FIRST.get(), current().correlation_id, current().actor))
        return name

    @flows.workflow(name="traps")
    async def telling(name: str) -> str:
        await events.publish(Told(name=name))
        return await tell(name)

    app = App(
        _database("sqlite+aiosqlite:///:memory:"),
        EventsModule.for_root(EventsSettings()),
        EventsModule.for_feature(events),
        WorkflowModule.for_root(WorkflowSettings(poll_seconds=0.05)),
        WorkflowModule.for_feature(flows),
        AuditModule.for_root(audit_settings()),
        AuditModule.for_feature(trail),
    )
    began_with: dict[asyncio.Task[Any], str] = {}

    def factory(loop: asyncio.AbstractEventLoop, work: Any, *, context: Context | None = None) -> asyncio.Task[Any]:
        task = asyncio.Task(work, loop=loop, context=context)
        began_with[task] = (copy_context() if context is None else context).get(FIRST, "nobody's")
        return task

    async def first() -> None:
        """Starts everything, and is the first to publish, write, record and start a run."""
        FIRST.set("the first one's")
        with bind(correlation_id="c-first", actor="ann"):
            await running.__aenter__()
            await events.publish(Told(name="a"))
            await trail.write("told")
            await (await telling.start("b", id="b")).result(20)

    running = app.running(serve=True)
    loop = asyncio.get_running_loop()
    loop.set_task_factory(factory)
    try:
        await first_task(first())
        await eventually(lambda: len(seen) == 3, what="the first one's events and step")
        # What travels with an event and a run is the context that is written with it; nothing else.
        assert {entry[1:] for entry in seen} == {("c-first", "ann")}
        seen.clear()
        await events.publish(Told(name="c"))
        await (await telling.start("d", id="d")).result(20)
        await eventually(lambda: len(seen) == 3, what="the second one's")
        assert all(entry[2] is None and entry[1] != "c-first" for entry in seen)
        living = [task for task in asyncio.all_tasks() if task in began_with]
        assert len(living) > 5
        assert [task.get_name() for task in living if began_with[task] != "nobody's"] == []
    finally:
        loop.set_task_factory(None)
        await running.__aexit__(None, None, None)


async def first_task(work: Coroutine[Any, Any, None]) -> None:
    """Run in a task of its own, whose context ends with it."""
    await asyncio.create_task(work)


async def test_prototype_07_step_timeouts_around_a_breaker_open_its_circuit() -> None:
    """Twenty steps give up on a provider that hangs: that is its failure, not twenty callers who went away."""
    flows = WorkflowRouter()
    payments = CircuitBreaker("hanging payments", BreakerConfig(minimum_calls=10, failure_ratio=0.5, break_seconds=60))
    clock = VirtualClock()
    reached = 0

    @flows.step(retry=Retry(attempts=1), timeout_seconds=10, harmless=True)
    @payments
    async def charge(n: int) -> int:
        nonlocal reached
        reached += 1
        await asyncio.Event().wait()
        return n

    @flows.workflow(name="pay")
    async def pay(n: int) -> int:
        return await charge(n)

    async with workflows(flows, clock=clock):
        runs = [await pay.start(n) for n in range(20)]
        await eventually(lambda: reached == 20, what="all calls at the provider")
        await clock.advance(10)
        for run in runs:
            with pytest.raises(WorkflowFailed, match="DeadlineExceeded"):
                await run.result(20)
        assert payments.state is State.OPEN
        with pytest.raises(CircuitOpen):
            await charge.function(21)
        assert reached == 20


async def test_observability_02_an_audit_entry_takes_no_second_connection(postgres: str) -> None:
    """With one connection in the pool, and many units of work that queue for it, each one's entry goes with it."""
    await upgrade(postgres, [LEASES, EVENTS, audit_tables.SCHEMA])
    trail, events = AuditTrail(), EventRouter()
    app = App(
        _database(postgres, pool_size=1, pool_timeout_seconds=5.0),
        EventsModule.for_root(EventsSettings()),
        EventsModule.for_feature(events),
        AuditModule.for_root(audit_settings()),
        AuditModule.for_feature(trail),
    )
    async with app:
        database = app.get(Database)

        @trail.record("traps.cancelled", resource="order/1")
        async def cancel(n: int) -> None:
            await events.publish(Told(name=str(n)))
            await trail.write("traps.inner")
            if n % 2:
                raise ZeroDivisionError

        async def unit(n: int) -> None:
            async with database.transaction() as session:
                await session.execute(sa.text("SELECT 1"))  # the connection is ours now, and there is no other
                await cancel(n)

        async with asyncio.timeout(20):
            ends = await asyncio.gather(*map(unit, range(10)), return_exceptions=True)
            assert [type(end) for end in ends] == [type(None), ZeroDivisionError] * 5

            async def count() -> int:
                return len(await written(database, "traps.cancelled"))

            while await count() < 10:  # those of the failures have transactions of their own  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        entries = [(entry.action, entry.outcome) for entry in await written(database)]
        assert sorted(set(entries)) == [
            ("traps.cancelled", "failed"), ("traps.cancelled", "succeeded"), ("traps.inner", "succeeded"),
        ]  # fmt: skip
        assert len(entries) == 15
