"""The transactional outbox in front of Kafka: events commit with what they tell of, and a relay carries them on.

Keys are hashed to lanes, and a lane is relayed by one process at a time, which holds its lease. A wave takes the oldest
rows of all lanes that are held, sends one batch to each partition and deletes, by their own numbers and under the
lease's fence, the rows of the batches that were confirmed. A batch is confirmed whole or not at all, and an event's key
always goes to the same partition; so of the rows with one key a prefix is deleted, and what failed is the first of its
key in the next wave. Deleting "everything up to" a position would lose rows of transactions that began earlier and
commit later.

Killed between sending and deleting, a relay's successor sends again: duplicates, in order, which an inbox recognises.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from zlib import crc32

from mainstay.core import Clock, Drain, Health
from mainstay.database import Database, FenceLost, Lease
from mainstay.events import tables
from mainstay.events._metrics import OUTBOX_DEPTH, RELAYED
from mainstay.events._transport import Arrivals
from mainstay.events.metadata import Outgoing
from mainstay.events.tables import pack_headers, unpack_headers

_log = logging.getLogger("mainstay.events")

LANES = 8
"""Never changed: rows of one key in two lanes could overtake each other."""
_WAVE = 2000
_POLL_SECONDS = 0.25
_BACKOFF_SECONDS = (0.2, 10.0)
_MEASURE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Wave:
    """What became of the events of one wave.

    Attributes:
        confirmed: the indexes of those that the broker has.
        failed: the topics that it refused, and why; what is in neither goes with the next wave.
    """

    confirmed: set[int]
    failed: dict[str, BaseException]


class Broker(Protocol):
    """What the relay needs of a transport."""

    async def send_wave(self, events: Sequence[Outgoing]) -> Wave:
        """Send at most one batch to each partition."""
        ...


class Outbox:
    """Where publishing writes to.

    Args:
        database: where the rows are.
        check: refuses an event that the broker would refuse, and that would block its lane then.
    """

    def __init__(self, database: Database, check: Callable[[Outgoing], None]) -> None:
        self._database = database
        self._check = check
        self.arrivals = Arrivals()

    async def send(self, batch: Sequence[Outgoing]) -> None:
        """Make events durable, in the unit of work that is open."""
        for event in batch:
            self._check(event)
        await self.send_again(batch)

    async def send_again(self, batch: Sequence[Outgoing]) -> None:
        """The same for records that have been on the topic: its broker's limit for them may be another than ours."""
        rows = [
            {
                "lane": lane_of(event),
                "topic": event.topic,
                "key": event.key,
                "value": event.value,
                "headers": pack_headers(event.headers),
            }
            for event in batch
        ]
        await self._database.write(tables.INSERT_OUTBOX, rows, route=("events", rows[0]["lane"]))
        self._database.after_commit(self.arrivals.announce)


def lane_of(event: Outgoing) -> int:
    """The lane of an event: by its key, or spread by its id."""
    return crc32(event.placing_key) % LANES


