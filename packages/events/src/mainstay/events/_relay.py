"""The relay: carries the outbox to the broker, and nothing that the broker refuses holds up the rest.

A lane is relayed by one process at a time, which holds its lease. A wave reads a page of each topic, bounded in bytes,
sends one batch to each partition and deletes, by their own numbers and under the lease's fence, the rows of the batches
that were confirmed. A batch is confirmed whole or not at all, and an event's key always goes to the same partition; so
of the rows with one key a prefix is deleted, and what failed is the first of its key in the next wave. Deleting
"everything up to" a position would lose rows of transactions that began earlier and commit later.

A partition that does not answer at once is left to itself: with the carrier that has its batch it goes on in the
background until its deadline, and everything else gets another carrier. Until it answers nothing is sent to it, its
turns come further and further apart, and where its rows fill whole pages they are put aside in the table, so that those
behind them are found. A topic that is missing or refused is waited for in the same way, and its rows are not read.

Order survives a relay that stands still or is cut off, because the deadline of every batch is before the end of the
leases of its rows: what was not sent by then is not sent any more, so it cannot follow what a successor sends. Killed
between sending and deleting, a relay's successor sends again: duplicates, in order, which an inbox recognises.
"""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from mainstay.core import Clock, Drain, Health, spawn
from mainstay.database import Database, Lease
from mainstay.events._lanes import SHORTEST_SECONDS, Lanes
from mainstay.events._metrics import RELAYED
from mainstay.events._outbox import BATCH_BYTES, Outbox, OutboxRows, Place, Waiting
from mainstay.events._sparing import Sparing, said
from mainstay.events.metadata import Outgoing

if TYPE_CHECKING:
    from mainstay.events._spans import Spans

_log = logging.getLogger("mainstay.events")

_RECORD_BYTES = 64  # about what a record takes beside its contents
_POLL_SECONDS = 0.25
_TOPICS_SECONDS = 0.25
_PATIENCE_SECONDS = 0.25
"""How long the other partitions wait for one, once."""
_BACKOFF_SECONDS = (0.2, 10.0)
_NAMED = 5  # of those that take nothing, in one line of health


class TooLarge(Exception):
    """A batch is larger than the broker takes; with fewer events it may be taken."""


class Refused(Exception):
    """A single event that the broker will not take, however often it is sent."""


class Carrier(Protocol):
    """A producer of batches: one to a partition at a time, and no byte of any after the deadline.

    Attributes:
        deadline: by the monotonic clock, of everything that is handed over.
    """

    deadline: float

    async def partitions(self, topic: str) -> int:
        """How many partitions a topic has."""
        ...

    def place(self, event: Outgoing, partitions: int) -> int:
        """The partition of an event."""
        ...

    async def send(self, topic: str, partition: int, events: Sequence[Outgoing]) -> None:
        """Send a batch and wait until it is confirmed, however long that takes.

        Raises:
            TooLarge: with fewer events it may be taken.
            Refused: it is one event, and will never be taken.
        """
        ...

    def close(self) -> None:
        """End it, all being answered."""
        ...

    def abandon(self) -> None:
        """End it with what it has not answered for: none of that goes out from now on."""
        ...


class Broker(Protocol):
    """What the relay needs of a transport."""

    async def prepare(self, topic: str) -> None:
        """Return when a topic is there."""
        ...

    def forget(self, topic: str) -> None:
        """It may not be there any more."""
        ...

    async def carrier(self) -> Carrier:
        """A new one."""
        ...


@dataclass(slots=True)
class _Trouble:
    """What is known of a topic or a partition that did not take what it was sent.

    Attributes:
        since: by the clock.
        what: the last error.
        again_at: when its next turn is; infinite while one goes on.
        pause: how long it waits for its next turn.
        aside: of a partition, whether rows of it were put aside in the table.
    """

    since: float
    what: str = "no answer yet"
    again_at: float = math.inf
    pause: float = _BACKOFF_SECONDS[0] / 2
    aside: bool = False


class _Batches(NamedTuple):
    """What is in a page.

    Attributes:
        batches: of each partition, its first rows.
        waiting: of each partition that is in trouble, all of its rows.
    """

    batches: dict[Place, list[Waiting]]
    waiting: dict[Place, list[Waiting]]


