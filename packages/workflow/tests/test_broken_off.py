"""A run that is parked after many claims says how they ended: by an exception, or by the death of its worker."""

import pytest
import sqlalchemy as sa

from mainstay.database import Database
from mainstay.workflow import Done, RunParked, Unknown, WorkflowEngine, WorkflowRouter, current_step
from mainstay.workflow._run import Run
from mainstay.workflow.tables import runs
from mainstay.workflow.testing import workflows

WAIT = 30.0
flows = WorkflowRouter()


@flows.workflow(name="w")
async def w(n: int) -> int:
    """Do nothing."""
    return n


@pytest.mark.parametrize("error", [RuntimeError("a bug"), BaseExceptionGroup("two", [KeyboardInterrupt()])])
async def test_the_note_names_the_exception_with_which_a_run_broke_off(url, monkeypatch, error):
    """The worker lives, so the note does not say that it died; it shows the last exception."""

    async def breaks_off(_run):
        raise error

    monkeypatch.setattr(Run, "execute", breaks_off)
    async with workflows(flows, url=url, max_attempts=2) as app:
        run = await w.start(1, id="r")
        with pytest.raises(RunParked, match=f"claimed 2 times .* broke off did so with {type(error).__name__}: "):
            await run.result(WAIT)
        view = await app.get(WorkflowEngine).run("r")
        assert view.note is not None
        assert "died" not in view.note


async def test_a_death_after_a_break_does_not_hide_it(url):
    """A run of a dead worker keeps what is on record of an earlier claim; only without that each claim was a death."""
    gone = {"status": "running", "worker": "mainstay-workflow gone", "attempts": 2, "epoch": 2}
    async with workflows(flows, url=url, max_attempts=2) as app:
        database = app.get(Database)
        async with database.transaction():  # before the worker sees them
            for name in ("died", "broke"):
                await w.start(1, id=name)
            await database.write(sa.update(runs).values(**gone))
            other = {"note": "it broke off with X", "worker": "mainstay-workflow other"}  # each died alone
            await database.write(sa.update(runs).where(runs.c.id == "broke").values(**other))
        for name, note in (("died", "its worker died each time"), ("broke", "it broke off with X")):
            with pytest.raises(RunParked, match=note):
                await w.handle(name).result(WAIT)


REFUSED = {
    "sqlite": (
        (
            "create trigger refused before insert on mainstay_workflow_history when new.step = 'charge:1' and "
            "new.kind = 'done' begin select raise(abort, 'refused'); end"
        ),
        "drop trigger refused",
    ),
    "postgresql": (
        "alter table mainstay_workflow_history add constraint refused check (step <> 'charge:1' or kind <> 'done')",
        "alter table mainstay_workflow_history drop constraint refused",
    ),
}


async def test_a_record_that_the_database_refuses_for_good_parks_the_run(url):
    """At the first claim, saying why; and the step that may have happened is attempted again under its key."""
    flows = WorkflowRouter()
    keys: list[str] = []

    @flows.step(harmless=True)
    async def charge() -> None:
        keys.append(current_step().key)

    @flows.workflow(name="sell")
    async def sell() -> str:
        await charge()
        return "sold"

    async with workflows(flows, url=url) as app:
        database, engine = app.get(Database), app.get(WorkflowEngine)
        refuse, accept = REFUSED[database.dialect]
        async with database.transaction() as session:
            await session.execute(sa.text(refuse))
        run = await sell.start(id="one")
        with pytest.raises(RunParked, match="refused"):
            await run.result(WAIT)
        assert ((await engine.run("one")).attempts, keys) == (1, ["one:charge:1"])
        async with database.transaction() as session:
            await session.execute(sa.text(accept))
        await engine.resume("one")
        assert await run.result(WAIT) == "sold"
    assert keys == ["one:charge:1"] * 2


async def test_gathers_that_are_nested_too_deep_park_the_run(url):
    """On every database, before the first effect whose record, or that of its compensation, would not fit."""
    flows = WorkflowRouter()
    charged: list[str] = []

    @flows.step()
    async def charge() -> None:
        charged.append(current_step().key)

    @charge.compensation
    async def refund(outcome: Done[None] | Unknown) -> None: ...

    async def nested(depth: int) -> None:
        await (flows.gather(nested(depth - 1)) if depth else charge())

    @flows.workflow(name="nest")
    async def nest(depth: int) -> None:
        await nested(depth)

    async with workflows(flows, url=url):
        await (await nest.start(60, id="one")).result(WAIT)
        run = await nest.start(71, id="two")
        with pytest.raises(RunParked, match="is longer than 287 characters: nest fewer gathers"):
            await run.result(WAIT)
    assert len(charged) == 1
