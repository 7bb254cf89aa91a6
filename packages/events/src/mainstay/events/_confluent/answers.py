"""What librdkafka answers to what was sent, on its way to those who wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from confluent_kafka import KafkaError

from mainstay.events._confluent.client import Reasons, connection
from mainstay.events._kafka.seam import RECORD_BYTES, Contact

TOO_LARGE = {KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE}
NOT_THIS_RECORD = {*TOO_LARGE, KafkaError.INVALID_RECORD, KafkaError.POLICY_VIOLATION}
"""What a broker answers because of a record that it will not take, however often. All else may pass."""


def options_of(contact: Contact, timeout_seconds: float, *kinds: str, **ours: Any) -> dict[str, Any]:
    """The options of a producer, whose records are given up after so long."""
    return {
        **connection(contact, "producer", *kinds, compression_type="lz4", **ours),
        "enable.idempotence": True,
        "partitioner": "murmur2_random",  # as Java places keys
        "message.max.bytes": RECORD_BYTES,
        "message.timeout.ms": int(timeout_seconds * 1000),
        "topic.metadata.propagation.max.ms": 5000,
        "error_cb": Reasons(contact),
    }


class Answer:
    """What becomes of records that were sent together. The thread counts the answers, the loop what it has sent.

    Args:
        done: is given this once all are answered, in the thread.

    Attributes:
        error: the first, where one was not confirmed.
        waiting: for all answers.
    """

    __slots__ = ("_answered", "_done", "_sent", "error", "waiting")

    def __init__(self, done: list[Answer], waiting: asyncio.Future[None]) -> None:
        self._answered = 0
        self._sent = -1
        self._done = done
        self.error: KafkaError | None = None
        self.waiting = waiting

    def told(self, error: KafkaError | None, _record: object) -> None:
        """One is answered; in the thread."""
        self._answered += 1
        if error is not None and self.error is None:
            self.error = error
        if self._answered == self._sent:
            self._done.append(self)

    def sent(self, count: int) -> bool:
        """So many were sent; whether all of them are answered already."""
        self._sent = count
        return self._answered == count

    @property
    def partly(self) -> bool:
        """Whether some failed while others are not answered."""
        return self.error is not None and self._answered < self._sent


def wake(answers: Sequence[Answer], waiting: Sequence[asyncio.Future[None]]) -> None:
    """In the loop: these are complete."""
    for each in (*(answer.waiting for answer in answers), *waiting):
        if not each.done():
            each.set_result(None)