@dataclass(slots=True)
class _Round:
    """Batches that were handed to one carrier together.

    Attributes:
        leases: those of the lanes that the rows are of.
        rows: of each partition, in the order of the batch.
        tasks: one for each partition.
    """

    carrier: Carrier
    leases: Mapping[int, Lease]
    rows: Mapping[Place, Sequence[Waiting]]
    tasks: dict[Place, asyncio.Task[None]] = field(default_factory=dict[Place, asyncio.Task[None]])

    def begin(self, spans: Spans | None) -> None:
        """Hand everything over, each batch in a span where there are any."""
        self.carrier.deadline = time.monotonic() + min(lease.remaining_seconds for lease in self.leases.values())
        for place, rows in self.rows.items():
            events = [row.event for row in rows]
            if spans is None:
                sending = self.carrier.send(*place, events)
            else:
                sending = spans.relaying(self.carrier.send, *place, events)
            self.tasks[place] = spawn(sending, name="events.relay.batch")

    async def end(self) -> None:
        """Wait for the answers until the deadline; what is left then is taken back."""
        try:
            left = self.carrier.deadline - time.monotonic()
            await asyncio.wait(self.tasks.values(), timeout=max(0.0, left))
        finally:
            self.carrier.abandon()
            for task in self.tasks.values():
                task.cancel()
            await asyncio.wait(self.tasks.values())


