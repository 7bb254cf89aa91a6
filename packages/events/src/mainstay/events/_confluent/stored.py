"""What a partition holds at the moment, read without a group."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from threading import Lock
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, TopicPartition

from mainstay.events._confluent.client import KafkaFault, connection, fault_of
from mainstay.events._confluent.records import KafkaRecord, records_of
from mainstay.events._confluent.threads import aside
from mainstay.events._kafka.seam import REQUEST_SECONDS, Contact
from mainstay.events.metadata import Record

_PAGE = 500
_NOT_KNOWN_YET = {KafkaError._UNKNOWN_PARTITION, KafkaError._UNKNOWN_TOPIC, KafkaError.UNKNOWN_TOPIC_OR_PART}


async def stored(contact: Contact, topic: str, partition: int, offset: int | None) -> AsyncGenerator[Record]:
    """The records of a partition up to its present end, from an offset on or from its beginning.

    Raises:
        KafkaFault: it cannot be read.
        TimeoutError: nothing came for a while.
    """
    options: dict[str, Any] = {
        **connection(contact, "consumer"),
        "group.id": "unused",  # it joins none, but cannot be made without
        "enable.auto.commit": False,
        "enable.partition.eof": True,
        "auto.offset.reset": "earliest",
        "error_cb": _nothing,
    }
    reader = _Reader(options, TopicPartition(topic, partition, OFFSET_BEGINNING if offset is None else offset))
    try:
        while page := await aside(reader.page, "events.stored"):
            for record in page:
                yield record
    finally:
        await aside(reader.close, "events.stored")


def _nothing(_error: KafkaError) -> None:
    """What goes wrong is said with what is read."""


class _Reader:
    """A consumer of one partition, called by one thread at a time."""

    def __init__(self, options: dict[str, Any], place: TopicPartition) -> None:
        self._options = options
        self._place = place
        self._consumer: Consumer | None = None
        self._end = 0
        self._next = 0
        self._turn = Lock()  # who reads a page may have gone before it was there
        self._over = False

    def page(self) -> list[KafkaRecord]:
        """The next records, none at the end."""
        try:
            with self._turn:
                return self._page()
        except KafkaException as error:
            raise fault_of(error, f"{self._place.topic}/{self._place.partition}") from error

    def _present_end(self, consumer: Consumer) -> int:
        until = time.monotonic() + REQUEST_SECONDS
        while True:
            try:
                _, end = consumer.get_watermark_offsets(self._place, REQUEST_SECONDS)
            except KafkaException as error:
                # One that was made just now may be unknown to the broker that is asked.
                if error.args[0].code() not in _NOT_KNOWN_YET or time.monotonic() > until:
                    raise
                time.sleep(0.1)
            else:
                return end

    def _page(self) -> list[KafkaRecord]:
        if self._consumer is None:
            self._consumer = Consumer(self._options)
            self._end = self._present_end(self._consumer)
            self._consumer.assign([self._place])
        until = time.monotonic() + REQUEST_SECONDS
        while self._next < self._end and not self._over:
            found = [each for each in [self._consumer.poll(0.2)] if each is not None]
            if found:
                found += self._consumer.consume(_PAGE, 0)
            elif time.monotonic() > until:
                msg = f"nothing came from {self._place.topic}/{self._place.partition} within {REQUEST_SECONDS:g} s"
                raise TimeoutError(msg)
            for each in found:
                error = each.error()
                if error is not None and error.code() != error._PARTITION_EOF:
                    raise KafkaFault(error, f"{self._place.topic}/{self._place.partition}")
                at = each.offset()
                if at is not None and at >= 0:  # the end, too, says where it is
                    self._next = at + (error is None)
            records = records_of([each for each in found if each.error() is None])
            if records:
                return records
        return []

    def close(self) -> None:
        """Disconnect."""
        self._over = True
        with self._turn, suppress(KafkaException):
            if self._consumer is not None:
                self._consumer.close()
