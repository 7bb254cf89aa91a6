"""How the log is kept short: what is old enough and has been read is deleted.

An event that a group has yet to read stays, however old it is. Only a group that no process has been a member of for
longer than events are kept does not count any more: otherwise a group that was renamed would keep the log for ever. It
is named in the log and by `mainstay check`, and what it loses is counted.

A service that was stopped for weeks starts one process after the other, and the first must not delete what the groups
of the others have yet to read. So each process waits for the others before it passes over anything.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

from mainstay.core import Clock, Drain
from mainstay.database import Database
from mainstay.events import tables
from mainstay.events._metrics import MISSED
from mainstay.events._snapshot import Place

_log = logging.getLogger("mainstay.events")

_SWEEP_SECONDS = 60.0
_DAY = 86_400.0
_OTHERS_SECONDS = 3600.0
"""How long a process has been running before it takes a group without members for given up."""
_SAY_AGAIN_SECONDS = _DAY
_MOST_SPARED = 100_000
"""Rows that a sweep looks at without deleting them; the next one goes on behind them."""

Reading = tuple[str, str]
"""A group, and a topic that it reads."""


async def swept(delete: Callable[[], Awaitable[None]], drain: Drain) -> None:
    """Delete old rows, again and again until the drain begins; several processes may do so side by side."""
    while not drain.begun:
        try:
            await delete()
        except Exception as error:  # noqa: BLE001  the next sweep does it
            _log.warning("deleting old rows failed, the next attempt is in a minute", exc_info=error)
        await drain.pause(_SWEEP_SECONDS)


class LogRetention:
    """Deletes from the log.

    Args:
        database: where the log is.
        days: how long events are kept at least.
        mine: the groups of this process, which count whether they have joined yet or not.
        clock: measures how long this process has been running.
    """

    def __init__(self, database: Database, *, days: float, mine: Collection[Reading], clock: Clock) -> None:
        self._database = database
        self._seconds = days * _DAY
        self._mine = mine
        self._clock = clock
        self._began_at = clock.monotonic()
        self._after = 0
        self._said_at: dict[Reading, float] = {}

    async def run(self, drain: Drain) -> None:
        """Worker: sweeps now and then."""
        self._began_at = self._clock.monotonic()
        await swept(lambda: self.sweep(drain), drain)

    async def without_members(self) -> Mapping[Reading, float]:
        """The groups that have a place in a topic and no member that reads it, and for how many seconds."""
        rows = await self._database.read(tables.READ_AWAY[self._database.dialect])
        return {(row.group_name, row.topic): row.away for row in rows if row.away > 0}

    async def sweep(self, drain: Drain) -> None:
        """Delete what is old and read by all groups that count."""
        await self._database.write(tables.FORGET_MEMBERS[self._database.dialect], {"seconds": _DAY})
        given_up: set[Reading] = set()
        if self._clock.monotonic() - self._began_at >= _OTHERS_SECONDS:
            away = await self.without_members()
            given_up = {each for each, seconds in away.items() if seconds > self._seconds} - set(self._mine)
        groups = await self._groups()
        missed: dict[Reading, int] = {}
        spared = 0
        while not drain.begun and spared < _MOST_SPARED:
            page = await self._database.read(
                tables.READ_OLD_LOG[self._database.dialect], {"after": self._after, "seconds": self._seconds}
            )
            if not page:
                self._after = 0
                break
            read = [row for row in page if self._may_go(row, groups.get(row.topic, {}), given_up, missed)]
            await self._database.write(tables.DELETE_LOG, [{"row": row.position} for row in read])
            spared += len(page) - len(read)
            self._after = page[-1].position
        self._say(missed)

    async def _groups(self) -> Mapping[str, Mapping[str, dict[int, Place]]]:
        """For each topic the groups that read it, with their places by partition."""
        groups: dict[str, dict[str, dict[int, Place]]] = {}
        rows = await self._database.read(tables.READ_AWAY[self._database.dialect])
        for group, topic in [*self._mine, *((row.group_name, row.topic) for row in rows)]:
            groups.setdefault(topic, {}).setdefault(group, {})
        for row in await self._database.read(tables.READ_PLACES):
            groups.setdefault(row.topic, {}).setdefault(row.group_name, {})[row.partition] = Place.of(row)
        return groups

    def _may_go(
        self,
        row: Any,
        groups: Mapping[str, Mapping[int, Place]],
        given_up: Collection[Reading],
        missed: dict[Reading, int],
    ) -> bool:
        unread = [
            (group, row.topic)
            for group, places in groups.items()
            if row.partition not in places or not places[row.partition].is_past(row.xid, row.position)
        ]
        if not all(each in given_up for each in unread):
            return False
        for each in unread:
            missed[each] = missed.get(each, 0) + 1
        return True

    def _say(self, missed: Mapping[Reading, int]) -> None:
        now = self._clock.monotonic()
        for (group, topic), count in missed.items():
            MISSED.labels(group).inc(count)
            if now - self._said_at.get((group, topic), float("-inf")) >= _SAY_AGAIN_SECONDS:
                self._said_at[group, topic] = now
                _log.error(
                    "group %s has had no member that reads topic %s for longer than %g days: %d events were deleted "
                    "before it had read them, and more will be",
                    group,
                    topic,
                    self._seconds / _DAY,
                    count,
                )
