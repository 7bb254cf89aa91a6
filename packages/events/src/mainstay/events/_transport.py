"""What a transport is: somewhere to send encoded events, and a way for a group to read them by partition."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import NamedTuple, Protocol
from zlib import crc32

from mainstay.core import Health
from mainstay.events._delivery import Assignment
from mainstay.events._starts import Start
from mainstay.events.metadata import Headers, Outgoing, Record


class LogRecord(NamedTuple):
    """A record of the transports that keep their logs themselves."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers


def partition_of(event: Outgoing, partitions: int) -> int:
    """The partition of an event: by its key, or spread by its id where it has none."""
    return crc32(event.placing_key) % partitions


class Arrivals:
    """Tells those who wait in this process that something was committed; others find it by polling.

    Whoever waits takes `next()` before looking, so that what is announced between looking and waiting is not missed.
    """

    def __init__(self) -> None:
        self._next: asyncio.Future[None] | None = None
        self._listeners: list[Callable[[], None]] = []

    def announce(self) -> None:
        """Wake everybody who waits."""
        arrival, self._next = self._next, None
        if arrival is not None:
            arrival.set_result(None)
        for listener in self._listeners:
            listener()

    @contextmanager
    def told_to(self, listener: Callable[[], None]) -> Generator[None, None, None]:
        """Call `listener` at every announcement within the block."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def next(self) -> asyncio.Future[None]:
        """The next announcement; one for all who wait, and nobody may cancel it."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        return self._next


async def arrived(arrival: asyncio.Future[None], seconds: float) -> None:
    """Return at the announcement, at the latest after `seconds`."""
    await asyncio.wait((arrival,), timeout=seconds)


class Reader(Protocol):
    """The side of a consumer that a source talks to."""

    def assigned(self, topic: str, partition: int) -> Assignment:
        """A partition is ours: records of it may be handed out."""
        ...

    async def revoked(self, assignments: Collection[Assignment]) -> None:
        """Partitions are going to be another's: finish what runs, commit, forget them. Ends within the drain time."""
        ...

    async def lost(self, assignments: Collection[Assignment]) -> None:
        """Partitions are another's already: stop, commit nothing."""
        ...


class Source(Protocol):
    """One group's reading of its topics.

    Attributes:
        absent: the topics that cannot be read at the moment, and why; the others do not wait for them.
    """

    absent: Mapping[str, str]

    async def fetch(self, ready: Sequence[Assignment]) -> Mapping[Assignment, Sequence[Record]]:
        """The next records of `ready` partitions, at most a batch; empty after a fraction of a second without any."""
        ...

    async def commit(self, finished: Mapping[Assignment, Record]) -> None:
        """Make durable that each partition is finished up to its record, that record included."""
        ...

    def lag(self) -> int | None:
        """About how many records of the partitions that are held were not handed out yet; None while unknown."""
        ...

    def lag_seconds(self, unfinished: Iterable[Record]) -> float | None:
        """For how long the oldest record waits that a group has not finished; 0.0 without one, None while unknown.

        Args:
            unfinished: those that were handed out, the oldest of each partition.
        """
        ...


class Transport(Protocol):
    """Where consumers read; what publishing writes to may be an outbox in front of it."""

    def source(
        self, group: str, topics: Sequence[str], reader: Reader, start: Start = "earliest"
    ) -> AbstractAsyncContextManager[Source]:
        """Read topics as a member of a group, from where it left off, else from their start.

        Leaving the block gives the partitions back, after `reader.revoked`.
        """
        ...

    async def health(self) -> Health:
        """Whether it can be reached, from what is known."""
        ...
