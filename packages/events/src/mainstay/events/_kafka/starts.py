"""Where a group begins in a topic of the cluster in which it has no place yet.

One member commits a choice for all partitions of a topic at once: the one that holds the topic's first partition, of
which there is one at a time. The others wait for it. Were each to choose for its own partitions, one that ends before
its first commit would leave some that its successor begins elsewhere.

Each process chooses when it first finds no place, and keeps that choice until the cluster has one: its own or that of
another member. A commit that is refused, or whose answer is lost, is repeated with the same places, also after a
rebalance or a new connection. Chosen anew, `latest` would pass over what came since the process had begun. Before a
member gives the first partition up it commits what it still keeps, since its successor may have come later.

Where any partition of a topic has a place the group has begun there, and a partition without one is new: it is read
from its beginning. So is a topic that did not exist when this process looked for it first, or that it has made. A
beginning is chosen for each partition by itself, so that none waits for another, and is committed, too: or a release
that says another start would find no trace of the group, and pass over what is not finished.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple, Protocol

from mainstay.events._kafka.missed import Missed
from mainstay.events._starts import Start, say


class Places(Protocol):
    """What is asked of the cluster about one topic, in the name of a member."""

    async def committed(self, topic: str) -> Mapping[int, int | None]:
        """The group's place in each partition."""
        ...

    async def first_offsets(self, topic: str, partitions: Collection[int], start: Start) -> Mapping[int, int]:
        """The first offset of each partition from a start on; its end where nothing is there from then on."""
        ...

    async def commit_first(self, topic: str, offsets: Mapping[int, int]) -> bool:
        """Commit places of partitions that others may hold; False where this member's time is over."""
        ...


class _Choice(NamedTuple):
    """Where a topic begins, and how many records are passed over."""

    offsets: Mapping[int, int]
    passed: int


class Starts:
    """Where one group begins; of a process, so that it outlives connections.

    Args:
        group: its name.
        start: as its handlers say.
        late: topics that came after the group, of which nothing is passed over.

    Attributes:
        begun: topics in which it has had a place, and of which nothing is passed over either.
        missed: what was gone before it was read.
    """

    def __init__(self, group: str, start: Start, late: Collection[str]) -> None:
        self.begun: set[str] = set()
        self.missed = Missed(group)
        self._group = group
        self._late = late
        self._start: Start = start
        self._kept: dict[str, _Choice] = {}  # that the cluster is not known to have

    async def place_in(self, topic: str, partition: int, held: Collection[int], places: Places) -> int | None:
        """The offset at which a partition without a place begins; None while another member is yet to commit one.

        Args:
            topic: of which.
            partition: its number.
            held: the partitions of the topic that this member holds.
            places: asks the cluster.
        """
        committed = await self._committed(topic, places)
        known = committed.get(partition)
        if known is not None:  # committed meanwhile
            return known
        if self._start == "earliest" or topic in self.begun or topic in self._late:
            chosen = await places.first_offsets(topic, [partition], "earliest")
            if not await places.commit_first(topic, chosen):
                return None
            say(self._group, f"{topic}/{partition}", "earliest", None)
            return chosen.get(partition)
        if committed and topic not in self._kept:
            self._kept[topic] = await self._choice(topic, list(committed), places)
        if not committed or min(committed) not in held:
            return None
        return (await self._commit(topic, places)).get(partition)

    async def give_up(self, going: Collection[tuple[str, int]], places: Places) -> None:
        """Commit the choices that are kept here alone, before the partitions whose holder commits them are given up.

        Args:
            going: these, by topic and number.
            places: asks the cluster.
        """
        for topic in list(self._kept):
            if any(each == topic for each, _ in going):
                committed = await self._committed(topic, places)
                if topic in self._kept and committed and (topic, min(committed)) in going:
                    await self._commit(topic, places)

    async def _committed(self, topic: str, places: Places) -> Mapping[int, int | None]:
        """The group's places; where it has any, a choice that is kept is this one, or counts no more."""
        committed = await places.committed(topic)
        there = {number: offset for number, offset in committed.items() if offset is not None}
        if there:
            self.begun.add(topic)
            kept = self._kept.pop(topic, None)
            if kept is not None and there == kept.offsets:  # it is what was lost of the commit: the answer
                say(self._group, topic, self._start, kept.passed)
        return committed

    async def _choice(self, topic: str, partitions: Collection[int], places: Places) -> _Choice:
        oldest = await places.first_offsets(topic, partitions, "earliest")
        chosen = await places.first_offsets(topic, partitions, self._start)
        return _Choice(chosen, sum(chosen[number] - oldest[number] for number in chosen))

    async def _commit(self, topic: str, places: Places) -> Mapping[int, int]:
        """Commit the choice that is kept; nothing where this member's time is over."""
        kept = self._kept[topic]
        if not await places.commit_first(topic, kept.offsets):
            return {}
        self.begun.add(topic)
        if self._kept.pop(topic, None) is not None:
            say(self._group, topic, self._start, kept.passed)
        return kept.offsets
