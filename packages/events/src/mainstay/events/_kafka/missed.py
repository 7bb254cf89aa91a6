"""Records that were gone before a group read them: counted once, and told.

They are counted by their offsets, which is the most that they can have been: where a topic is compacted, or written by
transactions, some offsets were no records.

That the group goes on behind them is committed, or each restart would find and count them again: at once where nothing
from before the gap is in hand, else with the last of that.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TypeVar

from mainstay.events._metrics import MISSED

_log = logging.getLogger("mainstay.events")

P = TypeVar("P")


class Missed:
    """What was gone for one group, as this process has told it.

    Args:
        group: its name.
    """

    def __init__(self, group: str) -> None:
        self._group = group
        self._told: dict[tuple[str, int], int] = {}  # up to which offset

    def pass_over(self, topic: str, partition: int, *, offset: int, oldest: int) -> None:
        """Tell that the group was to go on at an offset that is gone, and goes on with the oldest record there is."""
        place = topic, partition
        missed = max(0, oldest - max(offset, self._told.get(place, offset)))
        self._told[place] = oldest
        MISSED.labels(self._group).inc(missed)
        why = "the topic was made anew"
        if offset < oldest:
            why = f"up to {missed} records were deleted before they were read" if missed else "as was told before"
        _log.error(
            "group %s was to go on at %d in %s/%d, which begins at %d: %s",
            self._group, offset, topic, partition, oldest, why,
        )  # fmt: skip


def across(gaps: Mapping[P, tuple[int, int]], place: P, offset: int) -> int:
    """What to commit for all that is before an offset: where a gap begins there, its end."""
    begins, ends = gaps.get(place, (offset, offset))
    return ends if begins == offset else offset
