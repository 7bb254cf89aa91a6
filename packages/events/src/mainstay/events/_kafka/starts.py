"""Where a group begins in a topic of the cluster in which it has no place yet.

One member chooses for all partitions of a topic, and commits the places at once: the one that holds the topic's first
partition, of which there is one at a time. The others wait for it. Were each to choose for its own partitions, one that
ends before its first commit would leave some that its successor begins elsewhere.

Where any partition of a topic has a place the group has begun there, and a partition without one is new: it is read
from its beginning. So is a topic that did not exist when this process looked for it first, or that it has made. A
beginning is chosen for each partition by itself, so that none waits for another, and is committed, too: or a release
that says another start would find no trace of the group, and pass over what is not finished.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

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


class Starts:
    """Where one group begins.

    Args:
        group: its name.
        start: as its handlers say.
        late: topics that came after the group, of which nothing is passed over.

    Attributes:
        begun: topics in which it has had a place, and of which nothing is passed over either.
    """

    def __init__(self, group: str, start: Start, late: Collection[str]) -> None:
        self.begun: set[str] = set()
        self._group = group
        self._late = late
        self._start: Start = start

    async def place_in(self, topic: str, partition: int, held: Collection[int], places: Places) -> int | None:
        """The offset at which a partition without a place begins; None while another member is yet to choose.

        Args:
            topic: of which.
            partition: its number.
            held: the partitions of the topic that this member holds.
            places: asks the cluster.
        """
        committed = await places.committed(topic)
        known = committed.get(partition)
        if known is not None:  # chosen meanwhile
            return known
        if any(offset is not None for offset in committed.values()):
            self.begun.add(topic)
        start: Start = "earliest" if topic in self.begun or topic in self._late else self._start
        if start == "earliest":
            chosen = await places.first_offsets(topic, [partition], start)
            passed = None
        elif not committed or min(committed) not in held:
            return None
        else:
            oldest = await places.first_offsets(topic, list(committed), "earliest")
            chosen = await places.first_offsets(topic, list(committed), start)
            passed = sum(chosen[number] - oldest[number] for number in chosen)
        if not await places.commit_first(topic, chosen):
            return None
        say(self._group, topic if passed is not None else f"{topic}/{partition}", start, passed)
        return chosen.get(partition)
