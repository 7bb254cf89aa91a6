"""What a group handles in any of its processes: noted in a table, so that an event waits for those who can handle it.

The processes of a group do not all know the same. While a release is rolled out the old ones meet events of types and
major versions that only the new ones have a handler for. Such an event must be neither skipped nor given up: it is
parked with its key, for a process that knows it.

- Each App notes what its handlers are for when it starts, also one that only publishes: that is before it publishes.
- A process that has no handler for an event looks into the table, and it looks *after* the event was fetched. What is
  published after a note was made is thus never taken for an event that the group has nothing to do with. One look
  serves all that was fetched before it.
- A note counts for a month after the last process that made it was seen. A release that is taken back for a week
  finds its events where they wait. `ParkedKeys.forget` ends it sooner.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence

from mainstay.core import Drain, MainstayError
from mainstay.database import Database
from mainstay.events import tables

_log = logging.getLogger("mainstay.events")

KEPT_SECONDS = 30 * 86_400.0
"""How long a note counts when no process makes it again."""
NOTE_SECONDS = 30.0
"""How often a process that serves makes its notes again."""
GONE_SECONDS = 3 * NOTE_SECONDS
"""After which what no process has noted again counts as handled by none at the moment."""


class Handled:
    """The notes of one group.

    Args:
        database: where they are.
        group: the consumer group.
        mine: what this process handles.
    """

    def __init__(self, database: Database, group: str, mine: Collection[str]) -> None:
        self._database = database
        self._group = group
        self.mine = frozenset(mine)
        self._known: Mapping[str, float] = {}
        self._fetches = 1
        self._covered = 0  # by what is known, of the fetches
        self._asking = asyncio.Lock()

    async def note(self) -> None:
        """Note what this process handles."""
        rows = [{"group_name": self._group, "kind": each} for each in sorted(self.mine)]
        await self._database.write(tables.NOTE_HANDLED[self._database.dialect], rows)

    def fetched(self) -> None:
        """What was fetched now is not covered by an earlier look."""
        self._fetches += 1

    def is_nobodys(self, kind: str) -> bool:
        """Whether it is certain, without another look, that no process of the group handles it."""
        return not kind or (self._covered == self._fetches and kind not in self._known)

    async def is_somebodys(self, kind: str) -> bool:
        """Whether a process of the group handles it."""
        if kind and self._covered < self._fetches:
            async with self._asking:
                fetches = self._fetches
                if self._covered < fetches:
                    await self.look()
                    self._covered = fetches  # what was fetched meanwhile may be newer than the answer
        return kind in self._known

    async def look(self) -> Mapping[str, float]:
        """What the group handles, and for how many seconds no process has noted it again."""
        rows = await self._database.read(
            tables.READ_HANDLED[self._database.dialect], {"of_group": self._group, "kept": KEPT_SECONDS}
        )
        self._known = {row.kind: row.age for row in rows}
        return self._known


async def note(groups: Iterable[Handled]) -> None:
    """Note what this process handles in each of its groups."""
    for handled in groups:
        await handled.note()


async def note_often(groups: Sequence[Handled], drain: Drain) -> None:
    """Worker: keeps the notes of this process young."""
    while not drain.begun:
        try:
            await note(groups)
        except MainstayError as error:  # they are good for a month, and the database comes back before that
            _log.debug("what this process handles was not noted again", exc_info=error)
        await drain.pause(NOTE_SECONDS)
