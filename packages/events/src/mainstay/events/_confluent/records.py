"""Pages of librdkafka's messages as records."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from confluent_kafka import Message

from mainstay.events._transport import LogRecord
from mainstay.events.metadata import UNREADABLE, Headers

_log = logging.getLogger("mainstay.events")


def records_of(messages: Sequence[Message]) -> list[LogRecord]:
    """Messages without an error, as records; one that cannot be read is a record that says so."""
    try:
        # By `map`: called otherwise, a method that fails may leave its exception to whoever calls something next.
        headers = list(map(Message.headers, messages))
    except SystemError:
        return [_record_of(message) for message in messages]
    return [
        LogRecord(topic, partition, offset, key, value, about or ())
        for topic, partition, offset, key, value, about in zip(
            map(Message.topic, messages),
            map(Message.partition, messages),
            map(Message.offset, messages),
            map(Message.key, messages),
            map(Message.value, messages),
            headers,
            strict=True,
        )
    ]


def _record_of(message: Message) -> LogRecord:
    topic, partition, offset = message.topic() or "", message.partition() or 0, message.offset() or 0
    try:
        (headers,) = map(Message.headers, (message,))
    except SystemError as error:
        why = f"the name of a header is not UTF-8, so the record cannot be read: {error.__cause__}"
        _log.error("%s/%d@%d: %s", topic, partition, offset, why)
        return LogRecord(topic, partition, offset, None, None, [(UNREADABLE, why.encode())])
    about: Headers = headers or ()  # type: ignore[assignment]
    return LogRecord(topic, partition, offset, message.key(), message.value(), about)
