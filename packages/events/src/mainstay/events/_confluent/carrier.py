"""Batches of a relay, by librdkafka.

A batch must be confirmed whole or not at all, or its rest would overtake what failed. Librdkafka cuts batches where it
likes: by size, by number, and by time. So sizes and numbers are out of reach, and nothing is sent by itself: the thread
hands everything over and then flushes, and each partition's batch is one request.

Nothing goes out after the deadline either. What is alive takes its batches back then. What stands still, and comes to
itself later, does not send what has timed out meanwhile, which librdkafka looks for once a second: a batch is sent only
where the deadline is further away than its time and that second.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

from confluent_kafka import KafkaError, KafkaException, Producer, murmur2

from mainstay.events._confluent.admin import ConfluentAdmin
from mainstay.events._confluent.answers import NOT_THIS_RECORD, Answer, options_of, wake
from mainstay.events._confluent.client import CHECK_SECONDS, KafkaFault, fault_of
from mainstay.events._confluent.threads import post
from mainstay.events._kafka.seam import RECORD_BYTES, Contact, NotAllowed
from mainstay.events._kafka.topics import MissingTopicError
from mainstay.events._relay import Refused, TooLarge
from mainstay.events._sparing import said
from mainstay.events.metadata import Outgoing

_WIDTHS_SECONDS = 30.0
_FLUSH_SECONDS = 0.02
_NUMBER_SECONDS = 0.55  # librdkafka asks again after half a second
_MARGIN_SECONDS = 0.2
"""A batch is taken back whole before librdkafka finds its records too old, one by one."""
_PART_OF_LEASE = 0.5
"""So much is left of a lease that is renewed as it should be."""
_TAKEN_BACK = {
    KafkaError._PURGE_QUEUE: "it was not sent within its time",
    KafkaError._PURGE_INFLIGHT: "no answer within its time",
    KafkaError._MSG_TIMED_OUT: "no answer within its time",
}


class _Batch(NamedTuple):
    topic: str
    partition: int
    events: Sequence[Outgoing]
    answer: Answer


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
            **options_of(contact, self._seconds),
            "linger.ms": int(self._seconds * 900),
            "batch.size": 2 * RECORD_BYTES,
            "batch.num.messages": 1_000_000,
            "queue.buffering.max.messages": 0,  # as many as the relay hands over
            "queue.buffering.max.kbytes": 2_097_151,
        }
        self._producer: Producer | None = None
        self._widths: dict[str, tuple[float, int]] = {}
        self._next: list[_Batch] = []
        self._done: list[Answer] = []
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
            NotAllowed: this service may not write there.
            TimeoutError: it was not sent within its time, or not answered.
            KafkaFault: any other fault; it is not known whether the batch arrived.
        """
        batch = _Batch(topic, partition, events, Answer(self._done, self._loop.create_future()))
        if not self._next:
            self._loop.call_soon(self._hand_over)  # with what others send in this turn of the loop
        self._next.append(batch)
        await batch.answer.waiting
        if batch.answer.error is None:
            self._contact.made()
            return
        fault = KafkaFault(batch.answer.error)
        if fault.code in NOT_THIS_RECORD:
            if len(events) > 1:  # one of them
                raise TooLarge from fault
            raise Refused(said(fault)) from fault
        if fault.code == KafkaError.TOPIC_AUTHORIZATION_FAILED:
            msg = f"this service may not write to the topic {topic}: grant WRITE"
            raise NotAllowed(msg) from fault
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
            if self._producer is not None:
                self._producer.poll(0)  # it says why
            post(self._loop, self._prepared, error if isinstance(error, KafkaFault) else fault_of(error))
        else:
            post(self._loop, self._prepared, None)
            while (batches := self._handed.get()) is not None:
                self._send(producer, batches)
        if self._producer is not None:
            self._producer.close()
        post(self._loop, wake, (), [self.ended])

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
            post(self._loop, wake, answers, ())
