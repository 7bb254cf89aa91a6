"""The `kafka` transport, on aiokafka: explicit offsets, idempotent batches, and an end also without a broker.

What is done differently from aiokafka's defaults, and why:

- Automatic commits are off. The position moves when records are handed out, not when they are handled.
- Records of Kafka transactions that are open, or were aborted, are not handed out: they are no events.
- Nothing is deserialised in the client: a deserialiser that raises fetches the same record for ever.
- Back-pressure asks for records of the partitions that have room. `pause()` throws away what was prefetched.
- `rebalance_timeout_ms` covers the drain time. It defaults to the session timeout, after which a partition has two
  owners.
- `max_poll_interval_ms` is out of the way: a consumer that polls while its handlers hang looks alive, and one that
  waits for slow handlers looks dead. The age of the oldest event in flight tells them apart, and health reports it.
- The producer lingers, compresses, and takes larger batches; the relay hands it whole batches for each partition.
- After a failed batch an idempotent producer's numbers have a hole that the broker refuses from then on: it is
  replaced.
"""

# aiokafka ships no types.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
from __future__ import annotations

import asyncio
import json
import logging
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from typing import Any, cast
from uuid import UUID

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError, TopicAlreadyExistsError, for_code
from aiokafka.partitioner import DefaultPartitioner

from mainstay.core import Clock, ConfigurationError, Health, spawn
from mainstay.database import Database
from mainstay.events._delivery import Assignment
from mainstay.events._outbox import Wave
from mainstay.events._transport import Reader
from mainstay.events.dead_letters import DeadLetter
from mainstay.events.errors import PublishError
from mainstay.events.metadata import Headers, Outgoing, Record
from mainstay.events.settings import EventsSettings

_log = logging.getLogger("mainstay.events")

_BATCH = 500
_FETCH_MS = 250
_CLOSE_SECONDS = 5.0
_BATCH_BYTES = 256 * 1024
_LARGEST_BYTES = 900_000
"""The largest event. Brokers refuse 1 MiB, and one that is refused would block its lane for ever."""
_REQUEST_SECONDS = 20.0
_SHORTEST_SESSION_SECONDS = 6.0  # a broker's own default for the least it accepts
_DEAD_LETTERS = "mainstay.dead-letters"


