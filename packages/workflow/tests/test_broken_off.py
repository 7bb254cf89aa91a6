"""A run that is parked after many claims says how they ended: by an exception, or by the death of its worker."""

import pytest
import sqlalchemy as sa

from mainstay.database import Database
from mainstay.workflow import RunParked, WorkflowEngine, WorkflowRouter
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
