"""A group's reading, on aiokafka.

What is done differently from aiokafka's defaults, and why:

- Automatic commits are off. The position moves when records are handed out, not when they are handled.
- Records of Kafka transactions that are open, or were aborted, are not handed out: they are no events.
- Nothing is deserialised in the client: a deserialiser that raises fetches the same record for ever.
- Back-pressure asks for records of the partitions that have room. `pause()` throws away what was prefetched.
- `rebalance_timeout_ms` covers the drain time. It defaults to the session timeout, after which a partition has two
  owners.
- `max_poll_interval_ms` is out of the way: a consumer that polls while its handlers hang looks alive, and one that
  waits for slow handlers looks dead. The age of the oldest event in flight tells them apart, and health reports it.
"""

# aiokafka ships no types.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import (
    CommitFailedError,
    GroupAuthorizationFailedError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
    TopicAuthorizationFailedError,
)
from aiokafka.structs import ConsumerRecord, OffsetAndMetadata

from mainstay.events._aiokafka.client import CLOSE_SECONDS, connection, ended
from mainstay.events._aiokafka.connecting import NamingClient
from mainstay.events._delivery import Assignment
from mainstay.events._kafka.missed import across
from mainstay.events._kafka.seam import LOOK_SECONDS, REQUEST_SECONDS, Contact, NotAllowed, group_id
from mainstay.events._kafka.starts import Starts
from mainstay.events._kafka.topics import Topics
from mainstay.events._kafka.watch import watched
from mainstay.events._starts import Start
from mainstay.events._transport import LogRecord, Reader
from mainstay.events.metadata import UNREADABLE, Record

_log = logging.getLogger("mainstay.events")

_FETCH_MS = 250
_SHORTEST_SESSION_SECONDS = 6.0  # a broker's own default for the least it accepts


@asynccontextmanager
async def reading(
    topics: Topics, contact: Contact, *, group: str, names: Sequence[str], reader: Reader, starts: Starts
) -> AsyncGenerator[KafkaSource, None]:
    """A consumer of a group, from where it left off; leaving the block gives its partitions back.

    A topic that is missing or refused is read as soon as it is there, and the others do not wait for it.
    """
    settings = contact.settings
    session_ms = int(max(_SHORTEST_SESSION_SECONDS, settings.lease_seconds) * 1000)
    drain_ms = int((settings.drain_seconds + 2 * CLOSE_SECONDS) * 1000)
    consumer = AIOKafkaConsumer(
        **connection(contact, "consumer", fetch_max_wait_ms=100, metadata_max_age_ms=30_000),
        group_id=group_id(settings, group),
        group_instance_id=settings.kafka_instance_id,
        enable_auto_commit=False,
        auto_offset_reset="none",  # where a group has no place, or one that is gone, we choose it, and say so
        isolation_level="read_committed",
        rebalance_timeout_ms=drain_ms,
        session_timeout_ms=session_ms,
        heartbeat_interval_ms=session_ms // 6,  # by these the others learn that a member is gone
        max_poll_interval_ms=2_000_000_000,
    )
    NamingClient.instead_of(consumer._client, contact)
    source = KafkaSource(consumer, reader, group, starts)
    try:
        # Subscribed to after the start: a start with topics waits for each of them, and for the group to be dealt out,
        # which takes as long as the slowest member needs to drain.
        async with asyncio.timeout(REQUEST_SECONDS):
            await consumer.start()

        async def subscribe(there: list[str]) -> None:
            consumer.subscribe(there, listener=_Listener(source))

        async def ask() -> None:
            await consumer.topics()
            # A topic that was made just now may be unknown to the broker that is asked first. The group would be dealt
            # out without it, until the client asks again by itself, half a minute later.
            if not all(map(consumer.partitions_for_topic, consumer.subscription())):
                await consumer._client.force_metadata_update()

        async with watched(group, topics, names, source.absent, contact, subscribe=subscribe, ask=ask):
            yield source
        await source.leave()
    finally:
        await ended(f"the Kafka consumer of group {group}", consumer.stop(), consumer)


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


