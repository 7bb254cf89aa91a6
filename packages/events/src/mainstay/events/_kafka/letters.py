"""Dead letters in a compacted topic, for services without a Database."""

# aiokafka ships no types.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from aiokafka import AIOKafkaConsumer, TopicPartition

from mainstay.core import Clock
from mainstay.events._kafka.client import connection, ended
from mainstay.events._kafka.producer import KafkaProducer
from mainstay.events._kafka.topics import Topics
from mainstay.events.dead_letters import DeadLetter
from mainstay.events.metadata import Headers, Record
from mainstay.events.settings import EventsSettings

_DEAD_LETTERS = "mainstay.dead-letters"


class KafkaDeadLetters:
    """Dead letters in a compacted topic, for services without a Database.

    Args:
        settings: how to connect.
        topics: where theirs is made.
        producer: carries them.
        clock: stamps them.
    """

    def __init__(self, settings: EventsSettings, topics: Topics, producer: KafkaProducer, clock: Clock) -> None:
        self._settings = settings
        self._topics = topics
        self._producer = producer
        self._clock = clock

    async def add(self, group: str, record: Record, error: Exception, attempts: int) -> None:
        """See `DeadLetterStore`."""
        letter = DeadLetter.of(group, record, error, attempts, self._clock.now())
        await self._write(letter.id, letter.value or b"", _headers_of(letter))

    async def _write(self, id: UUID, value: bytes | None, headers: Headers) -> None:
        await self._topics.ensure(_DEAD_LETTERS, compacted=True)
        await self._producer.send(_DEAD_LETTERS, [(id.bytes, value, headers)])

    async def list(self, group: str | None, limit: int) -> Sequence[DeadLetter]:
        """See `DeadLetterStore`."""
        letters = [letter for letter in (await self._read()).values() if group in {None, letter.group}]
        return sorted(letters, key=lambda letter: (letter.time, letter.id))[:limit]

    async def get(self, id: UUID) -> DeadLetter | None:
        """See `DeadLetterStore`."""
        return (await self._read()).get(id)

    async def redrive(self, letter: DeadLetter) -> bool:
        """See `DeadLetterStore`. Killed between the two, it is there twice."""
        if letter.id not in await self._read():
            return False
        again = letter.again()
        await self._producer.send(again.topic, [(again.key, again.value, again.headers)])
        await self._write(letter.id, None, [])
        return True

    async def _read(self) -> dict[UUID, DeadLetter]:
        """The whole topic: compaction keeps it as large as what waits in it."""
        await self._topics.ensure(_DEAD_LETTERS, compacted=True)
        consumer = AIOKafkaConsumer(
            **connection(self._settings), enable_auto_commit=False, auto_offset_reset="earliest"
        )
        place = TopicPartition(_DEAD_LETTERS, 0)
        letters: dict[UUID, DeadLetter] = {}
        try:
            await consumer.start()
            consumer.assign([place])
            end = (await consumer.end_offsets([place]))[place]
            while await consumer.position(place) < end:
                for record in (await consumer.getmany(place, timeout_ms=1000)).get(place, ()):
                    name = UUID(bytes=record.key)
                    if record.value is None:
                        letters.pop(name, None)
                    else:
                        letters[name] = _letter_of(name, record.headers, record.value)
        finally:
            await ended("the reader of dead letters", consumer.stop(), consumer._client)
        return letters


def _headers_of(letter: DeadLetter) -> Headers:
    """The headers that it had, byte for byte, and behind them its key and what is known about the failure."""
    facts = {
        "group": letter.group,
        "topic": letter.topic,
        "partition": letter.partition,
        "offset": letter.offset,
        "empty": letter.value is None,  # in a compacted topic a record without a value deletes
        "error": letter.error,
        "attempts": letter.attempts,
        "time": letter.time.isoformat(),
    }
    return [*letter.headers, ("key", letter.key), ("letter", json.dumps(facts).encode())]


def _letter_of(id: UUID, headers: Headers, value: bytes) -> DeadLetter:
    *own, (_, key), (_, text) = headers
    facts: dict[str, Any] = json.loads(text or b"")
    return DeadLetter(
        id=id,
        group=facts["group"],
        topic=facts["topic"],
        partition=facts["partition"],
        offset=facts["offset"],
        key=key,
        value=None if facts["empty"] else value,
        headers=tuple(own),
        error=facts["error"],
        attempts=facts["attempts"],
        time=datetime.fromisoformat(facts["time"]),
    )
