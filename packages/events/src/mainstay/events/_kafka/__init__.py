"""The `kafka` transport, on aiokafka: explicit offsets, idempotent batches, and an end also without a broker."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

from mainstay.core import Clock, Health
from mainstay.events._kafka.client import Contact, check_connection
from mainstay.events._kafka.letters import KafkaDeadLetters
from mainstay.events._kafka.producer import Carrier, Direct, KafkaProducer, check_size
from mainstay.events._kafka.source import KafkaSource, reading
from mainstay.events._kafka.topics import Topics
from mainstay.events._transport import Reader
from mainstay.events.settings import EventsSettings

__all__ = ["Direct", "KafkaDeadLetters", "KafkaTransport", "check_connection", "check_size"]


class KafkaTransport:
    """The cluster.

    Args:
        settings: where it is, and how topics are created.
        clock: stamps dead letters.

    Attributes:
        topics: what is known of its topics.
        producer: sends.
    """

    def __init__(self, settings: EventsSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._contact = Contact()
        self.topics = Topics(settings)
        self.producer = KafkaProducer(settings, self.topics, self._contact)

    async def close(self) -> None:
        """Disconnect, within seconds also from a broker that is away."""
        await self.topics.close()
        await self.producer.close()

    async def health(self) -> Health:
        """What the last contact showed."""
        trouble = self._contact.trouble
        if trouble is None:
            return Health("ok", f"Kafka at {self._settings.kafka_servers}")
        return Health("degraded", f"Kafka at {self._settings.kafka_servers} is away: {trouble}")

    def letters(self) -> KafkaDeadLetters:
        """Dead letters of a service without a Database."""
        return KafkaDeadLetters(self._settings, self.topics, self.producer, self._clock)

    async def prepare(self, topic: str) -> None:
        """See `Broker`."""
        await self.topics.ensure(topic)

    def forget(self, topic: str) -> None:
        """See `Broker`."""
        self.topics.forget(topic)

    async def carrier(self) -> Carrier:
        """See `Broker`."""
        return await self.producer.carrier()

    def source(self, group: str, topics: Sequence[str], reader: Reader) -> AbstractAsyncContextManager[KafkaSource]:
        """See `Transport`."""
        return reading(self._settings, self.topics, self._contact, group=group, names=topics, reader=reader)
