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
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from confluent_kafka import KafkaError, Message

from mainstay.events._confluent.admin import ConfluentAdmin
from mainstay.events._confluent.client import CLOSE_SECONDS, KafkaFault, Reasons, connection
from mainstay.events._confluent.member import Found, Gone, Member, Place
from mainstay.events._confluent.records import KafkaRecord, records_of
from mainstay.events._delivery import Assignment
from mainstay.events._kafka.missed import across
from mainstay.events._kafka.seam import LOOK_SECONDS, Contact, group_id
from mainstay.events._kafka.starts import Starts
from mainstay.events._kafka.topics import Topics
from mainstay.events._kafka.watch import watched
from mainstay.events._starts import Start
from mainstay.events._transport import Reader
from mainstay.events.metadata import Record
from mainstay.events.settings import EventsSettings

_log = logging.getLogger("mainstay.events")

_FETCH_SECONDS = 0.25
_WAITING = 1000
_DEALT_OUT = {
    KafkaError.ILLEGAL_GENERATION,
    KafkaError.REBALANCE_IN_PROGRESS,
    KafkaError.STALE_MEMBER_EPOCH,
    KafkaError.UNKNOWN_MEMBER_ID,
}
"""What a commit is refused with while the group is dealt out anew."""
_SHORTEST_SESSION_SECONDS = 6.0  # a broker's own default for the least it accepts


@dataclass(slots=True)
class _Held:
    """A partition that is ours, and what was read of it and not handed out.

    Attributes:
        next: the offset behind what was handed out, None before the first.
        end: the offset behind all that there is, as far as is known.
        committed: the offset behind what was committed last.
        gone: what was found to be gone behind that offset, and is to be committed and told.
    """

    assignment: Assignment
    waiting: deque[Message] = field(default_factory=deque[Message])
    paused: bool = False
    next: int | None = None
    end: int | None = None
    committed: int | None = None
    gone: tuple[int | None, Gone] | None = None


def _by_number(offsets: Mapping[tuple[str, int], int]) -> Mapping[int, int]:
    return {number: offset for (_, number), offset in offsets.items()}


class _Places:
    """See `Places`.

    Args:
        member: of the group.
        admin: asks for offsets.
        look: asks for records while a commit is waited for.
    """

    def __init__(self, member: Member, admin: ConfluentAdmin, look: Callable[[float], Awaitable[None]]) -> None:
        self._member = member
        self._admin = admin
        self._look = look

    async def committed(self, topic: str) -> Mapping[int, int | None]:
        """See `Places`."""
        width = (await self._admin.widths([topic])).get(topic, 0)
        found = await self._member.committed_in([Place(topic, number) for number in range(width)])
        return {place.partition: offset for place, offset in found.items()}

    async def first_offsets(self, topic: str, partitions: Collection[int], start: Start) -> Mapping[int, int]:
        """See `Places`."""
        places = [(topic, number) for number in partitions]
        if start == "earliest":
            return _by_number(await self._admin.offsets(places, "first"))
        # The end is asked for first: what comes in between is found by its time, or is behind the end.
        ends = _by_number(await self._admin.offsets(places, "end"))
        if start == "latest":
            return ends
        found = _by_number(await self._admin.offsets(places, start.timestamp()))
        return {number: found[number] if found[number] >= 0 else end for number, end in ends.items()}

    async def commit_first(self, topic: str, offsets: Mapping[int, int]) -> bool:
        """See `Places`."""
        places = {Place(topic, number): offset for number, offset in offsets.items()}
        try:
            return await self._member.commit(places, self._look)
        except KafkaFault as fault:
            if fault.code in _DEALT_OUT:
                return False
            raise


