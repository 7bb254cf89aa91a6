"""Events that could not be handled: kept with their raw bytes, listed, and sent again to the group that failed."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import blake2b
from typing import Literal, NamedTuple, Protocol
from uuid import UUID

from mainstay.core import ConfigurationError, MainstayError, current, derived_id
from mainstay.database import Database
from mainstay.events._codec import codec_of
from mainstay.events._decoding import FIRST_READ, OURS, identity, is_cloud_event
from mainstay.events._routes import Handling, Routes
from mainstay.events._structured import is_structured, understood
from mainstay.events.errors import DecodeError, RedriveError
from mainstay.events.event import Event
from mainstay.events.metadata import (
    CORRELATION,
    ID,
    ONLY_GROUP,
    SOURCE,
    TYPE,
    UNREADABLE,
    VERSION,
    Headers,
    Outgoing,
    Record,
)

__all__ = ["DeadLetter", "DeadLetters"]

_LONGEST_ERROR = 20_000
_SCHEMA_SECONDS = 10.0
_AGAIN_SECONDS = 0.1

State = Literal["waiting", "redriven", "discarded"]


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
        type: of the event, empty where the record had none.
        state: `waiting`, or what a person has done with it.
        edited: whether `value` is what a person has made of it; `received` is what it was then.
        reason: why it was discarded.
        changed_by: who redrove, discarded or edited it last, as they said.
        changed_at: when, in UTC.
        first_read: the id of a record of others that was edited where what was received is not kept beside it.
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
    type: str = ""
    state: State = "waiting"
    edited: bool = False
    received: bytes | None = None
    reason: str = ""
    changed_by: str = ""
    changed_at: datetime | None = None
    first_read: str = ""

    @property
    def correlation_id(self) -> str | None:
        """The conversation that the event is part of."""
        if self.is_foreign:
            return self.identity
        value = dict(understood(self).headers).get(CORRELATION)
        return None if value is None else value.decode(errors="replace")

    @property
    def is_foreign(self) -> bool:
        """Whether it is a record of others, which has no id of its own."""
        return bool(self.type) and not is_cloud_event(self)

    @property
    def identity(self) -> str:
        """What stands for the id of a record of others, also after an edit."""
        return self.first_read or identity(replace(self, value=self.received) if self.edited else self)

    @classmethod
    def of(
        cls, group: str, record: Record, error: Exception, attempts: int, time: datetime, *, type: str = ""
    ) -> DeadLetter:
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
            type=type,
        )

    def again(self) -> Outgoing:
        """The event as it is sent again: for its group only, so that those who handled it do not do so twice."""
        headers = [(name, value) for name, value in self.headers if name not in {ONLY_GROUP, FIRST_READ}]
        if self.is_foreign:  # its place is its id, and it comes to another one
            headers.insert(0, (FIRST_READ, self.identity.encode()))
        return Outgoing(self.topic, self.key, self.value, [(ONLY_GROUP, self.group.encode()), *headers])


def text_of(error: Exception) -> str:
    """The trace as every store takes it: one that was refused for its size or characters would block the partition."""
    text = "".join(traceback.format_exception(error)).strip().encode(errors="backslashreplace").decode()
    half = _LONGEST_ERROR // 2
    return text if len(text) <= _LONGEST_ERROR else f"{text[:half]}\n…\n{text[-half:]}"


class Wanted(NamedTuple):
    """Which dead letters are asked for; what is None is not looked at. `until` is the first moment beyond them."""

    group: str | None = None
    type: str | None = None
    key: bytes | None = None
    correlation_id: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    state: State | None = None

    def has(self, letter: DeadLetter) -> bool:
        """Whether a letter is one of them."""
        return (
            self.group in {None, letter.group}
            and self.type in {None, letter.type}
            and self.key in {None, letter.key}
            and self.correlation_id in {None, letter.correlation_id}
            and self.state in {None, letter.state}
            and (self.since is None or letter.time >= self.since)
            and (self.until is None or letter.time < self.until)
        )


class DeadLetterStore(Protocol):
    """Where a transport keeps dead letters."""

    async def add(self, group: str, record: Record, error: Exception, attempts: int, *, type: str) -> None:
        """Keep one, of an event of this type; returns when it is durable. Adding it again changes nothing."""
        ...

    async def list(self, wanted: Wanted, limit: int) -> Sequence[DeadLetter]:
        """The oldest of those that are wanted."""
        ...

    async def get(self, id: UUID) -> DeadLetter | None:
        """One of them."""
        ...

    async def redrive(self, letter: DeadLetter, by: str) -> bool:
        """Send one again that was not sent yet, and note that; False when there is none any more."""
        ...

    async def discard(self, letter: DeadLetter, reason: str, by: str) -> bool:
        """Note that one that waits is not to be handled; False when it waits no more."""
        ...

    async def edit(self, letter: DeadLetter, value: bytes, by: str) -> bool:
        """Put another value into one that was not sent yet; False when there is none any more."""
        ...


class DeadLetters:
    """The dead letters of this service; `app.get(DeadLetters)`, or the command `mainstay events dead-letters`.

    A letter waits until a person redrives or discards it, and may be edited before. With a table the settled ones can
    still be listed for `dead_letter_days`; in a topic they are gone at once.
    """

    def __init__(self, store: DeadLetterStore, routes: Mapping[str, Routes], database: Database | None) -> None:
        self._store = store
        self._routes = routes
        self._database = database

    async def list(
        self,
        group: str | None = None,
        *,
        type: str | None = None,
        key: str | None = None,
        correlation_id: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        state: State | None = "waiting",
        limit: int = 100,
    ) -> Sequence[DeadLetter]:
        """The oldest dead letters that fit.

        Args:
            group: of this group; by default of all.
            type: with events of this type.
            key: with this key.
            correlation_id: of this conversation.
            since, until: given up from this moment on, and before that one; with a zone.
            state: in this state; None for all.
            limit: at most so many.

        Raises:
            ValueError: a moment has no zone.
        """
        for name, moment in (("since", since), ("until", until)):
            if moment is not None and moment.tzinfo is None:
                msg = f"{name}={moment!r} has no zone: say which one, such as datetime.UTC"
                raise ValueError(msg)
        wanted = Wanted(group, type, None if key is None else key.encode(), correlation_id, since, until, state)
        return await self._store.list(wanted, limit)

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

    async def redrive(self, id: UUID, *, by: str | None = None) -> DeadLetter:
        """Send one again to the group that failed, and to no other, at the end of its topic.

        It is what was received, byte for byte, unless it was edited. The event keeps its id: an inbox that has seen it
        stays the judge. It is not in order with what was published meanwhile. One that was discarded may be redriven.

        Args:
            id: which.
            by: who does it; by default the actor of the current context.

        Raises:
            RedriveError: there is none with this id (any more), or it was redriven before.
        """
        letter = await self.get(id)
        if not await self._store.redrive(letter, _who(by)):
            raise _settled(await self.get(id))
        return letter

    async def discard(self, id: UUID, *, reason: str, by: str | None = None) -> DeadLetter:
        """Say that one is not to be handled.

        Args:
            id: which.
            reason: why, for those who ask later.
            by: who does it; by default the actor of the current context.

        Raises:
            ValueError: the reason is empty.
            RedriveError: none with this id waits (any more).
        """
        if not reason.strip():
            msg = "discard(reason=…) says why the event is not to be handled: it cannot be empty"
            raise ValueError(msg)
        letter = await self.get(id)
        if not await self._store.discard(letter, reason, _who(by)):
            raise _settled(await self.get(id))
        return letter

    async def edit(self, id: UUID, value: bytes, *, by: str | None = None) -> DeadLetter:
        """Replace the value of one that was not sent again yet. What was received stays on it, with a table.

        Args:
            id: which.
            value: the event as JSON, as the class that its group handles reads it, with the same key.
            by: who does it; by default the actor of the current context.

        Raises:
            RedriveError: there is none with this id (any more), or it was redriven.
            DecodeError: the class does not read this; the message names the fields.
            ValueError: the key is another: that would be out of order with its own; publish an event instead. Or it is
                a CloudEvent in structured mode with another id.
            ConfigurationError: this App has no handler for it in its group.
        """
        letter = await self.get(id)
        edited = replace(letter, value=value)
        seen = await self._seen(edited)
        event = self._read(letter, seen)
        # A record of others has the key that they gave it, not one that its value names.
        if is_cloud_event(letter) and codec_of(type(event)).key(event) != letter.key:
            msg = f"dead letter {id} has another key: an edited event stays where it is in order; publish one instead"
            raise ValueError(msg)
        if is_structured(letter) and (other := _other_name(understood(letter), seen)):
            msg = f"dead letter {id} has another {other}: edited it would be another event; publish one instead"
            raise ValueError(msg)
        if not await self._store.edit(letter, value, _who(by)):
            raise _settled(await self.get(id))
        return await self.get(id)

    async def dry_run(self, id: UUID, *, handler: bool = False) -> Event:
        """Read one as its group does, and have its handler try it if asked to; nothing is redriven.

        Args:
            id: which.
            handler: call the handler in a unit of work that is rolled back. What it does elsewhere than in the
                Database is done.

        Returns:
            The event.

        Raises:
            RedriveError: there is none with this id.
            DecodeError: it cannot be read.
            ConfigurationError: this App has no handler for it in its group, or no Database to roll back.
            Exception: what the handler raises.
        """
        letter = await self.get(id)
        seen = await self._seen(letter)
        event = self._read(letter, seen)
        if not handler:
            return event
        if self._database is None:
            msg = "a handler is tried in a unit of work that is rolled back: add DatabaseModule.for_root()"
            raise ConfigurationError(msg)
        try:
            async with self._database.transaction():
                await self._handling(letter, seen).tried(event, seen, letter.group)
                raise _RollBackError
        except _RollBackError:
            return event

    async def _seen(self, letter: DeadLetter) -> Record:
        """The record as its group reads it; a schema that is not known yet is waited for."""
        routes = self._routes.get(letter.group)
        decoders = OURS if routes is None else routes.decoders
        end = time.monotonic() + _SCHEMA_SECONDS
        while True:
            try:
                return decoders.understood(letter)
            except MainstayError as passing:
                if time.monotonic() >= end:
                    raise
                wait = passing.retry_after_seconds or _AGAIN_SECONDS
            await asyncio.sleep(wait)

    def _read(self, letter: DeadLetter, seen: Record) -> Event:
        event: Event = self._handling(letter, seen).read(letter.type, seen.value or b"")
        return event

    def _handling(self, letter: DeadLetter, seen: Record) -> Handling:
        headers = dict(seen.headers)
        if UNREADABLE in headers:
            raise DecodeError((headers[UNREADABLE] or b"").decode(errors="replace"))
        type_ = (headers.get(TYPE) or b"").decode(errors="replace")
        routes = self._routes.get(letter.group)
        route = None if routes is None else routes.get(type_)
        if route is None:
            msg = (
                f"this App has no handler for {type_ or 'events without a type'} in group {letter.group}: "
                "name the one that has it, on the command line with --app"
            )
            raise ConfigurationError(msg)
        return route.handling(headers.get(VERSION) or b"1.0")


def _other_name(received: Record, edited: Record) -> str | None:
    """By which of the attributes that name an event another one is meant; a record that could not be read has none."""
    before, now = dict(received.headers), dict(edited.headers)
    other = [name for name in (ID, SOURCE) if before.get(name, now.get(name)) != now.get(name)]
    return other[0].removeprefix("ce_") if other else None


class _RollBackError(Exception):
    pass


def _who(by: str | None) -> str:
    return by or current().actor or ""


def _settled(letter: DeadLetter) -> RedriveError:
    when = "" if letter.changed_at is None else f" on {letter.changed_at:%Y-%m-%d %H:%M:%S %Z}"
    by = f" by {letter.changed_by}" if letter.changed_by else ""
    return RedriveError(f"dead letter {letter.id} was {letter.state}{when}{by}")
