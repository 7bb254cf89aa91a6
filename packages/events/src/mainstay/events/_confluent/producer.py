"""Sending, by librdkafka's idempotent producer.

For publishing without an outbox there is one producer, whose answers a thread collects: what was answered while it
looked goes to the loop together. What is refused or times out concerns its own partition alone.

A relay has `Carrier`s, and a batch of theirs must be confirmed whole or not at all, or its rest would overtake what
failed. Librdkafka cuts batches where it likes: by size, by number, and by time. So sizes and numbers are out of reach,
and nothing is sent by itself: the thread hands everything over and then flushes, and each partition's batch is one
request. Nothing goes out after the deadline either. What is alive takes its batches back then; what stands still, and
comes to itself later, does not send what has timed out meanwhile, which librdkafka looks for once a second: a batch is
handed over only where the deadline is further away than its time and that second.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

from confluent_kafka import KafkaError, KafkaException, Producer, murmur2

from mainstay.events._confluent.admin import ConfluentAdmin
from mainstay.events._confluent.client import (
    CHECK_SECONDS,
    CLOSE_SECONDS,
    KafkaFault,
    connection,
    fault_of,
    made,
    reporting,
)
from mainstay.events._confluent.threads import post
from mainstay.events._kafka.seam import (
    RECORD_BYTES,
    REQUEST_SECONDS,
    Contact,
    Payload,
    TooLargeError,
    unconfirmed,
    unreachable,
)
from mainstay.events._kafka.topics import MissingTopicError, Topics
from mainstay.events._relay import Refused, TooLarge
from mainstay.events._sparing import said
from mainstay.events.errors import PublishError
from mainstay.events.metadata import Outgoing

_log = logging.getLogger("mainstay.events")

_QUEUE_BYTES = 64 * 1024 * 1024
_WIDTHS_SECONDS = 30.0
_POLL_SECONDS = 0.2
_FLUSH_SECONDS = 0.02
_NUMBER_SECONDS = 0.55  # librdkafka asks again after half a second
_MARGIN_SECONDS = 0.2
"""A batch is taken back whole before librdkafka finds its records too old, one by one."""
_PART_OF_LEASE = 0.5
"""So much is left of a lease that is renewed as it should be."""
_TOO_LARGE = {KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE}
_TAKEN_BACK = {
    KafkaError._PURGE_QUEUE: "it was not sent within its time",
    KafkaError._PURGE_INFLIGHT: "no answer within its time",
    KafkaError._MSG_TIMED_OUT: "no answer within its time",
}
_GONE = {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION}


def _options(contact: Contact, timeout_seconds: float, *kinds: str, **ours: Any) -> dict[str, Any]:
    return {
        **connection(contact, "producer", *kinds, compression_type="lz4", **ours),
        "enable.idempotence": True,
        "partitioner": "murmur2_random",  # as Java places keys
        "message.max.bytes": RECORD_BYTES,
        "message.timeout.ms": int(timeout_seconds * 1000),
        "topic.metadata.propagation.max.ms": 5000,
        "error_cb": reporting(contact),
    }


class _Answer:
    """What becomes of records that were sent together. The thread counts the answers, the loop what it has sent.

    Args:
        done: is given this once all are answered, in the thread.

    Attributes:
        error: the first, where one was not confirmed.
        waiting: for all answers.
    """

    __slots__ = ("_answered", "_done", "_sent", "error", "waiting")

    def __init__(self, done: list[_Answer], waiting: asyncio.Future[None]) -> None:
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


def _wake(answers: Sequence[_Answer], waiting: Sequence[asyncio.Future[None]]) -> None:
    for each in (*(answer.waiting for answer in answers), *waiting):
        if not each.done():
            each.set_result(None)


class _Sending:
    """One producer for publishing, and the thread that its answers come to."""

    def __init__(self, producer: Producer) -> None:
        self._loop = asyncio.get_running_loop()
        self._producer = producer
        self._done: list[_Answer] = []
        self._room: deque[asyncio.Future[None]] = deque()
        self._over = False
        self.ended: asyncio.Future[None] = self._loop.create_future()
        Thread(target=self._listen, name="events.producer", daemon=True).start()

    def _listen(self) -> None:
        while not self._over:
            self._producer.poll(_POLL_SECONDS)
            self._hand_over()
        self._producer.flush(CLOSE_SECONDS)
        self._producer.purge()
        self._producer.flush(1)
        self._hand_over()
        self._producer.close()
        post(self._loop, _wake, (), [self.ended])

    def _hand_over(self) -> None:
        """All answers that are there, in one call of the loop."""
        answers = self._done.copy()
        self._done.clear()
        waiting: list[asyncio.Future[None]] = []
        while self._room:
            waiting.append(self._room.popleft())
        if answers or waiting:
            post(self._loop, _wake, answers, waiting)

    async def send(self, topic: str, batch: Sequence[Payload]) -> None:
        """Send records, and wait for all answers.

        Raises:
            KafkaFault: one was not confirmed.
        """
        given = _Answer(self._done, self._loop.create_future())
        told, produce, count = given.told, self._producer.produce, 0
        refused: KafkaError | None = None
        for key, value, headers in batch:
            while True:
                try:
                    produce(topic, value, key, -1, told, None, 0, list(headers))
                except BufferError:
                    self._room.append(room := self._loop.create_future())
                    await room
                except KafkaException as error:
                    refused = error.args[0]
                    break
                else:
                    count += 1
                    break
            if refused is not None:
                break
        if not given.sent(count):
            await given.waiting
        failed = given.error or refused
        if failed is not None:
            raise KafkaFault(failed)

    def end(self) -> None:
        """Send what is left, within seconds, and disconnect."""
        self._over = True


class ConfluentProducer:
    """Everything that is sent to the cluster.

    Args:
        topics: makes those that do not exist.
        admin: knows how many partitions they have.
        contact: how the cluster is met.
    """

    def __init__(self, topics: Topics, admin: ConfluentAdmin, contact: Contact) -> None:
        self._settings = contact.settings
        self._topics = topics
        self._admin = admin
        self._contact = contact
        self._loop = asyncio.get_running_loop()
        self._process = os.getpid()
        self._shared: _Sending | None = None
        self._starting = asyncio.Lock()
        self._spare: Carrier | None = None
        self._ending: set[asyncio.Future[None]] = set()

    async def connect(self) -> None:
        """See `Producer`."""
        try:
            await self._admin.ask(min(REQUEST_SECONDS, self._settings.send_seconds))
            await self._sending()  # in advance: it takes half a second until librdkafka can send
        except (KafkaFault, OSError, TimeoutError) as error:
            raise unreachable(self._settings, error) from error

    async def _sending(self) -> _Sending:
        async with self._starting:
            if self._shared is None:
                limit = self._settings.send_seconds
                options = _options(self._contact, max(limit / 2, limit - CHECK_SECONDS), "direct", linger_ms=5)
                options["queue.buffering.max.kbytes"] = _QUEUE_BYTES // 1024
                self._shared = _Sending(await made(Producer, options))
            return self._shared

    async def send(self, topic: str, batch: Sequence[Payload]) -> None:
        """See `Producer`."""
        if os.getpid() != self._process or asyncio.get_running_loop() is not self._loop:
            msg = "publish() in another process or event loop than the one that its App was started in: start one there"
            raise PublishError(msg, no_effect=True, retryable=False)
        sent = False
        try:
            async with asyncio.timeout(self._settings.send_seconds):
                await self._topics.ensure(topic)
                sending = await self._sending()
                sent = True
                await sending.send(topic, batch)
        except self._topics.away as error:
            if isinstance(error, TimeoutError):
                self._contact.lost(error)
            if isinstance(error, KafkaFault):
                self._had(topic, error)
            kind = TooLargeError if isinstance(error, KafkaFault) and error.code in _TOO_LARGE else PublishError
            raise kind(unconfirmed(self._settings, topic, len(batch), error), no_effect=not sent) from error
        self._contact.made()

    def _had(self, topic: str, error: KafkaFault) -> None:
        if error.code in _GONE:
            self._topics.forget(topic)
        if error.fatal and self._shared is not None:
            self._end(self._shared)
            self._shared = None

    async def carrier(self) -> Carrier:
        """See `Producer`. The next one is made in advance: it takes half a second until librdkafka can send by it.

        Raises:
            KafkaFault: the cluster does not answer.
        """
        carrier, self._spare = self._spare or self._made(), None
        try:
            await asyncio.shield(carrier.ready)
        except BaseException as error:
            if isinstance(error, KafkaFault):
                self._contact.lost(error)
            carrier.abandon()
            raise
        self._spare = self._made()
        return carrier

    def _made(self) -> Carrier:
        carrier = Carrier(self._admin, self._contact)
        self._ending.add(carrier.ended)
        carrier.ended.add_done_callback(self._ending.discard)
        return carrier

    def _end(self, shared: _Sending) -> None:
        self._ending.add(shared.ended)
        shared.ended.add_done_callback(self._ending.discard)
        shared.end()

    async def close(self) -> None:
        """See `Producer`."""
        if self._shared is not None:
            self._end(self._shared)
            self._shared = None
        if self._spare is not None:
            self._spare.abandon()
            self._spare = None
        if self._ending:
            _, late = await asyncio.wait(self._ending, timeout=2 * CLOSE_SECONDS)
            if late:
                _log.warning(
                    "%d Kafka producers did not end within %g s and are abandoned", len(late), 2 * CLOSE_SECONDS
                )


class _Batch(NamedTuple):
    topic: str
    partition: int
    events: Sequence[Outgoing]
    answer: _Answer


class Carrier:
    """A producer of batches: one to a partition at a time, and none goes out after the deadline; see the module.

    Args:
        admin: knows how many partitions topics have.
        contact: how the cluster is met.

    Attributes:
        deadline: by the monotonic clock, of everything that is handed over.
        ready: is done when the cluster has answered, or has the reason why it has not.
        ended: is done when the thread has.
    """

    def __init__(self, admin: ConfluentAdmin, contact: Contact) -> None:
        self.deadline = math.inf
        self._admin = admin
        self._contact = contact
        self._loop = asyncio.get_running_loop()
        self._seconds = contact.settings.lease_seconds * _PART_OF_LEASE - CHECK_SECONDS
        self._options: dict[str, Any] = {
            **_options(contact, self._seconds),
            "linger.ms": int(self._seconds * 900),
            "batch.size": 2 * RECORD_BYTES,
            "batch.num.messages": 1_000_000,
            "queue.buffering.max.messages": 0,  # as many as the relay hands over
            "queue.buffering.max.kbytes": 2_097_151,
        }
        self._producer: Producer | None = None
        self._widths: dict[str, tuple[float, int]] = {}
        self._next: list[_Batch] = []
        self._done: list[_Answer] = []
        self._handed: SimpleQueue[list[_Batch] | None] = SimpleQueue()
        self._over = False
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        Thread(target=self._work, name="events.carrier", daemon=True).start()

    async def partitions(self, topic: str) -> int:
        """See `Carrier` of the relay.

        Raises:
            MissingTopicError: there is no such topic.
            KafkaFault: it is refused.
        """
        now = time.monotonic()
        at, width = self._widths.get(topic, (-math.inf, 0))
        if now - at > _WIDTHS_SECONDS:
            width = (await self._admin.widths([topic])).get(topic, 0)
            if not width:
                msg = f"topic {topic} does not exist"
                raise MissingTopicError(msg)
            self._widths[topic] = now, width
        return width

    def place(self, event: Outgoing, partitions: int) -> int:
        """The partition of an event, as every Kafka client computes it: by its key, else by its id."""
        return murmur2(event.placing_key, partitions)

    async def send(self, topic: str, partition: int, events: Sequence[Outgoing]) -> None:
        """Send a batch, and wait until it is confirmed, or its time is over.

        Raises:
            TooLarge: with fewer events it may be taken.
            Refused: the broker will not take this event ever.
            TimeoutError: it was not sent within its time, or not answered.
            KafkaFault: any other fault; it is not known whether the batch arrived.
        """
        batch = _Batch(topic, partition, events, _Answer(self._done, self._loop.create_future()))
        if not self._next:
            self._loop.call_soon(self._hand_over)  # with what others send in this turn of the loop
        self._next.append(batch)
        await batch.answer.waiting
        if batch.answer.error is None:
            self._contact.made()
            return
        fault = KafkaFault(batch.answer.error)
        if fault.code in _TOO_LARGE:
            if len(events) > 1:
                raise TooLarge from fault
            raise Refused(said(fault)) from fault
        if fault.code in _TAKEN_BACK:
            msg = _TAKEN_BACK[fault.code]
            raise TimeoutError(msg)
        raise fault

    def _hand_over(self) -> None:
        batches, self._next = self._next, []
        self._handed.put(batches)

    def close(self) -> None:
        """End it, all being answered."""
        self._over = True
        self._handed.put(None)

    def abandon(self) -> None:
        """End it with what it has not answered for: none of that goes out from now on."""
        self.deadline = -math.inf
        if self._producer is not None:
            with suppress(RuntimeError):  # it has ended already
                self._producer.purge(blocking=False)
        self.close()

    # In the thread

    def _work(self) -> None:
        try:
            producer = self._prepare()
        except (KafkaException, KafkaFault) as error:
            post(self._loop, self._prepared, error if isinstance(error, KafkaFault) else fault_of(error))
        else:
            post(self._loop, self._prepared, None)
            while (batches := self._handed.get()) is not None:
                self._send(producer, batches)
        if self._producer is not None:
            self._producer.close()
        post(self._loop, _wake, (), [self.ended])

    def _prepare(self) -> Producer:
        made_at = time.monotonic()
        self._producer = producer = Producer(self._options)
        producer.list_topics(timeout=self._seconds)
        # Before its first connection librdkafka has asked in vain for the number that makes it idempotent.
        time.sleep(max(0.0, made_at + _NUMBER_SECONDS - time.monotonic()))
        return producer

    def _prepared(self, fault: KafkaFault | None) -> None:
        if fault is None:
            self.ready.set_result(None)
        else:
            self.ready.set_exception(fault)
            self.ready.exception()  # a spare one may never be asked for

    def _send(self, producer: Producer, batches: Sequence[_Batch]) -> None:
        until = time.monotonic() + self._seconds - _MARGIN_SECONDS
        whole = True
        for batch in batches:
            whole = self._produce(producer, batch) and whole
        # What was produced until here times out soon enough, or is not sent at all.
        if whole and time.monotonic() + self._seconds + CHECK_SECONDS < self.deadline:
            self._flush(producer, until, batches)
        if len(producer):  # else a late purge could meet what is produced next
            producer.purge()
            while len(producer):  # and no flush: it would send what is not purged yet
                producer.poll(_FLUSH_SECONDS)
        self._hand_back()

    def _produce(self, producer: Producer, batch: _Batch) -> bool:
        """Put a batch in the producer's queue, from where nothing goes out yet; whether it is there whole."""
        told, produce, count = batch.answer.told, producer.produce, 0
        for event in batch.events:
            try:
                produce(batch.topic, event.value, event.key, batch.partition, told, None, 0, list(event.headers))
            except KafkaException as error:
                batch.answer.error = error.args[0]
                break
            count += 1
        if batch.answer.sent(count):
            self._done.append(batch.answer)
        return count in {0, len(batch.events)}

    def _flush(self, producer: Producer, until: float, batches: Sequence[_Batch]) -> None:
        """Send, until all are answered, their time is over, or one was answered in part: the rest must not follow."""
        while time.monotonic() < min(until, self.deadline) and producer.flush(_FLUSH_SECONDS):
            self._hand_back()
            if any(batch.answer.partly for batch in batches):
                break

    def _hand_back(self) -> None:
        if self._done:
            answers = self._done.copy()
            self._done.clear()
            post(self._loop, _wake, answers, ())
