"""What topics hold and who reads them, seen from outside: no group is joined, no topic made and no place moved."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import ceil
from typing import Any, NamedTuple

from mainstay.core import MainstayError
from mainstay.database import Database
from mainstay.events import tables
from mainstay.events._declared import read
from mainstay.events._decoding import Decoders
from mainstay.events._handled import KEPT_SECONDS
from mainstay.events._in_hand import FRESH_SECONDS, LONG_SECONDS
from mainstay.events._log import Behind, Log, Member, Places, Stored, Topic
from mainstay.events._routes import Routes
from mainstay.events.errors import DecodeError
from mainstay.events.event import Event
from mainstay.events.metadata import UNREADABLE, VERSION, Metadata, kind_of
from mainstay.events.pauses import Pause, pause_of, said_of

__all__ = [
    "EventLog",
    "GroupMember",
    "GroupState",
    "LoggedEvent",
    "PartitionLag",
    "PartitionState",
    "StuckEvent",
    "TopicState",
]

_FOLLOW_SECONDS = 0.5
_LOOK_SECONDS = 5.0
_MOST_PARKED = 100
_SCHEMA_SECONDS = 5.0
"""For how long a schema registry is waited for before its topics are shown as they are."""
_AGAIN_SECONDS = 0.1
_FIRST, _LAST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class PartitionState:
    """What is in a partition.

    Attributes:
        number: of the partition.
        first, last: the offsets of the oldest and of the newest event that were counted; None where there is none.
        events: how many were counted; on Kafka about, since transactions and compaction leave holes.
    """

    number: int
    first: int | None
    last: int | None
    events: int


@dataclass(frozen=True, slots=True)
class TopicState:
    """A topic.

    Attributes:
        name: of the topic.
        partitions: what is in them; none where the topic is missing.
        missing: handlers of this App read it, and it is not there.
        groups: those that read it.
        keeps_seconds: for how long its events are kept at least, infinite where for ever; None where that is not known.
        compacted: the newest event of each key is kept for ever.
        whole: all events were counted; else those that are among the newest 100,000 of the `sql` log.
    """

    name: str
    partitions: Sequence[PartitionState]
    missing: bool
    groups: Sequence[str]
    keeps_seconds: float | None
    compacted: bool
    whole: bool

    @property
    def events(self) -> int:
        """How many were counted in all of its partitions."""
        return sum(each.events for each in self.partitions)


@dataclass(frozen=True, slots=True)
class GroupMember:
    """A process that takes part in a group.

    Attributes:
        name: as the transport knows it.
        process: on `sql` its host and its number there, `host:number`; on Kafka its host.
        since: when it joined, in UTC; None on Kafka, which does not say so.
        partitions: what it holds, as topic and number.
    """

    name: str
    process: str
    since: datetime | None
    partitions: Sequence[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class GroupState:
    """A consumer group.

    Attributes:
        name: of the group.
        state: `running`, `without members`, `not begun` (it has a handler in this App and was never seen), or what
            Kafka says of it while its partitions are dealt out.
        members: the processes that take part.
        topics: what it reads.
        handles: the kinds of events that it handles, such as `order.paid 2.x`; those of this App where there is no
            Database.
        paused: what a person has paused of it, by whom, since when and why; None where nothing is.
        parked: how many keys are parked; None without a Database.
        crashes: how often in a row its processes have ended while the event was handled that is suspected now; None
            without a Database.
        away_seconds: for how long it has had no member; None where it has one, and on Kafka.
    """

    name: str
    state: str
    members: Sequence[GroupMember]
    topics: Sequence[str]
    handles: Sequence[str]
    paused: str | None
    parked: int | None
    crashes: int | None
    away_seconds: float | None


@dataclass(frozen=True, slots=True)
class LoggedEvent:
    """An event as it is kept.

    Attributes:
        meta: what its headers say, or of a topic that others write its decoder; `meta.group` is empty.
        value: its payload, raw, or as its decoder has read it.
        written_at: when it was written to the topic, by the clock of the database or of Kafka, in UTC.
    """

    meta: Metadata
    value: bytes | None
    written_at: datetime


@dataclass(frozen=True, slots=True)
class PartitionLag:
    """How far a group is behind in a partition.

    Attributes:
        group, topic, partition: where.
        events: how many it has not finished.
        whole: all were counted; else there are more.
        seconds: for how long the oldest of them has been waiting since it was written; 0.0 without one.
        first: the oldest of them; None without one, or where it is gone.
        holder: the process that holds the partition; None where none does.
    """

    group: str
    topic: str
    partition: int
    events: int
    whole: bool
    seconds: float
    first: LoggedEvent | None
    holder: GroupMember | None


@dataclass(frozen=True, slots=True)
class StuckEvent:
    """An event that a group has not finished, and why.

    Attributes:
        group, topic, partition, offset: where it is.
        key: as text; None without one.
        type, id: as its headers say.
        handler: the function that handles it; empty where that is not known.
        attempt: the number of its last call, or of its next one where its key is parked; None where that is not known.
        since: since when it has been failing or called; where that is not known, when it was written.
        process: which has it in its hands, or holds its partition; None where none does.
        why: a sentence.
    """

    group: str
    topic: str
    partition: int
    offset: int | None
    key: str | None
    type: str
    id: str
    handler: str
    attempt: int | None
    since: datetime
    process: str | None
    why: str


class Sought(NamedTuple):
    """Which events are looked for; what is None is not looked at."""

    type: str | None = None
    key: str | None = None
    correlation_id: str | None = None
    since: float | None = None
    until: float | None = None

    def has(self, event: LoggedEvent) -> bool:
        """Whether an event is one of them."""
        at = event.written_at.timestamp()
        return (
            self.type in {None, event.meta.type}
            and self.key in {None, event.meta.key}
            and self.correlation_id in {None, event.meta.correlation_id}
            and (self.since is None or at >= self.since)
            and (self.until is None or at < self.until)
        )


class EventLog:
    """What topics hold and who reads them; `app.get(EventLog)` on `sql` and `kafka`, or the command `mainstay events`.

    Args:
        log: of the transport.
        database: where handlers, parked keys and crashes are noted; None without one.
        groups: of this App, with their topics and how they read them.
        decoders: read the topics that others write.
    """

    def __init__(
        self,
        log: Log,
        database: Database | None,
        groups: Mapping[str, tuple[Collection[str], Routes]],
        decoders: Decoders,
    ) -> None:
        self._log = log
        self._database = database
        self._mine = groups
        self._records = _Records(decoders)

    async def topics(self, names: Collection[str] | None = None) -> Sequence[TopicState]:
        """Topics, those that handlers of this App read and that are missing among them.

        Args:
            names: of those that are asked for. Default: those of this App, in an App without handlers all there are.
        """
        mine = {topic for topics, _ in self._mine.values() for topic in topics}
        wanted = set(names) if names is not None else mine or None
        found = dict(await self._log.topics(wanted))
        readers: dict[str, set[str]] = {}
        known = {group: reading.topics for group, reading in (await self._log.groups(None)).items()}
        for group, topics in [*known.items(), *((group, topics) for group, (topics, _) in self._mine.items())]:
            for topic in topics:
                readers.setdefault(topic, set()).add(group)
        for name in (wanted or set()) - found.keys():
            found[name] = Topic({}, None)
        return [
            TopicState(
                name=name,
                partitions=[PartitionState(number, *extent) for number, extent in sorted(topic.partitions.items())],
                missing=not topic.partitions,
                groups=sorted(readers.get(name, ())),
                keeps_seconds=topic.keeps_seconds,
                compacted=topic.compacted,
                whole=topic.whole,
            )
            for name, topic in sorted(found.items())
        ]

    async def groups(self, names: Collection[str] | None = None) -> Sequence[GroupState]:
        """Consumer groups.

        Args:
            names: of those that are asked for. Default: those of this App, in an App without handlers all there are.
        """
        wanted = set(names) if names is not None else set(self._mine) or None
        found = await self._log.groups(wanted)
        handles, parked, crashes = await self._noted()
        pauses = await self._pauses()
        states: list[GroupState] = []
        for name in sorted(found.keys() | (wanted or set())):
            reading = found.get(name)
            topics, routes = self._mine.get(name, ((), Routes()))
            kinds = {kind for route in routes.values() for kind in route.kinds}
            members = [] if reading is None else [_member(each) for each in reading.members]
            states.append(
                GroupState(
                    name=name,
                    state=_state_of(members, "" if reading is None else reading.state, begun=reading is not None),
                    members=members,
                    topics=sorted(topics if reading is None else reading.topics),
                    handles=sorted({*kinds, *handles.get(name, ())}),
                    paused=said_of([pause for pause in pauses if pause.group == name]),
                    parked=None if self._database is None else parked.get(name, 0),
                    crashes=None if self._database is None else crashes.get(name, 0),
                    away_seconds=None if reading is None else reading.away_seconds,
                )
            )
        return states

    async def _noted(self) -> tuple[Mapping[str, set[str]], Mapping[str, int], Mapping[str, int]]:
        """What groups handle, how many keys they have parked, and how often their processes ended."""
        if self._database is None:
            return {}, {}, {}
        handles: dict[str, set[str]] = {}
        for row in await self._database.read(tables.ALL_HANDLED[self._database.dialect], {"kept": KEPT_SECONDS}):
            handles.setdefault(row.group_name, set()).add(row.kind)
        parked = {row.group_name: row.keys for row in await self._database.read(tables.COUNT_PARKED)}
        crashes = {row.group_name: row.crashes for row in await self._database.read(tables.COUNT_CRASHES)}
        return handles, parked, crashes

    async def _pauses(self) -> Sequence[Pause]:
        if self._database is None:
            return []
        return [pause_of(row) for row in await self._database.read(tables.LIST_PAUSES)]

    async def lag(self, group: str) -> Sequence[PartitionLag]:
        """How far a group is behind in each partition of its topics; nothing for a group that there is not."""
        reading = (await self._log.groups([group])).get(group)
        if reading is None:
            return []
        members = [_member(each) for each in reading.members]
        holders = {partition: member for member in members for partition in member.partitions}
        behind = await self._log.behind(reading.places)
        firsts = {
            place: await self._records.seen(each.first) for place, each in behind.items() if each.first is not None
        }
        return [
            _lag(group, place, each, firsts.get(place), holders.get(place)) for place, each in sorted(behind.items())
        ]

    async def stuck(self, group: str, *, seconds: float = LONG_SECONDS) -> Sequence[StuckEvent]:
        """What keeps a group from going on, the oldest first.

        It is the first unfinished event of each partition, what processes have had in hand for long, and the first
        events of parked keys. A process notes every five seconds what it has had in hand for longer. On Kafka without
        a Database it does not: known is then which event it is at, and neither since when nor how often it was tried.

        Args:
            group: the consumer group.
            seconds: what waits for less is left out.
        """
        found = [*await self._in_hand(group), *await self._parked(group)]
        known = {(each.topic, each.partition, each.offset) for each in found}
        lags = [each for each in await self.lag(group) if each.first is not None and each.seconds >= seconds]
        runs = bool(lags) and any(each.state == "running" for each in await self.groups([group]))
        called = await self._called(group)
        paused = next((each.said for each in await self._pauses() if each.group == group and each.whole), None)
        for lag in lags:
            if lag.first is not None and (lag.topic, lag.partition, lag.first.meta.offset) not in known:
                crashes = called.get((lag.topic, lag.partition, lag.first.meta.offset), 0)
                found.append(_waiting(lag, lag.first, runs=runs, crashes=crashes, paused=paused))
        return sorted(found, key=lambda each: each.since)

    async def _in_hand(self, group: str) -> list[StuckEvent]:
        if self._database is None:
            return []
        asked = {"of_group": group, "seconds": FRESH_SECONDS}
        rows = await self._database.read(tables.READ_IN_HAND[self._database.dialect], asked)
        return [_in_hand(row) for row in rows]

    async def _parked(self, group: str) -> list[StuckEvent]:
        if self._database is None:
            return []
        rows = await self._database.read(tables.LIST_PARKED_KEYS_OF, {"of_group": group, "limit": _MOST_PARKED})
        return [_parked(row) for row in rows]

    async def _called(self, group: str) -> Mapping[tuple[str, int, int], int]:
        if self._database is None:
            return {}
        rows = await self._database.read(tables.READ_CALLED, {"of_group": group})
        return {(row.topic, row.partition, row.called): row.crashes for row in rows}

    def read(self, event: LoggedEvent) -> Event:
        """The event by its class: the one that handlers of this App are given, else one that is declared here.

        Raises:
            DecodeError: it cannot be read; the message names the fields, never their values.
        """
        type_, headers = event.meta.type, event.meta.headers
        if UNREADABLE in headers:
            raise DecodeError(headers[UNREADABLE].decode(errors="replace"))
        value = event.value or b""
        for topics, routes in self._mine.values():
            route = routes.get(type_)
            if route is not None and event.meta.topic in topics and kind_of(headers) in route.kinds:
                handled: Event = route.handling(headers.get(VERSION) or b"1.0").read(type_, value)
                return handled
        try:
            major = event.meta.version.major
        except ValueError as error:
            raise DecodeError(str(error)) from None
        return read(type_, major, value)

    async def newest(
        self,
        topics: Collection[str],
        *,
        type: str | None = None,
        key: str | None = None,
        correlation_id: str | None = None,
        until: datetime | None = None,
        limit: int = 20,
    ) -> Sequence[LoggedEvent]:
        """The newest events of topics, the oldest of them first.

        Args:
            topics: where to look; one that is not there holds nothing.
            type, key, correlation_id: of those that are asked for only.
            until: written before this moment.
            limit: how many at most.
        """
        if until is None:
            return await self._newest(await self._log.end(topics), Sought(type, key, correlation_id), limit)
        sought = Sought(type, key, correlation_id, until=until.timestamp())
        # `sql` counts in whole seconds: what was written in the last of them is looked at, too.
        return await self._newest(await self._log.since(topics, float(ceil(until.timestamp()))), sought, limit)

    async def _newest(self, ends: Places, sought: Sought, limit: int) -> Sequence[LoggedEvent]:
        found: list[LoggedEvent] = []
        async for page in self._log.backwards(ends):
            found = sorted([*found, *await self._records.wanted(page, sought)], key=_in_order)[-limit:]
            furthest: dict[tuple[str, int], float] = {}
            for each in page:
                at = furthest.setdefault((each.topic, each.partition), each.written_at)
                furthest[each.topic, each.partition] = min(at, each.written_at)
            # Every partition was read back to before the oldest that is kept: what comes next is older still.
            if len(found) == limit and max(furthest.values(), default=0.0) <= found[0].written_at.timestamp():
                break
        return found

    async def since(
        self,
        topics: Collection[str],
        since: datetime,
        *,
        type: str | None = None,
        key: str | None = None,
        correlation_id: str | None = None,
        until: datetime | None = None,
        limit: int = 20,
    ) -> Sequence[LoggedEvent]:
        """The first events of topics from a moment on, in the order of their times.

        Args:
            topics: where to look; one that is not there holds nothing.
            since: written at this moment or later; `sql` counts in whole seconds.
            type, key, correlation_id: of those that are asked for only.
            until: written before this moment.
            limit: how many at most.
        """
        from_second = float(int(since.timestamp()))
        sought = Sought(type, key, correlation_id, from_second, None if until is None else until.timestamp())
        places: Places = await self._log.since(topics, from_second)
        found: dict[tuple[str, int], list[LoggedEvent]] = {}
        while places:
            page = await self._log.read(places)
            over: set[tuple[str, int]] = set()
            for each in page.records:
                if sought.until is not None and each.written_at >= sought.until:
                    over.add((each.topic, each.partition))
            for event in await self._records.wanted(page.records, sought):
                of_partition = found.setdefault((event.meta.topic, event.meta.partition), [])
                of_partition.append(event)
                if len(of_partition) >= limit:  # more of it cannot be among the first
                    over.add((event.meta.topic, event.meta.partition))
            if page.last:
                break
            places = {partition: place for partition, place in page.places.items() if partition not in over}
        return sorted((event for some in found.values() for event in some), key=_in_order)[:limit]

    async def follow(
        self,
        topics: Collection[str],
        *,
        type: str | None = None,
        key: str | None = None,
        correlation_id: str | None = None,
        since: datetime | None = None,
        limit: int = 20,
    ) -> AsyncGenerator[LoggedEvent]:
        """Events as they come, without end: first the newest that are there, or those from a moment on.

        Args:
            topics: where to look; one that is not there yet is looked for again and again.
            type, key, correlation_id: of those that are asked for only.
            since: begin with all that were written at this moment or later.
            limit: without `since`, how many of the newest to begin with.
        """
        sought = Sought(type, key, correlation_id)
        if since is None:
            places: Places = await self._log.end(topics)
            for event in await self._newest(places, sought, limit):
                yield event
        else:
            sought = sought._replace(since=float(int(since.timestamp())))
            places = await self._log.since(topics, float(int(since.timestamp())))
        looked_at = time.monotonic()
        while True:
            page = await self._log.read(places)
            for event in sorted(await self._records.wanted(page.records, sought), key=_in_order):
                yield event
            places = page.places
            if page.last:
                await asyncio.sleep(_FOLLOW_SECONDS)
                missing = set(topics) - {topic for topic, _ in places}
                if missing and time.monotonic() - looked_at >= _LOOK_SECONDS:
                    looked_at = time.monotonic()
                    places = {**await self._log.since(missing, 0.0), **places}


class _Records:
    """Records of a log, as they are read."""

    def __init__(self, decoders: Decoders) -> None:
        self._decoders = decoders
        self._until: float | None = None  # how long a registry that has not answered is waited for

    async def wanted(self, records: Sequence[Stored], sought: Sought) -> list[LoggedEvent]:
        """Those of them that are looked for."""
        return [event for event in [await self.seen(each) for each in records] if sought.has(event)]

    async def seen(self, record: Stored) -> LoggedEvent:
        """One of them. A schema is waited for, once for as long as the registry is away."""
        while True:
            try:
                known = self._decoders.understood(record)
            except MainstayError as passing:
                now = time.monotonic()
                self._until = now + _SCHEMA_SECONDS if self._until is None else self._until
                if now >= self._until:
                    known = self._decoders.unreadable(record, str(passing))
                    break
                await asyncio.sleep(passing.retry_after_seconds or _AGAIN_SECONDS)
            else:
                self._until = None
                break
        return LoggedEvent(Metadata(known, group=""), known.value, _utc(record.written_at))


def _in_order(event: LoggedEvent) -> tuple[datetime, int, str, int]:
    return event.written_at, event.meta.offset, event.meta.topic, event.meta.partition


def _member(member: Member) -> GroupMember:
    since = None if member.since is None else _utc(member.since)
    return GroupMember(member.name, member.process, since, sorted(member.partitions))


def _state_of(members: Sequence[GroupMember], said: str, *, begun: bool) -> str:
    if not begun:
        return "not begun"
    calm = said.upper() in {"", "STABLE", "EMPTY", "DEAD", "UNKNOWN"}
    return ("running" if members else "without members") if calm else said.lower().replace("_", " ")


def _lag(
    group: str, place: tuple[str, int], behind: Behind, first: LoggedEvent | None, holder: GroupMember | None
) -> PartitionLag:
    return PartitionLag(
        group=group,
        topic=place[0],
        partition=place[1],
        events=behind.events,
        whole=behind.whole,
        seconds=behind.seconds or 0.0,
        first=first,
        holder=holder,
    )


def _waiting(lag: PartitionLag, first: LoggedEvent, *, runs: bool, crashes: int, paused: str | None) -> StuckEvent:
    """The first event of a partition, of which no process says that it has it in hand."""
    if paused is not None:
        why = f"the group is {paused}"
    elif lag.holder is None:
        why = "no process holds the partition" if runs else "no process of the group runs"
    elif crashes:
        why = f"its process ended {crashes} times in a row while it was handled"
    else:
        why = f"it is being handled, or waits for its turn; {lag.events} events of the partition are not finished"
    return StuckEvent(
        group=lag.group,
        topic=lag.topic,
        partition=lag.partition,
        offset=first.meta.offset,
        key=first.meta.key,
        type=first.meta.type,
        id=first.meta.id,
        handler="",
        attempt=None,
        since=first.written_at,
        process=None if lag.holder is None else lag.holder.process,
        why=why,
    )


def _in_hand(row: Any) -> StuckEvent:
    again = row.again_at and f"tried again at {_utc(row.again_at):%H:%M:%S}"
    last = row.error and f"its last attempt failed: {row.error}"
    return StuckEvent(
        group=row.group_name,
        topic=row.topic,
        partition=row.partition,
        offset=row.offset,
        key=_text(row.key),
        type=row.type,
        id=row.event_id,
        handler=row.handler,
        attempt=row.attempt,
        since=_utc(row.began_at),
        process=row.process,
        why="; ".join(part for part in (again or "its handler has not returned", last) if part),
    )


def _parked(row: Any) -> StuckEvent:
    due = "waits for a person" if row.due_at is None else f"tried again at {_utc(row.due_at):%Y-%m-%d %H:%M:%S}"
    due = "waits until what is paused is resumed" if row.paused else due
    error = row.error.rstrip().rpartition("\n")[2]
    where = "it is set aside" if row.later else "its key is parked"
    return StuckEvent(
        group=row.group_name,
        topic=row.topic,
        partition=row.partition,
        offset=None,
        key=_text(row.own_key),
        type=row.kind.rpartition(" ")[0],
        id="",
        handler="",
        attempt=row.attempt,
        since=_utc(row.failing_since),
        process=None,
        why=f"{where} as {row.id}, events in its queue: {row.waiting}; {due}; {error}",
    )


def _utc(seconds: float) -> datetime:
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):  # a producer may say any time: milliseconds for seconds, say
        return _LAST if seconds > 0 else _FIRST


def _text(key: bytes | None) -> str | None:
    return None if key is None else key.decode(errors="replace")
