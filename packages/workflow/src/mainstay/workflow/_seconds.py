"""Lengths of time and moments as callers give them, refused where they are given: `nan` seconds end nowhere."""

from __future__ import annotations

from datetime import datetime
from math import isfinite

_LONG = 40


def checked_seconds(what: str, seconds: object, *, zero: bool = True) -> None:
    """Refuse what is no length of time.

    Args:
        what: names it, for messages.
        seconds: an `int` or a `float`.
        zero: 0 is one, too.

    Raises:
        TypeError: it is no number.
        ValueError: it is negative, not finite, or larger than a float.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        msg = f"{what} is a number of seconds, an int or a float, and not {type(seconds).__name__}"
        raise TypeError(msg)
    try:
        is_one = isfinite(seconds) and (seconds > 0 or (zero and seconds == 0))
        shown = f"{seconds!r}"
    except (OverflowError, ValueError):  # larger than a float, or too long for a text
        is_one, shown = False, ""
    if not is_one:
        which = f"{what}={shown}" if len(shown) < _LONG and shown else f"{what} is too large"
        msg = f"{which}: a finite number of seconds, {'0 or more' if zero else 'more than 0'}"
        raise ValueError(msg)


def checked_moment(what: str, moment: object) -> None:
    """Refuse what is no moment.

    Args:
        what: names it, for messages.
        moment: a `datetime` with a time zone.

    Raises:
        TypeError: it is no `datetime`.
        ValueError: it has no time zone.
    """
    if not isinstance(moment, datetime):
        msg = f"{what} is a datetime with a time zone, and not {type(moment).__name__}"
        raise TypeError(msg)
    if moment.utcoffset() is None:
        msg = f"{what} {moment} has no time zone: give it one, as `await flows.now()` has"
        raise ValueError(msg)
