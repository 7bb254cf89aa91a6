"""Events at which partitions of a group have stopped: they stay where they are, and are tried again and again."""

from __future__ import annotations

import logging
from collections.abc import Collection
from datetime import timedelta

from mainstay.core import Clock
from mainstay.events._delivery import Assignment, Delivery
from mainstay.events._metrics import STOPPED
from mainstay.events._sparing import Sparing, said

_log = logging.getLogger("mainstay.events")

SHORTEST_SECONDS = 5.0
"""The shortest wait before an event at which its partition has stopped is tried again."""
_SAID = 200
"""Characters of a key and of an error in the health."""


class Stops:
    """Where a group has stopped, in this process.

    Args:
        group: the consumer group.
        sparing: says what was said lately.
        clock: says since when.
    """

    def __init__(self, group: str, sparing: Sparing, clock: Clock) -> None:
        self._group = group
        self._sparing = sparing
        self._clock = clock
        self._known: dict[Delivery, str] = {}
        self._gauge = STOPPED.labels(group)
        self._gauge.set(0)

    def __len__(self) -> int:
        return len(self._known)

    def at(self, delivery: Delivery, kind: str, error: Exception, age_seconds: float) -> None:
        """Note that a partition has stopped at an event of a kind, which has been failing for so long."""
        name, key = delivery.record_name, delivery.record.key
        if self._sparing.due(f"stops {kind} {type(error).__name__}") is not None:
            _log.error("group %s has stopped at %s (%s), and goes on trying", self._group, name, kind, exc_info=error)
        since = self._clock.now() - timedelta(seconds=age_seconds)
        shown = "none" if key is None else repr(key.decode(errors="replace"))[:_SAID]
        why = said(error)[:_SAID].encode(errors="replace").decode()
        self._known[delivery] = f"{name} ({kind}, key {shown}, since {since:%Y-%m-%d %H:%M:%S} UTC): {why}"
        self._gauge.set(len(self._known))

    def ended(self, delivery: Delivery) -> None:
        """Note that an event is handled or dealt with, or that another process has its partition."""
        if self._known.pop(delivery, None) is not None:
            self._gauge.set(len(self._known))

    def said(self, assignments: Collection[Assignment]) -> str | None:
        """Where partitions of these have stopped, and why; None where none has."""
        found = [why for delivery, why in self._known.items() if delivery.assignment in assignments]
        return f"it has stopped at {' and at '.join(found[:3])}" if found else None
