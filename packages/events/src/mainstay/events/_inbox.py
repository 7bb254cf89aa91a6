"""Effects exactly once: the note that a group has handled an event commits with what its handler wrote.

A process that is frozen in the middle of a handler keeps its transaction, and with it the note, until the server ends
that. A second note of the same event would wait for it, with a connection of the pool in its hands. So the note is
written under an advisory lock of the transaction, which is had at once or not at all: an event that is another's at the
moment is tried again later, at no cost of an attempt, and its connection goes back.

A handler has a connection for as long as it runs, and there are few. No more handlers run at once than leave some for
everybody else; on SQLite, where a transaction is the one writer's turn, it is one.

A handler that only writes needs no transaction of its own while it runs: what it writes is collected and committed with
the note, together with what others have collected. A note that is there already refuses the whole of it.

Benchmark rows: "inbox on PostgreSQL, a transaction each" and "inbox on PostgreSQL, in batches".
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from hashlib import blake2b
from typing import Any

import sqlalchemy as sa

from mainstay.core import Drain
from mainstay.database import CommitUnknown, Conflict, Database, DatabaseBusy
from mainstay.events import tables
from mainstay.events._metrics import DUPLICATES
from mainstay.events._retention import swept
from mainstay.events.errors import DecodeError
from mainstay.events.event import Event
from mainstay.events.metadata import ID, SOURCE, Metadata
from mainstay.events.router import InboxMode

_log = logging.getLogger("mainstay.events")

_LONGEST_ID = 1000


def handlers_at_once(dialect: str, pool_size: int) -> int:
    """How many handlers with an inbox a process runs at once: three quarters of the pool, on SQLite one."""
    return 1 if dialect == "sqlite" else max(1, pool_size * 3 // 4)


class Inbox:
    """The notes of the groups of this process.

    Args:
        database: where they are, and where the handlers write.
        at_once: the most handlers, of all groups together.

    Attributes:
        at_once: as given.
    """

    def __init__(self, database: Database, at_once: int) -> None:
        self._database = database
        self.at_once = at_once
        self._places = asyncio.Semaphore(at_once)
        self._insert = tables.INSERT_INBOX[database.dialect]
        self._insert_some = tables.INSERT_INBOX_NOTES[database.dialect]

    def around(
        self, group: str, call: Callable[[Event, Metadata], Awaitable[None]], mode: InboxMode
    ) -> Callable[[Event, Metadata], Awaitable[None]]:
        """A handler whose writes are committed with the note, and are not for an event that the group has handled."""
        duplicates = DUPLICATES.labels(group)
        once = self._in_batch if mode == "batch" else self._in_transaction

        async def handle(event: Event, meta: Metadata) -> None:
            try:
                if await once(_note(group, meta), call, event, meta):
                    duplicates.inc()
            except CommitUnknown as error:
                # Elsewhere it would be unknown what to do. Here the next attempt finds the note, or writes it.
                error.retryable = True
                raise

        return handle

    def around_batch(
        self, group: str, call: Callable[[list[Event], list[Metadata]], Awaitable[None]]
    ) -> Callable[[list[Event], list[Metadata]], Awaitable[None]]:
        """A batch handler whose writes are committed with the notes; what the group has handled is left out."""
        duplicates = DUPLICATES.labels(group)

        async def handle(events: list[Event], metas: list[Metadata]) -> None:
            ids = [_note(group, meta)["event_id"] for meta in metas]
            try:
                async with self._places, self._database.transaction():
                    new = await self._note_new(group, ids)
                    # One that is there twice is handled once, as the first.
                    first = {event_id: number for number, event_id in reversed([*enumerate(ids)])}
                    kept = sorted(first[event_id] for event_id in new)
                    if kept:
                        await call([events[number] for number in kept], [metas[number] for number in kept])
            except CommitUnknown as error:
                error.retryable = True  # as above
                raise
            except DatabaseBusy:
                if self._database.dialect == "postgresql":
                    await self._end_frozen(tables.END_FROZEN_BATCHES, {})
                raise
            duplicates.inc(len(events) - len(kept))

        return handle

    async def _note_new(self, group: str, ids: Sequence[str]) -> list[str]:
        """Write notes in the unit of work that is open; those that were not there.

        Raises:
            DatabaseBusy: another process is in the middle of one of the events.
        """
        notes = sorted(set(ids))  # in one order, whichever process writes them
        async with self._database.transaction() as session:
            if self._database.dialect == "sqlite":
                rows = await session.execute(self._insert_some, {"group_name": group, "event_ids": json.dumps(notes)})
                return list(rows.scalars())
            before = (await session.execute(tables.WAIT_SHORTLY)).scalar_one()
            rows = await session.execute(self._insert_some, {"group_name": group, "event_ids": notes})
            await session.execute(tables.WAIT_AS_BEFORE, {"before": before})
            return list(rows.scalars())

    async def _end_frozen(self, statement: sa.Executable, note: dict[str, str]) -> None:
        if await self._database.read(statement, note):
            _log.warning("a transaction of a frozen process was ended, which was in the middle of an event")

    async def _in_transaction(
        self, note: dict[str, str], call: Callable[[Event, Metadata], Awaitable[None]], event: Event, meta: Metadata
    ) -> bool:
        """Call the handler in a transaction; whether it is a duplicate, for which nothing is called."""
        async with self._places, self._database.transaction():
            if await self._is_noted(note):
                return True
            await call(event, meta)
        return False

    async def _in_batch(
        self, note: dict[str, str], call: Callable[[Event, Metadata], Awaitable[None]], event: Event, meta: Metadata
    ) -> bool:
        """Call the handler and commit what it has collected; whether it is a duplicate, of which nothing is written."""
        try:
            async with self._database.batch():
                await self._database.write(tables.INSERT_NEW_INBOX, note)
                await call(event, meta)
        except Conflict:
            if await self._database.read(tables.READ_INBOX, note):
                return True
            raise  # a row of the handler's own
        return False

    async def _is_noted(self, note: dict[str, str]) -> bool:
        """Write the note in the unit of work that is open; whether it was there already.

        Raises:
            DatabaseBusy: another process is in the middle of the event.
        """
        async with self._database.transaction() as session:
            result: Any = await session.execute(self._insert, note)
        if result.rowcount:
            return False
        if not await self._database.read(tables.READ_INBOX, note):
            await self._end_frozen(tables.END_FROZEN, note)
            msg = "another process is in the middle of this event, or is frozen there: it is tried again later"
            raise DatabaseBusy(msg)
        return True

    async def sweep(self, days: float, drain: Drain) -> None:
        """Worker: forgets events older than the window within which duplicates are recognised, some at a time."""
        age = {"seconds": days * 86_400.0}
        database = self._database

        async def delete() -> None:
            while not drain.begun and await database.read(tables.OLDEST_INBOX[database.dialect], age):
                await database.write(tables.DELETE_OLD_INBOX[database.dialect], age)

        await swept(delete, drain)


def _note(group: str, meta: Metadata) -> dict[str, str]:
    event_id = meta.headers.get(ID)
    if event_id is None:
        msg = f"an event without the header {ID} cannot be told from its duplicates: the inbox refuses it"
        raise DecodeError(msg)
    # An id is one of its source (CloudEvents 1.0): others number theirs as they like.
    whole = b"%b\n%b" % (meta.headers.get(SOURCE, b""), event_id)
    if len(whole) > _LONGEST_ID:  # an index takes no more; a digest is no other's name, since those have two lines
        return {"group_name": group, "event_id": blake2b(whole, digest_size=32).hexdigest()}
    return {"group_name": group, "event_id": whole.decode("latin-1").replace("\0", "\\0")}
