"""Reading without a group, by librdkafka."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from threading import Lock
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from mainstay.events._confluent.admin import ConfluentAdmin
from mainstay.events._confluent.client import KafkaFault, connection, fault_of
from mainstay.events._confluent.records import records_of
from mainstay.events._confluent.threads import aside
from mainstay.events._kafka.seam import REQUEST_SECONDS, Contact
from mainstay.events._log import Partition, Stored

_PAGE = 500


class ConfluentBrowser:
    """See `Browser`. Its consumer is called by one thread at a time.

    Args:
        contact: how the cluster is met.
        admin: knows the ends of partitions.
    """

    def __init__(self, contact: Contact, admin: ConfluentAdmin) -> None:
        self._admin = admin
        self._options: dict[str, Any] = {
            **connection(contact, "consumer"),
            "group.id": "unused",  # it joins none, but cannot be made without
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "isolation.level": "read_committed",
            "auto.offset.reset": "earliest",
            "error_cb": _nothing,
        }
        self._consumer: Consumer | None = None
        self._next: Mapping[Partition, int] = {}
        self._turn = Lock()  # who reads may have gone before it was there
        self._over = False

    async def spans(self, partitions: Collection[Partition]) -> Mapping[Partition, tuple[int, int]]:
        """See `Browser`."""
        firsts = await self._admin.offsets(partitions, "first")
        ends = await self._admin.offsets(partitions, "end")
        return {each: (firsts[each], ends[each]) for each in partitions}

    async def at(self, partitions: Collection[Partition], time: float) -> Mapping[Partition, int]:
        """See `Browser`."""
        found = await self._admin.offsets(partitions, time)
        ends = await self._admin.offsets(partitions, "end")
        return {each: offset if offset >= 0 else ends[each] for each, offset in found.items()}

    async def read(
        self, starts: Mapping[Partition, int], ends: Mapping[Partition, int]
    ) -> tuple[Sequence[Stored], Mapping[Partition, int]]:
        """See `Browser`."""
        return await aside(lambda: self._read(starts, ends), "events.browser")

    def _read(
        self, starts: Mapping[Partition, int], ends: Mapping[Partition, int]
    ) -> tuple[Sequence[Stored], Mapping[Partition, int]]:
        with self._turn:
            try:
                return self._page(starts, ends)
            except KafkaException as error:
                raise fault_of(error) from error

    def _page(
        self, starts: Mapping[Partition, int], ends: Mapping[Partition, int]
    ) -> tuple[Sequence[Stored], Mapping[Partition, int]]:
        if self._consumer is None:
            self._consumer = Consumer(self._options)
        if starts != self._next:  # else it goes on where it is, with what it has fetched already
            self._consumer.assign([TopicPartition(*each, offset) for each, offset in starts.items()])
        self._next = {}
        then = dict(starts)
        until = time.monotonic() + REQUEST_SECONDS
        while not self._over and time.monotonic() < until:
            found = [each for each in [self._consumer.poll(0.2)] if each is not None]
            if found:
                found += self._consumer.consume(_PAGE, 0)
            for each in found:
                topic, number, at, error = each.topic(), each.partition(), each.offset(), each.error()
                if error is not None and error.code() != error._PARTITION_EOF:
                    raise KafkaFault(error, f"{topic}/{number}")
                if topic is not None and number is not None and at is not None and at >= 0:
                    then[topic, number] = at + (error is None)  # the end, too, says where it is
            records = records_of([each for each in found if each.error() is None])
            if records or all(then[each] >= end for each, end in ends.items()):
                self._next = then
                return [Stored(*record[:6], record.timestamp / 1000) for record in records], then
        msg = f"nothing came from {', '.join(f'{topic}/{number}' for topic, number in starts)}"
        raise TimeoutError(msg)

    async def close(self) -> None:
        """See `Browser`."""
        self._over = True
        await aside(self._close, "events.browser")

    def _close(self) -> None:
        with self._turn, suppress(KafkaException):
            if self._consumer is not None:
                self._consumer.close()


def _nothing(_error: KafkaError) -> None:
    """What goes wrong is said with what is read."""
