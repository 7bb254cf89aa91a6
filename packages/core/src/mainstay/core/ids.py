"""Identifiers: time-ordered ones for new things, derived ones for things that must be the same on every replay."""

from __future__ import annotations

import os
import threading
import time
from uuid import UUID, uuid5

__all__ = ["derived_id", "uuid7"]

_NAMESPACE = UUID("6f3c1d52-7a04-5c0e-9d4b-2d0f6a1b8e77")
_lock = threading.Lock()
_last = 0


def uuid7() -> UUID:
    """A new UUIDv7 (RFC 9562, section 5.7): sorts by creation time, also within one millisecond of one process.

    The 12 bits after the millisecond hold its fraction (method 3 of section 6.2); where the clock stands still or steps
    back, the last value plus one is used, so that ids of a process never go backwards. Safe to call from any thread.
    """
    global _last  # noqa: PLW0603  the one counter of the process is the point
    nanoseconds = time.time_ns()
    ticks = (nanoseconds // 1_000_000) << 12 | (nanoseconds % 1_000_000) * 4096 // 1_000_000
    with _lock:
        _last = ticks = max(ticks, _last + 1)
    high = (ticks >> 12) << 16 | 0x7000 | ticks & 0xFFF
    low = 0x8000_0000_0000_0000 | int.from_bytes(os.urandom(8), "big") >> 2
    return UUID(int=high << 64 | low)


def derived_id(key: str) -> UUID:
    """The id (UUIDv5) that belongs to `key`, the same in every process and on every replay."""
    return uuid5(_NAMESPACE, key)
