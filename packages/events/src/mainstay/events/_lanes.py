"""The lanes of the outbox that this process relays: each has one relay at a time, which holds its lease."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

from mainstay.core import Clock
from mainstay.database import Database, Fence, FenceLost, Lease
from mainstay.events._outbox import LANES

_log = logging.getLogger("mainstay.events")

SHORTEST_SECONDS = 0.5
"""Less is left of a lease: then nothing more is begun under it."""

Write = Callable[[Sequence[Any], Fence], Awaitable[None]]


class Lanes:
    """The lanes that this process relays."""

    def __init__(self, database: Database, lease_seconds: float, clock: Clock) -> None:
        self._database = database
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._leases: dict[int, Lease] = {}
        self._at = -math.inf

    def held(self) -> dict[int, Lease]:
        """Those whose lease holds for long enough to send."""
        return {lane: lease for lane, lease in self._leases.items() if lease.remaining_seconds > SHORTEST_SECONDS}

    async def take(self) -> bool:
        """Take those that are free, now and then; whether there are new ones."""
        for lane in [lane for lane, lease in self._leases.items() if not lease.held]:
            await self._drop(lane)
        now = self._clock.monotonic()
        if len(self._leases) == LANES or now < self._at:
            return False
        self._at = now + self._lease_seconds / 4
        before = len(self._leases)
        for lane in range(LANES):
            if lane not in self._leases:
                lease = await self._database.lease(f"events/outbox/{lane}", seconds=self._lease_seconds)
                if lease is not None:
                    self._leases[lane] = lease
        return len(self._leases) > before

    async def write(self, leases: Mapping[int, Lease], rows: Iterable[Any], write: Write) -> None:
        """Write to rows, those of each lane under the fence of the lease by which they were read."""
        by_lane: dict[int, list[Any]] = {}
        for row in rows:
            by_lane.setdefault(row.lane, []).append(row)
        for lane, some in by_lane.items():
            try:
                await write(some, leases[lane].fence)
            except FenceLost:  # its new owner sends these again
                _log.warning("lane %d of the outbox belongs to another process now", lane)
                await self._drop(lane)

    async def _drop(self, lane: int) -> None:
        """Let a lane go. Without the release it would be renewed for ever, for a relay that no longer thinks of it."""
        if lane in self._leases:
            await self._leases.pop(lane).release()

    async def release(self) -> None:
        """Let all go."""
        for lane in list(self._leases):
            await self._drop(lane)
