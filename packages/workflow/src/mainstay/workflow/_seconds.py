"""Lengths of time and moments as callers give them, refused where they are given: `nan` seconds end nowhere."""

from __future__ import annotations

from datetime import datetime
from math import isfinite

_LONG = 40


def is_seconds(value: object) -> bool:
    """Whether it is a length of time: a finite number, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return isfinite(value) and value >= 0
    except OverflowError:  # larger than a float
        return False


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
        shown = f"{seconds!r}"
    except ValueError:  # too long for a text
        shown = ""
    if not is_seconds(seconds) or (seconds == 0 and not zero):
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