class _Waits:
    """Says how long what takes nothing waits for its next turn, in a line of log a minute."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._sparing = Sparing(clock)

    def again(self, what: str, trouble: _Trouble, error: BaseException) -> None:
        """Its turn ended with an error."""
        trouble.what = said(error)
        trouble.pause = min(2 * trouble.pause, _BACKOFF_SECONDS[1])
        trouble.again_at = self.clock.monotonic() + trouble.pause
        self.warn(what, "%s takes no events, again in %.1f s: %s", what, trouble.pause, trouble.what)

    def warn(self, about: str, text: str, *values: object) -> None:
        """Log it, unless it was lately."""
        left_out = self._sparing.due(about)
        if left_out is not None:
            more = f" ({left_out} such lines were left out)" if left_out else ""
            _log.warning(f"{text}{more}", *values)


class _Topics:
    """The topics that have rows: those that take events, and those that are waited for.

    Attributes:
        waiting: the latter.
    """

    def __init__(self, rows: OutboxRows, outbox: Outbox, broker: Broker, waits: _Waits) -> None:
        self.waiting: dict[str, _Trouble] = {}
        self._present: set[str] = set()
        self._rows = rows
        self._outbox = outbox
        self._broker = broker
        self._waits = waits
        self._at = -math.inf

    async def ready(self, in_background: Callable[[Coroutine[Any, Any, None]], None]) -> list[str]:
        """Those that take events; the others are looked for in the background."""
        now = self._waits.clock.monotonic()
        if now >= self._at or self._outbox.topics - self._present:
            self._at = now + _TOPICS_SECONDS
            present = {*await self._rows.topics(), *self._outbox.topics}
            new = {name: _Trouble(now, again_at=now) for name in present - self._present}
            self.waiting = {name: each for name, each in self.waiting.items() if name in present} | new
            self._present = present
        for name, trouble in self.waiting.items():
            if trouble.again_at <= now:
                trouble.again_at = math.inf
                in_background(self._prepare(name, trouble))
        return sorted(self._present - self.waiting.keys())

    async def _prepare(self, name: str, trouble: _Trouble) -> None:
        try:
            await self._broker.prepare(name)
        except Exception as error:  # noqa: BLE001  any error makes this topic wait, and no other
            self._waits.again(f"topic {name}", trouble, error)
        else:
            self.waiting.pop(name, None)

    def lost(self, name: str, error: BaseException) -> None:
        """It is not as it was."""
        self._broker.forget(name)
        self.waiting[name] = trouble = _Trouble(self._waits.clock.monotonic())
        self._waits.again(f"topic {name}", trouble, error)


class OutboxRelay:
    """Carries the outbox to the broker; its health is that of the way there.

    Args:
        database: where the rows are.
        outbox: tells when something was written in this process.
        broker: where they go.
        lease_seconds: how long a killed relay keeps its lanes.
        most_bytes: how much of the outbox is in memory at once.
        clock: measures waits.
        spans: of the batches; None where none are recorded.

    Attributes:
        rows: of the outbox.
    """

    def __init__(
        self,
        database: Database,
        outbox: Outbox,
        broker: Broker,
        *,
        lease_seconds: float,
        most_bytes: int,
        clock: Clock,
        spans: Spans | None = None,
    ) -> None:
        self._outbox = outbox
        self._spans = spans
        self._broker = broker
        self._lanes = Lanes(database, lease_seconds, clock)
        self.rows = OutboxRows(database, most_bytes)
        self._clock = clock
        self._carrier: Carrier | None = None
        self._waits = _Waits(clock)
        self._topics = _Topics(self.rows, outbox, broker, self._waits)
        self._places: dict[Place, _Trouble] = {}
        self._most_bytes: dict[str, int] = {}  # in a batch of this topic: more was too large for the broker
        self._background: dict[asyncio.Task[None], _Round | None] = {}
        self._failing_since: float | None = None
        self._what_fails = ""

    async def serve(self, drain: Drain) -> None:
        """Relay until the drain begins, through outages of broker and database."""
        try:
            with self._outbox.arrivals.told_to(drain.wake):
                await self._relay(drain)
        finally:
            await self._end()
            await self._lanes.release()

    async def _end(self) -> None:
        """What the broker answers within the drain time of the App is deleted; the rest is sent again by another."""
        try:
            for task, sent in self._background.items():
                if sent is None:
                    task.cancel()
            if self._background:
                await asyncio.wait(self._background)
                await self._answers()
        finally:  # not all of that, where the drain time is over
            for task in self._background:
                task.cancel()
            if self._background:
                await asyncio.wait(self._background)
            if self._carrier is not None:
                self._carrier.close()
                self._carrier = None

    async def _relay(self, drain: Drain) -> None:
        delay = first = _BACKOFF_SECONDS[0]
        while not drain.begun:
            try:
                if await self._lanes.take():
                    await self._find_aside()
                await self._answers()
                more = await self._wave(drain)
            except Exception as error:  # noqa: BLE001  broker and database come back
                if self._failing_since is None:
                    self._failing_since = self._clock.monotonic()
                self._what_fails = said(error)
                text = "the outbox could not be relayed, again in %.1f s: %s"
                self._waits.warn("outbox", text, delay, self._what_fails)
                await drain.pause(delay)
                delay = min(delay * 2, _BACKOFF_SECONDS[1])
            else:
                delay = first
                self._failing_since = None
                if not more:
                    await drain.pause(self._until_next_turn(), wakeable=True)

    def _until_next_turn(self) -> float:
        if not self._lanes.held():
            return _POLL_SECONDS
        now = self._clock.monotonic()
        turns = [trouble.again_at for trouble in (*self._topics.waiting.values(), *self._places.values())]
        return max(0.01, min([now + _POLL_SECONDS, *turns]) - now)

    # One wave

    async def _wave(self, drain: Drain) -> bool:
        """Send what waits in the lanes that are held; True when there may be more."""
        leases = self._lanes.held()
        if not leases:
            self._places.clear()  # they are others' now
            return False
        topics = await self._topics.ready(lambda work: self._in_background(work, None, drain))
        # The reads are over before anything is sent: no transaction is open meanwhile.
        page = await self.rows.read(topics, leases)
        now = self._clock.monotonic()
        due = {place for place, trouble in self._places.items() if trouble.again_at <= now}
        apart = {place: await self.rows.read_aside(place, leases) for place in due if self._places[place].aside}
        await self._refuse_unreadable(leases)
        found = _Batches({}, {})
        if page or apart:
            found = await self._batches(await self._main(), page)
        for place in due:
            if place in apart:
                await self._batch_of_aside(place, apart[place], found.batches)
            elif place not in found.batches:
                del self._places[place]  # nothing of it waits any more
        leases = {lane: lease for lane, lease in leases.items() if lease.remaining_seconds > SHORTEST_SECONDS}
        batches = {
            place: rows
            for place, rows in found.batches.items()
            if all(row.lane in leases for row in rows) and (place not in self._places or place in due)
        }
        doubtful = {place: rows for place, rows in batches.items() if place in self._places}
        healthy = {place: rows for place, rows in batches.items() if place not in self._places}
        if doubtful:
            await self._send_apart(doubtful, leases, drain)
        if healthy:
            await self._send(await self._main(), healthy, leases, drain)
        behind = self.rows.full and 2 * sum(map(len, found.waiting.values())) > len(page)
        if behind:
            await self._put_aside(found.waiting, leases)
        return bool(healthy) or behind

    async def _main(self) -> Carrier:
        if self._carrier is None:
            self._carrier = await self._broker.carrier()
        return self._carrier

    async def _batches(self, carrier: Carrier, rows: Sequence[Waiting]) -> _Batches:
        """Divide rows by partition, as many to each as a batch takes."""
        widths: dict[str, int] = {}
        for topic in {row.event.topic for row in rows}:
            try:
                async with asyncio.timeout(_PATIENCE_SECONDS):
                    widths[topic] = await carrier.partitions(topic)
            except Exception as error:  # noqa: BLE001  this topic is not as it was; the others are not its hostages
                self._topics.lost(topic, error)
        return _divided(carrier, rows, widths, self._places, self._most_bytes)

    async def _batch_of_aside(self, place: Place, rows: Sequence[Waiting], batches: dict[Place, list[Waiting]]) -> None:
        """Add a batch of rows that were put aside; where none are left, the partition is like any other again."""
        if not rows:
            del self._places[place]
            return
        self._places[place].aside = False
        found = await self._batches(await self._main(), rows)
        self._places[place].aside = True
        if place in found.batches:
            batches[place] = found.batches.pop(place)
        if found.batches:  # the topic has more partitions by now
            await self.rows.take_back([row for rows in found.batches.values() for row in rows])

    # Sending

    async def _send(
        self, carrier: Carrier, batches: Mapping[Place, Sequence[Waiting]], leases: Mapping[int, Lease], drain: Drain
    ) -> None:
        """Send to partitions that had no trouble. One that does not answer at once keeps the carrier to itself."""
        sent = _Round(carrier, leases, batches)
        sent.begin(self._spans)
        try:
            done, late = await asyncio.wait(sent.tasks.values(), timeout=_PATIENCE_SECONDS)
        except BaseException:  # the wave itself is cancelled
            self._carrier = None
            carrier.deadline = -math.inf
            await sent.end()
            raise
        if late:
            self._carrier = None
            now = self._clock.monotonic()
            self._places |= {place: _Trouble(now) for place, task in sent.tasks.items() if task in late}
            rest = _Round(carrier, leases, batches, {place: task for place, task in sent.tasks.items() if task in late})
            self._in_background(rest.end(), rest, drain)
        elif any(task.exception() is not None for task in done):
            self._carrier = None  # the numbers of a partition have a hole
            carrier.close()
        await self._answered(sent, {place: task for place, task in sent.tasks.items() if task in done})

    async def _send_apart(
        self, batches: Mapping[Place, Sequence[Waiting]], leases: Mapping[int, Lease], drain: Drain
    ) -> None:
        """Send to partitions that had trouble, by a carrier of their own and without waiting."""
        sent = _Round(await self._broker.carrier(), leases, batches)
        for place in batches:
            self._places[place].again_at = math.inf
        sent.begin(self._spans)
        self._in_background(sent.end(), sent, drain)

    def _in_background(self, work: Coroutine[Any, Any, None], sent: _Round | None, drain: Drain) -> None:
        task: asyncio.Task[None] = spawn(work, name="events.relay.background")
        self._background[task] = sent
        task.add_done_callback(lambda _: drain.wake())

    async def _answers(self) -> None:
        """What became of the batches that went on in the background."""
        for task in [task for task in self._background if task.done()]:
            sent = self._background[task]
            if sent is not None:  # once more where the database was away: what is noted twice is noted once
                await self._answered(sent, sent.tasks)
            del self._background[task]
            if not task.cancelled():
                task.result()

    async def _answered(self, sent: _Round, tasks: Mapping[Place, asyncio.Task[None]]) -> None:
        """Delete what was confirmed; note what was not."""
        confirmed: list[Waiting] = []
        for place, task in tasks.items():
            error = TimeoutError("no answer within the time") if task.cancelled() else task.exception()
            rows = sent.rows[place]
            if error is None:
                confirmed.extend(rows)
                trouble = self._places.get(place)
                if trouble is not None and trouble.aside:  # more of it may wait there
                    trouble.again_at, trouble.pause = self._clock.monotonic(), _BACKOFF_SECONDS[0] / 2
                else:
                    self._places.pop(place, None)
            elif isinstance(error, Refused):
                text = (
                    "an event for %s is refused by the broker for good and put aside, see `mainstay events refused`: %s"
                )
                _log.error(text, place, error)
                await self._lanes.write(sent.leases, rows[:1], partial(self.rows.refuse, str(error)))
                self._most_bytes.pop(place.topic, None)  # it was divided to find this one
                self._at_once(place)
            elif isinstance(error, TooLarge):
                size = sum(row.event.size + _RECORD_BYTES for row in rows)
                self._most_bytes[place.topic] = size // 2
                self._at_once(place)
            else:
                trouble = self._places.setdefault(place, _Trouble(self._clock.monotonic()))
                self._broker.forget(place.topic)
                self._waits.again(str(place), trouble, error)
        if confirmed:
            await self._lanes.write(sent.leases, confirmed, self.rows.delete)
            RELAYED.inc(len(confirmed))

    def _at_once(self, place: Place) -> None:
        if place in self._places:
            self._places[place].again_at = self._clock.monotonic()

    async def _refuse_unreadable(self, leases: Mapping[int, Lease]) -> None:
        """What is no event goes out of the way of those behind it."""
        for row in self.rows.unreadable:
            text = "an event for topic %s cannot be read and is put aside, see `mainstay events refused`: %s"
            _log.error(text, row.topic, row.why)
            await self._lanes.write(leases, [row], partial(self.rows.refuse, row.why))

    # Rows that are put aside

    async def _put_aside(self, waiting: Mapping[Place, Sequence[Waiting]], leases: Mapping[int, Lease]) -> None:
        """Most of a full page cannot be sent, and those behind it are not seen: mark it, so that it is read past."""
        for place, rows in waiting.items():
            if place in self._places:
                self._places[place].aside = True
                mine = [row for row in rows if row.lane in leases]
                await self._lanes.write(leases, mine, partial(self.rows.put_aside, place.partition))

    async def _find_aside(self) -> None:
        """What a predecessor has put aside in the lanes that are new here."""
        now = self._clock.monotonic()
        for topic, partition in await self.rows.places_aside(self._lanes.held()):
            trouble = self._places.setdefault(Place(topic, partition), _Trouble(now, again_at=now))
            trouble.aside = True

    # Seen from outside

    async def health(self) -> Health:
        """Degraded while events wait for a broker, a topic or a partition that takes none, or for a person."""
        now = self._clock.monotonic()
        troubles = [(f"topic {name}", trouble) for name, trouble in self._topics.waiting.items()]
        troubles += [(str(place), trouble) for place, trouble in self._places.items()]
        said = [f"{what}: {each.what}, for {now - each.since:.0f} s" for what, each in troubles if each.since < now - 1]
        if self._failing_since is not None:
            said.insert(0, f"not relayed for {now - self._failing_since:.0f} s: {self._what_fails}")
        if self.rows.refused:
            said.append(f"{self.rows.refused} events were refused, see `mainstay events refused`")
        if said:
            return Health("degraded", f"the outbox: {'; '.join(said[:_NAMED])}{'; …' if len(said) > _NAMED else ''}")
        return Health("ok", f"{self.rows.depth} events wait in the outbox")


def _divided(
    carrier: Carrier,
    rows: Sequence[Waiting],
    widths: Mapping[str, int],
    troubles: Mapping[Place, _Trouble],
    most_bytes: Mapping[str, int],
) -> _Batches:
    """Rows by partition, of the topics whose number of partitions is known."""
    found = _Batches({}, {})
    sizes: dict[Place, int] = {}
    for row in rows:
        event = row.event
        if event.topic not in widths:
            continue
        place = Place(event.topic, carrier.place(event, widths[event.topic]))
        trouble = troubles.get(place)
        if trouble is not None:
            found.waiting.setdefault(place, []).append(row)
        if trouble is not None and trouble.aside:
            continue  # behind those that were put aside
        size = sizes.get(place, 0) + event.size + _RECORD_BYTES
        batch = found.batches.setdefault(place, [])
        # The rest of a full one waits for the next wave, also where it is small, or it would overtake.
        sizes[place] = size if not batch or size <= most_bytes.get(event.topic, BATCH_BYTES) else sys.maxsize
        if sizes[place] < sys.maxsize:
            batch.append(row)
    return found
