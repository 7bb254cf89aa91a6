"""What a transport keeps, read without a group: looking joins no group, makes no topic and moves no place.

A *place* says where reading goes on in a partition. It means something to its transport only: an offset on Kafka, on
`sql` a window of the log, since what commits late has a position below what was read already. All who read without a
group, one partition or many, once or for as long as they live, do so by `Log.end` or `Log.since` and `Log.read`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from mainstay.events.metadata import Headers

Partition = tuple[str, int]
"""A topic, and the number of its part."""

Places = Mapping[Partition, Any]
"""Where reading goes on, by partition."""


class Stored(NamedTuple):
    """A record, and when it was written, in seconds since 1970."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    written_at: float


class Extent(NamedTuple):
    """What is in a partition.

    Attributes:
        first, last: the offsets of the oldest and of the newest record; None where there is none.
        events: how many there are; on Kafka about, since transactions and compaction leave holes.
    """

    first: int | None
    last: int | None
    events: int


class Topic(NamedTuple):
    """What is in a topic.

    Attributes:
        partitions: by number.
        keeps_seconds: for how long an event is kept at least, infinite where for ever; None where that is not known.
        compacted: the newest event of each key is kept for ever.
        whole: all of its events were counted; else those that are among the newest of the log.
    """

    partitions: Mapping[int, Extent]
    keeps_seconds: float | None
    compacted: bool = False
    whole: bool = True


class Page(NamedTuple):
    """Some records, in the order of each partition.

    Attributes:
        records: what was read.
        places: where to go on.
        last: there are no more at the moment.
    """

    records: Sequence[Stored]
    places: Places
    last: bool


class Behind(NamedTuple):
    """What a group has not finished of a partition.

    Attributes:
        events: how many.
        whole: all were counted; else there are more.
        first: the oldest; None where there is none, or where it is gone.
        seconds: for how long that one waits; None without one.
    """

    events: int
    whole: bool
    first: Stored | None
    seconds: float | None


class Member(NamedTuple):
    """A process in a group.

    Attributes:
        name: as the transport knows it.
        process: the host, and on `sql` the number of the process there, as `host:number`.
        since: when it joined, in seconds since 1970; None where that is not known.
        partitions: what it holds.
    """

    name: str
    process: str
    since: float | None
    partitions: frozenset[Partition]


class Reading(NamedTuple):
    """A group, as the transport knows it.

    Attributes:
        state: what the transport says of it beside its members; empty where it says nothing.
        members: who takes part.
        topics: what it reads, or has a place in.
        places: where it goes on.
        away_seconds: for how long it has had no member; None where it has one, or where that is not known.
    """

    state: str
    members: Sequence[Member]
    topics: frozenset[str]
    places: Places
    away_seconds: float | None = None


class Log(Protocol):
    """See the module."""

    async def topics(self, names: Collection[str] | None) -> Mapping[str, Topic]:
        """Those of these topics that are there; without names, all."""
        ...

    async def end(self, topics: Collection[str]) -> Places:
        """Where what comes next will be; nothing of topics that are not there."""
        ...

    async def since(self, topics: Collection[str], time: float) -> Places:
        """Where the records begin that were written from a time on, in seconds since 1970."""
        ...

    async def read(self, places: Places) -> Page:
        """The next records, some hundreds at most; without waiting for any."""
        ...

    def backwards(self, places: Places) -> AsyncGenerator[Sequence[Stored]]:
        """What is before places, page by page, the newest page first, down to the beginning."""
        ...

    async def groups(self, names: Collection[str] | None) -> Mapping[str, Reading]:
        """Those of these groups that there are; without names, all."""
        ...

    async def behind(self, places: Places) -> Mapping[Partition, Behind]:
        """What comes after places."""
        ...
