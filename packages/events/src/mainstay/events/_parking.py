"""Parked keys: an event that cannot be handled waits in a table with all that follows of its key, in order.

A key is parked in one commit with the event that failed, or that this process has no handler for while another of the
group has one. From then on its later events are appended to its queue, each of which counts as finished in its
partition, and the partition goes on. An event without a key has a queue of its own, and so has one that is set aside
alone, to be tried later (`RetryLater`): behind it nothing waits.

A queue is worked from its front once it is due: when a person says so, when the wait before the next attempt is over,
at once where a handler is all that is missing. Any process of the group may do so that handles the type and the major
version of the queue's first event, not only the holder of the partition. It claims the key for the time of a lease, by
the database's clock, and what it writes is void once another has claimed it. Where no process has noted that it handles
the first event (see `_handled`), any may take it.

A key is free when its queue is empty; both are looked at in one transaction that holds the key's row, so nothing is
appended in between. The holder of the partition knows its parked keys by heart: they are read before its first event is
handed out, and where others have freed one meanwhile the table decides.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from mainstay.core import derived_id, uuid7
from mainstay.database import Database
from mainstay.events import tables
from mainstay.events._decoding import OURS, Decoders
from mainstay.events._delivery import Assignment, Delivery, Verdict, queue_of
from mainstay.events._handled import GONE_SECONDS, KEPT_SECONDS, Handled
from mainstay.events._metrics import PARKED_AGE, PARKED_EVENTS, PARKED_KEYS, SET_ASIDE_EVENTS
from mainstay.events._pausing import Pausing
from mainstay.events.dead_letters import text_of
from mainstay.events.errors import NotHeldError
from mainstay.events.metadata import Record
from mainstay.events.tables import pack_headers

_log = logging.getLogger("mainstay.events")

_COUNT_SECONDS = 5.0


class Parking:
    """The tables of one group.

    Args:
        database: where they are.
        group: the consumer group.
        handled: what the group handles, here and elsewhere.
        lease_seconds: how long a claimed key is kept from others.
        decoders: read the topics that others write.

    Attributes:
        pausing: what a person has paused of the group.
        worker: by which name this process claims.
    """

    def __init__(
        self, database: Database, group: str, handled: Handled, lease_seconds: float, decoders: Decoders = OURS
    ) -> None:
        self.handled = handled
        self.pausing = Pausing(database, group)
        self.lease_seconds = lease_seconds
        self.worker = str(uuid7())
        self._database = database
        self._group = group
        self._decoders = decoders

    def _place(self, topic: str, key: bytes) -> dict[str, object]:
        return {"of_group": self._group, "of_topic": topic, "of_key": queue_of(key)}

    async def keys_of(self, topic: str) -> set[bytes]:
        """The queues of a topic; also of other partitions, since a topic that was widened has moved its keys."""
        rows = await self._database.read(tables.READ_PARKED_KEYS, {"of_group": self._group, "of_topic": topic})
        return {row.key for row in rows}

    async def park(self, delivery: Delivery, verdict: Verdict, age_seconds: float, before: Sequence[Record]) -> None:
        """Park a key with the event that failed, known to have failed for `age_seconds`.

        What was handled `before` it and is not committed is noted, too: it is read once more by another owner of the
        partition, who would append it behind.
        """
        record = delivery.record
        later = verdict.fate == "later"
        first = self._row(record, later=later)
        key = first["key"]
        dialect = self._database.dialect
        row = {
            **{name: first[name] for name in ("group_name", "topic", "key", "partition", "kind")},
            "id": derived_id(f"parked:{self._group}:{record.topic}:{key.hex()}"),
            "alone": later or record.key is None,
            "own_key": record.key,
            "age": age_seconds,
            **_state(delivery, verdict),
        }
        async with self._database.transaction() as session:
            await self._still_held(session, delivery)
            parked: Any = await session.execute(tables.PARK_KEY[dialect], row)
            if parked.rowcount == 0:  # by another, before this process had the partition: the queue has a first event
                held: Any = await session.execute(tables.HOLD_PARKED_KEY, self._place(record.topic, key))
                if held.rowcount == 0:
                    msg = f"a key of topic {record.topic} became free while it was parked"
                    raise RuntimeError(msg)
            rows = [*(self._row(each, handled=True) for each in before), first]
            await session.execute(tables.INSERT_PARKED[dialect], rows)

    async def append(self, assignment: Assignment, record: Record) -> bool:
        """Append an event to the queue of its key; False when the key is not parked any more."""
        async with self._database.transaction() as session:
            await self._still_held(session, Delivery(assignment, record))
            held: Any = await session.execute(tables.HOLD_PARKED_KEY, self._place(record.topic, record.key or b""))
            if held.rowcount == 0:
                return False
            await session.execute(tables.INSERT_PARKED[self._database.dialect], self._row(record))
        return True

    async def _still_held(self, session: AsyncSession, delivery: Delivery) -> None:
        """Refuse to park what another process deals with, and let none take it before the commit.

        A process that stood still does not know that it lost its partition, or the queue that it worked on. What it
        would park, the next holder has handled, and more of the key behind it.
        """
        assignment = delivery.assignment
        if assignment.queue is not None:
            place = self._place(assignment.topic, assignment.queue)
            claimed: Any = await session.execute(tables.HOLD_CLAIMED_KEY, {**place, "me": self.worker})
            if claimed.rowcount == 0:
                msg = f"a queue of topic {assignment.topic} is another process' now, or was discarded"
                raise NotHeldError(msg)
            return
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

    def _row(self, record: Record, *, handled: bool = False, later: bool = False) -> dict[str, Any]:
        # The bytes belong to its name: a topic that was deleted and made anew counts its offsets from 0 again.
        digest = blake2b(record.value or b"", digest_size=16).hexdigest()
        what = "later" if later else "parked"  # it may be in the queue of its key at that moment
        name = derived_id(f"{what}:{self._group}:{record.topic}/{record.partition}@{record.offset}:{digest}")
        return {
            "id": name,
            "group_name": self._group,
            "topic": record.topic,
            "partition": record.partition,
            "offset": record.offset,
            "key": name.bytes if later or record.key is None else queue_of(record.key),
            "value": None if handled else record.value,
            "headers": pack_headers([] if handled else record.headers),
            "handled": handled,
            "kind": "" if handled else self._decoders.kind_of(record),
        }

    async def claim(self, most: int, monotonic: Callable[[], float]) -> tuple[Sequence[Any], float]:
        """Claim keys whose queues this process may work on now, at most so many: id, topic, partition, key.

        Also when it was asked for, once the database had time for it: the lease begins no earlier.
        """
        asked = {
            "of_group": self._group,
            "mine": sorted(self.handled.mine),
            "kept": KEPT_SECONDS,
            "most": most,
        }
        if not await self._database.read(tables.ARE_DUE[self._database.dialect], asked):
            return (), monotonic()
        claim = tables.CLAIM_DUE_PARKED_KEYS[self._database.dialect]
        async with self._database.transaction() as session:
            asked_at = monotonic()
            claimed = await session.execute(claim, {**asked, "me": self.worker, "lease": self.lease_seconds})
            return claimed.all(), asked_at

    async def prolong(self, keys: Collection[UUID], monotonic: Callable[[], float]) -> float:
        """Keep claimed keys from others for another lease; when it was asked for, as `claim` says."""
        async with self._database.transaction() as session:
            asked_at = monotonic()
            await session.execute(
                tables.PROLONG_CLAIMS[self._database.dialect],
                {"me": self.worker, "keys": sorted(keys), "lease": self.lease_seconds},
            )
        return asked_at

    async def release(self, keys: Collection[UUID]) -> None:
        """Let others have claimed keys."""
        async with self._database.transaction() as session:
            await session.execute(tables.RELEASE_CLAIMS, {"me": self.worker, "keys": sorted(keys)})

    async def release_all(self) -> None:
        """Let others have all that this process has claimed."""
        await self._database.write(tables.RELEASE_ALL_CLAIMS, {"of_group": self._group, "me": self.worker})

    async def keep(self, delivery: Delivery, verdict: Verdict, age_seconds: float) -> None:
        """Note that the first of a claimed queue could not be handled this time either, and release it.

        It has failed for `age_seconds` by now; one that has not been called yet does not fail.
        """
        queue = delivery.assignment.queue
        assert queue is not None  # noqa: S101  of a partition nothing is kept
        place = self._place(delivery.record.topic, queue)
        await self._database.write(
            tables.KEEP_PARKED_KEY[self._database.dialect],
            {
                **place,
                "me": self.worker,
                "age": age_seconds or None,
                **_state(delivery, verdict),
            },
        )

    async def may_crash(self, topic: str, key: bytes) -> None:
        """Note that the first event of a claimed queue is called, by a process that may end of it."""
        await self._database.write(tables.NOTE_CRASH, {**self._place(topic, key), "me": self.worker})

    async def first(self, topic: str, key: bytes) -> Any | None:
        """The first event of a queue, with how often it has been tried."""
        statement = tables.READ_FIRST_PARKED[self._database.dialect]
        rows = await self._database.read(statement, self._place(topic, key))
        return rows[0] if rows else None

    async def finished(self, topic: str, key: bytes, position: int | None) -> bool:
        """Take an event out of a claimed queue; True when there is no more to do: the key is free, or another's."""
        place = self._place(topic, key)
        async with self._database.transaction() as session:
            held: Any = await session.execute(tables.HOLD_CLAIMED_KEY, {**place, "me": self.worker})
            if held.rowcount == 0:
                return True
            if position is not None:
                await session.execute(tables.HANDLE_PARKED, {"done": position})
            await session.execute(tables.NEXT_OF_PARKED_KEY[self._database.dialect], place)
            freed: Any = await session.execute(tables.FREE_PARKED_KEY, place)
            if freed.rowcount:
                await session.execute(tables.DELETE_QUEUE, place)
            return bool(freed.rowcount)

    async def kinds(self, stuck_seconds: float) -> Sequence[Any]:
        """How many keys are parked, events set aside and keys stuck, and since when the oldest of these, by kind."""
        asked = {"of_group": self._group, "seconds": stuck_seconds}
        return await self._database.read(tables.PARKED_KINDS[self._database.dialect], asked)

    async def events(self) -> int:
        """How many events are in the queues of parked keys; no more than `COUNTED_PARKED` are counted."""
        rows = await self._database.read(tables.COUNT_PARKED_EVENTS, {"of_group": self._group})
        return int(rows[0].events)


