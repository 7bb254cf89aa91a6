"""Identifiers: time-ordered ones for new things, derived ones for things that must be the same on every replay.

Those that applications choose follow one rule everywhere, because they do not stay where they are given: the id of a
run is the cause in the headers of what it publishes, a part of the key that a step hands to a provider, a field of a
log line. The rule is that of the narrowest of those places, and it is applied where the id comes in.
"""

from __future__ import annotations

import os
import re
import threading
import time
from typing import cast
from uuid import UUID, uuid5

__all__ = ["ID_RULE", "checked_id", "derived_id", "is_id", "uuid7"]

ID_RULE = "ASCII letters, digits and . _ : @ / + = -"
"""The characters that an identifier may have, for messages."""

_LONGEST_ID = 128
_ID = re.compile(r"[A-Za-z0-9._:@/+=-]+", re.ASCII)
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


def is_id(value: object, *, longest: int = _LONGEST_ID) -> bool:
    """Whether `value` is an identifier: a `str` of 1 to `longest` characters, all of them of `ID_RULE`."""
    return isinstance(value, str) and len(value) <= longest and _ID.fullmatch(value) is not None


def checked_id(value: str, what: str, *, longest: int = _LONGEST_ID) -> str:
    """Return an identifier, or say why it is none.

    Args:
        value: what was given as one.
        what: what it names, for the message: "the id of a run".
        longest: how many characters it may have.

    Raises:
        TypeError: it is no `str`.
        ValueError: it breaks the rule, which the message names.
    """
    if is_id(value, longest=longest):
        return str.__str__(value)  # of a subclass, such as a member of an enum, its plain text
    if not isinstance(cast("object", value), str):
        msg = f"{what} is text (str), not {value!a:.80} ({type(value).__name__})"
        raise TypeError(msg)
    said = f"{len(value)} characters" if len(value) > longest else ascii(value)
    msg = f"{what} is 1 to {longest} {ID_RULE}, not {said}"
    raise ValueError(msg)
