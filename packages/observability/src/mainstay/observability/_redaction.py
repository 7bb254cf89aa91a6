"""No secret in a line, and no line without end: what a line holds is made into what JSON has, within limits.

Of a mapping, of a model and of a dataclass a line shows what their repr shows, of any other object the repr
itself, which is text like any other; so it shows nothing that `Secrets` has not looked at. An iterator is never
advanced: its items belong to the application, and may have no end.

What users' objects do when they are looked at (raise, change meanwhile) concerns the one value, never the line. A cut
leaves a mark of how much was cut. A text is cut only after its secrets were hidden, or what is left of one would not be
known for one.
"""

from __future__ import annotations

from asyncio import CancelledError
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from ipaddress import IPv4Address, IPv6Address
from itertools import islice
from pathlib import PurePath
from typing import Any, cast
from uuid import UUID

from pydantic import BaseModel

from mainstay.observability._secrets import REDACTED, Secrets, is_card
from mainstay.observability.settings import LogLimits

# What a user's object may raise when it is looked at. An exit and an interrupt come from elsewhere, and go on.
BROKEN = (Exception, CancelledError, GeneratorExit)

_PAIR = 2
# With these nothing can be wrong; asking anything else about a value costs more than all the rest.
_HARMLESS = frozenset({float, bool, type(None), datetime, date, time, timedelta, Decimal, UUID})
_NAME_LENGTH = 256
_BEYOND = 1024  # looked at behind a cut, so that a secret that the cut divides is known for one
_SMALL_INT = 10**12  # below it are neither cards nor numbers that fill a line
_BITS = 1024
_SHORT = 64


class Redactor:
    """Makes values into what may stand in a line.

    Args:
        secrets: what is a secret.
        limits: of what a line may hold.
    """

    def __init__(self, secrets: Secrets, limits: LogLimits) -> None:
        self.secrets = secrets
        self.limits = limits

    def fields(self, event: Mapping[Any, object]) -> dict[Any, Any]:
        """The fields of a line; the caller's own objects stay as they are."""
        look = None
        safe: dict[Any, Any] = {}
        verdicts = self.secrets.verdicts
        items: Iterable[tuple[Any, object]] = event.items()
        if len(event) > self.limits.members:
            items = islice(items, self.limits.members)
        for key, value in items:
            verdict = verdicts.get(key)
            if verdict is None:
                verdict, key = self.secrets.is_key(key), self._name(key)  # noqa: PLW2901  its name in the line
            kind = type(value)
            if verdict:
                safe[key] = REDACTED
            elif kind is str and isinstance(value, str) and len(value) <= _SHORT:
                safe[key] = self.secrets.hide(value)
            elif kind in _HARMLESS or (kind is int and isinstance(value, int) and -_SMALL_INT < value < _SMALL_INT):
                safe[key] = value
            else:
                if look is None:
                    look = _Look(self)
                safe[key] = look.at(value, self.limits.depth)
        if len(event) > self.limits.members:
            safe["[more]"] = len(event) - self.limits.members
        return safe

    def _name(self, key: Any) -> Any:
        if isinstance(key, (str, bytes)):
            text = str.__str__(key) if isinstance(key, str) else key[: _NAME_LENGTH + _BEYOND].decode("latin-1")
            if len(text) <= _NAME_LENGTH:
                return text if text.isidentifier() else self.secrets.hide(text)
            return f"{self.secrets.hide(text[: _NAME_LENGTH + _BEYOND])[:_NAME_LENGTH]}[cut]"
        return key if key is None or isinstance(key, (int, float)) else self.last_resort(key)

    def text(self, text: str) -> str:
        """`text` without secrets, and not longer than a value may be."""
        longest = self.limits.value_chars
        if len(text) <= longest:
            safe = self.secrets.hide(text)
            return safe if len(safe) <= longest else cut(safe, longest)
        safe = self.secrets.hide(text[: longest + _BEYOND])
        return f"{safe[:longest]}[{len(text) - longest} characters cut]"

    def long_text(self, text: str) -> str:
        """As `text`, but cut in the middle: a traceback begins with where, and ends with what."""
        longest = self.limits.value_chars
        if len(text) > 8 * longest:
            text = f"{text[: 4 * longest]}\n[{len(text) - 8 * longest} characters cut]\n{text[-4 * longest :]}"
        safe = self.secrets.hide(text)
        if len(safe) <= longest:
            return safe
        head = longest // 3
        tail = longest - head
        return f"{safe[:head]}\n[{len(safe) - longest} characters cut]\n{safe[-tail:]}"

    def last_resort(self, value: object) -> str:
        """The repr of `value`, or that it has none."""
        try:
            return self.text(repr(value))
        except BROKEN:  # a line with a broken object in it is better than no line
            return f"<{type(value).__name__}, whose repr fails>"


def cut(text: str, longest: int) -> str:
    """`text`, not much longer than `longest`."""
    return text if len(text) <= longest else f"{text[:longest]}[{len(text) - longest} characters cut]"


