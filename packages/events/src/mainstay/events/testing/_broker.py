"""A simulated broker behind the outbox: the real relay sends to it, and what it takes is in the log that is read.

The network and the broker are the world outside. A batch that was handed over arrives, also where its sender has died,
and batches are taken in the order in which they arrive. As the clients of a real one, the carrier hands nothing over
after its deadline.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from mainstay.database import DatabaseBusy
from mainstay.events._transport import partition_of
from mainstay.events.metadata import Outgoing
from mainstay.events.testing._world import ProcessLoop, World

_NETWORK_SECONDS = 0.02
_AGAIN_SECONDS = 0.25


class Sender(Protocol):
    """The process that relays."""

    async def sending(self, events: Sequence[Outgoing], hand_over: Callable[[], asyncio.Future[None]]) -> None:
        """Hand a batch over, or not, and wait for its answer, or not."""
        ...


class SimulatedTopics:
    """The topics of a run.

    Args:
        world: where it is.
        loop: of those to whom nothing happens.
    """

    def __init__(self, world: World, loop: ProcessLoop) -> None:
        self._world = world
        self._loop = loop
        self._arrived: deque[tuple[Sequence[Outgoing], asyncio.Future[None]]] = deque()
        self._more: asyncio.Event = asyncio.Event()

    def hand_over(self, events: Sequence[Outgoing]) -> asyncio.Future[None]:
        """Send a batch; the answer is for the loop that runs."""
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def arrive() -> None:
            self._arrived.append((events, answer))
            self._more.set()

        self._world.at(self._world.now + _NETWORK_SECONDS, self._loop, arrive)
        return answer

    async def serve(self, log: Log) -> None:
        """Take what arrives, for ever."""
        while True:
            await self._more.wait()
            self._more.clear()
            while self._arrived:
                events, answer = self._arrived.popleft()
                await self._take(log, events)
                answer.get_loop().call_soon(_answer, answer)

    async def _take(self, log: Log, events: Sequence[Outgoing]) -> None:
        while True:
            try:
                await log.send(events)
            except DatabaseBusy:  # a process holds SQLite's one lock, of which no broker knows anything
                await asyncio.sleep(_AGAIN_SECONDS)
            else:
                return


def _answer(answer: asyncio.Future[None]) -> None:
    if not answer.done():
        answer.set_result(None)


class Log(Protocol):
    """The log in the database."""

    async def send(self, batch: Sequence[Outgoing]) -> None:
        """Write to it."""
        ...


class SimulatedBroker:
    """The broker as one process reaches it; see `Broker`.

    Args:
        topics: what there is.
        sender: the process; None for one that never relays.
        partitions: of each topic.
    """

    def __init__(self, topics: SimulatedTopics | None, sender: Sender | None, partitions: int) -> None:
        self._topics = topics
        self._sender = sender
        self._partitions = partitions

    async def prepare(self, topic: str) -> None:
        """See `Broker`. All topics are there."""

    def forget(self, topic: str) -> None:
        """See `Broker`."""

    async def carrier(self) -> _Carrier:
        """See `Broker`."""
        assert self._topics is not None and self._sender is not None  # noqa: PT018  a process relays
        return _Carrier(self._topics, self._sender, self._partitions)


class _Carrier:
    """See `Carrier`."""

    def __init__(self, topics: SimulatedTopics, sender: Sender, partitions: int) -> None:
        self.deadline = math.inf
        self._topics = topics
        self._sender = sender
        self._partitions = partitions

    async def partitions(self, topic: str) -> int:  # noqa: ARG002  all have as many
        """See `Carrier`."""
        return self._partitions

    def place(self, event: Outgoing, partitions: int) -> int:
        """See `Carrier`."""
        return partition_of(event, partitions)

    async def send(self, topic: str, partition: int, events: Sequence[Outgoing]) -> None:  # noqa: ARG002  the log finds them
        """See `Carrier`."""

        def hand_over() -> asyncio.Future[None]:
            if time.monotonic() >= self.deadline:
                msg = "it was not sent before its deadline"
                raise TimeoutError(msg)
            return self._topics.hand_over(events)

        await self._sender.sending(events, hand_over)

    def close(self) -> None:
        """See `Carrier`."""

    def abandon(self) -> None:
        """See `Carrier`."""
        self.deadline = -math.inf