class OutboxRelay:
    """Carries the outbox to the broker; its health is that of the way there.

    Args:
        database: where the rows are.
        outbox: tells when something was written in this process.
        broker: where they go.
        lease_seconds: how long a killed relay keeps its lanes.
        clock: measures waits.
    """

    def __init__(
        self, database: Database, outbox: Outbox, broker: Broker, *, lease_seconds: float, clock: Clock
    ) -> None:
        self._database = database
        self._outbox = outbox
        self._broker = broker
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._leases: dict[int, Lease] = {}
        self._lanes_at = 0.0
        self._paused: dict[str, tuple[float, float]] = {}  # a topic that was refused: until when, and for how long
        self._failing_since: float | None = None
        self._trouble = ""
        self._depth = 0

    async def serve(self, drain: Drain) -> None:
        """Relay until the drain begins, whatever happens to broker and database."""
        try:
            with self._outbox.arrivals.told_to(drain.wake):
                await self._relay(drain)
        finally:
            for lease in self._leases.values():
                await lease.release()
            self._leases.clear()

    async def _relay(self, drain: Drain) -> None:
        delay = first = _BACKOFF_SECONDS[0]
        while not drain.begun:
            try:
                await self._take_lanes()
                full = await self._wave()
            except Exception as error:  # noqa: BLE001  broker and database come back
                self._failed(error, delay)
                await drain.pause(delay)
                delay = min(delay * 2, _BACKOFF_SECONDS[1])
            else:
                delay = first
                if not self._paused:
                    self._failing_since = None
                if not full:
                    await drain.pause(_POLL_SECONDS, wakeable=True)

    def _failed(self, error: BaseException, delay: float, topic: str = "") -> None:
        if self._failing_since is None:
            self._failing_since = self._clock.monotonic()
        self._trouble = f"{topic and f'topic {topic}: '}{type(error).__name__}: {error}"
        _log.warning("the outbox could not be relayed, again in %.1f s: %s", delay, self._trouble)

    async def _take_lanes(self) -> None:
        for lane in [lane for lane, lease in self._leases.items() if not lease.held]:
            await self._drop(lane)
        now = self._clock.monotonic()
        if len(self._leases) == LANES or now < self._lanes_at:
            return
        self._lanes_at = now + self._lease_seconds / 4
        for lane in range(LANES):
            if lane not in self._leases:
                lease = await self._database.lease(f"events/outbox/{lane}", seconds=self._lease_seconds)
                if lease is not None:
                    self._leases[lane] = lease

    async def _wave(self) -> bool:
        """Send what waits in the lanes that are held; True when there may be more."""
        leases = {lane: lease for lane, lease in self._leases.items() if lease.held}
        if not leases:
            return False
        now = self._clock.monotonic()
        paused = [topic for topic, (until, _) in self._paused.items() if now < until]
        # The read is over before anything is sent: no transaction is open meanwhile.
        rows = await self._database.read(
            tables.READ_OUTBOX, {"lanes": sorted(leases), "paused": paused, "limit": _WAVE}
        )
        if not rows:
            return False
        wave = await self._broker.send_wave(
            [Outgoing(row.topic, row.key, row.value, unpack_headers(row.headers)) for row in rows]
        )
        await self._delete(leases, [rows[index] for index in sorted(wave.confirmed)])
        RELAYED.inc(len(wave.confirmed))
        # A topic that is refused waits by itself: its rows are the oldest, and would fill every wave.
        sent = {rows[index].topic for index in wave.confirmed} - wave.failed.keys()
        self._paused = {topic: pause for topic, pause in self._paused.items() if topic not in sent}
        for topic, error in wave.failed.items():
            seconds = min(self._paused.get(topic, (0.0, _BACKOFF_SECONDS[0] / 2))[1] * 2, _BACKOFF_SECONDS[1])
            self._paused[topic] = (now + seconds, seconds)
            self._failed(error, seconds, topic)
        return True

    async def _delete(self, leases: Mapping[int, Lease], rows: Sequence[Any]) -> None:
        by_lane: dict[int, list[Any]] = {}
        for row in rows:
            by_lane.setdefault(row.lane, []).append(row)
        for lane, sent in by_lane.items():
            try:
                await self._database.write(
                    tables.DELETE_OUTBOX, [{"sent": row.position} for row in sent], fence=leases[lane].fence
                )
            except FenceLost:  # its new owner sends these again
                _log.warning("lane %d of the outbox belongs to another process now", lane)
                await self._drop(lane)

    async def _drop(self, lane: int) -> None:
        """Let a lane go. Without the release it would be renewed for ever, for a relay that no longer thinks of it."""
        if lane in self._leases:
            await self._leases.pop(lane).release()

    async def measure(self, drain: Drain) -> None:
        """Keep the depth of the outbox known until the drain begins."""
        while not drain.begun:
            try:
                self._depth = (await self._database.read(tables.COUNT_OUTBOX))[0][0]
                OUTBOX_DEPTH.set(self._depth)
            except Exception as error:  # noqa: BLE001  a figure that is missing once
                _log.debug("the depth of the outbox is not known", exc_info=error)
            await drain.pause(_MEASURE_SECONDS)

    async def health(self) -> Health:
        """Degraded while events wait for a broker that is away."""
        if self._failing_since is not None:
            seconds = self._clock.monotonic() - self._failing_since
            return Health("degraded", f"the outbox has not been relayed for {seconds:.0f} s: {self._trouble}")
        return Health("ok", f"{self._depth} events wait in the outbox")
