"""Reading without a group, by aiokafka."""

# aiokafka ships no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition

from mainstay.events._aiokafka.client import connection, ended
from mainstay.events._aiokafka.connecting import NamingClient
from mainstay.events._kafka.seam import REQUEST_SECONDS, Contact
from mainstay.events._log import Partition, Stored
from mainstay.events.metadata import UNREADABLE

_FETCH_MS = 250


class AiokafkaBrowser:
    """See `Browser`.

    Args:
        contact: how the cluster is met.
    """

    def __init__(self, contact: Contact) -> None:
        self._consumer = AIOKafkaConsumer(
            **connection(contact, "consumer", fetch_max_wait_ms=100),
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
        )
        NamingClient.instead_of(self._consumer._client, contact)
        self._next: Mapping[Partition, int] = {}

    async def start(self) -> None:
        """Connect."""
        await self._consumer.start()

    async def spans(self, partitions: Collection[Partition]) -> Mapping[Partition, tuple[int, int]]:
        """See `Browser`."""
        places = [TopicPartition(*each) for each in partitions]
        firsts = await self._consumer.beginning_offsets(places)
        ends = await self._consumer.end_offsets(places)
        return {(place.topic, place.partition): (firsts[place], ends[place]) for place in places}

    async def at(self, partitions: Collection[Partition], time: float) -> Mapping[Partition, int]:
        """See `Browser`."""
        places = [TopicPartition(*each) for each in partitions]
        found = await self._consumer.offsets_for_times(dict.fromkeys(places, int(time * 1000)))
        ends = await self._consumer.end_offsets(places)
        return {
            (place.topic, place.partition): ends[place] if found[place] is None else found[place].offset
            for place in places
        }

    async def read(
        self, starts: Mapping[Partition, int], ends: Mapping[Partition, int]
    ) -> tuple[Sequence[Stored], Mapping[Partition, int]]:
        """See `Browser`."""
        if starts != self._next:  # else it goes on where it is, with what it has fetched already
            self._consumer.assign([TopicPartition(*each) for each in starts])
            for each, offset in starts.items():
                self._consumer.seek(TopicPartition(*each), offset)
        self._next = {}
        async with asyncio.timeout(REQUEST_SECONDS):
            while True:
                try:
                    fetched = await self._consumer.getmany(timeout_ms=_FETCH_MS, max_records=500)
                except UnicodeDecodeError:  # the name of a header, anywhere in what was fetched
                    records = await self._one_by_one(starts)
                else:
                    records = [_stored(record) for some in fetched.values() for record in some]
                then = {each: await self._consumer.position(TopicPartition(*each)) for each in starts}
                if records or all(then[each] >= end for each, end in ends.items()):
                    self._next = then
                    return records, then

    async def _one_by_one(self, starts: Mapping[Partition, int]) -> list[Stored]:
        """One record of each partition, in place of one that aiokafka cannot read another that says so."""
        for each, offset in starts.items():  # it has thrown away what it had read of others
            self._consumer.seek(TopicPartition(*each), offset)
        records: list[Stored] = []
        for each in starts:
            place = TopicPartition(*each)
            try:
                found = await self._consumer.getmany(place, timeout_ms=_FETCH_MS, max_records=1)
                records += [_stored(record) for record in found.get(place, ())]
            except UnicodeDecodeError as error:
                offset = await self._consumer.position(place)
                self._consumer.seek(place, offset + 1)
                why = f"the name of a header is not UTF-8, so the record cannot be read: {error.reason}"
                records.append(Stored(*each, offset, None, None, [(UNREADABLE, why.encode())], 0.0))
        return records

    async def close(self) -> None:
        """See `Browser`."""
        await ended("a reader without a group", self._consumer.stop(), self._consumer)


def _stored(record: Any) -> Stored:
    return Stored(
        record.topic,
        record.partition,
        record.offset,
        record.key,
        record.value,
        record.headers,
        record.timestamp / 1000,
    )
