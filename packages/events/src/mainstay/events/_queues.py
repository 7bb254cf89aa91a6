"""Working on the queues of parked keys: in order, each key by itself, by the process that holds its partition."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable
from typing import Any

from mainstay.core import spawn
from mainstay.events._delivery import Assignment, Delivery
from mainstay.events._dispatch import Dispatcher
from mainstay.events._parking import Parking
from mainstay.events._transport import LogRecord
from mainstay.events.tables import unpack_headers

_log = logging.getLogger("mainstay.events")

_POLL_SECONDS = 0.5
_AT_ONCE = 16
"""Keys of a group that a process works on at once."""


class Queues:
    """Works on the parked keys of the partitions that a consumer holds.

    Args:
        parking: the tables.
        dispatcher: calls the handlers, in their places among all others.
        held: the partitions, at any time.
    """

    def __init__(self, parking: Parking, dispatcher: Dispatcher, held: Collection[Assignment]) -> None:
        self._parking = parking
        self._dispatcher = dispatcher
        self._held = held
        self._tasks: dict[Assignment, asyncio.Task[None]] = {}
        self._keys: set[tuple[str, bytes]] = set()

    async def run(self) -> None:
        """Look for keys that are due, until cancelled; what has begun goes on."""
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            try:
                due = await self._parking.due()
            except Exception as error:  # noqa: BLE001  the next look finds the same
                _log.debug("the parked keys are not known", exc_info=error)
                continue
            places = {(held.topic, held.number): held for held in self._held if held.open}
            for row in due:
                assignment = places.get((row.topic, row.partition))
                if assignment is not None and (row.topic, row.key) not in self._keys and len(self._keys) < _AT_ONCE:
                    self._begin(assignment, row.topic, row.key)

    def _begin(self, assignment: Assignment, topic: str, key: bytes) -> None:
        queue = Assignment(topic, assignment.number, queue=True)
        assignment.queues.add(queue)
        self._keys.add((topic, key))
        task = self._tasks[queue] = spawn(self._work(assignment, queue, key), name="events.parked")

        def ended(task: asyncio.Task[None]) -> None:
            assignment.queues.discard(queue)
            self._keys.discard((topic, key))
            del self._tasks[queue]
            if not task.cancelled() and task.exception() is not None:
                _log.warning("a parked key of topic %s goes on waiting", topic, exc_info=task.exception())

        task.add_done_callback(ended)

    async def _work(self, assignment: Assignment, queue: Assignment, key: bytes) -> None:
        """Hand out the events of a queue one after the other, until one fails or none is left."""
        while queue.open and assignment.open:
            row = await self._parking.first(queue.topic, key)
            position = None
            if row is not None:
                position = row.position
                delivery = self._delivery(queue, row)
                while queue.window and queue.open:
                    await self._dispatcher.progress(1.0)
                if delivery.kept or not delivery.done:
                    return
            if await self._parking.finished(queue.topic, key, position):
                assignment.parked.discard(key)
                return

    def _delivery(self, queue: Assignment, row: Any) -> Delivery:
        headers = unpack_headers(row.headers)
        record = LogRecord(row.topic, row.partition, row.offset, row.key, row.value, headers)
        self._dispatcher.feed(queue, [record])
        delivery = queue.window[0]
        delivery.attempt, delivery.postponed, delivery.waited = row.attempt, row.postponed, row.waited_seconds
        delivery.aged = row.age
        return delivery

    async def settle(self, assignments: Iterable[Assignment], seconds: float) -> None:
        """Wait until what was handled has left its queue; their calls have ended."""
        tasks = [self._tasks[queue] for held in assignments for queue in held.queues if queue in self._tasks]
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)

    async def stop(self) -> None:
        """Cancel what still runs."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
