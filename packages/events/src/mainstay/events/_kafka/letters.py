"""Dead letters in a compacted topic of the service, for services without a Database.

A letter is the record as it was, with two more headers. Where that is more than the broker takes, only these are kept,
and the record itself is read from the topic that it came from, for as long as that keeps it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from mainstay.core import Clock
from mainstay.events._kafka.seam import REQUEST_SECONDS, Client, Producer, TooLargeError
from mainstay.events._kafka.topics import Topics
from mainstay.events.dead_letters import DeadLetter, Wanted
from mainstay.events.errors import RedriveError
from mainstay.events.metadata import CORRELATION, TYPE, Headers, Record
from mainstay.events.settings import EventsSettings

_log = logging.getLogger("mainstay.events")


class _Kept(NamedTuple):
    letter: DeadLetter
    whole: bool


class KafkaDeadLetters:
    """See the module.

    Args:
        settings: how to connect.
        topics: where theirs is made.
        client: reads them.
        producer: carries them.
        clock: stamps them.
    """

    def __init__(
        self, settings: EventsSettings, topics: Topics, client: Client, producer: Producer, clock: Clock
    ) -> None:
        self._topics = topics
        self._client = client
        self._producer = producer
        self._clock = clock
        self._topic = re.sub(r"[^A-Za-z0-9._-]", "-", settings.source) + ".dead-letters"

    async def add(self, group: str, record: Record, error: Exception, attempts: int, *, type: str) -> None:
        """See `DeadLetterStore`."""
        letter = DeadLetter.of(group, record, error, attempts, self._clock.now(), type=type)
        try:
            await self._write(letter.id, letter.value or b"", _headers_of(letter, whole=True))
        except TooLargeError:
            await self._write(letter.id, b"", _headers_of(letter, whole=False))

    async def _write(self, id: UUID, value: bytes | None, headers: Headers) -> None:
        await self._topics.ensure(self._topic, compacted=True)
        await self._producer.send(self._topic, [(id.bytes, value, headers)])

    async def list(self, wanted: Wanted, limit: int) -> Sequence[DeadLetter]:
        """See `DeadLetterStore`. Here are only those that wait."""
        letters = [kept.letter for kept in (await self._read()).values() if wanted.has(kept.letter)]
        return sorted(letters, key=lambda letter: (letter.time, letter.id))[:limit]

    async def get(self, id: UUID) -> DeadLetter | None:
        """See `DeadLetterStore`."""
        kept = (await self._read()).get(id)
        if kept is None:
            return None
        return kept.letter if kept.whole else await self._with_its_record(kept.letter) or kept.letter

    async def redrive(self, letter: DeadLetter, by: str) -> bool:
        """See `DeadLetterStore`. Killed between the two, it is there twice."""
        _log.info("dead letter %s is redriven by %s", letter.id, by or "somebody without a name")
        kept = (await self._read()).get(letter.id)
        if kept is None:
            return False
        again = (await self._whole(kept)).again()
        await self._producer.send(again.topic, [(again.key, again.value, again.headers)])
        await self._write(letter.id, None, [])
        return True

    async def discard(self, letter: DeadLetter, reason: str, by: str) -> bool:
        """See `DeadLetterStore`. What is discarded is gone, and why is in the log only."""
        if letter.id not in await self._read():
            return False
        await self._write(letter.id, None, [])
        place = f"{letter.topic}/{letter.partition}@{letter.offset}"
        who = by or "somebody without a name"
        _log.warning("dead letter %s of group %s, %s, was discarded by %s: %s", letter.id, letter.group, place, who,
                     reason)  # fmt: skip
        return True

    async def edit(self, letter: DeadLetter, value: bytes, by: str) -> bool:
        """See `DeadLetterStore`. What was received is where it was read, for as long as that topic keeps it."""
        kept = (await self._read()).get(letter.id)
        if kept is None:
            return False
        whole = await self._whole(kept)
        first_read = whole.identity if whole.is_foreign else ""
        edited = replace(
            whole, value=value, edited=True, changed_by=by, changed_at=self._clock.now(), first_read=first_read
        )
        try:
            await self._write(letter.id, value, _headers_of(edited, whole=True))
        except TooLargeError as error:
            msg = f"dead letter {letter.id} cannot be edited: its topic takes no record of that size beside its error"
            raise RedriveError(msg) from error
        return True

    async def _whole(self, kept: _Kept) -> DeadLetter:
        """A letter with its record.

        Raises:
            RedriveError: that is kept nowhere any more.
        """
        letter = kept.letter
        whole = letter if kept.whole else await self._with_its_record(letter)
        if whole is None:
            msg = (
                f"dead letter {letter.id} was too large to be kept, and its record is no longer in "
                f"{letter.topic}/{letter.partition}@{letter.offset}: there is nothing to send again"
            )
            raise RedriveError(msg)
        return whole

    async def _with_its_record(self, letter: DeadLetter) -> DeadLetter | None:
        """The letter with what is at its place, None where that is another record by now, or nothing."""
        async with (
            asyncio.timeout(REQUEST_SECONDS),
            aclosing(self._client.stored(letter.topic, letter.partition, offset=letter.offset)) as records,
        ):
            async for record in records:
                found = DeadLetter.of(letter.group, record, ValueError(), 1, letter.time)
                if found.id != letter.id:
                    return None
                return replace(letter, key=found.key, value=found.value, headers=found.headers)
        return None

    async def _read(self) -> dict[UUID, _Kept]:
        """The whole topic: compaction keeps it as large as what waits in it."""
        await self._topics.ensure(self._topic, compacted=True)
        letters: dict[UUID, _Kept] = {}
        async with aclosing(self._client.stored(self._topic, 0)) as records:
            async for record in records:
                self._take(letters, record)
        return letters

    def _take(self, letters: dict[UUID, _Kept], record: Record) -> None:
        try:
            name = UUID(bytes=record.key)
            if record.value is None:
                letters.pop(name, None)
            else:
                letters[name] = _letter_of(name, record.headers, record.value)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            _log.warning("topic %s holds a record at %d that is no dead letter of ours and is passed over: %r",
                         self._topic, record.offset, error)  # fmt: skip


def _headers_of(letter: DeadLetter, *, whole: bool) -> Headers:
    """The headers that it had, byte for byte, and behind them its key and what is known about the failure."""
    facts = {
        "group": letter.group,
        "topic": letter.topic,
        "partition": letter.partition,
        "offset": letter.offset,
        "whole": whole,
        "empty": letter.value is None,  # in a compacted topic a record without a value deletes
        "error": letter.error,
        "attempts": letter.attempts,
        "time": letter.time.isoformat(),
        "type": letter.type,
        "edited": letter.edited,
        "first_read": letter.first_read,
        "changed_by": letter.changed_by,
        "changed_at": letter.changed_at and letter.changed_at.isoformat(),
    }
    own = letter.headers if whole else [pair for pair in letter.headers if pair[0] in {TYPE, CORRELATION}]
    return [*own, ("key", letter.key if whole else None), ("letter", json.dumps(facts).encode())]


def _letter_of(id: UUID, headers: Headers, value: bytes) -> _Kept:
    *own, (_, key), (_, text) = headers
    facts: dict[str, Any] = json.loads(text or b"")
    letter = DeadLetter(
        id=id,
        group=facts["group"],
        topic=facts["topic"],
        partition=facts["partition"],
        offset=facts["offset"],
        key=key,
        value=None if facts["empty"] or not facts["whole"] else value,
        headers=tuple(own),
        error=facts["error"],
        attempts=facts["attempts"],
        time=datetime.fromisoformat(facts["time"]),
        type=facts["type"],
        edited=facts["edited"],
        first_read=facts["first_read"],
        changed_by=facts["changed_by"],
        changed_at=datetime.fromisoformat(facts["changed_at"]) if facts["changed_at"] else None,
    )
    return _Kept(letter, facts["whole"])
