"""What a client of Kafka has to offer: two stand behind this seam, aiokafka and librdkafka."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Protocol

from mainstay.core import Clock, ConfigurationError
from mainstay.events._kafka.tokens import Tokens
from mainstay.events._log import Member, Partition, Stored
from mainstay.events._relay import Carrier
from mainstay.events._sparing import Sparing, said
from mainstay.events._transport import Reader, Source
from mainstay.events.errors import PublishError
from mainstay.events.metadata import Headers, Record
from mainstay.events.settings import EventsSettings

if TYPE_CHECKING:
    from mainstay.events._kafka.starts import Starts
    from mainstay.events._kafka.topics import Topics

_log = logging.getLogger("mainstay.events")

REQUEST_SECONDS = 20.0
RECORD_BYTES = 64 * 1024 * 1024
"""The clients' own limit for a record, before compression; the broker's is for what is left of it, and decides."""
LOOK_SECONDS = 5.0

Payload = tuple[bytes | None, bytes | None, Headers]
"""Key, value and headers of a record that is to be sent."""


class NotAllowed(Exception):
    """This service may not do that."""


class TooLargeError(PublishError):
    """The broker does not take a record of this size."""


def group_id(settings: EventsSettings, group: str) -> str:
    """The name of a group in the cluster, where other services may have one that is called the same."""
    return f"{settings.source}.{group}"


def unreachable(settings: EventsSettings, error: BaseException) -> ConfigurationError:
    """Say that a start without an outbox needs the cluster."""
    msg = (
        f"EventsModule cannot reach Kafka at {settings.kafka_servers} ({type(error).__name__}): correct "
        "MAINSTAY_EVENTS_KAFKA_SERVERS, or keep the outbox on, with which a start does not need the broker"
    )
    return ConfigurationError(msg)


def unconfirmed(settings: EventsSettings, topic: str, count: int, error: BaseException) -> str:
    """Say that events for a topic were not confirmed."""
    events = "an event" if count == 1 else f"{count} events"
    return f"Kafka at {settings.kafka_servers} did not confirm {events} for topic {topic}: {said(error)}"


class Contact:
    """The cluster as a client meets it, and what the last contact showed.

    Args:
        settings: where it is, and what it is shown.
        clock: measures how old tokens are.

    Attributes:
        settings: as given.
        tokens: to be shown, None where the settings name no function that gets them.
        trouble: why there was no contact, or None.
    """

    def __init__(self, settings: EventsSettings, clock: Clock) -> None:
        self.settings = settings
        self.tokens = None if settings.kafka_token is None else Tokens(settings.kafka_token, clock)
        self.trouble: str | None = None
        self._sparing = Sparing(clock)

    def lost(self, error: BaseException) -> None:
        """It was not to be had."""
        self.trouble = said(error)
        if self._sparing.due(self.trouble) is not None:
            _log.warning("Kafka at %s: %s", self.settings.kafka_servers, self.trouble)

    def made(self) -> None:
        """It was."""
        self.trouble = None

    async def close(self) -> None:
        """Ask for no more tokens."""
        if self.tokens is not None:
            await self.tokens.close()


class Admin(Protocol):
    """What is asked of the cluster as a whole."""

    async def names(self) -> set[str]:
        """The topics that there are."""
        ...

    async def widths(self, topics: Collection[str]) -> Mapping[str, int]:
        """How many partitions topics have that are there."""
        ...

    async def create(self, topic: str, *, partitions: int, replicas: int | None, config: Mapping[str, str]) -> bool:
        """Create a topic, with as many replicas as the cluster says where that is None; False where it is there.

        Raises:
            NotAllowed: this service may not create it.
        """
        ...

    async def configs(self, topics: Collection[str]) -> Mapping[str, Mapping[str, str]]:
        """The configurations of topics, without those that this service may not see."""
        ...

    async def groups(self) -> set[str]:
        """The groups that there are."""
        ...

    async def members(self, group: str) -> tuple[str, Sequence[Member]]:
        """The state of a group in the words of Kafka, and who takes part."""
        ...

    async def committed(self, group: str) -> Mapping[Partition, int]:
        """Where a group goes on."""
        ...


class Browser(Protocol):
    """A connection that reads without a group, for one user at a time."""

    async def spans(self, partitions: Collection[Partition]) -> Mapping[Partition, tuple[int, int]]:
        """The offset of the oldest record, and the one behind the newest that is committed."""
        ...

    async def at(self, partitions: Collection[Partition], time: float) -> Mapping[Partition, int]:
        """The offset of the first record of that time or later; the end where there is none."""
        ...

    async def read(
        self, starts: Mapping[Partition, int], ends: Mapping[Partition, int]
    ) -> tuple[Sequence[Stored], Mapping[Partition, int]]:
        """Some records from these offsets on, and the offsets behind them; none only where nothing is below the ends.

        Args:
            starts: of each partition, below its end.
            ends: up to where there is something to wait for.

        Raises:
            TimeoutError: nothing came for a while.
        """
        ...

    async def close(self) -> None:
        """Disconnect."""
        ...


class Producer(Protocol):
    """Everything that is sent to the cluster."""

    async def connect(self) -> None:
        """Make sure that the cluster answers.

        Raises:
            ConfigurationError: it does not.
        """
        ...

    async def send(self, topic: str, batch: Sequence[Payload]) -> None:
        """Send records to one topic, those with equal keys in their order, and wait until all are confirmed.

        Raises:
            TooLargeError: one is larger than the broker takes.
            PublishError: not all were confirmed within the time of the settings.
        """
        ...

    async def carrier(self) -> Carrier:
        """A producer of batches, for a relay."""
        ...

    async def close(self) -> None:
        """Disconnect, within seconds also from a broker that is away."""
        ...


class Client(Protocol):
    """One of the two.

    Attributes:
        away: what it raises while the cluster refuses something or does not answer.
    """

    away: tuple[type[Exception], ...]

    def admin(self) -> AbstractAsyncContextManager[Admin]:
        """A connection for questions."""
        ...

    def producer(self, topics: Topics) -> Producer:
        """Sends; it makes the topics that do not exist."""
        ...

    def reading(
        self, topics: Topics, *, group: str, names: Sequence[str], reader: Reader, starts: Starts
    ) -> AbstractAsyncContextManager[Source]:
        """Read topics as a member of a group, see `Transport.source`."""
        ...

    async def browser(self) -> Browser:
        """A connection that reads without a group."""
        ...

    def stored(self, topic: str, partition: int, *, offset: int | None = None) -> AsyncGenerator[Record]:
        """The records of a partition up to its present end, from an offset on or from its beginning."""
        ...

    async def close(self) -> None:
        """Drop what it has open beside the rest."""
        ...
