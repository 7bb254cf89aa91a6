"""A member of a group: the consumer of librdkafka, and the one thread that calls it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from mainstay.core import spawn
from mainstay.events._confluent.client import CLOSE_SECONDS, KafkaFault, fault_of
from mainstay.events._confluent.threads import Caller
from mainstay.events._kafka.seam import REQUEST_SECONDS

_log = logging.getLogger("mainstay.events")

_SLICE_SECONDS = 0.05
"""How long a commit waits for a fetch that finds nothing."""
_PAGE = 1000
_LAG_SECONDS = 0.25
_METADATA = b"CGMDv2:"
_ABOUT_ITS_TOPIC = {
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError._UNKNOWN_TOPIC,
    KafkaError._UNKNOWN_PARTITION,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
}
_ABOUT_OTHERS = "the group has members by another client of Kafka, and takes this one once they have gone"
_PASSING = {KafkaError._PARTITION_EOF, KafkaError._MAX_POLL_EXCEEDED, KafkaError._TRANSPORT, KafkaError._TIMED_OUT}

_Offsets = frozenset[tuple[str, int, int]]


class Place(NamedTuple):
    """A partition."""

    topic: str
    partition: int


class Gone(NamedTuple):
    """What the group would have read next of a partition, and the oldest record there is, with which it goes on."""

    place: Place
    offset: int
    oldest: int


class Found(NamedTuple):
    """What a look brought; the loop makes records of the messages, since the thread has Python's lock only in turns."""

    messages: Sequence[Message]
    ends: Mapping[Place, int]
    trouble: Sequence[tuple[str | None, KafkaFault]]
    placeless: Sequence[Place]
    gone: Sequence[Gone]


class Holder(Protocol):
    """The side that holds the partitions, in the loop."""

    async def assign(self, places: Sequence[Place]) -> None:
        """Partitions are ours."""
        ...

    async def revoke(self, places: Sequence[Place]) -> None:
        """Partitions are going to be another's; returns when they can."""
        ...

    async def lose(self, places: Sequence[Place]) -> None:
        """Partitions are another's already."""
        ...


