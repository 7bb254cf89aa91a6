"""Sending, on aiokafka's idempotent producer: what is refused or hangs concerns its own partition alone.

Aiokafka tries an idempotent batch for ever and offers no way to take it back, and a batch that failed leaves a hole in
the numbers of its partition, so that the broker refuses everything that this producer sends there from then on. A
producer is therefore given up *for the partitions that had trouble*, and goes on for all others: a relay has
`Carrier`s, which end with what they have not answered for, and publishing without outbox has a producer of its own for
each topic that was ever refused.
"""

# aiokafka ships no types.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
from __future__ import annotations

import asyncio
import math
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

from aiokafka import AIOKafkaProducer, errors
from aiokafka.client import ConnectionGroup
from aiokafka.errors import (
    BrokerResponseError,
    ClusterAuthorizationFailedError,
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    OutOfOrderSequenceNumber,
    PolicyViolationError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
)
from aiokafka.partitioner import DefaultPartitioner

from mainstay.core import ConfigurationError, spawn
from mainstay.events._aiokafka.client import connection, ended
from mainstay.events._aiokafka.connecting import NamingClient, UnreachableError
from mainstay.events._kafka.seam import (
    RECORD_BYTES,
    Contact,
    NotAllowed,
    Payload,
    TooLargeError,
    unconfirmed,
    unreachable,
)
from mainstay.events._kafka.topics import Topics
from mainstay.events._relay import Refused, TooLarge
from mainstay.events._sparing import said
from mainstay.events.errors import PublishError
from mainstay.events.metadata import Outgoing
from mainstay.events.settings import EventsSettings

_BATCH_BYTES = 256 * 1024
_REQUEST_BYTES = 1_048_576
_TCP_USER_TIMEOUT = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux alone has it

_TOO_LARGE = (MessageSizeTooLargeError, RecordListTooLargeError)


class InvalidRecordError(BrokerResponseError):  # type: ignore[misc]  # aiokafka ships no types
    """A record is none that its topic takes: one without a key where the topic is compacted, say."""

    errno = 87

    def __init__(self, *said: object) -> None:  # what is said already where aiokafka copies it for each who waits
        text = "the topic takes no such record: it is compacted and there is no key, or it checks schemas"
        super().__init__(*said or (text,))


# Aiokafka knows the codes of brokers up to 79; all above are an `UnknownError`, of which nothing can be concluded.
errors.kafka_errors.setdefault(InvalidRecordError.errno, InvalidRecordError)

_NOT_THIS_RECORD = (*_TOO_LARGE, InvalidRecordError, PolicyViolationError)
"""What a broker answers because of a record that it will not take, however often. All else may pass: rights are given,
replicas come back, a topic is configured otherwise. That is waited for, and named."""

_OURS = {
    "acks": "all",
    "enable_idempotence": True,
    "compression_type": "lz4",
    "max_request_size": RECORD_BYTES,
}

_place_by_key = DefaultPartitioner()


class Late(KafkaError):  # type: ignore[misc]  # aiokafka ships no types
    """A batch was not sent, because its deadline had passed before its first byte went out."""

    retriable = False


