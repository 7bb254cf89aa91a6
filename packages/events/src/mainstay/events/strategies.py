"""What becomes of an event that keeps failing: the values of `on(…, on_failure=…)`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

__all__ = ["RetryLater"]

Fate = Literal["park", "dead-letter", "skip", "stop"]


@dataclass(frozen=True, slots=True)
class RetryLater:
    """Set an event that keeps failing aside, go on with what follows of its key, and try it again later.

    The event waits in the Database, by whose clock it is called again after each of the delays, in the same group only.
    When the call after the last delay has failed, or an error says that another attempt is no use, it becomes a dead
    letter. Order is given up: what follows of its key is handled before it.

    Args:
        delays_seconds: how long the event waits before each further call, in seconds.

    Raises:
        ValueError: there is no delay, or one of them is no positive, finite number.
    """

    delays_seconds: Sequence[float] = (60.0, 600.0, 3600.0)

    def __post_init__(self) -> None:
        delays = cast("object", self.delays_seconds)  # callers may be unchecked
        given = cast("Sequence[object]", delays) if isinstance(delays, Sequence) else ()
        if not given or not all(map(_is_delay, given)):
            msg = f"RetryLater(delays_seconds={delays!r}): one positive number of seconds or more, such as (60, 600)"
            raise ValueError(msg)
        object.__setattr__(self, "delays_seconds", tuple(map(float, self.delays_seconds)))


def _is_delay(delay: object) -> bool:
    return isinstance(delay, int | float) and not isinstance(delay, bool) and 0.0 < delay < math.inf


OnFailure = Fate | RetryLater
