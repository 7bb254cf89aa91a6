"""Parked keys: what failed waits in a table with all that follows of its key, in order, and the partition goes on.

A key is parked in one commit with the event that failed. From then on its later events are appended to its queue, each
of which counts as finished in its partition. The queue is worked from its front, by the process that holds the
partition, once it is due: when a person says so, or when the wait before the next attempt is over. A key is free when
its queue is empty; both are looked at in one transaction that holds the key's row, so nothing is appended in between.

The partition's owner knows its parked keys by heart: they are read before its first event is handed out, and where
another process has changed them meanwhile (a person has discarded one) the table decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from mainstay.core import derived_id
from mainstay.database import Database
from mainstay.events import tables
from mainstay.events._delivery import Assignment, Delivery, Verdict
from mainstay.events.dead_letters import text_of
from mainstay.events.errors import NotHeldError
from mainstay.events.metadata import Record
from mainstay.events.tables import pack_headers

_DUE_AT_ONCE = 100


class Parking:
    """The tables of one group.

    Args:
        database: where they are.
        group: the consumer group.
    """

    def __init__(self, database: Database, group: str) -> None:
        self._database = database
        self._group = group

    def _place(self, topic: str, key: bytes) -> dict[str, object]:
        return {"of_group": self._group, "of_topic": topic, "of_key": key}

    async def keys_of(self, topic: str) -> set[bytes]:
        """The parked keys of a topic; also of other partitions, since a topic that was widened has moved its keys."""
        rows = await self._database.read(tables.READ_PARKED_KEYS, {"of_group": self._group, "of_topic": topic})
        return {row.key for row in rows}

    async def park(self, delivery: Delivery, verdict: Verdict, age_seconds: float, before: Sequence[Record]) -> None:
        """Park a key with the event that failed, known to have failed for `age_seconds`.

        What was handled `before` it and is not committed is noted, too: it is read once more by another owner of the
        partition, who would append it behind.
        """
        record = delivery.record
        key = record.key or b""
        dialect = self._database.dialect
        row = {
            "id": derived_id(f"parked:{self._group}:{record.topic}:{key.hex()}"),
            "group_name": self._group,
            "topic": record.topic,
            "key": key,
            "partition": record.partition,
            "age": age_seconds,
            **_state(delivery, verdict),
        }
        async with self._database.transaction() as session:
            await self._still_held(session, delivery.assignment)
            await session.execute(tables.PARK_KEY[dialect], row)
            rows = [*(self._row(each, handled=True) for each in before), self._row(record)]
            await session.execute(tables.INSERT_PARKED[dialect], rows)

    async def append(self, assignment: Assignment, record: Record) -> bool:
        """Append an event to the queue of its key; False when the key is not parked any more."""
        async with self._database.transaction() as session:
            await self._still_held(session, assignment)
            held: Any = await session.execute(tables.HOLD_PARKED_KEY, self._place(record.topic, record.key or b""))
            if held.rowcount == 0:
                return False
            await session.execute(tables.INSERT_PARKED[self._database.dialect], self._row(record))
        return True

    async def _still_held(self, session: AsyncSession, assignment: Assignment) -> None:
        """Refuse to park for a partition that another process holds, and let none take it before the commit.

        A process that stood still does not know that it lost its partition. What it would park, the next holder has
        handled, and more of the key behind it.
        """
        if assignment.holder is None:  # no other process takes part
            return
        kept: Any = await session.execute(
            tables.KEEP_PARTITION,
            {
                "of_group": self._group,
                "of_topic": assignment.topic,
                "number": assignment.number,
                "of_holder": assignment.holder,
            },
        )
        if kept.rowcount == 0:
            msg = f"{assignment} is another process' now: it is the one to park its keys"
            raise NotHeldError(msg)

    def _row(self, record: Record, *, handled: bool = False) -> Mapping[str, object]:
        # The bytes belong to its name: a topic that was deleted and made anew counts its offsets from 0 again.
        digest = blake2b(record.value or b"", digest_size=16).hexdigest()
        return {
            "id": derived_id(f"parked:{self._group}:{record.topic}/{record.partition}@{record.offset}:{digest}"),
            "group_name": self._group,
            "topic": record.topic,
            "partition": record.partition,
            "offset": record.offset,
            "key": record.key or b"",
            "value": None if handled else record.value,
            "headers": pack_headers([] if handled else record.headers),
            "handled": handled,
        }

    async def keep(self, delivery: Delivery, verdict: Verdict) -> None:
        """Note that the first of a queue has failed once more."""
        place = self._place(delivery.record.topic, delivery.record.key or b"")
        await self._database.write(
            tables.KEEP_PARKED_KEY[self._database.dialect], {**place, **_state(delivery, verdict)}
        )

    async def due(self) -> Sequence[Any]:
        """Topic, partition and key of what is to be tried now."""
        statement = tables.READ_DUE_PARKED_KEYS[self._database.dialect]
        return await self._database.read(statement, {"of_group": self._group, "limit": _DUE_AT_ONCE})

    async def first(self, topic: str, key: bytes) -> Any | None:
        """The first event of a queue, with how often it has been tried."""
        statement = tables.READ_FIRST_PARKED[self._database.dialect]
        rows = await self._database.read(statement, self._place(topic, key))
        return rows[0] if rows else None

    async def finished(self, topic: str, key: bytes, position: int | None) -> bool:
        """Take an event out of the queue of its key; True when that was the last one, and the key is free."""
        place = self._place(topic, key)
        async with self._database.transaction() as session:
            await session.execute(tables.NEXT_OF_PARKED_KEY[self._database.dialect], place)
            if position is not None:
                await session.execute(tables.HANDLE_PARKED, {"done": position})
            freed: Any = await session.execute(tables.FREE_PARKED_KEY, place)
            if freed.rowcount:
                await session.execute(tables.DELETE_QUEUE, place)
            return bool(freed.rowcount)


def _state(delivery: Delivery, verdict: Verdict) -> Mapping[str, object]:
    return {
        "attempt": delivery.attempt,
        "postponed": delivery.postponed,
        "waited_seconds": delivery.waited,
        "error": text_of(verdict.error).replace("\0", ""),
        "due": verdict.due_seconds,
    }
