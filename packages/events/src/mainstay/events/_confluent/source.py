"""A group's reading, by librdkafka.

One thread calls the consumer, and only while the loop fetches: a process whose loop hangs stops asking for records, and
loses its partitions when `max.poll.interval.ms` is over, as it should. What the thread finds goes to the loop a page at
a time, and waits there, by partition, until it is asked for; a partition of which much waits is paused. Librdkafka
throws away what it had prefetched of that one and fetches it again.

Partitions move without the others stopping: by Kafka 4's own group protocol where the broker offers it with a session
that is no longer than the lease of the settings, else by the cooperative one, in which the client says how long its
session is. A partition that goes is drained from within the consumer's callback, and commits are served meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition

from mainstay.core import spawn
from mainstay.events._confluent.admin import ConfluentAdmin
from mainstay.events._confluent.client import CLOSE_SECONDS, KafkaFault, connection, fault_of, reporting
from mainstay.events._confluent.records import records_of
from mainstay.events._confluent.threads import Caller
from mainstay.events._delivery import Assignment
from mainstay.events._kafka.seam import LOOK_SECONDS, REQUEST_SECONDS, Contact
from mainstay.events._kafka.topics import Topics
from mainstay.events._kafka.watch import watch
from mainstay.events._metrics import MISSED
from mainstay.events._transport import LogRecord, Reader
from mainstay.events.metadata import Record
from mainstay.events.settings import EventsSettings

_log = logging.getLogger("mainstay.events")

_FETCH_SECONDS = 0.25
_SLICE_SECONDS = 0.05
"""How long a commit waits for a fetch that finds nothing."""
_PAGE = 1000
_WAITING = 1000
_LAG_SECONDS = 0.25
_SHORTEST_SESSION_SECONDS = 6.0  # a broker's own default for the least it accepts
_METADATA = b"CGMDv2:"
_ABOUT_ITS_TOPIC = {
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError._UNKNOWN_TOPIC,
    KafkaError._UNKNOWN_PARTITION,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
}
_PASSING = {KafkaError._PARTITION_EOF, KafkaError._MAX_POLL_EXCEEDED, KafkaError._TRANSPORT, KafkaError._TIMED_OUT}


_Offsets = frozenset[tuple[str, int, int]]


class Place(NamedTuple):
    """A partition."""

    topic: str
    partition: int


@dataclass(slots=True)
class _Held:
    """A partition that is ours, and what was read of it and not handed out.

    Attributes:
        next: the offset behind what was handed out, None before the first.
        end: the offset behind all that there is, as far as is known.
    """

    assignment: Assignment
    waiting: deque[LogRecord] = field(default_factory=deque[LogRecord])
    paused: bool = False
    next: int | None = None
    end: int | None = None


class _Found(NamedTuple):
    """What a look brought."""

    pages: Mapping[Place, Sequence[LogRecord]]
    ends: Mapping[Place, int]
    trouble: Sequence[tuple[str | None, KafkaFault]]


@asynccontextmanager
async def reading(
    topics: Topics,
    admin: ConfluentAdmin,
    contact: Contact,
    *,
    group: str,
    names: Sequence[str],
    reader: Reader,
) -> AsyncGenerator[ConfluentSource]:
    """A consumer of a group, from where it left off; leaving the block gives its partitions back.

    A topic that is missing or refused is read as soon as it is there, and the others do not wait for it.
    """
    settings = contact.settings
    options = await _group_options(settings, admin)
    moving_seconds = settings.drain_seconds + 2 * CLOSE_SECONDS
    members = _Members(
        {
            **connection(
                contact,
                "consumer",
                fetch_wait_max_ms=100,
                fetch_max_bytes=max(1_048_576, min(52_428_800, settings.window_bytes // 4)),
            ),
            **options,
            "group.id": group,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "error",  # where a group has no place, or one that is gone, we choose it, and say so
            "isolation.level": "read_committed",
            "max.poll.interval.ms": int(max(_session_seconds(settings), moving_seconds + CLOSE_SECONDS) * 1000),
            "queued.max.messages.kbytes": max(1024, settings.window_bytes // 4 // 1024),
            "error_cb": reporting(contact),
        },
        group,
        moving_seconds,
    )
    source = ConfluentSource(members, reader, group, most_bytes=settings.window_bytes // 4)
    try:
        await members.start(source)
        looking = watch(
            topics,
            names,
            source.absent,
            contact,
            subscribe=members.subscribe,
            ask=partial(admin.ask, LOOK_SECONDS),
        )
        watching = spawn(looking, name=f"events.{group}.watch")
        try:
            yield source
        finally:
            watching.cancel()
            await asyncio.wait((watching,))
    finally:
        await members.end()


def _session_seconds(settings: EventsSettings) -> float:
    return max(_SHORTEST_SESSION_SECONDS, settings.lease_seconds)


async def _group_options(settings: EventsSettings, admin: ConfluentAdmin) -> dict[str, Any]:
    """The group protocol: Kafka 4's own has its session from the broker, and must not keep partitions for longer."""
    wanted = _session_seconds(settings)
    instance = {} if settings.kafka_instance_id is None else {"group.instance.id": settings.kafka_instance_id}
    try:
        offered = await admin.consumer_session_seconds()
    except KafkaFault as error:
        _log.info("the broker does not tell what group protocols it offers (%s); the cooperative one is used", error)
        offered = None
    if offered is not None and offered <= wanted:
        return {**instance, "group.protocol": "consumer"}
    session_ms = int(wanted * 1000)
    return {
        **instance,
        "group.protocol": "classic",
        "partition.assignment.strategy": "cooperative-sticky",
        "session.timeout.ms": session_ms,
        "heartbeat.interval.ms": session_ms // 4,
    }


