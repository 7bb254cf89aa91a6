"""Taking over: a worker whose lease has ended is dead, and its runs go back into the queue.

That is a loop in every worker, beside the one that serves: a row that cannot be had must not keep a live worker from
its own work. The worker that gets the dead one's lease puts its runs back. A row that a transaction holds, such as
that of a process that froze between BEGIN and COMMIT, is passed over; the dead worker keeps its name in the table until
the last row is back, so each look comes to those that are left.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from mainstay.core import Drain
from mainstay.database import Database, Lease
from mainstay.workflow import _metrics
from mainstay.workflow.settings import WorkflowSettings
from mainstay.workflow.tables import COMPANY, TAKE_OVER, WORKERS

_log = logging.getLogger("mainstay.workflow")

_AT_ONCE = (
    1_000  # runs in one transaction: more would hold the rows, and on SQLite the writer, for longer than it saves
)


class Takeover:
    """The search for dead workers.

    Args:
        mine: the name under which this worker claims at the moment.
        wake: called when there is something new in the queue.
    """

    def __init__(
        self,
        *,
        database: Database,
        settings: WorkflowSettings,
        mine: Callable[[], str | None],
        wake: Callable[[], None],
    ) -> None:
        self._database = database
        self._seconds = settings.lease_seconds
        self._mine = mine
        self._wake = wake
        self._buried: dict[str, int] = {}  # the dead, and how many runs each was executing

    async def work(self, drain: Drain) -> None:
        """Look for dead workers three times in a lease, until the drain begins."""
        while not drain.begun:
            try:
                names = [name for (name,) in await self._database.read(WORKERS) if name != self._mine()]
            except Exception as error:  # noqa: BLE001  it is looked again
                _log.warning("dead workers could not be looked for, and will be again: %s", error)
                names = []
            for name in names:
                if not drain.begun:
                    await self._look_at(name)
            self._buried = {name: company for name, company in self._buried.items() if name in names}
            await drain.pause(self._seconds / 3)

    async def _look_at(self, name: str) -> None:
        """Take over the worker's runs if it is dead; one that fails must not keep the others from it."""
        known = name in self._buried
        try:
            lease = await self._database.lease(name, seconds=self._seconds)
            if lease is None:
                return  # it lives
            try:
                taken = await self._take(name, lease)
            finally:
                await lease.release()
        except Exception as error:  # noqa: BLE001  as above
            _log.warning("the runs of worker %s could not be taken over, and will be again: %s", name, error)
            return
        if not known:
            _metrics.WORKERS_BURIED.inc()
            _log.warning("worker %s is dead: %d of its runs are back in the queue", name, taken)
        elif taken:
            _log.warning("%d more runs of the dead worker %s are back in the queue", taken, name)

    async def _take(self, name: str, lease: Lease) -> int:
        """Put back every run whose row is free; how many."""
        if name not in self._buried:  # what a later look comes to is only what was passed over
            self._buried[name] = (await self._database.read(COMPANY, {"dead": name}))[0][0]
        values = {"dead": name, "most": _AT_ONCE, "together": self._buried[name]}
        taken = 0
        while True:
            async with self._database.transaction() as session, self._database.batch(fence=lease.fence):
                rows = (await session.execute(TAKE_OVER, values)).all()
            taken += len(rows)
            if rows:
                self._wake()
            if len(rows) < _AT_ONCE:
                return taken