class KafkaProducer:
    """Everything that is sent to the cluster.

    Args:
        settings: where it is, and how long a confirmation may take.
        topics: makes those that do not exist.
        contact: is told how it went.
    """

    def __init__(self, settings: EventsSettings, topics: Topics, contact: Contact) -> None:
        self._settings = settings
        self._topics = topics
        self._contact = contact
        self._shared: AIOKafkaProducer | None = None
        self._own: dict[str, AIOKafkaProducer] = {}
        self._starting = asyncio.Lock()
        self._endings: set[asyncio.Task[None]] = set()

    async def connect(self) -> None:
        """Make sure that the cluster answers.

        Raises:
            ConfigurationError: it does not.
        """
        try:
            await self._producer_of(None)
        except (UnreachableError, NotAllowed) as error:
            msg = f"EventsModule cannot connect to Kafka: {error}. With the outbox on, a start does not need the broker"
            raise ConfigurationError(msg) from error
        except (KafkaError, OSError, TimeoutError) as error:
            raise unreachable(self._settings, error) from error

    async def close(self) -> None:
        """Disconnect, within seconds also from a broker that is away."""
        producers = [*self._own.values(), *([] if self._shared is None else [self._shared])]
        self._shared = None
        self._own.clear()
        for producer in producers:
            self._end(ended("a Kafka producer", producer.stop(), producer))
        if self._endings:
            await asyncio.wait(self._endings)

    def _end(self, ending: Coroutine[Any, Any, None]) -> None:
        task = spawn(ending, name="events.producer.end")
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    async def carrier(self) -> Carrier:
        """A producer of batches, for a relay.

        Raises:
            KafkaError, OSError, TimeoutError: the cluster does not answer.
            NotAllowed: this service may not write.
        """
        # In a context of its own: its tasks outlive the relay that needs it.
        options = connection(self._contact, "producer", **_OURS, linger_ms=0, max_batch_size=_REQUEST_BYTES)
        producer = await spawn(self._new(options), name="events.producer")
        return Carrier(producer, self._contact, self._end)

    async def _new(self, options: dict[str, Any]) -> AIOKafkaProducer:
        producer = AIOKafkaProducer(**options)
        NamingClient.instead_of(producer.client, self._contact)
        try:
            async with asyncio.timeout(self._settings.send_seconds):
                await producer.start()
        except BaseException as error:
            await ended("a Kafka producer", producer.stop(), producer)
            if isinstance(error, ClusterAuthorizationFailedError):
                msg = "this service may not write to any topic: grant WRITE on those that it publishes to"
                refused = NotAllowed(msg)
                self._contact.lost(refused)
                raise refused from error
            self._contact.lost(error)
            raise
        self._contact.made()
        return producer

    async def _for_publishing(self) -> AIOKafkaProducer:
        # In a context of its own: its tasks outlive the publisher that happens to need it first.
        options = connection(self._contact, "producer", "direct", **_OURS, linger_ms=5, max_batch_size=_BATCH_BYTES)
        return await spawn(self._new(options), name="events.producer")

    def _usable(self, topic: str) -> AIOKafkaProducer | None:
        """The producer of a topic, None while one is being made."""
        return None if self._starting.locked() else self._own.get(topic, self._shared)

    async def _producer_of(self, topic: str | None) -> AIOKafkaProducer:
        async with self._starting:
            if topic in self._own:
                return self._own[topic]
            if self._shared is None:
                self._shared = await self._for_publishing()
            return self._shared

    async def send(self, topic: str, batch: Sequence[Payload]) -> None:
        """Send keys, values and headers to one topic, and wait until all are confirmed.

        Raises:
            TooLargeError: one is larger than the broker takes.
            PublishError: not all were, within the time of the settings.
        """
        sent = False
        producer: AIOKafkaProducer | None = None
        try:
            async with asyncio.timeout(self._settings.send_seconds):
                await self._topics.ensure(topic)
                left = batch
                while left:
                    producer = self._usable(topic) or await self._producer_of(topic)
                    confirmations: list[Awaitable[object]] = []
                    # Enqueued one after the other, awaited together: awaiting each would cost a round trip an event.
                    for key, value, headers in left:
                        sent = True
                        confirmations.append(await producer.send(topic, value, key=key, headers=headers))
                    answers = await _answers(confirmations)
                    left = _behind_a_hole(left, answers)
                    if left:
                        await self._part(topic, producer)
        except self._topics.away as error:
            # What timed out is tried on by the client, in order; what was refused has left a hole in the numbers.
            if producer is not None and isinstance(error, KafkaError) and not isinstance(error, KafkaTimeoutError):
                await self._part(topic, producer)
            if isinstance(error, TimeoutError):
                self._contact.lost(error)
            msg = unconfirmed(self._settings, topic, len(batch), error)
            kind = TooLargeError if isinstance(error, _TOO_LARGE) else PublishError
            alone = len(batch) == 1 and isinstance(error, _NOT_THIS_RECORD)
            raise kind(msg, no_effect=alone or not sent, retryable=not isinstance(error, _NOT_THIS_RECORD)) from error
        self._contact.made()

    async def _part(self, topic: str, refused: AIOKafkaProducer) -> None:
        """Give a topic that was refused a producer of its own; what others have in the shared one goes on."""
        async with self._starting:
            seen_to = self._own.get(topic, self._shared) is not refused
            if seen_to:
                return  # by another who was refused
            if topic in self._own:
                del self._own[topic]
                self._end(ended("a Kafka producer", refused.stop(), refused))
            with suppress(*self._topics.away):  # then it begins with the shared one once more
                self._own[topic] = await self._for_publishing()


