"""The transactional outbox in front of Kafka: events commit with what they tell of, and a relay carries them on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple
from zlib import crc32

from mainstay.core import Drain
from mainstay.database import Database, Fence
from mainstay.events import tables
from mainstay.events._metrics import OUTBOX_AGE, OUTBOX_DEPTH, OUTBOX_REFUSED
from mainstay.events._transport import Arrivals
from mainstay.events.metadata import Outgoing
from mainstay.events.tables import pack_headers, unpack_headers

_log = logging.getLogger("mainstay.events")

LANES = 8
"""Never changed: rows of one key in two lanes could overtake each other."""
BATCH_BYTES = 256 * 1024
_PAGE = 2000
_MEASURE_SECONDS = 5.0


class Place(NamedTuple):
    """A partition of a topic."""

    topic: str
    partition: int

    def __str__(self) -> str:
        return f"topic {self.topic}, partition {self.partition}"


class Outbox:
    """Where publishing writes to.

    Args:
        database: where the rows are.
        check: refuses an event that the broker would refuse.

    Attributes:
        topics: those that this process has written to.
    """

    def __init__(self, database: Database, check: Callable[[Outgoing], None]) -> None:
        self._database = database
        self._check = check
        self.arrivals = Arrivals()
        self.topics: set[str] = set()

    async def send(self, batch: Sequence[Outgoing]) -> None:
        """Make events durable, in the unit of work that is open."""
        for event in batch:
            self._check(event)
        await self.send_again(batch)

    async def send_again(self, batch: Sequence[Outgoing]) -> None:
        """The same for records that have been on the topic: its broker's limit for them may be another than ours."""
        rows = [
            {
                "lane": lane_of(event),
                "topic": event.topic,
                "key": event.key,
                "value": event.value,
                "headers": pack_headers(event.headers),
            }
            for event in batch
        ]
        await self._database.write(tables.INSERT_OUTBOX, rows, route=("events", rows[0]["lane"]))
        self.topics.update(event.topic for event in batch)
        self._database.after_commit(self.arrivals.announce)


def lane_of(event: Outgoing) -> int:
    """The lane of an event: by its key, or spread by its id."""
    return crc32(event.placing_key) % LANES


class Waiting(NamedTuple):
    """A row of the outbox."""

    position: int
    lane: int
    event: Outgoing


class Unreadable(NamedTuple):
    """A row whose event cannot be read, and why."""

    position: int
    lane: int
    topic: str
    why: str


class OutboxRows:
    """The rows of the outbox.

    Attributes:
        unreadable: those that were read last and of which no event can be made.
        full: whether there may be more behind the last page.
        depth, refused: how many wait, and how many were refused, when it was last measured.
    """

    def __init__(self, database: Database, most_bytes: int) -> None:
        self._database = database
        self._most_bytes = most_bytes
        self.unreadable: list[Unreadable] = []
        self.full = False
        self.depth = 0
        self.refused = 0

    async def topics(self) -> Collection[str]:
        """Those that have rows."""
        return [topic for (topic,) in await self._database.read(tables.OUTBOX_TOPICS) if topic is not None]

    async def read(self, topics: Sequence[str], leases: Collection[int]) -> Sequence[Waiting]:
        """The oldest rows of each topic in some lanes, in order."""
        self.full, self.unreadable = False, []
        if not topics:
            return ()
        parameters: dict[str, object] = {
            "lanes": sorted(leases),
            "limit": _PAGE,
            "bytes": self._most_bytes // len(topics),
            **{f"topic_{number}": topic for number, topic in enumerate(topics)},
        }
        found = await self._database.read(tables.read_outbox(len(topics), self._database.dialect), parameters)
        rows = self._read(found)
        self.full = len(found) >= _PAGE or 2 * sum(row.event.size for row in rows) > self._most_bytes
        rows.sort()  # positions are unique: nothing else is compared
        return rows

    async def read_aside(self, place: Place, leases: Collection[int]) -> Sequence[Waiting]:
        """The oldest rows that were put aside for a partition."""
        parameters = {
            "topic": place.topic,
            "partition": place.partition,
            "lanes": sorted(leases),
            "limit": _PAGE,
            "bytes": BATCH_BYTES,
        }
        return self._read(await self._database.read(tables.READ_ASIDE[self._database.dialect], parameters))

    def _read(self, found: Sequence[Any]) -> list[Waiting]:
        rows: list[Waiting] = []
        for row in found:
            try:
                rows.append(Waiting(row.position, row.lane, event_of(row)))
            except ValueError as error:
                self.unreadable.append(Unreadable(row.position, row.lane, row.topic, str(error)))
        return rows

    async def places_aside(self, leases: Collection[int]) -> Sequence[Any]:
        """The partitions for which rows were put aside."""
        return await self._database.read(tables.PLACES_ASIDE, {"lanes": sorted(leases)})

    async def delete(self, rows: Sequence[Waiting], fence: Fence) -> None:
        """They were confirmed."""
        await self._database.write(tables.DELETE_OUTBOX, [{"sent": row.position} for row in rows], fence=fence)

    async def put_aside(self, partition: int, rows: Sequence[Waiting], fence: Fence) -> None:
        """They wait for a partition that takes none."""
        values = [{"row": row.position, "of_partition": partition} for row in rows]
        await self._database.write(tables.PUT_ASIDE, values, fence=fence)

    async def take_back(self, rows: Sequence[Waiting]) -> None:
        """They belong to another partition."""
        values = [{"row": row.position, "of_partition": tables.NOT_ASIDE} for row in rows]
        await self._database.write(tables.PUT_ASIDE, values)

    async def refuse(self, why: str, rows: Sequence[Waiting | Unreadable], fence: Fence) -> None:
        """They are for a person to look at."""
        async with self._database.batch(fence=fence):
            for row in rows:
                await self._database.write(tables.REFUSE, {"row": row.position, "reason": why[:1000]})
                await self._database.write(tables.DELETE_OUTBOX, {"sent": row.position})
        self.refused += len(rows)

    async def measure(self, drain: Drain) -> None:
        """Keep known how many wait, and how long the oldest does, until the drain begins."""
        while not drain.begun:
            try:
                await self._measure()
            except Exception as error:  # noqa: BLE001  a figure that is missing once
                _log.debug("the depth of the outbox is not known", exc_info=error)
            await drain.pause(_MEASURE_SECONDS)

    async def _measure(self) -> None:
        self.depth, age, self.refused = (await self._database.read(tables.MEASURE_OUTBOX[self._database.dialect]))[0]
        OUTBOX_DEPTH.set(self.depth)
        OUTBOX_AGE.set(max(0.0, age or 0.0))
        OUTBOX_REFUSED.set(self.refused)


def event_of(row: Any) -> Outgoing:
    """The event that a row keeps.

    Raises:
        ValueError: its headers cannot be read.
    """
    return Outgoing(row.topic, row.key, row.value, unpack_headers(row.headers))
