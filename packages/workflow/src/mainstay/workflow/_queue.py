"""The queue: what is due, what one worker takes of it, and what waits there in vain."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

from mainstay.database import Database
from mainstay.workflow import _metrics
from mainstay.workflow._history import History, recall
from mainstay.workflow._identity import Identity
from mainstay.workflow._payloads import Payloads
from mainstay.workflow.errors import PayloadUnreadable
from mainstay.workflow.tables import ENTRIES, PARKED, Claims

_log = logging.getLogger("mainstay.workflow")

Begin = Callable[[Identity, Mapping[str, Any], History], None]


class Queue:
    """The queue of the runs whose workflows a worker knows.

    Args:
        workflows: their time limits in seconds, by name and version.
        payloads: opens what the histories hold.
        max_attempts: a run that is claimed more often without getting any further is parked.

    Attributes:
        unknown: what waits for a worker that knows its workflow, in words.
        parked: how many runs wait for a person.
    """

    def __init__(
        self,
        *,
        database: Database,
        workflows: Mapping[tuple[str, int], float | None],
        payloads: Payloads,
        max_attempts: int,
    ) -> None:
        self._database = database
        self._claims = Claims(workflows)
        self._payloads = payloads
        self._max_attempts = max_attempts
        self.unknown: list[str] = []
        self.parked = 0

    async def waiting(self) -> tuple[bool, int | None]:
        """Whether runs are due that may be claimed together, and the largest company of the suspects that are."""
        (found,) = await self._database.read(self._claims.waiting)
        return bool(found.others), found.company

    async def next_due_seconds(self) -> float | None:
        """How long until the next run is due that is not yet."""
        rows = await self._database.read(self._claims.next_due)
        return max(0.0, rows[0].seconds) if rows else None

    async def take(self, identity: Identity, most: int, company: int | None, *, begin: Begin) -> bool:
        """Claim what is due and begin it; whether there may be more.

        Args:
            identity: whose it will be.
            most: so many at once.
            company: of suspects that are to be taken, by themselves; None for the others.
            begin: executes a claim.
        """
        values: dict[str, Any] = {"owner": identity.lease.name, "most": most}
        claim = self._claims.claim
        if company is not None:
            claim, values["together"] = self._claims.claim_suspects, company
        async with self._database.transaction() as session:
            result = await session.execute(claim, values)
            rows = [dict(row) for row in result.mappings()]
        if suspects := identity.isolation.begin(rows):
            _log.warning("workers died under %d runs without these getting further: executed by themselves", suspects)
        histories = await self._histories([row["id"] for row in rows if row["epoch"] > 1])
        for row in rows:
            try:
                if row["attempts"] > self._max_attempts:
                    await identity.park(row, _claimed_in_vain(row))
                else:
                    opened = partial(self._payloads.open, run_id=row["id"])
                    begin(identity, row, recall(histories.get(row["id"], ()), opened))
            except PayloadUnreadable as error:
                await identity.park(row, f"{error}. Then resume it")
            except Exception:  # noqa: BLE001  one run that cannot be begun must not keep the others from it
                _log.exception("run %s could not be begun", row["id"])
        return len(rows) == most

    async def _histories(self, ids: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        if not ids:
            return {}
        entries = await self._database.read(ENTRIES, {"ids": ids})
        by_run = groupby((dict(entry._mapping) for entry in entries), key=lambda entry: entry["run_id"])
        return {run_id: list(own) for run_id, own in by_run}

    async def measure(self) -> None:
        """Count those that no worker executes."""
        self.parked = (await self._database.read(PARKED))[0][0]
        _metrics.RUNS_PARKED.set(self.parked)
        unknown = await self._database.read(self._claims.unknown)
        _metrics.RUNS_UNKNOWN.set(sum(row.waiting for row in unknown))
        names = [f"{row.waiting} of {row.workflow!r} version {row.version}" for row in unknown]
        if names and names != self.unknown:
            _log.warning("runs wait for a worker that knows their workflow: %s", ", ".join(names))
        self.unknown = names


def _claimed_in_vain(row: Mapping[str, Any]) -> str:
    times = row["attempts"] - 1
    why = row["note"] or "how these claims ended is not on record"
    return f"claimed {times} times without getting any further: {why}. Find out why, then resume or cancel it"
