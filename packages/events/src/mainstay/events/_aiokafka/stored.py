"""What a partition holds at the moment, read without a group."""

# aiokafka ships no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

from collections.abc import AsyncGenerator

from aiokafka import AIOKafkaConsumer, TopicPartition

from mainstay.events._aiokafka.client import connection, ended
from mainstay.events._aiokafka.connecting import NamingClient
from mainstay.events._kafka.seam import Contact
from mainstay.events.metadata import Record


async def stored(contact: Contact, topic: str, partition: int, offset: int | None) -> AsyncGenerator[Record]:
    """The records of a partition up to its present end, from an offset on or from its beginning."""
    place = TopicPartition(topic, partition)
    consumer = AIOKafkaConsumer(
        **connection(contact, "consumer"), enable_auto_commit=False, auto_offset_reset="earliest"
    )
    NamingClient.instead_of(consumer._client, contact)
    try:
        await consumer.start()
        consumer.assign([place])
        end = (await consumer.end_offsets([place]))[place]
        if offset is not None:
            consumer.seek(place, offset)
        while await consumer.position(place) < end:
            for record in (await consumer.getmany(place, timeout_ms=1000)).get(place, ()):
                yield record
    finally:
        await ended("a reader of stored records", consumer.stop(), consumer)