class _Members:
    """The consumer, and the thread that calls it.

    Args:
        options: of the consumer.
        group: its group.
        moving_seconds: how long partitions may take to be given up.
    """

    def __init__(self, options: dict[str, Any], group: str, moving_seconds: float) -> None:
        self._options = options
        self._group = group
        self._moving_seconds = moving_seconds
        self._caller = Caller(f"events.{group}")
        self._consumer: Consumer | None = None
        self._source: ConfluentSource | None = None
        self._lag_at = 0.0
        self._looking = 0
        self._moving = False
        self._committing: tuple[_Offsets, asyncio.Future[None]] | None = None

    async def start(self, source: ConfluentSource) -> None:
        """Make the consumer."""
        self._source = source

        def make() -> None:
            try:
                self._consumer = Consumer({**self._options, "on_commit": self.committed})
            except KafkaException as error:
                raise fault_of(error) from error

        await self._caller.run(make)

    async def subscribe(self, topics: list[str]) -> None:
        """Read these topics from now on."""
        await self._caller.run(partial(self._subscribe, topics))

    async def end(self) -> None:
        """Give all partitions back, and end consumer and thread, within seconds also without a broker."""
        closing = spawn(self._caller.run(self._close), name=f"events.{self._group}.close")
        try:
            done, _ = await asyncio.wait((closing,), timeout=CLOSE_SECONDS)
            if done and closing.exception() is not None:
                _log.info("the Kafka consumer of group %s ended with %r", self._group, closing.exception())
            if not await self._caller.end(CLOSE_SECONDS if done else 0.0):
                _log.warning("the Kafka consumer of group %s did not stop in time and is abandoned", self._group)
        finally:
            if not closing.done():
                closing.cancel()
                await asyncio.wait((closing,))

    async def look(
        self, seconds: float, pause: Sequence[Place], resume: Sequence[Place], landing: Callable[[_Found], None]
    ) -> None:
        """Ask for what is there, for so long at most."""
        self._looking += 1
        try:
            await self._caller.run(partial(self._look, seconds, pause, resume), landing)
        finally:
            self._looking -= 1

    async def commit(self, offsets: Mapping[Place, int], landing: Callable[[_Found], None]) -> bool:
        """Commit, unless the broker has given this member up; whether it was done.

        The answer comes while the consumer is asked for records, which this does where nobody else does.

        Raises:
            KafkaFault: it was refused.
        """
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not await self._caller.run(partial(self._commit, offsets, answered)):
            return False
        while not answered.done():
            if not self._looking:
                await self.look(_SLICE_SECONDS, (), (), landing)
            await asyncio.wait((answered,), timeout=_SLICE_SECONDS)
        answered.result()
        return True

    # In the thread

    def _subscribe(self, topics: list[str]) -> None:
        assert self._consumer is not None  # noqa: S101  started
        self._consumer.subscribe(topics, on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost)

    def _close(self) -> None:
        if self._consumer is not None:
            self._consumer.close()

    def _assigned(self, _consumer: Consumer, places: list[TopicPartition]) -> None:
        self._moved(places, lambda source, moved: source.assign(moved))

    def _revoked(self, _consumer: Consumer, places: list[TopicPartition]) -> None:
        self._moved(places, lambda source, moved: source.revoke(moved))

    def _lost(self, _consumer: Consumer, places: list[TopicPartition]) -> None:
        self._moved(places, lambda source, moved: source.lose(moved))

    def _moved(self, places: list[TopicPartition], tell: Callable[[ConfluentSource, list[Place]], Any]) -> None:
        source = self._source
        assert source is not None  # noqa: S101  started
        moved = [Place(each.topic, each.partition) for each in places]
        self._moving = True
        try:
            self._caller.while_waiting_for(lambda: tell(source, moved), self._moving_seconds)
        finally:
            self._moving = False

    def _look(self, seconds: float, pause: Sequence[Place], resume: Sequence[Place]) -> _Found:
        consumer = self._consumer
        assert consumer is not None  # noqa: S101  started
        _each(consumer.pause, pause)
        _each(consumer.resume, resume)
        until = time.monotonic() + seconds
        first = consumer.poll(0)
        while first is None and time.monotonic() < until and not self._caller.wanted:
            first = consumer.poll(_SLICE_SECONDS)
        messages = [] if first is None else [first, *consumer.consume(_PAGE - 1, 0)]
        good = [message for message in messages if message.error() is None]
        trouble = self._see_to(consumer, [message for message in messages if message.error() is not None])
        pages: dict[Place, list[LogRecord]] = {}
        for record in records_of(good):
            pages.setdefault(Place(record.topic, record.partition), []).append(record)
        return _Found(pages, self._ends(consumer), trouble)

    def _ends(self, consumer: Consumer) -> Mapping[Place, int]:
        now = time.monotonic()
        if now - self._lag_at < _LAG_SECONDS:
            return {}
        self._lag_at = now
        ends: dict[Place, int] = {}
        for place in consumer.assignment():
            _, end = consumer.get_watermark_offsets(place, cached=True)
            if end >= 0:
                ends[Place(place.topic, place.partition)] = end
        return ends

    def _see_to(self, consumer: Consumer, messages: Sequence[Message]) -> list[tuple[str | None, KafkaFault]]:
        trouble: list[tuple[str | None, KafkaFault]] = []
        for message in messages:
            error = message.error()
            assert error is not None  # noqa: S101  these are such
            if error.code() == KafkaError._AUTO_OFFSET_RESET:
                self._begin(consumer, Place(message.topic() or "", message.partition() or 0), message.offset())
            elif error.fatal() or error.code() not in _PASSING:
                trouble.append((message.topic() if error.code() in _ABOUT_ITS_TOPIC else None, KafkaFault(error)))
        return trouble

    def _begin(self, consumer: Consumer, place: Place, offset: int | None) -> None:
        """A group without a place in a partition, or with one that is gone, begins with the oldest record there."""
        start = TopicPartition(*place, OFFSET_BEGINNING)
        if offset is None or offset < 0:
            _log.info("group %s begins with all that is in %s/%d", self._group, *place)
        else:
            oldest, _ = consumer.get_watermark_offsets(start, timeout=REQUEST_SECONDS)
            start.offset = oldest
            missed = max(0, oldest - offset)
            MISSED.labels(self._group).inc(missed)
            _log.error(
                "group %s was to go on at %d in %s/%d, which begins at %d: %s",
                self._group,
                offset,
                place.topic,
                place.partition,
                oldest,
                f"{missed} records were deleted before they were read" if missed else "the topic was made anew",
            )
        # It is no longer fetched, and what is not fetched cannot be told to seek.
        consumer.incremental_unassign([start])
        consumer.incremental_assign([start])

    def _commit(self, offsets: Mapping[Place, int], answered: asyncio.Future[None]) -> bool:
        consumer = self._consumer
        assert consumer is not None  # noqa: S101  started
        if _generation(consumer.consumer_group_metadata()) <= 0:
            # It is no member any more. A commit of nobody is taken from a group that all have left, and would move it
            # back behind what the others have committed.
            return False
        places = [TopicPartition(*place, offset) for place, offset in offsets.items()]
        try:
            if self._moving:  # within a callback no other one is called
                consumer.commit(offsets=places, asynchronous=False)
                self._caller.settle(answered, None)
            else:
                self._committing = _offsets_of(places), answered
                consumer.commit(offsets=places, asynchronous=True)
        except KafkaException as error:
            raise fault_of(error) from error
        return True

    def committed(self, error: KafkaError | None, places: list[TopicPartition]) -> None:
        """A commit is answered: that of now, or an earlier one that nobody waits for any more."""
        if self._committing is None or self._committing[0] != _offsets_of(places):
            return
        (_, answered), self._committing = self._committing, None
        failed = error or next((place.error for place in places if place.error is not None), None)
        self._caller.settle(answered, None if failed is None else KafkaFault(failed))


