"""Publishing without an outbox, by librdkafka's idempotent producer.

A thread collects the answers: what was answered while it looked goes to the loop together. What is refused or times out
concerns its own partition alone.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Sequence
from threading import Thread

from confluent_kafka import KafkaError, KafkaException, Producer

from mainstay.core import ConfigurationError
from mainstay.events._confluent.admin import ConfluentAdmin
from mainstay.events._confluent.answers import NOT_THIS_RECORD, TOO_LARGE, Answer, options_of, wake
from mainstay.events._confluent.carrier import Carrier
from mainstay.events._confluent.client import CHECK_SECONDS, CLOSE_SECONDS, KafkaFault, made
from mainstay.events._confluent.threads import post
from mainstay.events._kafka.seam import (
    REQUEST_SECONDS,
    Contact,
    Payload,
    TooLargeError,
    unconfirmed,
    unreachable,
)
from mainstay.events._kafka.topics import Topics
from mainstay.events.errors import PublishError

_log = logging.getLogger("mainstay.events")

_QUEUE_BYTES = 64 * 1024 * 1024
_POLL_SECONDS = 0.2
_GONE = {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION}


class _Sending:
    """One producer for publishing, and the thread that its answers come to."""

    def __init__(self, producer: Producer) -> None:
        self._loop = asyncio.get_running_loop()
        self._producer = producer
        self._done: list[Answer] = []
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
        post(self._loop, wake, (), [self.ended])

    def _hand_over(self) -> None:
        """All answers that are there, in one call of the loop."""
        answers = self._done.copy()
        self._done.clear()
        waiting: list[asyncio.Future[None]] = []
        while self._room:
            waiting.append(self._room.popleft())
        if answers or waiting:
            post(self._loop, wake, answers, waiting)

    async def send(self, topic: str, batch: Sequence[Payload]) -> None:
        """Send records, and wait for all answers.

        Raises:
            KafkaFault: one was not confirmed.
        """
        given = Answer(self._done, self._loop.create_future())
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
            if isinstance(error, KafkaFault) and error.remedied:
                msg = f"EventsModule cannot connect to Kafka at {self._settings.kafka_servers}: {error}"
                raise ConfigurationError(msg) from error
            raise unreachable(self._settings, error) from error

    async def _sending(self) -> _Sending:
        async with self._starting:
            if self._shared is None:
                limit = self._settings.send_seconds
                options = options_of(self._contact, max(limit / 2, limit - CHECK_SECONDS), "direct", linger_ms=5)
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
            code = error.code if isinstance(error, KafkaFault) else None
            kind = TooLargeError if code in TOO_LARGE else PublishError
            raise kind(
                unconfirmed(self._settings, topic, len(batch), error),
                no_effect=not sent or (len(batch) == 1 and code in NOT_THIS_RECORD),
                retryable=code not in NOT_THIS_RECORD,
            ) from error
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
            if isinstance(error, KafkaFault) and self._contact.trouble is None:
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
