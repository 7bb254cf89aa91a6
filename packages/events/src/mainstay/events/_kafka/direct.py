"""Publishing straight to the broker, where the settings say `outbox=False`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from mainstay.database import Database
from mainstay.events._kafka.seam import Payload, Producer
from mainstay.events.errors import PublishError
from mainstay.events.metadata import Outgoing

_LARGEST_BYTES = 900_000
"""The largest event: brokers refuse 1 MiB."""


class Direct:
    """Publishing straight to the broker, where the settings say `outbox=False`.

    Args:
        producer: to the cluster.
        database: asked for at each send; None where the App has none.
    """

    def __init__(self, producer: Producer, database: Callable[[], Database | None] | None) -> None:
        self._producer = producer
        self._database = database

    async def send(self, batch: Sequence[Outgoing]) -> None:
        """Send, unless a transaction is open.

        Raises:
            PublishError: inside a unit of work, which may still roll back; or the broker did not confirm.
        """
        database = None if self._database is None else self._database()
        if database is not None and database.in_unit_of_work():
            msg = (
                "publish() inside db.transaction() with outbox=False: the event would be out even if the transaction "
                "rolls back. Use the outbox, or publish after the commit"
            )
            raise PublishError(msg, no_effect=True, retryable=False)
        for event in batch:
            check_size(event)
        by_topic: dict[str, list[Payload]] = {}
        for event in batch:
            by_topic.setdefault(event.topic, []).append((event.key, event.value, event.headers))
        if len(by_topic) == 1:  # almost always, and a task for each costs as much as all the rest
            ((topic, records),) = by_topic.items()
            await self._producer.send(topic, records)
            return
        outcomes = await asyncio.gather(
            *(self._producer.send(topic, records) for topic, records in by_topic.items()), return_exceptions=True
        )
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                if isinstance(outcome, PublishError):
                    outcome.no_effect = False  # the other topics may have theirs
                raise outcome


def check_size(event: Outgoing) -> None:
    """Refuse what a broker would refuse, where the publisher learns of it.

    Raises:
        PublishError: the event is too large.
    """
    size = event.size
    if size > _LARGEST_BYTES:
        msg = f"an event for topic {event.topic} has {size} bytes; at most {_LARGEST_BYTES} are taken"
        raise PublishError(msg, no_effect=True, retryable=False)
