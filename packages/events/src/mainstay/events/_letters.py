"""Dead letters in a table of the service's database."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from mainstay.core import Clock, Drain
from mainstay.database import Database
from mainstay.events import tables
from mainstay.events._retention import swept
from mainstay.events.dead_letters import DeadLetter, Wanted
from mainstay.events.metadata import Outgoing, Record
from mainstay.events.tables import headers_of, pack_headers

_LETTERS = tables.DEAD_LETTERS.c


class SqlDeadLetters:
    """See the module.

    Args:
        database: where.
        send: writes a redriven event: to the log, or the outbox.
        clock: stamps them.
    """

    def __init__(self, database: Database, send: Callable[[Sequence[Outgoing]], Awaitable[None]], clock: Clock) -> None:
        self._database = database
        self._send = send
        self._clock = clock

    async def add(self, group: str, record: Record, error: Exception, attempts: int, *, type: str) -> None:
        """See `DeadLetterStore`."""
        letter = DeadLetter.of(group, record, error, attempts, self._clock.now(), type=type)
        correlation_id = letter.correlation_id
        await self._database.write(
            tables.INSERT_DEAD_LETTER[self._database.dialect],
            {
                "id": letter.id,
                "group_name": letter.group,
                "topic": letter.topic,
                "partition": letter.partition,
                "offset": letter.offset,
                "key": letter.key,
                "value": letter.value,
                "headers": pack_headers(letter.headers),
                "error": letter.error.replace("\0", ""),
                "attempts": letter.attempts,
                "time": letter.time,
                "type": letter.type.replace("\0", ""),
                "correlation_id": correlation_id and correlation_id.replace("\0", ""),
            },
        )

    async def list(self, wanted: Wanted, limit: int) -> Sequence[DeadLetter]:
        """See `DeadLetterStore`."""
        conditions = [
            column == value
            for column, value in (
                (_LETTERS.state, wanted.state),
                (_LETTERS.group_name, wanted.group),
                (_LETTERS.type, wanted.type),
                (_LETTERS.key, wanted.key),
                (_LETTERS.correlation_id, wanted.correlation_id),
            )
            if value is not None
        ]
        if wanted.since is not None:
            conditions.append(_LETTERS.time >= wanted.since.astimezone(UTC))
        if wanted.until is not None:
            conditions.append(_LETTERS.time < wanted.until.astimezone(UTC))
        statement = sa.select(tables.DEAD_LETTERS).where(*conditions).order_by(_LETTERS.time, _LETTERS.id).limit(limit)
        return [_letter(row) for row in await self._database.read(statement)]

    async def get(self, id: UUID) -> DeadLetter | None:
        """See `DeadLetterStore`."""
        rows = await self._database.read(tables.GET_DEAD_LETTER, {"letter": id})
        return _letter(rows[0]) if rows else None

    async def redrive(self, letter: DeadLetter, by: str) -> bool:
        """See `DeadLetterStore`. Sent and noted in one commit, as it is then: another may have edited it."""
        async with self._database.transaction() as session:
            settled: Any = await session.execute(
                tables.SETTLE_DEAD_LETTER, self._settled(letter, "redriven", letter.reason, by)
            )
            if settled.rowcount == 0:
                return False
            row = (await session.execute(tables.GET_DEAD_LETTER, {"letter": letter.id})).one()
            await self._send([_letter(row).again()])
        return True

    async def discard(self, letter: DeadLetter, reason: str, by: str) -> bool:
        """See `DeadLetterStore`."""
        async with self._database.transaction() as session:
            discarded = self._settled(letter, "discarded", reason, by, states=["waiting"])
            settled: Any = await session.execute(tables.SETTLE_DEAD_LETTER, discarded)
            return bool(settled.rowcount)

    def _settled(
        self, letter: DeadLetter, state: str, reason: str, by: str, states: Sequence[str] = ("waiting", "discarded")
    ) -> dict[str, object]:
        changed = {"changed_by": by, "changed_at": self._clock.now()}
        return {"letter": letter.id, "from_states": list(states), "state": state, "reason": reason, **changed}

    async def edit(self, letter: DeadLetter, value: bytes, by: str) -> bool:
        """See `DeadLetterStore`."""
        async with self._database.transaction() as session:
            changed = {"letter": letter.id, "payload": value, "changed_by": by, "changed_at": self._clock.now()}
            edited: Any = await session.execute(tables.EDIT_DEAD_LETTER, changed)
            return bool(edited.rowcount)

    async def sweep(self, days: float, drain: Drain) -> None:
        """Worker: forgets what was redriven or discarded so long ago, some at a time."""

        async def delete() -> None:
            age = {"before": self._clock.now() - timedelta(days=days)}
            while not drain.begun and await self._database.read(tables.OLD_DEAD_LETTERS, age):
                await self._database.write(tables.DELETE_OLD_DEAD_LETTERS, age)

        await swept(delete, drain)


def _letter(row: Any) -> DeadLetter:
    return DeadLetter(
        id=row.id,
        group=row.group_name,
        topic=row.topic,
        partition=row.partition,
        offset=row.offset,
        key=row.key,
        value=row.value,
        headers=headers_of(row.headers),
        error=row.error,
        attempts=row.attempts,
        time=_in_utc(row.time),
        type=row.type,
        state=row.state,
        edited=row.edited,
        received=row.received,
        reason=row.reason,
        changed_by=row.changed_by,
        changed_at=None if row.changed_at is None else _in_utc(row.changed_at),
    )


def _in_utc(time: datetime) -> datetime:
    return time if time.tzinfo else time.replace(tzinfo=UTC)  # SQLite keeps none
