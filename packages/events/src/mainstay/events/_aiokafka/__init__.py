"""The cluster by aiokafka: explicit offsets, idempotent batches, and an end also without a broker."""

# aiokafka ships no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import ClassVar

from aiokafka.errors import KafkaError

from mainstay.events._aiokafka.admin import AiokafkaAdmin, asking
from mainstay.events._aiokafka.browser import AiokafkaBrowser
from mainstay.events._aiokafka.producer import KafkaProducer
from mainstay.events._aiokafka.source import KafkaSource, reading
from mainstay.events._aiokafka.stored import stored
from mainstay.events._kafka.seam import Contact
from mainstay.events._kafka.starts import Starts
from mainstay.events._kafka.tls import check_connection
from mainstay.events._kafka.topics import Topics
from mainstay.events._transport import Reader
from mainstay.events.metadata import Record
from mainstay.events.settings import EventsSettings

__all__ = ["Client", "check_connection"]


class Client:
    """See `Client`.

    Args:
        settings: where the cluster is.
        contact: is told how it went.
    """

    away: ClassVar[tuple[type[Exception], ...]] = (KafkaError, OSError, TimeoutError)

    def __init__(self, settings: EventsSettings, contact: Contact) -> None:
        self._settings = settings
        self._contact = contact

    def admin(self) -> AbstractAsyncContextManager[AiokafkaAdmin]:
        """See `Client`."""
        return asking(self._contact)

    def producer(self, topics: Topics) -> KafkaProducer:
        """See `Client`."""
        return KafkaProducer(self._settings, topics, self._contact)

    def reading(
        self, topics: Topics, *, group: str, names: Sequence[str], reader: Reader, starts: Starts
    ) -> AbstractAsyncContextManager[KafkaSource]:
        """See `Client`."""
        return reading(topics, self._contact, group=group, names=names, reader=reader, starts=starts)

    async def browser(self) -> AiokafkaBrowser:
        """See `Client`."""
        browser = AiokafkaBrowser(self._contact)
        try:
            await browser.start()
        except BaseException:
            await browser.close()
            raise
        return browser

    def stored(self, topic: str, partition: int, *, offset: int | None = None) -> AsyncGenerator[Record]:
        """See `Client`."""
        return stored(self._contact, topic, partition, offset)

    async def close(self) -> None:
        """Nothing is open beside what the parts have."""
