"""Effects exactly once: the note that a group has handled an event commits with what its handler wrote."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from mainstay.core import Drain
from mainstay.database import CommitUnknown, Database
from mainstay.events import tables
from mainstay.events._metrics import DUPLICATES
from mainstay.events._sql import swept
from mainstay.events.errors import DecodeError
from mainstay.events.event import Event
from mainstay.events.metadata import ID, SOURCE, Metadata


def exactly_once(
    database: Database, group: str, call: Callable[[Event, Metadata], Awaitable[None]]
) -> Callable[[Event, Metadata], Awaitable[None]]:
    """A handler that runs inside `db.transaction()` and is not called for an event that the group has handled.

    The note comes first: two processes with the same event wait for each other there, and the second finds it taken.
    """
    insert = tables.INSERT_INBOX[database.dialect]
    duplicates = DUPLICATES.labels(group)

    async def handle(event: Event, meta: Metadata) -> None:
        event_id = meta.headers.get(ID)
        if event_id is None:
            msg = f"an event without the header {ID} cannot be told from its duplicates: the inbox refuses it"
            raise DecodeError(msg)
        # An id is one of its source (CloudEvents 1.0): others number theirs as they like.
        whole = b"%b\n%b" % (meta.headers.get(SOURCE, b""), event_id)
        note = {"group_name": group, "event_id": whole.decode("latin-1").replace("\0", "\\0")}
        try:
            async with database.transaction() as session:
                result: Any = await session.execute(insert, note)
                if result.rowcount == 0:
                    duplicates.inc()
                    return
                await call(event, meta)
        except CommitUnknown as error:
            # Elsewhere nobody could tell whether to try again. Here the next attempt finds the note, or writes it.
            error.retryable = True
            raise

    return handle


async def sweep(database: Database, days: float, drain: Drain) -> None:
    """Worker: forgets events that are older than the window within which duplicates are recognised, some at a time."""
    age = {"seconds": days * 86_400.0}

    async def delete() -> None:
        while not drain.begun and await database.read(tables.OLDEST_INBOX[database.dialect], age):
            await database.write(tables.DELETE_OLD_INBOX[database.dialect], age)

    await swept(delete, drain)