@asynccontextmanager
async def reading(
    topics: Topics,
    admin: ConfluentAdmin,
    contact: Contact,
    *,
    group: str,
    names: Sequence[str],
    reader: Reader,
    starts: Starts,
) -> AsyncGenerator[ConfluentSource]:
    """A consumer of a group, from where it left off; leaving the block gives its partitions back.

    A topic that is missing or refused is read as soon as it is there, and the others do not wait for it.
    """
    settings = contact.settings
    options = await _group_options(settings, admin)
    moving_seconds = settings.drain_seconds + 2 * CLOSE_SECONDS
    member = Member(
        {
            **connection(
                contact,
                "consumer",
                fetch_wait_max_ms=100,
                fetch_max_bytes=max(1_048_576, min(52_428_800, settings.window_bytes // 4)),
            ),
            **options,
            "group.id": group_id(settings, group),
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "error",  # where a group has no place, or one that is gone, we choose it, and say so
            "isolation.level": "read_committed",
            "max.poll.interval.ms": int(max(_session_seconds(settings), moving_seconds + CLOSE_SECONDS) * 1000),
            "queued.max.messages.kbytes": max(1024, settings.window_bytes // 4 // 1024),
            "error_cb": Reasons(contact),
        },
        group,
        moving_seconds,
    )
    source = ConfluentSource(member, admin, reader, starts, most_bytes=settings.window_bytes // 4)
    try:
        await member.start(source)
        ask = partial(admin.ask, LOOK_SECONDS)
        async with watched(group, topics, names, source.absent, contact, subscribe=member.subscribe, ask=ask):
            yield source
    finally:
        await member.end()


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


class ConfluentSource:
    """One group's consumer.

    Attributes:
        absent: topics that are not read, and why.
    """

    def __init__(
        self, member: Member, admin: ConfluentAdmin, reader: Reader, starts: Starts, *, most_bytes: int
    ) -> None:
        self.absent: dict[str, str] = {}
        self._member = member
        self._reader = reader
        self._starts = starts
        self._places = _Places(member, admin, self._look)
        self._placeless: dict[Place, None] = {}
        self._gaps: dict[Place, tuple[int, int]] = {}  # behind what was handed out, and before what is there
        self._begin_at = 0.0
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
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._starts.give_up(places, self._places)
        except Exception as error:  # noqa: BLE001  the partitions go all the same
            _log.warning("what is known of where a group begins could not be committed", exc_info=error)
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
            place = self._by_assignment.pop(assignment, None)
            if place is not None:
                self._gaps.pop(place, None)

    async def fetch(self, ready: Sequence[Assignment]) -> Mapping[Assignment, Sequence[Record]]:
        """See `Source`."""
        found = self._waiting_for(ready)
        if not found:
            seconds = _FETCH_SECONDS if ready or not self._held else 0.0
            await self._look(seconds)
            await self._begin()
            await self._pass_over()
            if self._fault is not None:
                raise self._fault
            found = self._waiting_for(ready)
        return found

    async def _look(self, seconds: float) -> None:
        """Ask for records, of partitions of which not too much waits."""
        await self._member.look(seconds, *self._turns(), self._landed)

    async def _begin(self) -> None:
        """Begin in partitions in which the group has no place, as its handlers say; a moment later again if need be."""
        if not self._placeless or time.monotonic() < self._begin_at:
            return
        for place in list(self._placeless):
            held = {each.partition for each in self._held if each.topic == place.topic}
            offset = None
            if place in self._held:
                try:
                    async with asyncio.timeout(CLOSE_SECONDS):  # a commit is answered only by a broker that is there
                        offset = await self._starts.place_in(place.topic, place.partition, held, self._places)
                except TimeoutError:  # it is asked again
                    pass
                except KafkaFault as fault:  # the others are read on
                    self._landed(Found([], {}, [(place.topic, fault)], [], []))
                if offset is None:
                    continue
                await self._member.go_on_at(place, offset)
                self.absent.pop(place.topic, None)  # what had kept its beginning from being known has passed
            self._placeless.pop(place, None)
        self._begin_at = time.monotonic() + _FETCH_SECONDS

    async def _pass_over(self) -> None:
        """Commit that the group goes on behind what is gone, and tell it; with what is in hand from before the gap."""
        for place, held in list(self._held.items()):
            if held.gone is None:
                continue
            (behind, gone), held.gone = held.gone, None
            if behind is None or behind == held.committed:
                try:
                    async with asyncio.timeout(CLOSE_SECONDS):
                        if not await self._places.commit_first(place.topic, {place.partition: gone.oldest}):
                            continue
                except (KafkaFault, TimeoutError) as error:  # it may have been committed all the same
                    _log.debug("%s/%d: the end of a gap could not be committed", *place, exc_info=error)
            else:
                self._gaps[place] = behind, gone.oldest
            self._starts.missed.pass_over(*place, offset=gone.offset, oldest=gone.oldest)

    def _waiting_for(self, ready: Sequence[Assignment]) -> Mapping[Assignment, Sequence[Record]]:
        found: dict[Assignment, Sequence[Record]] = {}
        for assignment in ready:
            place = self._by_assignment.get(assignment)
            held = None if place is None else self._held.get(place)
            if held is not None and held.waiting:
                count = min(len(held.waiting), assignment.most)
                records = records_of([held.waiting.popleft() for _ in range(count)])
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

    def _landed(self, found: Found) -> None:
        """Keep what was read, of what is held still, also where the one who fetched has gone."""
        for message in found.messages:
            held = self._held.get(Place(message.topic() or "", message.partition() or 0))
            if held is not None:
                held.waiting.append(message)
        for place, end in found.ends.items():
            held = self._held.get(place)
            if held is not None:
                held.end = end
        for gone in found.gone:
            if gone.place in self._held:
                held = self._held[gone.place]
                held.gone = (_behind(held.waiting[-1]) if held.waiting else held.next), gone
        self._placeless.update(dict.fromkeys(found.placeless))
        for topic, fault in found.trouble:
            if topic is None:
                self._fault = fault
            elif topic not in self.absent:
                _log.warning("topic %s cannot be read: %s", topic, fault)
                self.absent[topic] = f"topic {topic}: {fault}"

    async def commit(self, finished: Mapping[Assignment, Record]) -> None:
        """See `Source`."""
        places = {self._by_assignment[each]: at for each, at in finished.items() if each in self._by_assignment}
        behind = {place: record.offset + 1 for place, record in places.items()}
        offsets = {place: across(self._gaps, place, offset) for place, offset in behind.items()}
        self._starts.begun.update(place.topic for place in offsets)
        if not offsets:
            return
        if not await self._member.commit(offsets, self._look):
            _log.warning("a commit came after the broker had given the partitions to others: they repeat some events")
            return
        for place, offset in behind.items():
            if place in self._held:
                self._held[place].committed = offset
            if offsets[place] != offset:
                self._gaps.pop(place, None)

    def lag(self) -> int:
        """See `Source`; of the partitions that anything was read from so far."""
        waiting = 0
        for held in self._held.values():
            if held.next is not None:
                waiting += max(len(held.waiting), (held.end or 0) - held.next)
            else:
                waiting += len(held.waiting)
        return waiting

    def lag_seconds(self, unfinished: Iterable[Record]) -> float | None:
        """See `Source`, by the time that is in a record. When what was not read was written is not known here."""
        times = [record.timestamp for record in unfinished if isinstance(record, KafkaRecord)]
        times += [held.waiting[0].timestamp()[1] for held in self._held.values() if held.waiting]
        if not times:
            return None if self.lag() else 0.0
        return max(0.0, time.time() - min(times) / 1000)


def _behind(message: Message) -> int:
    return (message.offset() or 0) + 1
