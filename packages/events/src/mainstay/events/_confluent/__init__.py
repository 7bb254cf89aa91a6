"""The cluster by librdkafka, whose Python client is confluent-kafka.

Librdkafka does its work in threads of its own and calls back from the thread that asks it for news. Here each producer
and each consumer has one thread of ours that does nothing else; between it and the event loop go batches of answers and
pages of records, never single ones.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import ClassVar

from mainstay.events._confluent.admin import ConfluentAdmin
from mainstay.events._confluent.browser import ConfluentBrowser
from mainstay.events._confluent.client import KafkaFault, check_connection
from mainstay.events._confluent.producer import ConfluentProducer
from mainstay.events._confluent.source import ConfluentSource, reading
from mainstay.events._confluent.stored import stored
from mainstay.events._kafka.seam import Contact
from mainstay.events._kafka.starts import Starts
from mainstay.events._kafka.topics import Topics
from mainstay.events._transport import Reader
from mainstay.events.metadata import Record
from mainstay.events.settings import EventsSettings

__all__ = ["Client", "check_connection"]


class Client:
    """See `mainstay.events._kafka.seam.Client`.

    Args:
        settings: unused beside those of the contact.
        contact: how the cluster is met.
    """

    away: ClassVar[tuple[type[Exception], ...]] = (KafkaFault, OSError, TimeoutError)

    def __init__(self, settings: EventsSettings, contact: Contact) -> None:  # noqa: ARG002  those of the contact
        self._contact = contact
        self._admin = ConfluentAdmin(contact)

    def admin(self) -> AbstractAsyncContextManager[ConfluentAdmin]:
        """See `Client`; one connection serves all questions."""
        return self._admin

    def producer(self, topics: Topics) -> ConfluentProducer:
        """See `Client`."""
        return ConfluentProducer(topics, self._admin, self._contact)

    def reading(
        self, topics: Topics, *, group: str, names: Sequence[str], reader: Reader, starts: Starts
    ) -> AbstractAsyncContextManager[ConfluentSource]:
        """See `Client`."""
        return reading(topics, self._admin, self._contact, group=group, names=names, reader=reader, starts=starts)

    async def browser(self) -> ConfluentBrowser:
        """See `Client`; it connects with its first reading."""
        return ConfluentBrowser(self._contact, self._admin)

    def stored(self, topic: str, partition: int, *, offset: int | None = None) -> AsyncGenerator[Record]:
        """See `Client`."""
        return stored(self._contact, topic, partition, offset)

    async def close(self) -> None:
        """See `Client`."""
        await self._admin.close()
