"""No secret in a line: values go by the keys that they stand under, text by what stands around it.

What a line holds is first made into what JSON has, so that it shows nothing that was not looked at: of a mapping, of a
model and of a dataclass what their repr shows, of whatever is not known here the repr itself, which is text like any
other. An iterator is never advanced: its items belong to the application, and may have no end.

What users' objects do when they are looked at (raise, change meanwhile) concerns the one value, never the line.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from ipaddress import IPv4Address, IPv6Address
from pathlib import PurePath
from typing import Any, cast
from uuid import UUID

from pydantic import BaseModel

REDACTED = "[redacted]"
_DEPTH = 6
_PAIR = 2
# With these nothing can be wrong; asking anything else about a value costs more than all the rest.
_HARMLESS = frozenset({int, float, bool, type(None), datetime, date, time, timedelta, Decimal, UUID})

_KEY = (
    r"passw(?:or)?d|passphrase|pwd|(?:api|access|private|signing|secret)[-_ ]?key|secret|token|credential"
    r"|(?P<authorization>authorization)|(?P<cookie>cookie)"
)
_SECRET_KEY = re.compile(_KEY, re.IGNORECASE)
# A word of each alternative above: whether a text has any is known much sooner than where.
_STEMS = ("passw", "passphrase", "pwd", "key", "secret", "token", "credential", "authorization", "cookie")
_ASSIGNMENT = re.compile(
    rf"""
    (?P<before>
        (?:{_KEY}) (?:s|[_-]\w{{1,32}})?
        (?: (?:\\*["'])? \s{{0,3}} [:=] >?+ \s{{0,3}}+  # token=…   password: …   "token":"…"   also JSON inside of JSON
          | \\*["'] , \s? (?=b?\\*["'])                 # ('authorization', '…')
        )
    )
    (?: (?P<open> b? (?P<quote>\\*["']) ) (?!\[redacted) (?: (?!(?P=quote)) (?:\\+["']?|[^\\\n]) )+
      | (?P<scheme> (?:bearer|basic|digest|negotiate|token|apikey) \s+ )?+
        (?!\[redacted | SecretStr\( | SecretBytes\( | b?\\*["'])
        (?: [\[({{] [^\])}}\n]+
          | (?![\[({{]) (?(cookie) [^\n"']+ | [^\s&,;"'}})\]]+ (?(authorization) (?:[ ][^\s&,;"'}})\]]+)? ) )
        )
    )
    """,
    re.IGNORECASE | re.VERBOSE,
)
# A password may hold what should have been encoded; a port and a path are no password.
_URL_PASSWORD = re.compile(
    r"(://[^\s/:@\"'<>]*:)(?!\d{1,5}(?:[/?#\s,;)\]}\"'>]|$))(?:[^\s/?#\"']{1,512}@|[^\s\"']{1,512}?@)"
)
# Whoever is named alone in an address of the web is a token.
_URL_USER = re.compile(r"(https?://)[^\s/?#\"'<>]{1,512}@")
# What pydantic's ValidationError repeats of its input.
_INPUT = re.compile(r"(input_value=)[^\n]{0,400}(?=, input_type=)")

_verdicts: dict[str, bool] = {}


def is_secret(key: object) -> bool:
    """Whether what stands under `key` is a secret; remembered, because a service uses few keys and many lines."""
    if not isinstance(key, str):
        return isinstance(key, bytes) and is_secret(key.decode("latin-1"))
    verdict = _verdicts.get(key)
    if verdict is None:
        verdict = _SECRET_KEY.search(key) is not None
        if len(_verdicts) < 4096:  # noqa: PLR2004  a bound, so that keys made from data cannot fill the memory
            _verdicts[key] = verdict
    return verdict


def redact_text(text: str) -> str:
    """`text` without passwords in addresses and without `token=…` and its like. Cheap where there are none."""
    if "://" in text:
        text = _URL_PASSWORD.sub(rf"\1{REDACTED}@", _URL_USER.sub(rf"\1{REDACTED}@", text))
    if ":" in text or "=" in text or "," in text:
        lower = text.lower()
        for stem in _STEMS:
            if stem in lower:
                text = _ASSIGNMENT.sub(rf"\g<before>\g<open>\g<scheme>{REDACTED}", text)
                break
        if "input_value=" in lower:
            text = _INPUT.sub(rf"\1{REDACTED}", text)
    return text


def redact(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Processor: leave in `event` only what JSON has, without secrets; the caller's own objects stay as they are."""
    items: MutableMapping[str, object] = event
    for key, value in items.items():
        kind = type(value)
        if is_secret(key):
            event[key] = REDACTED
        elif kind is str and isinstance(value, str):
            if ":" in value or "=" in value or "," in value:
                event[key] = redact_text(value)
        elif kind not in _HARMLESS:
            event[key] = _plain(value, _DEPTH)
    return event


def last_resort(value: object) -> str:
    """The repr of `value`, or that it has none."""
    try:
        return redact_text(repr(value))
    except Exception:  # noqa: BLE001  a line with a broken object in it is better than no line
        return f"<{type(value).__name__}, whose repr fails>"


def _plain(value: object, depth: int) -> Any:
    kind = type(value)
    if kind is str:
        return redact_text(cast("str", value))
    if kind in _HARMLESS:
        return value
    try:
        return _opened(value, depth)
    except Exception:  # noqa: BLE001  as in `last_resort`
        return last_resort(value)


def _opened(value: Any, depth: int) -> Any:
    pairs = _pairs(value)
    if pairs is None and not isinstance(value, (list, tuple, set, frozenset, deque)):
        return _leaf(value)
    if depth == 0:
        return "[too deep]"
    if pairs is not None:
        return {_name(key): REDACTED if is_secret(key) else _plain(inner, depth - 1) for key, inner in pairs}
    members = list(cast("list[Any]", value))
    if len(members) == _PAIR and isinstance(value, (list, tuple)) and is_secret(members[0]):
        return [_plain(members[0], depth - 1), REDACTED]  # a header
    return [_plain(inner, depth - 1) for inner in members]


def _pairs(value: Any) -> list[tuple[Any, Any]] | None:
    """What has names, with its names; None of anything else."""
    if isinstance(value, Mapping):
        return list(cast("Mapping[object, object]", value).items())
    if isinstance(value, BaseModel):
        return list(value.__repr_args__())
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in fields(value) if field.repr]
    if isinstance(value, tuple) and hasattr(cast("object", value), "_fields"):
        return list(zip(cast("Any", value)._fields, cast("tuple[object, ...]", value), strict=True))
    return None


def _name(key: Any) -> Any:
    if isinstance(key, bytes):
        return redact_text(key.decode("latin-1"))
    if isinstance(key, str):
        return redact_text(key)
    return key if key is None or isinstance(key, (int, float)) else last_resort(key)


def _leaf(value: Any) -> Any:
    if isinstance(value, Enum):
        return _plain(value.value, 0)
    if isinstance(value, str):
        return redact_text(str.__str__(value))
    if isinstance(value, (int, float, date, time, timedelta, Decimal, UUID)):
        return value
    if isinstance(value, (bytes, bytearray)):
        try:
            return redact_text(value.decode())
        except UnicodeDecodeError:
            return last_resort(value)
    if isinstance(value, (PurePath, IPv4Address, IPv6Address)):
        return redact_text(str(value))
    return last_resort(value)