class _Places:
    """See `Places`.

    Args:
        consumer: the member.
        allowed: whether it may commit.
    """

    def __init__(self, consumer: AIOKafkaConsumer, allowed: Callable[[], bool]) -> None:
        self._consumer: Any = consumer  # of which more is used than it offers
        self._allowed = allowed

    async def committed(self, topic: str) -> Mapping[int, int | None]:
        """See `Places`."""
        numbers = self._consumer.partitions_for_topic(topic) or ()
        places = [TopicPartition(topic, number) for number in sorted(numbers)]
        found = await self._consumer._coordinator.fetch_committed_offsets(places)
        return {
            place.partition: found[place].offset if place in found and found[place].offset >= 0 else None
            for place in places
        }

    async def first_offsets(self, topic: str, partitions: Collection[int], start: Start) -> Mapping[int, int]:
        """See `Places`."""
        places = [TopicPartition(topic, number) for number in partitions]
        if start == "earliest":
            found = await self._consumer.beginning_offsets(places)
            return {place.partition: found[place] for place in places}
        # The end is asked for first: what comes in between is found by its time, or is behind the end.
        ends = await self._consumer.end_offsets(places)
        times: Mapping[TopicPartition, Any] = {}
        if start != "latest":
            times = await self._consumer.offsets_for_times(dict.fromkeys(places, int(start.timestamp() * 1000)))
        return {
            place.partition: times[place].offset if times.get(place) is not None else ends[place] for place in places
        }

    async def commit_first(self, topic: str, offsets: Mapping[int, int]) -> bool:
        """See `Places`. Their consumer commits for its own partitions only, its coordinator for all."""
        subscription = self._consumer._subscription.subscription
        if subscription is None or subscription.assignment is None or not self._allowed():
            return False
        places = {TopicPartition(topic, number): OffsetAndMetadata(offset, "") for number, offset in offsets.items()}
        try:
            await self._consumer._coordinator.commit_offsets(subscription.assignment, places)
        except CommitFailedError:  # the group is being dealt out anew
            return False
        return True


