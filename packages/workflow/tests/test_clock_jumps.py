"""A worker whose wall clock jumps: durations are monotonic, and what is stored are the database's times."""

import time
from datetime import datetime, timedelta, tzinfo
from itertools import cycle

import pytest
import sqlalchemy as sa

from mainstay.core import FullJitter, Retry
from mainstay.core import clock as clocks
from mainstay.database import Database
from mainstay.workflow import StepFailed, WorkflowEngine, WorkflowRouter
from mainstay.workflow.tables import history
from mainstay.workflow.testing import workflows

WAIT = 30.0
DAY = 86_400.0


async def test_a_wall_clock_that_jumps_changes_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sleeps, deadlines, leases and retries last as long as ever, and no stored time is off."""
    flows, jumps, tries = WorkflowRouter(), cycle([DAY, -DAY, 30 * DAY, -30 * DAY]), [2]
    told = flows.signal("told", int)
    real, off = time.time, [0.0]

    class Jumping(datetime):
        """The wall clock of this process."""

        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Jumping":
            return cls.fromtimestamp(real() + off[0], tz)

    monkeypatch.setattr(clocks, "datetime", Jumping)
    monkeypatch.setattr(time, "time", lambda: real() + off[0])

    @flows.step(harmless=True, retry=Retry(attempts=3, wait=FullJitter(0.01)), timeout_seconds=20)
    async def jump(n: int) -> int:
        off[0] = next(jumps)
        if tries[0]:
            tries[0] -= 1
            raise OSError(n)
        return n

    @flows.workflow(name="w", timeout_seconds=3_600)
    async def w(n: int) -> list[float]:
        lasted = []
        for wait in ("sleep", "sleep_until", "signal"):
            await jump(n)
            began, clock = await flows.now(), time.monotonic()
            if wait == "sleep":
                await flows.sleep(0.2)
            elif wait == "sleep_until":
                await flows.sleep_until(began + timedelta(seconds=0.2))
            else:
                with pytest.raises(StepFailed, match="no signal"):
                    await told.wait(timeout_seconds=0.2)
            await jump(n)
            lasted += [time.monotonic() - clock, (await flows.now() - began).total_seconds()]
        return lasted

    async with workflows(flows, url=url) as app:
        began = real()
        run = await w.start(1, id="r")
        lasted = await run.result(WAIT)
        ended = real()
        assert min(lasted) >= 0.15
        assert max(lasted) < WAIT
        view = await app.get(WorkflowEngine).run("r")
        times = [row.at for row in await app.get(Database).read(sa.select(history.c.at))]
        times += [view.created_at.timestamp(), view.ended_at.timestamp() if view.ended_at else 0.0]
        assert began - 1 <= min(times)
        assert max(times) <= ended + 1
        assert view.attempts == 1
