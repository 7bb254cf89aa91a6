"""One audit entry, and the exact bytes that are stored, hashed and proved.

The bytes are canonical JSON as RFC 8785 defines it. General encoders come close and differ in floats, in `-0.0` and in
the order of keys beyond ASCII; so the schema leaves those out: keys are ASCII, values are strings, booleans, None,
integers that every JSON reader keeps exact, and lists and mappings of those. What is left, the standard library
encodes as the RFC does. Ids, decimals, moments and enumerations are written as the strings that people know; a float
is refused.

`v` is the version of this schema. Personal data under a key of its subject will be a version 2: nothing else depends
on what is inside the bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from typing import Any, Literal, Never, cast, get_args
from uuid import UUID

from mainstay.audit.errors import InvalidEntry

__all__ = ["Entry", "Outcome"]

Outcome = Literal["succeeded", "failed", "denied", "unknown"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

MAX_BYTES = 65_536
_EXACT = 2**53 - 1  # beyond it, a JSON reader with floating point numbers changes the number
_DEPTH = 16
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """Who did what to which thing, when, as part of what, and how it ended.

    Attributes:
        id: of the entry.
        action: what was done, such as `order.cancelled`.
        outcome: `succeeded`, `failed`, `denied`, or `unknown` where the connection broke while committing.
        time: ISO 8601, UTC, microseconds; by the clock of the process that wrote it. Nothing is ordered by it.
        resource: what it was done to, such as `order/7`.
        actor, tenant, correlation_id, causation_id: from the context.
        producer: the process that wrote it, a random name for each start.
        number: of the producer's numbered entries this is the number-th; 0 for its statements.
        detail: whatever else matters; never a secret, never more about a person than must be kept.
    """

    id: UUID
    action: str
    outcome: Outcome
    time: str
    producer: str
    number: int
    resource: str | None = None
    actor: str | None = None
    tenant: str | None = None
    correlation_id: str | None = None
    causation_id: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def to_bytes(self) -> bytes:
        """The canonical bytes.

        Raises:
            InvalidEntry: something in it cannot be stored exactly, or it is longer than 64 KiB.
        """
        return encode({name: getattr(self, name) for name in _FIELDS})

    @classmethod
    def from_bytes(cls, data: bytes) -> Entry:
        """The entry that `to_bytes` wrote.

        Raises:
            InvalidEntry: these are not the canonical bytes of an entry.
        """
        return cls(**attributes(data))


_FIELDS = (
    *("id", "action", "outcome", "time", "producer", "number"),
    *("resource", "actor", "tenant", "correlation_id", "causation_id", "detail"),
)
_KINDS: dict[str, type] = {**dict.fromkeys(_FIELDS, str), "number": int, "detail": dict, "v": int}
_REQUIRED = {"id", "action", "outcome", "time", "producer", "number", "v"}


def _refuse(number: str) -> Never:
    raise ValueError(number)


# Made once: `json.dumps` with options of its own makes an encoder for every call.
_encoder = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)
_decoder = json.JSONDecoder(parse_float=_refuse, parse_constant=_refuse)


def _encode(plain: Mapping[str, Any]) -> bytes:
    return _encoder.encode(plain).encode()


def attributes(data: bytes) -> dict[str, Any]:
    """The attributes of the entry with these bytes, without making the entry.

    Raises:
        InvalidEntry: as `Entry.from_bytes` does.
    """
    try:
        fields: dict[str, Any] = _decoder.decode(data.decode())
        good = (
            len(data) <= MAX_BYTES
            and _encode(fields) == data
            and fields.keys() >= _REQUIRED
            and all(type(value) is _KINDS[name] for name, value in fields.items())
            and fields.pop("v") == _VERSION
            and fields["outcome"] in OUTCOMES
        )
        text = fields["id"]
        fields["id"] = UUID(text)
        if not good or str(fields["id"]) != text:
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        msg = "these are not the canonical bytes of an audit entry"
        raise InvalidEntry(msg) from error
    return fields


def encode(fields: Mapping[str, Any]) -> bytes:
    """The canonical bytes of an entry with these attributes, without making the entry.

    Raises:
        InvalidEntry: as `Entry.to_bytes` does.
    """
    outcome = fields["outcome"]
    if outcome not in OUTCOMES:
        msg = f"outcome {outcome!r} of an audit entry is none of {', '.join(OUTCOMES)}"
        raise InvalidEntry(msg)
    kept = {name: value for name, value in fields.items() if value is not None or name in _REQUIRED}
    if not kept.get("detail", True):
        del kept["detail"]
    plain = _plain({**kept, "v": _VERSION}, "", _DEPTH)
    for name, value in plain.items():
        if type(value) is not _KINDS[name]:
            wanted = "a mapping" if name == "detail" else "a string"
            msg = f"{name} of an audit entry has to be {wanted}, not {type(fields[name]).__name__}"
            raise InvalidEntry(msg)
    data = _bytes(plain)
    if len(data) > MAX_BYTES:
        msg = (
            f"the audit entry {fields['action']!r} has {len(data)} bytes, of at most {MAX_BYTES}: keep less in `detail`"
        )
        raise InvalidEntry(msg)
    return data


def canonical(value: Mapping[str, Any]) -> bytes:
    """`value` as the canonical JSON of RFC 8785.

    Raises:
        InvalidEntry: it holds a float, a large integer, a key beyond ASCII, half a surrogate pair or a strange object.
    """
    return _bytes(_plain(value, "", _DEPTH))


def _bytes(plain: Mapping[str, Any]) -> bytes:
    try:
        return _encode(plain)
    except UnicodeEncodeError as error:
        msg = "a string of the audit entry holds half a surrogate pair, which no encoding can store"
        raise InvalidEntry(msg) from error


_AS_IT_IS = frozenset({str, bool, type(None)})


def _at(path: str) -> str:
    return path.lstrip(".") or "the entry"


def _plain(value: object, path: str, depth: int) -> Any:
    # The exact types first: asking whether something is a Mapping costs more than copying a small one.
    if type(value) in _AS_IT_IS:
        return value
    if type(value) is not dict:
        if isinstance(value, Enum):
            return _plain(value.value, path, depth)
        if isinstance(value, int):
            if not -_EXACT <= value <= _EXACT:
                msg = f"{_at(path)} is an integer beyond 2^53, which JSON readers change: pass it as a string"
                raise InvalidEntry(msg)
            return int(value)
        if isinstance(value, (str, UUID, Decimal)):
            return str(value)
        if isinstance(value, (datetime, date)):
            return value.isoformat()
    if depth == 0:
        msg = f"{_at(path)} is nested more than {_DEPTH} levels deep"
        raise InvalidEntry(msg)
    if isinstance(value, (dict, Mapping)):  # dict first, which is quicker than asking the abstract class
        plain: dict[str, Any] = {}
        for key, inner in cast("Mapping[object, object]", value).items():
            if not isinstance(key, str) or not key.isascii():
                msg = f"{_at(path)} has the key {key!r}: keys are ASCII strings, whose order no reader doubts"
                raise InvalidEntry(msg)
            plain[key] = inner if type(inner) in _AS_IT_IS else _plain(inner, f"{path}.{key}", depth - 1)
        return plain
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        sequence = cast("Sequence[object]", value)
        return [_plain(inner, f"{path}[{place}]", depth - 1) for place, inner in enumerate(sequence)]
    remedy = "pass a Decimal or a string" if isinstance(value, float) else "pass strings, integers, booleans"
    msg = f"{_at(path)} is a {type(value).__name__}, which has no exact form in JSON: {remedy}"
    raise InvalidEntry(msg)
