"""Log lines that are spared: an outage fails every event alike, and says so once a minute."""

from __future__ import annotations

from mainstay.core import Clock

_SECONDS = 60.0


def said(error: BaseException) -> str:
    """An error in one line: its type, and what it says if it says anything."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


class Sparing:
    """What was said lately, by kind.

    Args:
        clock: measures the minute.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._said_at: dict[str, float] = {}
        self._left_out: dict[str, int] = {}

    def due(self, kind: str) -> int | None:
        """How many lines of this kind were left out since the last one; None where this one is left out, too."""
        now = self._clock.monotonic()
        if now - self._said_at.get(kind, float("-inf")) < _SECONDS:
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return None
        self._said_at[kind] = now
        return self._left_out.pop(kind, 0)
