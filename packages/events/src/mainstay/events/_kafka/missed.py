"""Records that were gone before a group read them: counted, and told."""

from __future__ import annotations

import logging

from mainstay.events._metrics import MISSED

_log = logging.getLogger("mainstay.events")


def pass_over(group: str, topic: str, partition: int, *, offset: int, oldest: int) -> None:
    """Tell that a group was to go on at an offset that is gone, and goes on with the oldest record that is there."""
    missed = max(0, oldest - offset)
    MISSED.labels(group).inc(missed)
    why = f"{missed} records were deleted before they were read" if missed else "the topic was made anew"
    _log.error(
        "group %s was to go on at %d in %s/%d, which begins at %d: %s", group, offset, topic, partition, oldest, why
    )