class Carrier:
    """A producer of batches: one to a partition at a time, and no byte of any after the deadline.

    Args:
        producer: started, for this carrier alone.
        contact: is told how it went.
        end: ends a producer in the background.
    """

    def __init__(
        self, producer: AIOKafkaProducer, contact: Contact, end: Callable[[Coroutine[Any, Any, None]], None]
    ) -> None:
        self.deadline = math.inf
        self._producer = producer
        self._contact = contact
        self._end = end
        self._send_request = producer.client.send
        producer.client.send = self._guarded

    async def _guarded(self, node_id: int, request: Any, *, group: Any = ConnectionGroup.DEFAULT) -> object:
        """Look at the clock at the last moment: between handing over and here a process may have stood still."""
        if hasattr(request, "required_acks"):
            client = self._producer.client
            await client.ready(node_id, group=group)
            left = self.deadline - time.monotonic()
            if left <= 0:
                msg = "the batch was handed over too long ago"
                raise Late(msg)
            for connection_ in client._conns.values():
                _give_up_after(connection_, left)
        return await self._send_request(node_id, request, group=group)

    async def partitions(self, topic: str) -> int:
        """How many there are.

        Raises:
            KafkaError: the topic is missing or refused.
        """
        return len(await self._producer.partitions_for(topic))

    def place(self, event: Outgoing, partitions: int) -> int:
        """The partition of an event, as every Kafka client computes it: by its key, else by its id."""
        numbers = range(partitions)
        partition: int = _place_by_key(event.placing_key, numbers, numbers)
        return partition

    async def send(self, topic: str, partition: int, events: Sequence[Outgoing]) -> None:
        """Send a batch, and wait until it is confirmed, however long that takes.

        Raises:
            TooLarge: with fewer events it may be taken.
            Refused: the broker will not take this event ever.
            NotAllowed: this service may not write there.
            KafkaError: any other fault; it is not known whether the batch arrived.
        """
        builder = self._producer.create_batch()
        for event in events:
            if builder.append(key=event.key, value=event.value, timestamp=None, headers=event.headers) is None:
                raise TooLarge
        try:
            await (await self._producer.send_batch(builder, topic, partition=partition))
        except TopicAuthorizationFailedError as error:
            msg = f"this service may not write to the topic {topic}: grant WRITE"
            raise NotAllowed(msg) from error
        except _NOT_THIS_RECORD as error:
            if len(events) > 1:  # one of them
                raise TooLarge from error
            raise Refused(said(error)) from error
        self._contact.made()

    def close(self) -> None:
        """End it, all being answered."""
        self._end(ended("a Kafka producer", self._producer.stop(), self._producer))

    def abandon(self) -> None:
        """End it with what it has not answered for: none of that goes out from now on."""
        self.deadline = -math.inf
        client = self._producer.client
        for connection_ in client._conns.values():
            _discard(connection_)
            connection_.close()
        self._end(ended("a Kafka producer", self._producer._sender.close(), self._producer))


def _behind_a_hole(batch: Sequence[Payload], answers: Sequence[object]) -> Sequence[Payload]:
    """The records that were refused only since one before them left a hole in the numbers: they are sent again.

    Raises what else the broker answered.
    """
    failed = [each for each in answers if isinstance(each, BaseException)]
    for error in failed:
        if not isinstance(error, OutOfOrderSequenceNumber):
            raise error
    return (
        [each for each, answer in zip(batch, answers, strict=True) if isinstance(answer, BaseException)]
        if failed
        else ()
    )


async def _answers(confirmations: Sequence[Awaitable[object]]) -> Sequence[object]:
    """What became of each: anything, or an error."""
    if len(confirmations) > 1:
        return await asyncio.gather(*confirmations, return_exceptions=True)
    try:
        return [await confirmations[0]]  # to gather a single one costs as much as to send it
    except Exception as error:  # noqa: BLE001  the caller sorts them
        return [error]


def _socket_of(connection_: Any) -> socket.socket | None:
    writer = vars(connection_)["_writer"]
    return None if writer is None else writer.get_extra_info("socket")


def _give_up_after(connection_: Any, seconds: float) -> None:
    """Have the kernel drop what the broker has not taken by then, also while this process stands still."""
    found = _socket_of(connection_)
    if found is not None and _TCP_USER_TIMEOUT is not None:
        milliseconds = 0 if seconds == math.inf else max(1, int(seconds * 1000))
        found.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, milliseconds)


def _discard(connection_: Any) -> None:
    """Have the kernel throw away what it holds of this connection as soon as it is closed."""
    found = _socket_of(connection_)
    if found is not None:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
