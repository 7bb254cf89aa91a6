"""Working on the queues of parked keys: in order, each key by itself, by a process that has claimed it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from functools import partial
from typing import Any
from uuid import UUID

from mainstay.core import Clock, spawn
from mainstay.events._crashes import Crashes, Turn
from mainstay.events._delivery import Assignment, Delivery
from mainstay.events._dispatch import Dispatcher
from mainstay.events._parking import Parking
from mainstay.events._transport import LogRecord
from mainstay.events.errors import ProcessEndedError
from mainstay.events.tables import headers_of

_log = logging.getLogger("mainstay.events")

_POLL_SECONDS = 0.5
_AT_ONCE = 16
"""Keys of a group that a process works on at once."""
_ENDS = 2
"""After so many claims that ended with their process a queue's first event is called while no other suspect is."""
_MARGIN = 0.2
"""Of a lease: how long before the database's end of a claim this process stops believing in it."""


class _Claim:
    """A key that is being worked on."""

    __slots__ = ("queue", "task", "until")

    def __init__(self, queue: Assignment, until: float) -> None:
        self.queue = queue
        self.until = until
        self.task: asyncio.Task[None] | None = None


class Queues:
    """Works on parked keys whose first event this process can handle.

    Args:
        parking: the tables.
        dispatcher: calls the handlers, in their places among all others.
        crashes: how often an event may end its process, None where that is not counted.
        clock: measures how long a claim is certain.
    """

    def __init__(self, parking: Parking, dispatcher: Dispatcher, crashes: Crashes | None, clock: Clock) -> None:
        self._parking = parking
        self._crashes = crashes
        self._dispatcher = dispatcher
        self._clock = clock
        self._claims: dict[UUID, _Claim] = {}
        self._prolong_at = 0.0
        self._has_claimed = False

    @property
    def assignments(self) -> list[Assignment]:
        """The queues that are being worked on."""
        return [claim.queue for claim in self._claims.values()]

    async def run(self) -> None:
        """Claim keys that are due, until cancelled; what has begun goes on."""
        while True:
            more = False
            try:
                await self._parking.pausing.look()
                self._dispatcher.heed(self._parking.pausing)
                more = await self._claim()
            except Exception as error:  # noqa: BLE001  the next look finds the same
                _log.debug("the parked keys are not known", exc_info=error)
            tasks = [claim.task for claim in self._claims.values() if claim.task is not None]
            if more and tasks:
                await asyncio.wait(tasks, timeout=_POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            else:
                await asyncio.sleep(_POLL_SECONDS)

    async def keep(self) -> None:
        """Keep what is claimed from others, until cancelled; beside `run`, which may have to wait for the database."""
        while True:
            await asyncio.sleep(self._parking.lease_seconds / 8)
            held = dict(self._claims)
            if held and self._clock.monotonic() >= self._prolong_at:
                try:
                    await self._prolong(held)
                except Exception as error:  # noqa: BLE001  until the lease is over it is tried again
                    _log.debug("claims of parked keys were not prolonged", exc_info=error)
            await self._give_up()

    def _certain_until(self, asked_at: float) -> float:
        return asked_at + self._parking.lease_seconds * (1 - _MARGIN)

    async def _prolong(self, held: Mapping[UUID, _Claim]) -> None:
        left = min(claim.until for claim in held.values()) - self._clock.monotonic()
        async with asyncio.timeout(max(left, 0.0)):
            until = self._certain_until(await self._parking.prolong(held, self._clock.monotonic))
        self._prolong_at = self._clock.monotonic() + self._parking.lease_seconds / 4
        for claim in held.values():
            claim.until = until

    async def _claim(self) -> bool:
        """Begin what is due; whether there may be more of it."""
        room = _AT_ONCE - len(self._claims)
        if room <= 0:
            return True
        self._has_claimed = True
        claimed, asked_at = await self._parking.claim(room, self._clock.monotonic)
        for row in claimed:
            # One that is here already was discarded by a person and parked anew: the claim ends with the work on it.
            if row.id not in self._claims:
                self._begin(row, self._certain_until(asked_at))
        return len(claimed) == room

    async def _give_up(self) -> None:
        """End the work on keys that others may claim by now."""
        now = self._clock.monotonic()
        lapsed = [claim.queue for claim in self._claims.values() if claim.until <= now]
        if lapsed:
            _log.warning("%d parked keys could not be kept from others in time, who go on with them", len(lapsed))
            await self._dispatcher.cancel(lapsed)

    def _begin(self, row: Any, until: float) -> None:
        queue = Assignment(row.topic, row.partition, queue=row.key)
        claim = self._claims[row.id] = _Claim(queue, until)
        claim.task = spawn(self._work(queue, row.id, row.key), name="events.parked")

        def ended(task: asyncio.Task[None]) -> None:
            del self._claims[row.id]
            if not task.cancelled() and task.exception() is not None:
                _log.debug("a parked key could not be released", exc_info=task.exception())

        claim.task.add_done_callback(ended)

    async def _work(self, queue: Assignment, id: UUID, key: bytes) -> None:
        try:
            if await self._work_off(queue, key):
                return
        except Exception:  # noqa: BLE001  what has not left the queue is handled again
            _log.warning("a parked key of topic %s goes on waiting", queue.topic, exc_info=True)
        await self._parking.release([id])

    async def _work_off(self, queue: Assignment, key: bytes) -> bool:
        """Hand out the events of a queue one after the other; True when the claim has ended with the work."""
        while queue.open:
            row = await self._parking.first(queue.topic, key)
            position = None
            if row is not None:
                position = row.position
                record = LogRecord(
                    row.topic,
                    row.partition,
                    row.offset,
                    row.own_key,
                    row.value,
                    headers_of(row.headers),
                )
                pausing = self._parking.pausing
                if pausing.whole or pausing.of(record.key, row.kind) or await self._is_others(row.kind):
                    return False
                delivery = await self._called(queue, record, row)
                if delivery.kept or not delivery.done:
                    return delivery.kept
            if await self._parking.finished(queue.topic, key, position):
                return True
        return False

    async def _is_others(self, kind: str) -> bool:
        handled = self._parking.handled
        if kind in handled.mine:
            return False
        handled.fetched()  # it may have been forgotten
        return await handled.is_somebodys(kind)

    async def _called(self, queue: Assignment, record: LogRecord, row: Any) -> Delivery:
        """Have the first event of a queue called, alone where processes that did so before have ended."""
        if self._crashes is None or row.begun <= _ENDS:
            return await self._ended(queue, self._hand_out(queue, record, row))
        refused = ProcessEndedError(row.crashes) if row.crashes >= self._crashes.most else None
        with self._crashes.turn(self._clock) as turn:
            return await self._ended(queue, self._hand_out(queue, record, row, refused, turn=turn), turn)

    async def _note_crash(self, queue: Assignment, key: bytes) -> None:
        """Note that an event is called now, by a process that may end of it; until that is durable it waits."""
        while queue.open:
            try:
                await self._parking.may_crash(queue.topic, key)
            except Exception as error:  # noqa: BLE001  the database comes back, or the claim ends
                _log.debug("the call of a parked event cannot be noted, and waits", exc_info=error)
                await self._dispatcher.progress(_POLL_SECONDS)
            else:
                return

    async def _ended(self, queue: Assignment, delivery: Delivery, turn: Turn | None = None) -> Delivery:
        while queue.window and queue.open:
            if turn is not None:
                turn.yield_if_long()
            await self._dispatcher.progress(1.0)
        return delivery

    def _hand_out(
        self,
        queue: Assignment,
        record: LogRecord,
        row: Any,
        refused: ProcessEndedError | None = None,
        *,
        turn: Turn | None = None,
    ) -> Delivery:
        delivery = Delivery(queue, record)
        delivery.attempt, delivery.postponed, delivery.waited = row.attempt, row.postponed, row.waited_seconds
        delivery.later = row.later
        if row.attempt + row.postponed > 1:  # while an event waits for its first call it does not fail
            delivery.aged = row.age
        delivery.refused = refused
        if turn is not None:
            delivery.before_call = partial(turn.begin, partial(self._note_crash, queue, row.key))
        self._dispatcher.feed_one(delivery)
        return delivery

    async def settle(self, seconds: float) -> None:
        """Wait until what was handled has left its queue; the calls have ended."""
        tasks = [claim.task for claim in self._claims.values() if claim.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)

    async def stop(self) -> None:
        """Cancel what still runs, and let others have its keys."""
        tasks = [claim.task for claim in self._claims.values() if claim.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._has_claimed:
            try:
                async with asyncio.timeout(self._parking.lease_seconds / 4):
                    await self._parking.release_all()
            except Exception as error:  # noqa: BLE001  the claims end by themselves
                _log.debug("parked keys were not released", exc_info=error)