class Member:
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
        self._source: Holder | None = None
        self._lag_at = 0.0
        self._looking = 0
        self._moving = False
        self._hung = False  # the loop did not answer while partitions moved: what is read or committed may not be ours
        self._committing: dict[_Offsets, deque[asyncio.Future[None]]] = {}  # in the order in which they are answered

    async def start(self, source: Holder) -> None:
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
        self, seconds: float, pause: Sequence[Place], resume: Sequence[Place], landing: Callable[[Found], None]
    ) -> None:
        """Ask for what is there, for so long at most."""
        self._looking += 1
        try:
            await self._caller.run(partial(self._look, seconds, pause, resume), landing)
        finally:
            self._looking -= 1

    async def commit(self, offsets: Mapping[Place, int], look: Callable[[float], Awaitable[None]]) -> bool:
        """Commit, unless the broker has given this member up; whether it was done.

        The answer comes while the consumer is asked for records, which this does, by `look` and for so many seconds at
        most, where no other task does.

        Raises:
            KafkaFault: it was refused.
        """
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not await self._caller.run(partial(self._commit, offsets, answered), within=True):
            return False
        while not answered.done():
            if not self._looking:
                await look(_SLICE_SECONDS)
            await asyncio.wait((answered,), timeout=_SLICE_SECONDS)
        answered.result()
        return True

    async def committed_in(self, places: Sequence[Place]) -> Mapping[Place, int | None]:
        """The group's places in partitions, also in those that others hold.

        Raises:
            KafkaFault: they cannot be asked for.
        """
        return await self._caller.run(partial(self._committed_in, places), within=True)

    async def go_on_at(self, place: Place, offset: int) -> None:
        """Read a partition without a place from an offset on, where it is held still."""
        await self._caller.run(partial(self._go_on_at, TopicPartition(*place, offset)))

    # In the thread

    def _committed_in(self, places: Sequence[Place]) -> Mapping[Place, int | None]:
        try:
            found = self._in_use().committed([TopicPartition(*place) for place in places], timeout=CLOSE_SECONDS)
        except KafkaException as error:
            raise fault_of(error) from error
        failed = next((each.error for each in found if each.error is not None), None)
        if failed is not None:
            raise KafkaFault(failed)
        return {Place(each.topic, each.partition): each.offset if each.offset >= 0 else None for each in found}

    def _go_on_at(self, start: TopicPartition) -> None:
        consumer = self._in_use()
        if any((each.topic, each.partition) == (start.topic, start.partition) for each in consumer.assignment()):
            # It is no longer fetched, and what is not fetched cannot be told to seek.
            consumer.incremental_unassign([start])
            consumer.incremental_assign([start])

    def _subscribe(self, topics: list[str]) -> None:
        assert self._consumer is not None  # noqa: S101  started
        self._consumer.subscribe(topics, on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost)

    def _close(self) -> None:
        if self._consumer is not None:
            self._consumer.close()

    def _assigned(self, _consumer: Consumer, places: list[TopicPartition]) -> None:
        self._moved(places, lambda source, moved: source.assign(moved))

    def _revoked(self, consumer: Consumer, places: list[TopicPartition]) -> None:
        self._moved(places, lambda source, moved: source.revoke(moved))
        _resume(consumer, places)

    def _lost(self, consumer: Consumer, places: list[TopicPartition]) -> None:
        self._moved(places, lambda source, moved: source.lose(moved))
        _resume(consumer, places)

    def _moved(self, places: list[TopicPartition], tell: Callable[[Holder, list[Place]], Any]) -> None:
        source = self._source
        assert source is not None  # noqa: S101  started
        moved = [Place(each.topic, each.partition) for each in places]
        self._moving = True
        try:
            if not self._caller.while_waiting_for(lambda: tell(source, moved), self._moving_seconds):
                self._hung = True
        finally:
            self._moving = False

    def _in_use(self) -> Consumer:
        if self._hung:
            msg = f"the event loop stood still for over {self._moving_seconds:g} s while partitions moved"
            raise TimeoutError(msg)
        assert self._consumer is not None  # noqa: S101  started
        return self._consumer

    def _look(self, seconds: float, pause: Sequence[Place], resume: Sequence[Place]) -> Found:
        try:
            return self._found(seconds, pause, resume)
        except KafkaException as error:
            raise fault_of(error) from error

    def _found(self, seconds: float, pause: Sequence[Place], resume: Sequence[Place]) -> Found:
        consumer = self._in_use()
        if pause:  # what has gone since that was asked for must not be paused any more, see `_resume`
            held = {(each.topic, each.partition) for each in consumer.assignment()}
            _each(consumer.pause, [each for each in pause if each in held])
        _each(consumer.resume, resume)
        until = time.monotonic() + seconds
        messages = consumer.consume(_PAGE, 0)
        while not messages and time.monotonic() < until and not self._caller.wanted:
            first = consumer.poll(_SLICE_SECONDS)
            messages = [] if first is None else [first, *consumer.consume(_PAGE - 1, 0)]
        good = [message for message in messages if message.error() is None]
        placeless: list[Place] = []
        gone: list[Gone] = []
        trouble = self._see_to(consumer, [each for each in messages if each.error() is not None], placeless, gone)
        self._in_use()  # partitions may have moved within
        return Found(good, self._ends(consumer), trouble, placeless, gone)

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

    def _see_to(
        self, consumer: Consumer, messages: Sequence[Message], placeless: list[Place], gone: list[Gone]
    ) -> list[tuple[str | None, KafkaFault]]:
        trouble: list[tuple[str | None, KafkaFault]] = []
        for message in messages:
            error = message.error()
            assert error is not None  # noqa: S101  these are such
            if error.code() == KafkaError._AUTO_OFFSET_RESET:
                place, offset = Place(message.topic() or "", message.partition() or 0), message.offset()
                if offset is None or offset < 0:
                    placeless.append(place)
                else:
                    gone.append(self._pass_over(consumer, place, offset))
            elif error.fatal() or error.code() not in _PASSING:
                about = _ABOUT_OTHERS if error.code() == KafkaError.INCONSISTENT_GROUP_PROTOCOL else ""
                topic = message.topic() if error.code() in _ABOUT_ITS_TOPIC else None
                trouble.append((topic, KafkaFault(error, about)))
        return trouble

    def _pass_over(self, consumer: Consumer, place: Place, offset: int) -> Gone:
        """What the group would read next is gone: go on with the oldest record that is there."""
        start = TopicPartition(*place)
        start.offset, _ = consumer.get_watermark_offsets(start, timeout=REQUEST_SECONDS)
        self._go_on_at(start)
        return Gone(place, offset, start.offset)

    def _commit(self, offsets: Mapping[Place, int], answered: asyncio.Future[None]) -> bool:
        consumer = self._in_use()
        if _generation(consumer.consumer_group_metadata()) <= 0:
            # It is no member any more. A commit without a member is taken from a group that all have left, and would
            # move it back behind what the others have committed.
            return False
        places = [TopicPartition(*place, offset) for place, offset in offsets.items()]
        try:
            if self._moving:  # within a callback no other one is called
                consumer.commit(offsets=places, asynchronous=False)
                self._caller.settle(answered, None)
            else:
                consumer.commit(offsets=places, asynchronous=True)
                self._committing.setdefault(_offsets_of(places), deque()).append(answered)
        except KafkaException as error:
            raise fault_of(error) from error
        return True

    def committed(self, error: KafkaError | None, places: list[TopicPartition]) -> None:
        """A commit is answered: one of those of now, or an earlier one that is not waited for any more."""
        offsets = _offsets_of(places)
        waiting = self._committing.get(offsets)
        if not waiting:
            return
        answered = waiting.popleft()
        if not waiting:
            del self._committing[offsets]
        failed = error or next((place.error for place in places if place.error is not None), None)
        self._caller.settle(answered, None if failed is None else KafkaFault(failed))


def _offsets_of(places: Sequence[TopicPartition]) -> _Offsets:
    return frozenset((place.topic, place.partition, place.offset) for place in places)


def _resume(consumer: Consumer, places: Sequence[TopicPartition]) -> None:
    """Leave no pause behind on partitions that go: librdkafka keeps it, and would not read them when they come back."""
    _each(consumer.resume, [Place(each.topic, each.partition) for each in places])


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