def _offsets_of(places: Sequence[TopicPartition]) -> _Offsets:
    return frozenset((place.topic, place.partition, place.offset) for place in places)


def _each(do: Callable[[list[TopicPartition]], None], places: Sequence[Place]) -> None:
    for place in places:
        try:
            do([TopicPartition(*place)])
        except KafkaException:  # it has gone meanwhile
            _log.debug("partition %s/%d could neither be paused nor resumed", *place)


def _generation(metadata: bytes) -> int:
    """The group's generation, or the member's epoch, as librdkafka writes it for its transactions."""
    if not metadata.startswith(_METADATA):
        msg = f"librdkafka says what it knows of its group in another form than {_METADATA.decode()}"
        raise RuntimeError(msg)
    return int.from_bytes(metadata[len(_METADATA) : len(_METADATA) + 4], "little", signed=True)


class ConfluentSource:
    """One group's consumer.

    Attributes:
        absent: topics that are not read, and why.
    """

    def __init__(self, members: _Members, reader: Reader, group: str, *, most_bytes: int) -> None:
        self.absent: dict[str, str] = {}
        self._members = members
        self._reader = reader
        self._group = group
        self._most_bytes = most_bytes
        self._held: dict[Place, _Held] = {}
        self._by_assignment: dict[Assignment, Place] = {}
        self._fault: KafkaFault | None = None

    async def assign(self, places: Sequence[Place]) -> None:
        """Partitions are ours."""
        for place in places:
            self.absent.pop(place.topic, None)
            assignment = self._reader.assigned(*place)
            self._held[place] = _Held(assignment)
            self._by_assignment[assignment] = place

    async def revoke(self, places: Sequence[Place]) -> None:
        """Partitions are going to be another's; the others stay."""
        going = self._dropped(places)
        try:
            await self._reader.revoked(going)
        finally:
            self._forget(going)

    async def lose(self, places: Sequence[Place]) -> None:
        """Partitions are another's already."""
        gone = self._dropped(places)
        self._forget(gone)
        await self._reader.lost(gone)

    def _dropped(self, places: Sequence[Place]) -> list[Assignment]:
        held = [self._held.pop(place, None) for place in places]
        return [each.assignment for each in held if each is not None]

    def _forget(self, assignments: Collection[Assignment]) -> None:
        for assignment in assignments:
            self._by_assignment.pop(assignment, None)

    async def fetch(self, ready: Sequence[Assignment]) -> Mapping[Assignment, Sequence[Record]]:
        """See `Source`."""
        found = self._waiting_for(ready)
        if not found:
            seconds = _FETCH_SECONDS if ready or not self._held else 0.0
            await self._members.look(seconds, *self._turns(), self._landed)
            if self._fault is not None:
                raise self._fault
            found = self._waiting_for(ready)
        return found

    def _waiting_for(self, ready: Sequence[Assignment]) -> Mapping[Assignment, Sequence[Record]]:
        found: dict[Assignment, Sequence[Record]] = {}
        for assignment in ready:
            place = self._by_assignment.get(assignment)
            held = None if place is None else self._held.get(place)
            if held is not None and held.waiting:
                count = min(len(held.waiting), assignment.most)
                records = [held.waiting.popleft() for _ in range(count)]
                held.next = records[-1].offset + 1
                found[assignment] = records
        return found

    def _turns(self) -> tuple[list[Place], list[Place]]:
        """The partitions of which too much waits, and those that may go on."""
        most = self._most_bytes // max(1, len(self._held))
        pause: list[Place] = []
        resume: list[Place] = []
        for place, held in self._held.items():
            count = len(held.waiting)
            full = count >= _WAITING or count * held.assignment.record_bytes >= most
            if full and not held.paused:
                held.paused = True
                pause.append(place)
            elif held.paused and count < _WAITING // 4:
                held.paused = False
                resume.append(place)
        return pause, resume

    def _landed(self, found: _Found) -> None:
        """Keep what was read, of what is held still, also where the one who fetched has gone."""
        for place, records in found.pages.items():
            held = self._held.get(place)
            if held is not None:
                held.waiting.extend(records)
        for place, end in found.ends.items():
            held = self._held.get(place)
            if held is not None:
                held.end = end
        for topic, fault in found.trouble:
            if topic is None:
                self._fault = fault
            elif topic not in self.absent:
                _log.warning("topic %s cannot be read: %s", topic, fault)
                self.absent[topic] = f"topic {topic}: {fault}"

    async def commit(self, finished: Mapping[Assignment, Record]) -> None:
        """See `Source`."""
        offsets = {
            self._by_assignment[assignment]: record.offset + 1
            for assignment, record in finished.items()
            if assignment in self._by_assignment
        }
        if offsets and not await self._members.commit(offsets, self._landed):
            _log.warning("a commit came after the broker had given the partitions to others: they repeat some events")

    def lag(self) -> int:
        """See `Source`; of the partitions that anything was read from so far."""
        waiting = 0
        for held in self._held.values():
            if held.next is not None:
                waiting += max(len(held.waiting), (held.end or 0) - held.next)
            else:
                waiting += len(held.waiting)
        return waiting
