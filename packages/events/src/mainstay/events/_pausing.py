"""What a person has paused of a group, as a process of it knows.

A paused *group* starts no call: its dispatcher hands out nothing and its consumer fetches nothing, while the partitions
stay held. A paused *kind* of event or *key* is parked by the machinery there is for that (see `_parking`): its next
event becomes the first of a queue that is due at once, and no process claims a queue while a pause concerns it. So a
pause is one row, a resumption is its deletion, and what waits needs no mark of its own.

It is read together with the parked keys: before the first event of a partition is handed out, and at every look for
queues that are due. While the Database is away, what was known last stands.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from mainstay.database import Database
from mainstay.events import tables
from mainstay.events._metrics import PAUSED
from mainstay.events.pauses import Pause, pause_of, said_of

_log = logging.getLogger("mainstay.events")


class Pausing:
    """The pauses of one group.

    Args:
        database: where they are.
        group: the consumer group.

    Attributes:
        whole: the pause of the group as a whole, None without one.
        said: what is paused, in one line; None where nothing is.
    """

    def __init__(self, database: Database, group: str) -> None:
        self.whole: Pause | None = None
        self.said: str | None = None
        self._database = database
        self._group = group
        self._kinds: Mapping[str, Pause] = {}
        self._keys: Mapping[bytes, Pause] = {}

    async def look(self) -> None:
        """Find out what is paused now."""
        rows = await self._database.read(tables.READ_PAUSES, {"of_group": self._group})
        pauses = [pause_of(row) for row in rows]
        kinds = {each.kind: each for each in pauses if each.kind is not None}
        keys = {each.key: each for each in pauses if each.key is not None}
        self.whole = next((each for each in pauses if each.whole), None)
        self._kinds, self._keys = kinds, keys
        PAUSED.labels(self._group).set(len(pauses))
        before, self.said = self.said, said_of(pauses)
        if self.said != before:
            _log.warning("group %s: %s", self._group, self.said or "nothing is paused any more")

    @property
    def of_parts(self) -> bool:
        """Whether kinds of events or keys are paused."""
        return bool(self._kinds or self._keys)

    def of(self, key: bytes | None, kind: str) -> Pause | None:
        """The pause of an event's key or kind, None where neither is paused."""
        if key is not None and key in self._keys:
            return self._keys[key]
        return self._kinds.get(kind)