class _Look:
    """One look at the values of a line: what it may still take."""

    __slots__ = ("_chars", "_members", "_nodes", "_redactor")

    def __init__(self, redactor: Redactor) -> None:
        self._redactor = redactor
        self._members = redactor.limits.members
        self._chars = 2 * redactor.limits.line_chars
        self._nodes = redactor.limits.line_chars // 4

    def at(self, value: object, depth: int) -> Any:
        kind = type(value)
        if kind is str:
            return self._text(cast("str", value))
        if kind is int:
            return _whole(cast("int", value))
        if kind in _HARMLESS:
            return value
        try:
            return self._opened(value, depth)
        except BROKEN:
            return self._redactor.last_resort(value)

    def _text(self, text: str) -> str:
        self._chars -= min(len(text), self._redactor.limits.value_chars)
        if self._chars < 0 and len(text) > _SHORT:
            return f"[{len(text)} characters cut]"
        return self._redactor.text(text)

    def _opened(self, value: Any, depth: int) -> Any:
        pairs = _pairs(value)
        if pairs is None and not isinstance(value, (list, tuple, set, frozenset, deque)):
            return self._leaf(value)
        if depth == 0:
            return "[too deep]"
        if pairs is not None:
            return self._mapped(pairs, len(cast("Any", value)) if isinstance(value, Mapping) else 0, depth)
        return self._listed(cast("Collection[object]", value), depth)

    def _listed(self, value: Collection[object], depth: int) -> list[Any]:
        members = list(islice(value, self._room()))
        if len(members) == _PAIR and isinstance(value, (list, tuple)) and self._redactor.secrets.is_key(members[0]):
            return [self.at(members[0], depth - 1), REDACTED]  # a header
        shown = [self.at(inner, depth - 1) for inner in members]
        if len(value) > len(shown):
            shown.append(f"[{len(value) - len(shown)} more]")
        return shown

    def _mapped(self, pairs: Iterable[tuple[Any, Any]], length: int, depth: int) -> dict[Any, Any]:
        redactor = self._redactor
        members = list(islice(pairs, self._room()))
        shown: dict[Any, Any] = {}
        for key, inner in members:
            name = redactor._name(key)
            shown[name] = REDACTED if redactor.secrets.is_key(key) else self.at(inner, depth - 1)
        if length > len(members):
            shown["[more]"] = length - len(members)
        return shown

    def _room(self) -> int:
        """How many members may be shown of what is opened now."""
        room = min(self._members, max(self._nodes, 0))
        self._nodes -= 1
        return room

    def _leaf(self, value: Any) -> Any:
        self._nodes -= 1
        if isinstance(value, Enum):
            return self.at(value.value, 0)
        if isinstance(value, str):
            return self._text(str.__str__(value))
        if isinstance(value, int):
            return _whole(int(value))
        if isinstance(value, (float, date, time, timedelta, Decimal, UUID)):
            return value
        if isinstance(value, (bytes, bytearray)):
            return self._bytes(value)
        if isinstance(value, (PurePath, IPv4Address, IPv6Address)):
            return self._text(str(value))
        return self._redactor.last_resort(value)

    def _bytes(self, value: bytes | bytearray) -> str:
        longest = self._redactor.limits.value_chars + _BEYOND
        if len(value) <= longest:
            try:
                return self._text(value.decode())
            except UnicodeDecodeError:
                return self._redactor.last_resort(bytes(value))
        shown = self._text(value[:longest].decode(errors="backslashreplace"))
        return f"{shown}[{len(value)} bytes]"


def _whole(value: int) -> Any:
    if -_SMALL_INT < value < _SMALL_INT:
        return value
    if value.bit_length() > _BITS:
        return f"[a number of {value.bit_length()} bits]"
    return REDACTED if is_card(str(value)) else value


def _pairs(value: Any) -> Iterable[tuple[Any, Any]] | None:
    """What has names, with its names; None of anything else."""
    if isinstance(value, Mapping):
        return cast("Mapping[object, object]", value).items()
    if isinstance(value, BaseModel):
        return value.__repr_args__()
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in fields(value) if field.repr]
    if isinstance(value, tuple) and hasattr(cast("object", value), "_fields"):
        return list(zip(cast("Any", value)._fields, cast("tuple[object, ...]", value), strict=True))
    return None


_usual = Redactor(Secrets(), LogLimits())
_active: list[Redactor] = []  # the newest configuration's last


def activate(redactor: Redactor | None) -> None:
    """Let `redact_text` follow this configuration, or none."""
    _active[:] = [] if redactor is None else [redactor]


def active() -> Redactor:
    """The redactor of the configuration that has the loggers; the usual one where none has."""
    return _active[-1] if _active else _usual


def redact_text(text: str) -> str:
    """`text` without passwords in addresses, tokens, keys, card numbers and without `token=…` and its like."""
    return active().secrets.hide(text)
