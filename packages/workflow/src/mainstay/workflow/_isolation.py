"""Isolation: a run that kills its worker must not take others along, and which one it is must come out.

When a worker dies, every run that it was executing may be the reason. Each keeps the number of deaths since it last got
further (`deaths`), and how many runs the last of those workers was executing (`company`). A death in company spends no
attempt; only a death alone does. After one death the runs are claimed like all others, since most workers die for
reasons of their own, and then many runs have to be picked up fast. After `SUSPECT_DEATHS` they are suspects. These are
claimed only by a worker that executes nothing, at most half of their company together, and it takes nothing beside them
while the isolation lasts. So each death halves the company, and one run among 1,000 is alone after ten or so.

The isolation of a run ends when it gets further or leaves the worker, as it does at once where it only waits and others
want its place. It also ends after a time that doubles with every
death: an innocent run with a long step must not keep its worker from all others for hours, and one that kills its
worker late is isolated for longer each time, until it is found.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from mainstay.core import Clock
from mainstay.database import Database
from mainstay.workflow.tables import GOT_FURTHER, SUSPECT_DEATHS

_MOST_DOUBLINGS = 16


class Isolation:
    """The suspects that a worker executes at the moment.

    Args:
        seconds: what doubles with every death.
    """

    def __init__(self, *, database: Database, clock: Clock, seconds: float) -> None:
        self._database = database
        self._clock = clock
        self._seconds = seconds
        self._until: dict[str, float] = {}

    @staticmethod
    def most(company: int) -> int:
        """How many suspects of this company are claimed together."""
        return max(1, company // 2)

    def begin(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Isolate those of the claimed runs that are suspects; how many."""
        now = self._clock.monotonic()
        self._until = {
            row["id"]: now + self._seconds * 2 ** min(row["deaths"], _MOST_DOUBLINGS)
            for row in rows
            if row["deaths"] >= SUSPECT_DEATHS
        }
        return len(self._until)

    async def lasts(self, executing: Container[str]) -> bool:
        """Whether a suspect among the runs that are executed still has to be by itself."""
        now = self._clock.monotonic()
        self._until = {run_id: until for run_id, until in self._until.items() if run_id in executing and now < until}
        if self._until:
            for (run_id,) in await self._database.read(GOT_FURTHER, {"ids": list(self._until)}):
                self._until.pop(run_id, None)
        return bool(self._until)
