"""Pages of librdkafka's messages as records."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from confluent_kafka import Message

from mainstay.events.metadata import UNREADABLE, Headers

_log = logging.getLogger("mainstay.events")


class KafkaRecord(NamedTuple):
    """A record, and when it was written, in milliseconds of the time of day."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp: int


def records_of(messages: Sequence[Message]) -> list[KafkaRecord]:
    """Messages without an error, as records; one that cannot be read is a record that says so."""
    headers: list[Headers | None] = []
    broken: dict[int, str] = {}
    # By `map`, and once each: where the name of a header is not UTF-8, the method raises only where its caller looks at
    # the result as `map` does, and what it returns the second time is a list that ends the process of who reads it.
    every = map(Message.headers, messages)
    while len(headers) < len(messages):
        try:
            headers.extend(every)  # type: ignore[arg-type]  # its stubs know of no header without a value
        except SystemError as error:
            broken[len(headers)] = f"the name of a header is not UTF-8, so the record cannot be read: {error.__cause__}"
            headers.append(None)
    records = [
        KafkaRecord(topic or "", partition or 0, offset or 0, key, value, about or (), written[1])
        for topic, partition, offset, key, value, about, written in zip(
            map(Message.topic, messages),
            map(Message.partition, messages),
            map(Message.offset, messages),
            map(Message.key, messages),
            map(Message.value, messages),
            headers,
            map(Message.timestamp, messages),
            strict=True,
        )
    ]
    for index, why in broken.items():
        record = records[index]
        _log.error("%s/%d@%d: %s", record.topic, record.partition, record.offset, why)
        records[index] = record._replace(key=None, value=None, headers=[(UNREADABLE, why.encode())])
    return records
