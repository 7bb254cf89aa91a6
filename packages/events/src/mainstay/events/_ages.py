"""How old is what a group has in hand: its calls, and its events that failed. While the group is paused none ages."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from mainstay.core import Clock
from mainstay.events._delivery import Assignment, Delivery
from mainstay.events._places import Caller


class Ages:
    """The ages of what one dispatcher has in hand.

    Args:
        callers: its callers.
        failing: the events that failed and have not ended.
        clock: measures.
    """

    def __init__(self, callers: Collection[Caller], failing: Collection[Delivery], clock: Clock) -> None:
        self._callers = callers
        self._failing = failing
        self._clock = clock
        self._held_at: float | None = None

    def hold(self, held: bool) -> None:  # noqa: FBT001  a state
        """Let what failed grow no older while the group is paused."""
        now = self._clock.monotonic()
        if not held and self._held_at is not None:
            for each in self._failing:
                each.began_at = None if each.began_at is None else each.began_at + now - self._held_at
        self._held_at = (now if self._held_at is None else self._held_at) if held else None

    def of(self, assignments: Iterable[Assignment]) -> list[tuple[Caller | Delivery, float]]:
        """Of each call, and of each event that failed, the seconds since its first call. What only waits has no age."""
        mine, now = set(assignments), self._clock.monotonic()
        those: list[Caller | Delivery] = [*self._callers, *(self._failing if self._held_at is None else ())]
        return [(one, now - one.began_at) for one in those if one.began_at is not None and one.assignment in mine]

    def oldest_seconds(self, assignments: Iterable[Assignment]) -> float:
        """How long ago the first call of an event began that is not finished, 0.0 without one."""
        return max((age for _, age in self.of(assignments)), default=0.0)
