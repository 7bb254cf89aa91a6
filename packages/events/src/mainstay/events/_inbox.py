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
import logging
from collections.abc import Awaitable, Callable
from typing import Any

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
            if await self._database.read(tables.END_FROZEN, note):
                _log.warning("a transaction of a frozen process was ended, which was in the middle of an event")
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
    return {"group_name": group, "event_id": whole.decode("latin-1").replace("\0", "\\0")}
