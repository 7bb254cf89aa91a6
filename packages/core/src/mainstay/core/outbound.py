"""What one service tells another with a call: the context of the work, and how long its result is waited for.

Both cross HTTP here and nowhere else, so that both sides agree. The deadline goes as the seconds that remain, since the
clocks of two machines differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mainstay.core.context import current
from mainstay.core.deadline import remaining_seconds

__all__ = ["DEADLINE_HEADER", "deadline_seconds_of", "outbound_headers"]

DEADLINE_HEADER = "x-deadline-seconds"
"""Seconds, with up to six digits after the point, that the caller still waits."""

_SECONDS = re.compile(r"[0-9]{1,6}(?:\.[0-9]{1,6})?", re.ASCII)


def outbound_headers() -> dict[str, str]:
    """HTTP headers (lower case) for a call to another service of ours, as of this moment.

    Correlation id, causation id, actor, tenant and trace context of `current()`, and the seconds that remain of the
    deadline, 0 of one that has passed. Not for strangers: they learn who acts and for whom.
    """
    headers = current().to_headers()
    remaining = remaining_seconds()
    if remaining is not None:
        headers[DEADLINE_HEADER] = f"{min(max(remaining, 0.0), 999_999.0):.3f}"
    return headers


def deadline_seconds_of(headers: Mapping[str, str]) -> float | None:
    """How many seconds a caller still waits, by its headers (lower case); None if they say nothing well-formed.

    Believe it of a service of ours only: a stranger could have work broken off at any point of it.
    """
    value = headers.get(DEADLINE_HEADER)
    return float(value) if value is not None and _SECONDS.fullmatch(value) else None
