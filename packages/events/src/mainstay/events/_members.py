"""JSON of others without a loss: the members of an object as they are written, and numbers that a float would round.

Reading a number and writing it again goes through a float, which keeps 17 digits, and so does a number on its way into
a `Decimal`, by pydantic. Our own amounts are text in JSON; those of others may be numbers.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal, InvalidOperation
from typing import cast

from mainstay.events.errors import DecodeError

# A string that does not end is all that is left: it is looked at once, not again from each quote in it.
_LONG = re.compile(r"[0-9][0-9.]{15}")
_STRING_OR_NUMBER = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)|-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?', re.DOTALL)
_SPACE = re.compile(r"[ \t\n\r]*")
_parse = json.JSONDecoder().raw_decode


def exact(text: str) -> str:
    """The same JSON, in which numbers that a float cannot hold are texts, so that a `Decimal` is what was written."""
    return text if _LONG.search(text) is None else _STRING_OR_NUMBER.sub(_as_text_if_long, text)


def _as_text_if_long(found: re.Match[str]) -> str:
    written = found[0]
    if written.startswith('"') or written.lstrip("-").isdecimal():  # a whole number is read as it is
        return written
    return f'"{written}"' if rounded(written) else written


def rounded(written: str) -> bool:
    """Whether a float holds another number than the one that is written."""
    try:
        return Decimal(repr(float(written))) != Decimal(written)
    except InvalidOperation:  # an exponent that not even a Decimal has
        return True


def members(text: str) -> dict[str, str]:
    """The members of a JSON object, each as it is written, digit for digit: an amount is not rounded on its way.

    Raises:
        DecodeError: it is none.
    """
    try:
        return _members(text)
    except (ValueError, IndexError, RecursionError):
        msg = "the value is no JSON object"
        raise DecodeError(msg) from None


def _members(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    at = _behind(text, _after_space(text, 0), "{")
    at = _after_space(text, at)
    if text[at] != "}":
        while True:
            name, at = cast("tuple[object, int]", _parse(text, at))
            if not isinstance(name, str):
                raise ValueError  # noqa: TRY004  as all that is wrong with it
            begin = _after_space(text, _behind(text, _after_space(text, at), ":"))
            _, end = cast("tuple[object, int]", _parse(text, begin))
            found[name] = text[begin:end]
            at = _after_space(text, end)
            if text[at] == "}":
                break
            at = _after_space(text, _behind(text, at, ","))
    if _after_space(text, at + 1) != len(text):
        raise ValueError
    return found


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return at if match is None else match.end()


def _behind(text: str, at: int, sign: str) -> int:
    if text[at] != sign:
        raise ValueError
    return at + 1
