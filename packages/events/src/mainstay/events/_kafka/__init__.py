"""The `kafka` transport: topics, dead letters and what else does not depend on the client that connects to the cluster.

There are two clients, `_aiokafka` and `_confluent`; each is an extra, and `seam` says what they have to offer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractAsyncContextManager
from importlib import import_module
from typing import Any

from mainstay.core import Clock, ConfigurationError, Health
from mainstay.events._kafka.direct import Direct, check_size
from mainstay.events._kafka.letters import KafkaDeadLetters
from mainstay.events._kafka.log import KafkaLog
from mainstay.events._kafka.seam import Client, Contact, Producer, group_id
from mainstay.events._kafka.starts import Starts
from mainstay.events._kafka.topics import Topics
from mainstay.events._relay import Carrier
from mainstay.events._starts import Start
from mainstay.events._transport import Reader, Source
from mainstay.events.settings import EventsSettings

__all__ = ["Direct", "KafkaDeadLetters", "KafkaTransport", "check_connection", "check_size"]

_CLIENTS = {
    "aiokafka": ("mainstay.events._aiokafka", "kafka", {"aiokafka", "cramjam"}),
    "confluent": ("mainstay.events._confluent", "confluent", {"confluent_kafka"}),
}
"""The package of each client, its extra, and what that installs."""


def _parts(settings: EventsSettings) -> Any:
    """The package of the client that the settings choose.

    Raises:
        ConfigurationError: it is not installed.
    """
    package, extra, needs = _CLIENTS[settings.kafka_client]
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in needs:
            raise
        msg = (
            f"EventsSettings.transport is 'kafka' with kafka_client {settings.kafka_client!r}, which needs an extra: "
            f"pip install 'mainstay-events[{extra}]'"
        )
        raise ConfigurationError(msg) from error


def check_connection(settings: EventsSettings) -> None:
    """Look at what a connection needs of this machine.

    Raises:
        ConfigurationError: the client is not installed, or does not take what the settings say.
    """
    _parts(settings).check_connection(settings)


class KafkaTransport:
    """The cluster.

    Args:
        settings: where it is, by which client it is reached, and how topics are created.
        clock: stamps dead letters, and measures how old tokens are.
        foreign: topics that others write, which this service does not create.

    Attributes:
        topics: what is known of its topics.
        producer: sends.
        log: what is there, read without a group.
    """

    def __init__(self, settings: EventsSettings, clock: Clock, foreign: Collection[str] = ()) -> None:
        self._settings = settings
        self._clock = clock
        self._contact = Contact(settings, clock)
        self._client: Client = _parts(settings).Client(settings, self._contact)
        self.topics = Topics(settings, self._client, foreign)
        self._starts: dict[str, Starts] = {}
        self.producer: Producer = self._client.producer(self.topics)
        self.log = KafkaLog(self._client, self._contact, group_id(settings, ""))

    async def close(self) -> None:
        """Disconnect, within seconds also from a broker that is away."""
        await self.log.close()
        await self.topics.close()
        await self.producer.close()
        await self._client.close()
        await self._contact.close()

    async def health(self) -> Health:
        """What the last contact showed."""
        trouble = self._contact.trouble
        if trouble is None:
            return Health("ok", f"Kafka at {self._settings.kafka_servers}")
        return Health("degraded", f"Kafka at {self._settings.kafka_servers} cannot be used: {trouble}")

    def letters(self) -> KafkaDeadLetters:
        """Dead letters of a service without a Database."""
        return KafkaDeadLetters(self._settings, self.topics, self._client, self.producer, self._clock)

    async def prepare(self, topic: str) -> None:
        """See `Broker`."""
        await self.topics.ensure(topic)

    def forget(self, topic: str) -> None:
        """See `Broker`."""
        self.topics.forget(topic)

    async def carrier(self) -> Carrier:
        """See `Broker`."""
        return await self.producer.carrier()

    def source(
        self, group: str, topics: Sequence[str], reader: Reader, start: Start = "earliest"
    ) -> AbstractAsyncContextManager[Source]:
        """See `Transport`."""
        starts = self._starts.setdefault(group, Starts(group, start, self.topics.late))
        return self._client.reading(self.topics, group=group, names=topics, reader=reader, starts=starts)