class KafkaSource:
    """One group's consumer.

    Attributes:
        absent: topics that are not read, and why.
    """

    def __init__(self, consumer: AIOKafkaConsumer, reader: Reader, group: str, starts: Starts) -> None:
        self.absent: dict[str, str] = {}
        self._starts = starts
        self._places = _Places(consumer, self.commit_allowed)
        self._consumer = consumer
        self._reader = reader
        self._group = group
        self._held: dict[TopicPartition, Assignment] = {}
        self._by_assignment: dict[Assignment, TopicPartition] = {}
        self._delivered: dict[TopicPartition, int] = {}
        self._generation = -1
        self._refused_until: dict[str, float] = {}
        self._committed: dict[TopicPartition, int] = {}
        self._gaps: dict[TopicPartition, tuple[int, int]] = {}  # behind what was handed out, and before what is there

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
            await self._give_up_starts(held)
            await self._reader.revoked(list(held.values()))
        finally:
            self._by_assignment.clear()
            self._committed.clear()
            self._gaps.clear()

    async def leave(self) -> None:
        """Leave nothing uncommitted that this process alone knows."""
        await self._give_up_starts(self._held)

    async def _give_up_starts(self, held: Collection[TopicPartition]) -> None:
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._starts.give_up(held, self._places)
        except Exception as error:  # noqa: BLE001  the partitions go all the same
            _log.warning("group %s could not commit where it begins, before others may", self._group, exc_info=error)

    async def fetch(self, ready: Sequence[Assignment]) -> Mapping[Assignment, Sequence[Record]]:
        """See `Source`."""
        places = [
            place
            for place in (self._by_assignment.get(assignment) for assignment in ready)
            if place is not None and place in self._held and self._may_read(place)
        ]
        if not places:
            if not self._held:  # nothing is subscribed to yet, or is being dealt out
                self._allowed_in_group()
            if ready or not self._held:  # or what has room may not be read
                await asyncio.sleep(_FETCH_MS / 1000)
            return {}  # all are full, and asking for no partition asks for every one
        try:
            async with asyncio.timeout(
                CLOSE_SECONDS
            ):  # while partitions are dealt out it waits for as long as that takes
                fetched: Mapping[TopicPartition, Sequence[Record]] = await self._consumer.getmany(
                    *places, timeout_ms=_FETCH_MS, max_records=min(self._held[place].most for place in places)
                )
        except TimeoutError:
            return {}
        except TopicAuthorizationFailedError as error:
            self._refused(error.args[0])
            return {}
        except GroupAuthorizationFailedError as error:
            raise self._not_allowed() from error
        except NoOffsetForPartitionError as error:
            await self._begin(error.args[0])
            return {}
        except OffsetOutOfRangeError as error:
            for place, offset in error.args[0].items():
                await self._pass_over(place, offset)
            return {}
        except UnicodeDecodeError:  # the name of a header, anywhere in what was fetched
            fetched = await self._one_by_one(places)
        for topic in self._refused_until.keys() & {place.topic for place in places}:
            del self._refused_until[topic], self.absent[topic]
        # A rebalance may have happened meanwhile: what belongs to nobody any more is dropped and not committed.
        mine = {place: records for place, records in fetched.items() if place in self._held}
        for place, records in mine.items():
            self._delivered[place] = records[-1].offset + 1
        return {self._held[place]: records for place, records in mine.items()}

    def _may_read(self, place: TopicPartition) -> bool:
        return self._refused_until.get(place.topic, -math.inf) <= time.monotonic()

    def _refused(self, topic: str) -> None:
        """Leave a topic alone for a while: the others are read on."""
        if topic not in self._refused_until:
            self.absent[topic] = f"this service may not read the topic {topic}: grant READ"
            _log.error("group %s: %s", self._group, self.absent[topic])
        self._refused_until[topic] = time.monotonic() + LOOK_SECONDS

    def _allowed_in_group(self) -> None:
        """Ask what aiokafka tells only to those who fetch: that this service may not take part."""
        coordinator: Any = self._consumer._coordinator
        try:
            coordinator.check_errors()
        except GroupAuthorizationFailedError as error:
            raise self._not_allowed() from error

    def _not_allowed(self) -> NotAllowed:
        name = self._consumer._group_id
        return NotAllowed(f"this service may not take part in the group {name}: grant READ on that group")

    async def _begin(self, place: TopicPartition) -> None:
        """A group that has no place in a partition begins with the oldest record there, or as its handlers say."""
        held = {each.partition for each in self._held if each.topic == place.topic}
        offset: int | None = None
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                offset = await self._starts.place_in(place.topic, place.partition, held, self._places)
        except TopicAuthorizationFailedError:
            self._refused(place.topic)
            return
        except TimeoutError:  # it is asked again
            pass
        if offset is None:
            await asyncio.sleep(_FETCH_MS / 1000)
        elif place in self._held:
            self._consumer.seek(place, offset)

    async def _pass_over(self, place: TopicPartition, offset: int) -> None:
        """What the group would read next is gone: it goes on with the oldest record that is there, and is told."""
        oldest = (await self._consumer.beginning_offsets([place]))[place]
        if place not in self._held:
            return
        delivered = self._delivered.get(place)
        if delivered is None or delivered == self._committed.get(place):  # nothing from before the gap is in hand
            try:
                async with asyncio.timeout(CLOSE_SECONDS):
                    if not await self._places.commit_first(place.topic, {place.partition: oldest}):
                        return
            except TimeoutError:  # it is found again
                return
        else:
            self._gaps[place] = delivered, oldest
        self._starts.missed.pass_over(place.topic, place.partition, offset=offset, oldest=oldest)
        if place in self._held:
            self._consumer.seek(place, oldest)

    async def _one_by_one(self, places: Sequence[TopicPartition]) -> Mapping[TopicPartition, Sequence[Record]]:
        """What aiokafka reads up to a record that it cannot, and in place of that one a record that says so.

        Aiokafka has thrown away what it had read for the others meanwhile: all begin again where they were.
        """
        for place in list(self._held):
            if place in self._delivered:
                self._consumer.seek(place, self._delivered[place])
            else:
                await self._from_committed(place)
        fetched: dict[TopicPartition, Sequence[Record]] = {}
        for place in places:
            records: list[Record] = []
            try:
                while len(records) < self._held[place].most:
                    some = await self._consumer.getmany(place, timeout_ms=_FETCH_MS, max_records=1)
                    if not some.get(place):
                        break
                    records += some[place]
            except UnicodeDecodeError as error:
                offset = await self._consumer.position(place)
                self._consumer.seek(place, offset + 1)
                why = f"the name of a header is not UTF-8, so the record cannot be read: {error.reason}"
                _log.error("%s/%d@%d: %s", place.topic, place.partition, offset, why)
                headers = [(UNREADABLE, why.encode())]
                records.append(LogRecord(place.topic, place.partition, offset, None, None, headers))
            if records:
                fetched[place] = records
        return fetched

    async def _from_committed(self, place: TopicPartition) -> None:
        offset = await self._consumer.committed(place)
        if offset is None:
            await self._consumer.seek_to_beginning(place)
        else:
            self._consumer.seek(place, offset)

    async def commit(self, finished: Mapping[Assignment, Record]) -> None:
        """See `Source`."""
        places = {self._by_assignment[each]: at for each, at in finished.items() if each in self._by_assignment}
        behind = {place: record.offset + 1 for place, record in places.items()}
        offsets = {place: across(self._gaps, place, offset) for place, offset in behind.items()}
        if not offsets:
            return
        if not self.commit_allowed():
            _log.warning("a commit came after the broker had given the partitions to others: they repeat some events")
            return
        await self._consumer.commit(offsets)
        self._starts.begun.update(place.topic for place in offsets)
        self._committed |= behind
        for place, offset in offsets.items():
            if offset != behind[place]:
                self._gaps.pop(place, None)

    def commit_allowed(self) -> bool:
        """Whether the broker has not given us up.

        Aiokafka would commit without a member's name, which a group that all have left accepts: it would move the
        group back behind what the others have committed.
        """
        return self._current_generation() == self._generation

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
                waiting += max(0, end - self._read_until(place))
        return waiting

    def _read_until(self, place: TopicPartition) -> int:
        """The offset behind what was handed out, and behind what are no records: the ends of transactions, say."""
        subscription: Any = self._consumer._subscription.subscription
        assigned = None if subscription is None else subscription.assignment
        state = assigned.state_value(place) if assigned is not None and place in assigned.tps else None
        at: int = state.position if state is not None and state.has_valid_position else 0
        return max(at, self._delivered[place])

    def lag_seconds(self, unfinished: Iterable[Record]) -> float | None:
        """See `Source`, by the time that is in a record. When what was not fetched was written is not known here."""
        times: list[int] = [record.timestamp for record in unfinished if isinstance(record, ConsumerRecord)]
        if not times:
            return None if self.lag() else 0.0
        return max(0.0, time.time() - min(times) / 1000)
