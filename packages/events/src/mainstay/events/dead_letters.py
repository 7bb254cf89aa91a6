"""Events that could not be handled: kept with their raw bytes, listed, and sent again to the group that failed."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from typing import Protocol
from uuid import UUID

from mainstay.core import derived_id
from mainstay.events.errors import RedriveError
from mainstay.events.metadata import ONLY_GROUP, TYPE, Headers, Outgoing, Record

__all__ = ["DeadLetter", "DeadLetters"]

_LONGEST_ERROR = 20_000


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One event that a group gave up.

    Attributes:
        id: its name for `redrive`; the same when the same failure is reported twice.
        group: who could not handle it.
        topic, partition, offset: where it was read.
        key, value, headers: the record as it was received, byte for byte.
        error: the exception and its trace.
        attempts: how often the handler was called.
        time: when it was given up, in UTC.
    """

    id: UUID
    group: str
    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    error: str
    attempts: int
    time: datetime

    @property
    def type(self) -> str:
        """The event's type, empty where the record had none."""
        return (dict(self.headers).get(TYPE) or b"").decode(errors="replace")

    @classmethod
    def of(cls, group: str, record: Record, error: Exception, attempts: int, time: datetime) -> DeadLetter:
        """The dead letter for a record."""
        # The bytes belong to its name: a topic that was deleted and made anew counts its offsets from 0 again.
        digest = blake2b(record.value or b"", digest_size=16).hexdigest()
        where = f"{group}:{record.topic}/{record.partition}@{record.offset}:{digest}"
        return cls(
            id=derived_id(f"dead-letter:{where}"),
            group=group,
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            key=record.key,
            value=record.value,
            headers=tuple(record.headers),
            error=text_of(error),
            attempts=attempts,
            time=time,
        )

    def again(self) -> Outgoing:
        """The event as it is sent again: for its group only, so that those who handled it do not do so twice."""
        headers = [(name, value) for name, value in self.headers if name != ONLY_GROUP]
        return Outgoing(self.topic, self.key, self.value, [(ONLY_GROUP, self.group.encode()), *headers])


def text_of(error: Exception) -> str:
    """The trace as every store takes it: one that was refused for its size or characters would block the partition."""
    text = "".join(traceback.format_exception(error)).strip().encode(errors="backslashreplace").decode()
    half = _LONGEST_ERROR // 2
    return text if len(text) <= _LONGEST_ERROR else f"{text[:half]}\n…\n{text[-half:]}"


class DeadLetterStore(Protocol):
    """Where a transport keeps dead letters."""

    async def add(self, group: str, record: Record, error: Exception, attempts: int) -> None:
        """Keep one; returns when it is durable. Adding it again changes nothing."""
        ...

    async def list(self, group: str | None, limit: int) -> Sequence[DeadLetter]:
        """The oldest, of one group or of all."""
        ...

    async def get(self, id: UUID) -> DeadLetter | None:
        """One of them."""
        ...

    async def redrive(self, letter: DeadLetter) -> bool:
        """Send one again and remove it; False when it was gone."""
        ...


class DeadLetters:
    """The dead letters of this service; `app.get(DeadLetters)`, or the command `mainstay events dead-letters`."""

    def __init__(self, store: DeadLetterStore) -> None:
        self._store = store

    async def list(self, group: str | None = None, *, limit: int = 100) -> Sequence[DeadLetter]:
        """The oldest dead letters, of one group or of all."""
        return await self._store.list(group, limit)

    async def get(self, id: UUID) -> DeadLetter:
        """One dead letter.

        Raises:
            RedriveError: there is none with this id.
        """
        letter = await self._store.get(id)
        if letter is None:
            msg = f"no dead letter {id}: list them with mainstay events dead-letters list"
            raise RedriveError(msg)
        return letter

    async def redrive(self, id: UUID) -> DeadLetter:
        """Send one again to the group that failed, and to no other, at the end of its topic.

        The event keeps its id: an inbox that has seen it stays the judge. It is not in order with what was published
        meanwhile.

        Raises:
            RedriveError: there is none with this id (any more).
        """
        letter = await self.get(id)
        if not await self._store.redrive(letter):
            msg = f"dead letter {id} was redriven or deleted by somebody else a moment ago"
            raise RedriveError(msg)
        return letter
