"""Parked keys, for a person: listed, tried again, skipped, discarded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from mainstay.core import ConfigurationError
from mainstay.database import Database
from mainstay.events import tables
from mainstay.events._decoding import OURS
from mainstay.events._handled import GONE_SECONDS, Handled
from mainstay.events._transport import LogRecord
from mainstay.events.dead_letters import DeadLetterStore
from mainstay.events.errors import ForgetError, NotParkedError, SkippedError
from mainstay.events.tables import headers_of

__all__ = ["ParkedKey", "ParkedKeys"]


@dataclass(frozen=True, slots=True)
class ParkedKey:
    """A key whose first event could not be handled, and behind which what follows of the key waits.

    Attributes:
        id: its name for `retry`, `skip` and `discard`.
        group: who could not handle it.
        topic, partition: where it is read.
        key: as it was received; None for an event without a key.
        alone: this is one event by itself: it has no key, or `RetryLater` has set it aside, and its key goes on.
        waiting: how many events are in its queue, the one that failed among them.
        kind: of its first event the type and the major version, such as `order.paid 2.x`; empty where it has none.
        error: the exception of the last attempt, and its trace.
        attempt: the number that the next attempt has.
        since: since when its first event has been failing, in UTC.
        due: when it is tried again, in UTC; None while it waits for a person.
        paused: a person has paused it, its group or that kind of event: it is not tried before that is resumed.
    """

    id: UUID
    group: str
    topic: str
    partition: int
    key: bytes | None
    waiting: int
    kind: str
    error: str
    attempt: int
    since: datetime
    due: datetime | None
    alone: bool
    paused: bool


class ParkedKeys:
    """The parked keys of this service; `app.get(ParkedKeys)`, or the command `mainstay events parked`.

    What is asked for here is done by a process that handles the first event of the key, within a second where one
    serves. In an App without a Database every method raises `ConfigurationError`.
    """

    def __init__(self, database: Database | None, dead_letters: DeadLetterStore) -> None:
        self._known = database
        self._dead_letters = dead_letters

    @property
    def _database(self) -> Database:
        if self._known is None:
            msg = "keys are parked in the Database, and this App has none: add DatabaseModule.for_root()"
            raise ConfigurationError(msg)
        return self._known

    async def list(self, group: str | None = None, *, limit: int = 100) -> Sequence[ParkedKey]:
        """The parked keys, those that have been failing for the longest first, of one group or of all."""
        if group is None:
            rows = await self._database.read(tables.LIST_PARKED_KEYS, {"limit": limit})
        else:
            rows = await self._database.read(tables.LIST_PARKED_KEYS_OF, {"limit": limit, "of_group": group})
        return [_parked_key(row) for row in rows]

    async def get(self, id: UUID) -> ParkedKey:
        """One parked key.

        Raises:
            NotParkedError: there is none with this id.
        """
        return _parked_key(await self._row(id))

    async def _row(self, id: UUID) -> Any:
        rows = await self._database.read(tables.GET_PARKED_KEY, {"parked": id})
        if not rows:
            msg = f"no parked key {id}: list them with mainstay events parked list"
            raise NotParkedError(msg)
        return rows[0]

    async def retry(self, id: UUID) -> ParkedKey:
        """Have the events of a key tried again, from the first one on, with all their attempts.

        Raises:
            NotParkedError: there is none with this id.
        """
        found = await self._row(id)
        await self._database.write(tables.NEXT_OF_PARKED_KEY[self._database.dialect], _place(found))
        return _parked_key(found)

    async def skip(self, id: UUID) -> ParkedKey:
        """Make the first event of a key a dead letter, and have the others tried.

        Raises:
            NotParkedError: there is none with this id, or its first event is not one that has failed: another person
                has skipped that one.
        """
        found = await self._row(id)
        parked, place = _parked_key(found), _place(found)
        dialect = self._database.dialect
        async with self._database.transaction() as session:
            await session.execute(tables.HOLD_PARKED_KEY, place)
            now: Any = (await session.execute(tables.GET_PARKED_KEY, {"parked": id})).first()
            if now is None or now.failing_since != found.failing_since or not _has_failed(now):
                msg = f"the first event of parked key {id} has not failed (any more): look at it once more"
                raise NotParkedError(msg)
            row: Any = (await session.execute(tables.READ_FIRST_PARKED[dialect], place)).first()
            if row is not None:
                headers = headers_of(row.headers)
                record = LogRecord(row.topic, row.partition, row.offset, parked.key, row.value, headers)
                why = SkippedError(f"skipped by a person; its last error was\n{parked.error}")
                type_ = row.kind.rpartition(" ")[0] or OURS.type_of(record)
                await self._dead_letters.add(parked.group, record, why, parked.attempt, type=type_)
                await session.execute(tables.HANDLE_PARKED, {"done": row.position})
            await session.execute(tables.NEXT_OF_PARKED_KEY[dialect], place)
        return parked

    async def discard(self, id: UUID) -> ParkedKey:
        """Delete a key's whole queue, unhandled: the key is free, and what comes next is handled.

        Raises:
            NotParkedError: there is none with this id.
        """
        found = await self._row(id)
        place = _place(found)
        async with self._database.transaction() as session:
            await session.execute(tables.NEXT_OF_PARKED_KEY[self._database.dialect], place)
            await session.execute(tables.DELETE_QUEUE, place)
            await session.execute(tables.FREE_PARKED_KEY, place)
        return _parked_key(found)

    async def forget(self, group: str, kind: str) -> None:
        """Note that no process of a group will handle a kind of event any more, such as `order.paid 1.x`.

        While a release is rolled out, or taken back, events wait for the processes that can handle them. Where a
        handler was removed for good they would wait for 30 days, and what follows of their keys behind them. Once their
        kind is forgotten they are dealt with as if the group had never handled it: those of a type that it does not
        know are skipped, those of a major version that it cannot read become dead letters.

        Raises:
            ForgetError: a process that serves has a handler for it, or the group never had one.
        """
        place = {"of_group": group, "of_kind": kind, "gone": GONE_SECONDS}
        async with self._database.transaction() as session:
            forgotten: Any = await session.execute(tables.FORGET_HANDLED[self._database.dialect], place)
        if forgotten.rowcount == 0:
            known = await Handled(self._database, group, ()).look()
            if kind in known:
                msg = (
                    f"a process of group {group} had a handler for {kind} {known[kind]:.0f} s ago: it can be forgotten "
                    f"{GONE_SECONDS:.0f} s after the last one has ended"
                )
            else:
                handles = ", ".join(sorted(known)) or "nothing"
                msg = f"group {group} has no handler for {kind!r} that could be forgotten; it handles {handles}"
            raise ForgetError(msg)


def _place(row: Any) -> dict[str, object]:
    return {"of_group": row.group_name, "of_topic": row.topic, "of_key": row.key}


def _has_failed(row: Any) -> bool:
    """Whether the first event of a key has been tried, and does not merely wait for its turn."""
    return row.due_at is None or row.attempt + row.postponed > 1


def _parked_key(row: Any) -> ParkedKey:
    return ParkedKey(
        id=row.id,
        group=row.group_name,
        topic=row.topic,
        partition=row.partition,
        key=row.own_key,
        waiting=row.waiting,
        kind=row.kind,
        error=row.error,
        attempt=row.attempt,
        since=datetime.fromtimestamp(row.failing_since, UTC),
        due=None if row.due_at is None else datetime.fromtimestamp(row.due_at, UTC),
        alone=row.alone,
        paused=row.paused,
    )
