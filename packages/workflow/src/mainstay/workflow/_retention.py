"""Retention: ended runs, and signals that no run received, are deleted once they are older than the settings keep them.

A loop in every worker, of which one at a time deletes, under a lease. It deletes a few runs in a transaction and then
rests, so that live work comes in between; a row that somebody holds is passed over and found by a later sweep.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mainstay.core import Drain
from mainstay.database import Database, Lease
from mainstay.workflow import _metrics
from mainstay.workflow._ended import EXPIRE, FROM_THE_FIRST, UNCLAIMED, Ended, delete
from mainstay.workflow.settings import DAY_SECONDS, WorkflowSettings
from mainstay.workflow.workflow import RunStatus

_log = logging.getLogger("mainstay.workflow")

_AT_ONCE = 200  # runs, or signals, in one transaction
_REST_SECONDS = 0.05  # after each of them
_SWEEP_SECONDS = 600.0
_LEASE = "mainstay-workflow retention"


class Retention:
    """Deletes what the settings do not keep any longer."""

    def __init__(self, *, database: Database, settings: WorkflowSettings) -> None:
        self._database = database
        self._lease_seconds = settings.lease_seconds
        self._signals = {"kept_seconds": settings.keep_signals_days * DAY_SECONDS}
        days = {
            RunStatus.COMPLETED: settings.keep_completed_days,
            RunStatus.FAILED: settings.keep_failed_days,
            RunStatus.CANCELLED: settings.keep_cancelled_days,
            RunStatus.TERMINATED: settings.keep_terminated_days,
        }
        self._ended = Ended({status: kept * DAY_SECONDS for status, kept in days.items() if kept is not None})

    async def work(self, drain: Drain) -> None:
        """Sweep again and again until the drain begins."""
        while not drain.begun:
            try:
                await self.sweep(drain)
            except Exception as error:  # noqa: BLE001  a later sweep does it
                _log.warning("what is kept no longer could not be deleted, and will be later: %s", error)
            await drain.pause(_SWEEP_SECONDS)

    async def sweep(self, drain: Drain) -> None:
        """Delete all that is kept no longer, unless another worker does so at the moment."""
        if not await self._any():
            return
        lease = await self._database.lease(_LEASE, seconds=self._lease_seconds)
        if lease is None:
            return
        try:
            await self._runs(lease, drain)
            await self._unclaimed(lease, drain)
        finally:
            await lease.release()

    async def _any(self) -> bool:
        """Whether there is anything to delete: most sweeps end here, without a lease."""
        first = {**FROM_THE_FIRST, "most": 1}
        for query in self._ended.of.values():
            if await self._database.read(query, first):
                return True
        return bool(await self._database.read(UNCLAIMED, {**self._signals, "most": 1}))

    async def _runs(self, lease: Lease, drain: Drain) -> None:
        """Delete runs, round by round: a parent goes in the round after its last child."""
        gone = Counter[RunStatus]()
        try:
            more = True
            while more and not drain.begun:
                more = False
                for status in self._ended.of:
                    number = await self._of_status(status, lease, drain)
                    gone[status] += number
                    more = more or number > 0
        finally:
            if said := ", ".join(f"{number} {status}" for status, number in gone.items() if number):
                _log.info("deleted runs that are kept no longer: %s", said)

    async def _of_status(self, status: RunStatus, lease: Lease, drain: Drain) -> int:
        query = self._ended.locked(status)
        after: dict[str, Any] = {**FROM_THE_FIRST, "most": _AT_ONCE}
        number = 0
        while not drain.begun:
            async with self._database.transaction() as session, self._database.batch(fence=lease.fence):
                found = (await session.execute(query, after)).all()
                await delete(session, [row.id for row in found])
            number += len(found)
            _metrics.RUNS_DELETED.labels(status).inc(len(found))
            if len(found) < _AT_ONCE:
                break
            after |= {"after": found[-1].ended_at, "after_id": found[-1].id}
            await drain.pause(_REST_SECONDS)
        return number

    async def _unclaimed(self, lease: Lease, drain: Drain) -> None:
        while not drain.begun:
            async with self._database.transaction() as session, self._database.batch(fence=lease.fence):
                found = (await session.execute(EXPIRE, {**self._signals, "most": _AT_ONCE})).all()
            if found:
                _say_expired(found)
            if len(found) < _AT_ONCE:
                break
            await drain.pause(_REST_SECONDS)


def _say_expired(found: Sequence[Any]) -> None:
    _metrics.SIGNALS_EXPIRED.inc(len(found))
    _log.warning(
        "%d signals had expired, since there is no run of their id, and were deleted: %s for run %s, for example",
        len(found),
        found[0].name,
        found[0].run_id,
    )