class ParkedCount:
    """How many keys of a group are parked, and which of them wait for a person or for a handler.

    Args:
        parking: the tables.
        group: the consumer group.
        stuck_seconds: from when on a key that is tried again and again counts as one that a person has to look at.

    Attributes:
        keys: how many there were when it was last looked.
    """

    def __init__(self, parking: Parking, group: str, stuck_seconds: float) -> None:
        self.keys = 0
        self._parking = parking
        self._group = group
        self._stuck_seconds = stuck_seconds

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            trouble = await self.trouble()
            _log.debug("parked keys of group %s: %d, %s", self._group, self.keys, trouble or "all well")
            await asyncio.sleep(_COUNT_SECONDS)

    async def trouble(self) -> str | None:
        """Look, and say what is wrong if anything is."""
        try:
            kinds = await self._parking.kinds(self._stuck_seconds)
            events = await self._parking.events() if kinds else 0
            waiting = {row.kind for row in kinds if row.due} - self._parking.handled.mine
            seen = await self._parking.handled.look() if waiting else dict[str, float]()
        except Exception as error:  # noqa: BLE001  any error is said
            return f"its parked keys are not known ({type(error).__name__})"
        self._show(kinds, events)
        wrong: list[str] = []
        stuck = sum(row.stuck for row in kinds)
        if stuck:
            since = datetime.fromtimestamp(min(row.since for row in kinds if row.since is not None), UTC)
            wrong.append(
                f"{stuck} parked keys need a person, the oldest since {since:%Y-%m-%d %H:%M:%S} UTC; "
                f"{_many(events)} events wait in all: mainstay events parked list"
            )
        unhandled = sorted(kind for kind in waiting if seen.get(kind, 0.0) > GONE_SECONDS)
        if unhandled:
            which = ", ".join(unhandled)
            wrong.append(
                f"events of {which} wait, and no process that serves has a handler for them; if none will have, "
                "mainstay events parked forget"
            )
        return "; ".join(wrong) or None

    def _show(self, kinds: Sequence[Any], events: int) -> None:
        self.keys = sum(row.keys for row in kinds)
        PARKED_KEYS.labels(self._group).set(self.keys)
        PARKED_EVENTS.labels(self._group).set(events)
        PARKED_AGE.labels(self._group).set(max((row.seconds or 0.0 for row in kinds), default=0.0))
        SET_ASIDE_EVENTS.labels(self._group).set(sum(row.aside for row in kinds))


def _many(events: int) -> str:
    return f"{events:,}" if events < tables.COUNTED_PARKED else f"{events:,} or more"


def _state(delivery: Delivery, verdict: Verdict) -> Mapping[str, object]:
    return {
        "attempt": delivery.attempt,
        "postponed": delivery.postponed,
        "later": delivery.later,
        "waited_seconds": delivery.waited,
        "error": text_of(verdict.error).replace("\0", ""),
        "due": verdict.due_seconds,
    }
