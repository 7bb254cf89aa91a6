"""A consumer group in this process: fetches, dispatches, commits what is finished, gives partitions back."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Collection, Sequence

from mainstay.core import Clock, Drain, Health, spawn
from mainstay.events._crashes import Crashes
from mainstay.events._delivery import Assignment, Delivery, note_sizes
from mainstay.events._dispatch import Dispatcher
from mainstay.events._failure import Failures
from mainstay.events._in_hand import InHand
from mainstay.events._intake import Intake
from mainstay.events._lag import Gauges, Lag
from mainstay.events._metrics import DEAD_LETTERS, REVOKED
from mainstay.events._parking import ParkedCount, Parking
from mainstay.events._queues import Queues
from mainstay.events._routes import Routes
from mainstay.events._sparing import Sparing, said
from mainstay.events._transport import Source, Transport
from mainstay.events.dead_letters import DeadLetterStore

_log = logging.getLogger("mainstay.events")

_WINDOW = 1000
"""Records of one partition that may be handed out and not committed: bounds memory, and what a kill repeats."""
_COMMIT_SECONDS = 0.25
_RECONNECT_SECONDS = (0.2, 5.0)
_CLOSING_SECONDS = 5.0


class Consumer:
    """One group's worker.

    Args:
        group: its name.
        topics: what it reads.
        routes: what it does with each type.
        transport: where it reads.
        dead_letters: where what cannot be handled goes.
        parking: the group's parked keys, None without a Database.
        crashes: how the holders of partitions ended, None without a Database.
        in_hand: where it is noted what is in hand for long, None without a Database.
        concurrency: the most handlers at once.
        window_bytes: about how much of the topics is in memory at once.
        drain_seconds: how long handlers may finish when a partition moves away.
        stuck_seconds: from which age of the oldest event in flight the health is degraded.
        clock: measures ages and waits.
    """

    def __init__(
        self,
        group: str,
        topics: Sequence[str],
        routes: Routes,
        *,
        transport: Transport,
        dead_letters: DeadLetterStore,
        parking: Parking | None,
        crashes: Crashes | None,
        in_hand: InHand | None,
        concurrency: int,
        window_bytes: int,
        drain_seconds: float,
        stuck_seconds: float,
        clock: Clock,
    ) -> None:
        self.group = group
        self._topics = topics
        self._routes = routes
        self._transport = transport
        self._dead_letters = dead_letters
        self._parking = parking
        self._crashes = crashes
        self._in_hand = in_hand
        self._concurrency = concurrency
        self._window_bytes = window_bytes
        self._drain_seconds = drain_seconds
        self._stuck_seconds = stuck_seconds
        self._clock = clock
        self._assignments: dict[Assignment, None] = {}
        self._queues: Queues | None = None
        self._source: Source | None = None
        self._dispatcher = self._new_dispatcher()
        self._intake = self._new_intake()
        self._committing = asyncio.Lock()
        self._trouble: str | None = None
        self._parked = None if parking is None else ParkedCount(parking, group, stuck_seconds)
        self._serving = False

    def _new_dispatcher(self) -> Dispatcher:
        self._failures = failures = Failures(
            self.group,
            bury=self._bury,
            commit=lambda assignment: self._commit((assignment,)),
            parking=self._parking,
            unknown=self._routes.unknown,
            spans=self._routes.spans,
            decoders=self._routes.decoders,
            clock=self._clock,
        )
        return Dispatcher(self.group, self._routes, concurrency=self._concurrency, failures=failures, clock=self._clock)

    def _new_intake(self) -> Intake:
        return Intake(
            self.group, self._dispatcher, parking=self._parking, crashes=self._crashes, window=_WINDOW,
            clock=self._clock,
        )  # fmt: skip

    async def serve(self, drain: Drain) -> None:
        """Consume until the drain begins, whatever happens to the transport; then finish what is in flight."""
        self._serving = True
        first, longest = _RECONNECT_SECONDS
        delay, sparing = first, Sparing(self._clock)
        try:
            while not drain.begun:
                began_at = self._clock.monotonic()
                try:
                    await self._session(drain)
                except Exception as error:  # noqa: BLE001  a transport that is away comes back
                    self._dispatcher.check()
                    self._trouble = said(error)
                    if self._clock.monotonic() - began_at > longest:  # it was there meanwhile
                        delay = first
                    if sparing.due(self._trouble) is not None:
                        _log.warning("group %s lost its transport, again in %.1f s", self.group, delay, exc_info=error)
                    await drain.pause(delay)
                    delay = min(delay * 2, longest)
        finally:
            self._serving = False

    async def _session(self, drain: Drain) -> None:
        self._dispatcher = dispatcher = self._new_dispatcher()
        self._intake = self._new_intake()
        self._assignments.clear()
        try:
            async with self._transport.source(self.group, self._topics, self, self._routes.start) as source:
                self._source = source
                beside = [spawn(self._commit_often(), name=f"events.{self.group}.commit")]
                if self._parking is not None and self._parked is not None:
                    self._queues = Queues(self._parking, dispatcher, self._crashes, self._clock)
                    beside.append(spawn(self._queues.run(), name=f"events.{self.group}.parked"))
                    beside.append(spawn(self._queues.keep(), name=f"events.{self.group}.claims"))
                    beside.append(spawn(self._parked.run(), name=f"events.{self.group}.parked keys"))
                if self._in_hand is not None:
                    noting = self._in_hand.run(dispatcher, self._all, drain)
                    beside.append(spawn(noting, name=f"events.{self.group}.in hand"))
                try:
                    self._trouble = None
                    while not drain.begun:
                        await self._turn(source)
                    await self._intake.give_up(self._intake.held(self._assignments))
                    # What runs is finished before the partitions are given back; the App's own drain time ends this.
                    await self._drain(self._all(), math.inf)
                except Exception:
                    await self._drain(self._all(), self._drain_seconds)
                    raise
                finally:
                    for task in beside:
                        task.cancel()
                    await asyncio.wait(beside)
                    async with asyncio.timeout(_CLOSING_SECONDS + self._drain_seconds):
                        await self._leave()
        finally:
            self._source = None
            await self._intake.stop()
            await dispatcher.stop()
            if self._queues is not None:
                await self._queues.stop()
            self._assignments.clear()

    async def _drain(self, assignments: Collection[Assignment], seconds: float) -> bool:
        """Start nothing more of partitions and of queues, and wait for the calls that run."""
        finished = await self._dispatcher.drain(assignments, seconds)
        if self._queues is not None and any(assignment.queue is not None for assignment in assignments):
            await self._queues.settle(_CLOSING_SECONDS)
        return finished

    async def _turn(self, source: Source) -> None:
        self._dispatcher.check()
        await self._intake.learn()
        share = self._window_bytes // max(1, len(self._assignments))
        ready: list[Assignment] = []
        for assignment in () if self._dispatcher.held else self._assignments:
            waiting = len(assignment.window)
            if waiting >= _WINDOW or (waiting and waiting * assignment.record_bytes >= share):
                self._dispatcher.make_room(assignment, parks=self._parking is not None)
            elif assignment.open and self._intake.takes(assignment):
                ready.append(assignment)
        if not ready and self._assignments:
            await self._dispatcher.progress(_COMMIT_SECONDS)
        fetched = await source.fetch(ready)
        if fetched:
            note_sizes(self._assignments, fetched, share)
            await self._intake.take({each: records for each, records in fetched.items() if each.open})
            await asyncio.sleep(0)  # a fetch from a buffer never gave the handlers a turn

    async def _commit_often(self) -> None:
        gauges = Gauges(self.group)
        failures = 0
        while True:
            await asyncio.sleep(_COMMIT_SECONDS)
            gauges.show(self.lag(), self._oldest_seconds(), self._assignments)
            try:
                await self._commit(list(self._assignments))
                failures = 0
            except Exception as error:  # noqa: BLE001  the next one commits the same and more
                failures += 1
                # Once is normal while partitions move; what is finished stays finished, and the next commit says so.
                level = logging.WARNING if failures in {10, 100, 1000} else logging.DEBUG
                _log.log(level, "group %s could not commit, %d times in a row", self.group, failures, exc_info=error)

    async def _commit(self, assignments: Collection[Assignment]) -> None:
        # One at a time: two commits that overtake each other would move the group back.
        async with self._committing:
            finished = {
                assignment: assignment.finished
                for assignment in assignments
                if assignment.finished is not None and assignment in self._assignments
            }
            if not finished or self._source is None:
                return
            async with asyncio.timeout(_CLOSING_SECONDS):  # a revocation waits for the lock that is held here
                await self._source.commit(finished)
            for assignment, record in finished.items():
                if assignment.finished is record:
                    assignment.finished = None

    async def _leave(self) -> None:
        """Before the source closes: what the time allows is finished, and what is finished is committed."""
        left = list(self._assignments)
        try:
            await self._dispatcher.cancel(self._all())
            await self._commit(left)
        finally:
            self._failures.left(left)
            self._assignments.clear()

    async def _bury(self, delivery: Delivery, error: Exception) -> None:
        type_ = self._routes.decoders.type_of(delivery.record)
        await self._dead_letters.add(self.group, delivery.record, error, delivery.attempt, type=type_)
        DEAD_LETTERS.labels(self.group).inc()

    # What the source says

    def assigned(self, topic: str, partition: int) -> Assignment:
        """See `Reader`."""
        assignment = Assignment(topic, partition)
        self._assignments[assignment] = None
        self._intake.assigned(assignment)
        return assignment

    async def revoked(self, assignments: Collection[Assignment]) -> None:
        """See `Reader`: stop intake, drain to a deadline, commit, cancel."""
        mine = [assignment for assignment in assignments if assignment in self._assignments]
        if not mine:
            return
        REVOKED.labels(self.group).inc(len(mine))
        finished = await self._drain(mine, self._drain_seconds)
        try:
            await self._commit(mine)
        except Exception:  # noqa: BLE001  the partitions go all the same; their next owner repeats
            _log.exception("group %s could not commit what it gave up: its next owner will repeat some", self.group)
        finally:
            held = self._intake.held(mine)
            self._forget(mine)
            if not finished:
                await self._dispatcher.cancel(mine)
            await self._intake.give_up(held)

    async def lost(self, assignments: Collection[Assignment]) -> None:
        """See `Reader`."""
        mine = [assignment for assignment in assignments if assignment in self._assignments]
        self._forget(mine)
        await self._dispatcher.cancel(mine)

    def _all(self) -> list[Assignment]:
        """The partitions that are held, and the queues that are worked on."""
        return [*self._assignments, *(self._queues.assignments if self._queues is not None else ())]

    def _forget(self, assignments: Collection[Assignment]) -> None:
        for assignment in assignments:
            self._assignments.pop(assignment, None)
        self._failures.left(assignments)
        self._intake.forget(assignments)

    @property
    def idle(self) -> bool:
        """Whether everything that is known to be there has been handled."""
        source = self._source
        return source is not None and not source.lag() and not any(item.window for item in self._all())

    async def health(self) -> Health:
        """Degraded while the transport is away, or while an event is in flight for too long."""
        if not self._serving:
            return Health("ok", "not serving")
        if self._trouble is not None:
            return Health("degraded", f"group {self.group}: the transport is away ({self._trouble})")
        if self._source is not None and self._source.absent:
            return Health("degraded", f"group {self.group}: {'; '.join(self._source.absent.values())}")
        if self._intake.trouble is not None:
            return Health("degraded", f"group {self.group}: its parked keys are not known ({self._intake.trouble})")
        parked = None if self._parked is None else await self._parked.trouble()
        stopped = None if self._dispatcher.held else self._failures.stops.said(self._assignments)
        wrong = [each for each in (stopped, parked) if each is not None]
        if wrong:
            return Health("degraded", f"group {self.group}: {'; '.join(wrong)}")
        oldest = self._oldest_seconds()
        if oldest > self._stuck_seconds:
            return Health("degraded", f"group {self.group}: an event is in flight for {oldest:.0f} s")
        keys = 0 if self._parked is None else self._parked.keys
        more = [f"{keys} keys parked"] if keys else []
        more += [each for each in (self.paused, self.backlog()) if each is not None]
        return Health("ok", ", ".join([f"group {self.group}: {len(self._assignments)} partitions", *more]))

    def lag(self) -> Lag:
        """How far the group is behind in the partitions that are held here."""
        return Lag.of(self._source, self._assignments, self._intake.waiting)

    @property
    def paused(self) -> str | None:
        """What a person has paused of the group, None where nothing is."""
        return None if self._parking is None else self._parking.pausing.said

    def backlog(self) -> str | None:
        """What to say of a group whose oldest event waits for long: that it has much to do is no fault."""
        return None if self._dispatcher.held else self.lag().said(self._stuck_seconds)

    def _oldest_seconds(self) -> float:
        return self._dispatcher.ages.oldest_seconds(self._all())