class KafkaTransport:
    """See the module.

    Args:
        settings: where the cluster is, and how topics are created.
        clock: measures ages.
    """

    def __init__(self, settings: EventsSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._producer: AIOKafkaProducer | None = None
        self._starting = asyncio.Lock()
        self._known_topics: set[str] = set()
        self._trouble: str | None = None

    def _connection(self) -> dict[str, Any]:
        settings = self._settings
        options: dict[str, Any] = {
            "bootstrap_servers": settings.kafka_servers,
            "client_id": settings.source,
            "request_timeout_ms": int(min(_REQUEST_SECONDS, settings.send_seconds) * 1000),
        }
        if settings.kafka_protocol != "PLAINTEXT":
            options["security_protocol"] = settings.kafka_protocol
        if settings.kafka_protocol in {"SSL", "SASL_SSL"}:
            options["ssl_context"] = ssl.create_default_context(cafile=settings.kafka_ca_file)
        if settings.kafka_protocol.startswith("SASL"):
            assert settings.kafka_password is not None  # noqa: S101  the settings have seen to it
            options["sasl_mechanism"] = settings.kafka_mechanism
            options["sasl_plain_username"] = settings.kafka_username
            options["sasl_plain_password"] = settings.kafka_password.get_secret_value()
        return options

    async def connect(self) -> None:
        """Make sure that the cluster answers.

        Raises:
            ConfigurationError: it does not.
        """
        try:
            await self._producing()
        except (KafkaError, OSError, TimeoutError) as error:
            msg = (
                f"EventsModule cannot reach Kafka at {self._settings.kafka_servers} ({type(error).__name__}): correct "
                "MAINSTAY_EVENTS_KAFKA_SERVERS, or keep the outbox on, with which a start does not need the broker"
            )
            raise ConfigurationError(msg) from error

    async def close(self) -> None:
        """Disconnect, within seconds also from a broker that is away."""
        producer = self._producer
        self._producer = None
        if producer is not None:
            await _ended("the Kafka producer", producer.stop(), producer.client)

    async def health(self) -> Health:
        """What the last contact showed."""
        if self._trouble is None:
            return Health("ok", f"Kafka at {self._settings.kafka_servers}")
        return Health("degraded", f"Kafka at {self._settings.kafka_servers} is away: {self._trouble}")

    # Sending

    async def _producing(self) -> AIOKafkaProducer:
        async with self._starting:
            if self._producer is None:
                # In a context of its own: its tasks outlive the publisher who happens to need it first.
                self._producer = await spawn(self._new_producer(), name="events.producer")
            return self._producer

    async def _new_producer(self) -> AIOKafkaProducer:
        producer = AIOKafkaProducer(
            **self._connection(),
            acks="all",
            enable_idempotence=True,
            compression_type="lz4",
            linger_ms=5,
            max_batch_size=_BATCH_BYTES,
            max_request_size=1_048_576,
        )
        try:
            async with asyncio.timeout(self._settings.send_seconds):
                await producer.start()
        except BaseException as error:
            self._trouble = type(error).__name__
            await _ended("the Kafka producer", producer.stop(), producer.client)
            raise
        self._trouble = None
        return producer

    async def _replace_producer(self, broken: AIOKafkaProducer, error: BaseException) -> None:
        self._trouble = f"{type(error).__name__}: {error}"
        current = self._producer is broken
        if current:
            self._producer = None
            await _ended("the Kafka producer", broken.stop(), broken.client)

    async def send(self, batch: Sequence[Outgoing]) -> None:
        """See `Transport`. Waits for the broker; the outbox is what makes that unnecessary."""
        sent = False
        producer: AIOKafkaProducer | None = None
        try:
            async with asyncio.timeout(self._settings.send_seconds):
                producer = await self._producing()
                for topic in {event.topic for event in batch}:
                    await self.ensure_topic(topic)
                confirmations: list[Awaitable[object]] = []
                # Enqueued one after the other, awaited together: awaiting each would cost a round trip an event.
                for event in batch:
                    sent = True
                    confirmations.append(
                        await producer.send(event.topic, event.value, key=event.key, headers=event.headers)
                    )
                if len(confirmations) == 1:
                    await confirmations[0]
                else:
                    await asyncio.gather(*confirmations)
        except (KafkaError, OSError, TimeoutError) as error:
            if producer is not None:
                await self._replace_producer(producer, error)
            msg = f"Kafka at {self._settings.kafka_servers} did not confirm {len(batch)} events: {type(error).__name__}"
            raise PublishError(msg, no_effect=not sent) from error
        self._trouble = None

    async def send_wave(self, events: Sequence[Outgoing]) -> Wave:
        """See `outbox.Broker`."""
        producer = await self._producing()
        try:
            async with asyncio.timeout(self._settings.send_seconds):
                wave = await self._send_wave(producer, events)
        except (KafkaError, OSError, TimeoutError) as error:
            await self._replace_producer(producer, error)
            raise
        if wave.failed:
            await self._replace_producer(producer, next(iter(wave.failed.values())))
        else:
            self._trouble = None
        return wave

    async def _send_wave(self, producer: AIOKafkaProducer, events: Sequence[Outgoing]) -> Wave:
        failed: dict[str, BaseException] = {}
        numbers: dict[str, list[int]] = {}
        for topic in {event.topic for event in events}:
            try:
                await self.ensure_topic(topic)
                numbers[topic] = sorted(await producer.partitions_for(topic))
            except KafkaError as error:  # this topic is refused; the others are not its hostages
                failed[topic] = error
        batches: dict[tuple[str, int], tuple[Any, list[int]]] = {}
        full: set[tuple[str, int]] = set()
        place_by_key = DefaultPartitioner()
        for index, event in enumerate(events):
            if event.topic in failed:
                continue
            place = (event.topic, place_by_key(event.placing_key, numbers[event.topic], numbers[event.topic]))
            if place in full:  # the rest of this partition waits for the next wave, or it would overtake
                continue
            if place not in batches:
                batches[place] = (producer.create_batch(), [])
            builder, indexes = batches[place]
            if builder.append(key=event.key, value=event.value, timestamp=None, headers=event.headers) is None:
                full.add(place)
            else:
                indexes.append(index)
        confirmations = [
            await producer.send_batch(builder, topic, partition=partition)
            for (topic, partition), (builder, _) in batches.items()
        ]
        outcomes = await asyncio.gather(*confirmations, return_exceptions=True)
        confirmed: set[int] = set()
        for outcome, ((topic, _), (_, indexes)) in zip(outcomes, batches.items(), strict=True):
            if isinstance(outcome, BaseException):
                failed[topic] = outcome
            else:
                confirmed.update(indexes)
        return Wave(confirmed, failed)

    # Topics

    async def ensure_topic(self, topic: str, *, compacted: bool = False) -> None:
        """Create a topic that does not exist, if the settings say so.

        It happens before anything asks for the topic: a broker that creates topics by itself gives them one partition.
        """
        if topic in self._known_topics:
            return
        if self._settings.kafka_create_topics:
            admin = AIOKafkaAdminClient(**self._connection())
            try:
                await admin.start()
                new = NewTopic(
                    name=topic,
                    num_partitions=1 if compacted else self._settings.partitions,
                    replication_factor=self._settings.kafka_replicas or 1,
                    topic_configs={"cleanup.policy": "compact"} if compacted else {},
                )
                if self._settings.kafka_replicas is None:
                    new.replication_factor = -1  # the cluster's default, which aiokafka's constructor does not take
                answer: Any = await admin.create_topics([new])
                for name, code, *_ in answer.topic_errors:
                    error = for_code(code)
                    if code and error is not TopicAlreadyExistsError:
                        msg = f"topic {name} could not be created"
                        raise error(msg)
            finally:
                await _ended("the Kafka admin client", admin.close(), admin._client)
        self._known_topics.add(topic)

    async def wrong_topics(self, topics: Sequence[str]) -> list[str]:
        """A sentence for each topic that is missing and will not be created, or has fewer partitions than it should."""
        admin = AIOKafkaAdminClient(**self._connection())
        try:
            await admin.start()
            # Only what is there is asked for: by being asked, a broker creates a topic, with partitions of its own.
            there = set(await admin.list_topics()).intersection(topics)
            answers = cast("list[dict[str, Any]]", await admin.describe_topics(sorted(there)) if there else [])
        except KafkaError as error:
            return [f"Kafka at {self._settings.kafka_servers} does not answer ({type(error).__name__}: {error})"]
        finally:
            await _ended("the Kafka admin client", admin.close(), admin._client)
        found: list[str] = []
        settings = self._settings
        widths = {answer["topic"]: len(answer["partitions"]) for answer in answers}
        for name in topics:
            width = widths.get(name, 0)
            if not width:
                if not settings.kafka_create_topics:
                    found.append(f"topic {name} does not exist: create it, or set kafka_create_topics")
            elif settings.kafka_create_topics and width < settings.partitions:
                found.append(
                    f"topic {name} has {width} partitions where the settings say {settings.partitions}: widen it, or "
                    f"set {settings.variable('partitions')}={width}"
                )
        return found

    # Reading

    @asynccontextmanager
    async def source(self, group: str, topics: Sequence[str], reader: Reader) -> AsyncGenerator[KafkaSource, None]:
        """See `Transport`."""
        for topic in topics:
            await self.ensure_topic(topic)
        session_ms = int(max(_SHORTEST_SESSION_SECONDS, self._settings.lease_seconds) * 1000)
        drain_ms = int((self._settings.drain_seconds + 2 * _CLOSE_SECONDS) * 1000)
        consumer = AIOKafkaConsumer(
            **self._connection(),
            group_id=group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            rebalance_timeout_ms=drain_ms,
            session_timeout_ms=session_ms,
            heartbeat_interval_ms=session_ms // 4,
            max_poll_interval_ms=2_000_000_000,
            fetch_max_wait_ms=100,
            metadata_max_age_ms=30_000,
        )
        source = KafkaSource(consumer, reader)
        try:
            consumer.subscribe(list(topics), listener=_Listener(source))
            async with asyncio.timeout(_REQUEST_SECONDS):
                await consumer.start()
            watch = spawn(self._watch(consumer), name=f"events.{group}.watch")
            try:
                yield source
            finally:
                watch.cancel()
                await asyncio.wait((watch,))
        finally:
            await _ended(f"the Kafka consumer of group {group}", consumer.stop(), consumer._client)

    async def _watch(self, consumer: AIOKafkaConsumer) -> None:
        """A broker that is away is waited for without a word by aiokafka; asking for something shows it."""
        while True:
            await asyncio.sleep(_CLOSE_SECONDS)
            try:
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await consumer.topics()
            except (KafkaError, OSError, TimeoutError) as error:
                self._trouble = type(error).__name__
            else:
                self._trouble = None


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka ships no types
    def __init__(self, source: KafkaSource) -> None:
        self._source = source

    async def on_partitions_revoked(self, revoked: object) -> None:  # noqa: ARG002 # pyright: ignore[reportIncompatibleMethodOverride]  all, and it may be async
        try:
            await self._source.revoke()
        except Exception:  # noqa: BLE001  aiokafka would swallow it without a word
            _log.exception("giving up partitions failed; their next owner will repeat some events")

    async def on_partitions_assigned(self, assigned: Sequence[TopicPartition]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  it may be async
        self._source.assign(assigned)


class KafkaSource:
    """One group's consumer."""

    def __init__(self, consumer: AIOKafkaConsumer, reader: Reader) -> None:
        self._consumer = consumer
        self._reader = reader
        self._held: dict[TopicPartition, Assignment] = {}
        self._by_assignment: dict[Assignment, TopicPartition] = {}
        self._delivered: dict[TopicPartition, int] = {}
        self._generation = -1

    def assign(self, partitions: Sequence[TopicPartition]) -> None:
        """New partitions, in a generation of their own: what is left of older ones no longer counts."""
        self._generation = self._current_generation()
        for place in partitions:
            assignment = self._reader.assigned(place.topic, place.partition)
            self._held[place] = assignment
            self._by_assignment[assignment] = place

    async def revoke(self) -> None:
        """Aiokafka takes everything away before each rebalance. No lock is held here that a fetch could hold."""
        held, self._held = self._held, {}
        self._delivered.clear()
        try:
            await self._reader.revoked(list(held.values()))
        finally:
            self._by_assignment.clear()

    async def fetch(self, ready: Sequence[Assignment]) -> Mapping[Assignment, Sequence[Record]]:
        """See `Source`."""
        places = [self._by_assignment[assignment] for assignment in ready if assignment in self._by_assignment]
        if not places and self._held:
            return {}  # all are full, and asking for no partition asks for every one
        try:
            async with asyncio.timeout(
                _CLOSE_SECONDS
            ):  # while partitions are dealt out it waits for as long as that takes
                fetched: Mapping[TopicPartition, Sequence[Record]] = await self._consumer.getmany(
                    *places, timeout_ms=_FETCH_MS, max_records=_BATCH
                )
        except TimeoutError:
            return {}
        # A rebalance may have happened meanwhile: what belongs to nobody any more is dropped and not committed.
        mine = {place: records for place, records in fetched.items() if place in self._held}
        for place, records in mine.items():
            self._delivered[place] = records[-1].offset + 1
        return {self._held[place]: records for place, records in mine.items()}

    async def commit(self, finished: Mapping[Assignment, Record]) -> None:
        """See `Source`."""
        offsets = {
            self._by_assignment[assignment]: record.offset + 1
            for assignment, record in finished.items()
            if assignment in self._by_assignment
        }
        if not offsets:
            return
        if self._current_generation() != self._generation:
            # The broker has given us up. Aiokafka would commit as nobody, which a group that all have left accepts: it
            # would move the group back behind what the others have committed.
            _log.warning("a commit came after the broker had given the partitions to others: they repeat some events")
            return
        await self._consumer.commit(offsets)

    def _current_generation(self) -> int:
        coordinator: Any = self._consumer._coordinator
        generation: int = coordinator.generation
        return generation

    def lag(self) -> int:
        """See `Source`; of the partitions that anything was read from so far."""
        waiting = 0
        for place in self._delivered:
            end = self._consumer.highwater(place)
            if end is not None:
                waiting += max(0, end - self._delivered[place])
        return waiting


class Direct:
    """Publishing straight to the broker, where the settings say `outbox=False`.

    Args:
        transport: the cluster.
        database: asked for at each send.
    """

    def __init__(self, transport: KafkaTransport, database: Callable[[], Database | None]) -> None:
        self._transport = transport
        self._database = database

    async def send(self, batch: Sequence[Outgoing]) -> None:
        """Send, unless a transaction is open.

        Raises:
            PublishError: inside a unit of work, which may still roll back; or the broker did not confirm.
        """
        database = self._database()
        if database is not None and database.in_unit_of_work():
            msg = (
                "publish() inside db.transaction() with outbox=False: the event would be out even if the transaction "
                "rolls back. Use the outbox, or publish after the commit"
            )
            raise PublishError(msg, no_effect=True, retryable=False)
        for event in batch:
            check_size(event)
        await self._transport.send(batch)


def check_size(event: Outgoing) -> None:
    """Refuse what a broker would refuse, where the publisher learns of it.

    Raises:
        PublishError: the event is too large.
    """
    headers = sum(len(name) + len(value or b"") for name, value in event.headers)
    size = len(event.value or b"") + len(event.key or b"") + headers
    if size > _LARGEST_BYTES:
        msg = f"an event for topic {event.topic} has {size} bytes; at most {_LARGEST_BYTES} are taken"
        raise PublishError(msg, no_effect=True, retryable=False)


async def _ended(what: str, stop: Coroutine[Any, Any, None], client: Any) -> None:
    """Stop a client within seconds: aiokafka's own stop waits for a broker that is away."""
    task = asyncio.ensure_future(stop)
    try:
        done, _ = await asyncio.wait((task,), timeout=_CLOSE_SECONDS)
        if not done:
            _log.warning("%s did not stop within %g s and is abandoned", what, _CLOSE_SECONDS)
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait((task,), timeout=_CLOSE_SECONDS)
        # Also after a stop that went well: a connection that was being made meanwhile is open by now.
        with suppress(Exception):
            await asyncio.wait_for(client.close(), _CLOSE_SECONDS)
        if task.done() and not task.cancelled() and task.exception() is not None:
            _log.info("%s ended with %r", what, task.exception())


class KafkaDeadLetters:
    """Dead letters in a compacted topic, for services without a Database.

    Args:
        transport: the cluster.
        settings: how to connect.
        clock: stamps them.
    """

    def __init__(self, transport: KafkaTransport, clock: Clock) -> None:
        self._transport = transport
        self._clock = clock

    async def add(self, group: str, record: Record, error: Exception, attempts: int) -> None:
        """See `DeadLetterStore`."""
        letter = DeadLetter.of(group, record, error, attempts, self._clock.now())
        await self._write(letter.id, letter.value or b"", _headers_of(letter))

    async def _write(self, id: UUID, value: bytes | None, headers: Headers) -> None:
        await self._transport.ensure_topic(_DEAD_LETTERS, compacted=True)
        producer = await self._transport._producing()
        try:
            await producer.send_and_wait(_DEAD_LETTERS, value, key=id.bytes, headers=headers)
        except KafkaError as error:
            await self._transport._replace_producer(producer, error)
            msg = f"Kafka did not confirm dead letter {id}: {type(error).__name__}"
            raise PublishError(msg) from error

    async def list(self, group: str | None, limit: int) -> Sequence[DeadLetter]:
        """See `DeadLetterStore`."""
        letters = [letter for letter in (await self._read()).values() if group in {None, letter.group}]
        return sorted(letters, key=lambda letter: (letter.time, letter.id))[:limit]

    async def get(self, id: UUID) -> DeadLetter | None:
        """See `DeadLetterStore`."""
        return (await self._read()).get(id)

    async def redrive(self, letter: DeadLetter) -> bool:
        """See `DeadLetterStore`. Killed between the two, it is there twice."""
        if letter.id not in await self._read():
            return False
        await self._transport.send([letter.again()])
        await self._write(letter.id, None, [])
        return True

    async def _read(self) -> dict[UUID, DeadLetter]:
        """The whole topic: compaction keeps it as large as what waits in it."""
        await self._transport.ensure_topic(_DEAD_LETTERS, compacted=True)
        consumer = AIOKafkaConsumer(
            **self._transport._connection(), enable_auto_commit=False, auto_offset_reset="earliest"
        )
        place = TopicPartition(_DEAD_LETTERS, 0)
        letters: dict[UUID, DeadLetter] = {}
        try:
            await consumer.start()
            consumer.assign([place])
            end = (await consumer.end_offsets([place]))[place]
            while await consumer.position(place) < end:
                for record in (await consumer.getmany(place, timeout_ms=1000)).get(place, ()):
                    name = UUID(bytes=record.key)
                    if record.value is None:
                        letters.pop(name, None)
                    else:
                        letters[name] = _letter_of(name, record.headers, record.value)
        finally:
            await _ended("the reader of dead letters", consumer.stop(), consumer._client)
        return letters


def _headers_of(letter: DeadLetter) -> Headers:
    """The headers that it had, byte for byte, and behind them its key and what is known about the failure."""
    facts = {
        "group": letter.group,
        "topic": letter.topic,
        "partition": letter.partition,
        "offset": letter.offset,
        "empty": letter.value is None,  # in a compacted topic a record without a value deletes
        "error": letter.error,
        "attempts": letter.attempts,
        "time": letter.time.isoformat(),
    }
    return [*letter.headers, ("key", letter.key), ("letter", json.dumps(facts).encode())]


def _letter_of(id: UUID, headers: Headers, value: bytes) -> DeadLetter:
    *own, (_, key), (_, text) = headers
    facts: dict[str, Any] = json.loads(text or b"")
    return DeadLetter(
        id=id,
        group=facts["group"],
        topic=facts["topic"],
        partition=facts["partition"],
        offset=facts["offset"],
        key=key,
        value=None if facts["empty"] else value,
        headers=tuple(own),
        error=facts["error"],
        attempts=facts["attempts"],
        time=datetime.fromisoformat(facts["time"]),
    )
