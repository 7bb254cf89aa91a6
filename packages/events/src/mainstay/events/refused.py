"""Events that the broker refused for good, or that cannot be read. They wait here for a person.

Most often they are too large for their topic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy.ext.asyncio import AsyncSession

from mainstay.database import Database
from mainstay.events import tables
from mainstay.events._outbox import Outbox, event_of, lane_of
from mainstay.events.errors import RefusedError
from mainstay.events.metadata import TYPE, Headers
from mainstay.events.tables import headers_of

__all__ = ["RefusedEvent", "RefusedEvents"]


@dataclass(frozen=True, slots=True)
class RefusedEvent:
    """An event that was published and will never be taken by the broker as it is.

    Attributes:
        id: its number in the outbox.
        topic, key, value, headers: as it was sent.
        reason: what the broker said, or why it cannot be read.
        published_at: when it was written to the outbox.
    """

    id: int
    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers
    reason: str
    published_at: datetime

    @property
    def type(self) -> str:
        """The event's type."""
        return (dict(self.headers).get(TYPE) or b"").decode(errors="replace")


class RefusedEvents:
    """The refused events of this service; `app.get(RefusedEvents)`, or the command `mainstay events refused`.

    Args:
        database: where they are.
        outbox: takes those that are to be tried again.
    """

    def __init__(self, database: Database, outbox: Outbox) -> None:
        self._database = database
        self._outbox = outbox

    async def list(self, *, limit: int = 100) -> Sequence[RefusedEvent]:
        """The oldest."""
        rows = await self._database.read(tables.LIST_REFUSED, {"limit": limit})
        return [
            RefusedEvent(
                row.position,
                row.topic,
                row.key,
                row.value,
                headers_of(row.headers),
                row.reason,
                datetime.fromtimestamp(row.created_at, UTC),
            )
            for row in rows
        ]

    async def retry(self, id: int) -> None:
        """Send one again, behind what was published meanwhile: the topic takes it now.

        Raises:
            RefusedError: there is none with this id (any more), or it cannot be read.
        """
        rows = await self._database.read(tables.GET_REFUSED, {"row": id})
        try:
            lane = lane_of(event_of(rows[0])) if rows else 0
        except ValueError as error:
            msg = f"refused event {id} cannot be sent: its headers cannot be read: {error}; discard it"
            raise RefusedError(msg) from error
        async with self._database.transaction() as session:
            if rows:
                await session.execute(tables.TRY_REFUSED, {"row": id, "lane": lane})
            await _remove(session, id)
            self._database.after_commit(self._outbox.arrivals.announce)

    async def discard(self, id: int) -> None:
        """Delete one.

        Raises:
            RefusedError: there is none with this id (any more).
        """
        async with self._database.transaction() as session:
            await _remove(session, id)


async def _remove(session: AsyncSession, id: int) -> None:
    gone = await session.execute(tables.DELETE_REFUSED.returning(tables.REFUSED.c.position), {"row": id})
    if gone.first() is None:
        msg = f"no refused event {id}: list them with mainstay events refused list"
        raise RefusedError(msg)
