"""What Kafka Connect and Debezium mean by a number or by bytes, as the schema beside a value says it.

An amount arrives as the bytes of a whole number and a scale, a day as the days since 1970, a time as milliseconds,
microseconds or nanoseconds. Read without its schema such a value may pass for another: the base64 of some amounts is
all digits, and a number of days is a number of seconds. So they become what our own events write: amounts as text,
times by ISO 8601. One that no calendar has becomes a text that is no time.
"""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import lru_cache, partial
from typing import Any, cast

from mainstay.events._members import rounded
from mainstay.events.errors import DecodeError

Meaning = Callable[[Any], Any]
"""From a value as it is written to one that JSON holds; what it does not understand it leaves."""

_CONNECT = "org.apache.kafka.connect.data."
_DEBEZIUM = "io.debezium."
DECIMAL = f"{_CONNECT}Decimal"
_DAY_0 = date(1970, 1, 1)
_MOMENT_0 = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND = 1_000_000_000
_KEPT = 64
"""Schemas whose meaning is remembered: each record of a topic repeats its own."""
_LONGEST_KEPT = 64 * 1024
"""Characters of one that is remembered: what others write must not fill the memory."""


class _Number(str):
    """A number as it was written, which a float would round."""

    __slots__ = ()


def amount(value: Any, scale: int) -> Any:
    """A decimal as text, without rounding, from the bytes of its digits or from their base64."""
    if isinstance(value, str) and not isinstance(value, _Number):
        value = b64decode(value, validate=True)
    if not isinstance(value, bytes):  # a number already, as Connect can be told to write it
        return value
    digits = int.from_bytes(value, "big", signed=True)
    return str(Decimal(f"{digits}E{-scale}"))


def _amount_with_scale(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    parts = cast("Mapping[str, Any]", value)
    return amount(parts["value"], int(parts["scale"]))


def _day(days: Any) -> Any:
    if not isinstance(days, int):
        return days
    try:
        return (_DAY_0 + timedelta(days=days)).isoformat()
    except OverflowError:
        return f"{days} days after 1970-01-01"


def _moment(unit: int, number: Any) -> Any:
    if not isinstance(number, int):
        return number
    whole = number * unit
    try:
        moment = _MOMENT_0 + timedelta(microseconds=whole // 1000)
    except OverflowError:
        return f"{whole} nanoseconds after 1970-01-01"
    return f"{moment.replace(tzinfo=None, microsecond=0).isoformat()}{_fraction(whole % _SECOND)}Z"


def _clock(unit: int, number: Any) -> Any:
    """A time of day; one that is none, since it is negative or of more than a day, is the hours all the same."""
    if not isinstance(number, int):
        return number
    seconds, rest = divmod(abs(number * unit), _SECOND)
    sign = "-" if number < 0 else ""
    return f"{sign}{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{_fraction(rest)}"


def _duration(unit: int, number: Any) -> Any:
    if not isinstance(number, int):
        return number
    seconds, rest = divmod(abs(number * unit), _SECOND)
    return f"{'-' if number < 0 else ''}PT{seconds}{_fraction(rest)}S"


def _fraction(nanoseconds: int) -> str:
    if nanoseconds == 0:
        return ""
    return f".{nanoseconds // 1000:06}" if nanoseconds % 1000 == 0 else f".{nanoseconds:09}"


MEANINGS: Mapping[str, Meaning] = {
    f"{_CONNECT}Date": _day,
    f"{_CONNECT}Time": partial(_clock, 1_000_000),
    f"{_CONNECT}Timestamp": partial(_moment, 1_000_000),
    f"{_DEBEZIUM}time.Date": _day,
    f"{_DEBEZIUM}time.Time": partial(_clock, 1_000_000),
    f"{_DEBEZIUM}time.MicroTime": partial(_clock, 1_000),
    f"{_DEBEZIUM}time.NanoTime": partial(_clock, 1),
    f"{_DEBEZIUM}time.Timestamp": partial(_moment, 1_000_000),
    f"{_DEBEZIUM}time.MicroTimestamp": partial(_moment, 1_000),
    f"{_DEBEZIUM}time.NanoTimestamp": partial(_moment, 1),
    f"{_DEBEZIUM}time.MicroDuration": partial(_duration, 1_000),
    f"{_DEBEZIUM}time.NanoDuration": partial(_duration, 1),
    f"{_DEBEZIUM}data.VariableScaleDecimal": _amount_with_scale,
}
"""By the name of the schema."""
NANOSECONDS = MEANINGS[f"{_DEBEZIUM}time.NanoTimestamp"]


def understood(payload: str, schema: str) -> str:
    """JSON that stands beside its schema, as it is meant.

    Raises:
        DecodeError: it is not as its schema says.
    """
    try:
        meaning = _meaning_of(schema) if len(schema) <= _LONGEST_KEPT else _meaning(json.loads(schema))
        if meaning is None:
            return payload
        return json.dumps(meaning(json.loads(payload, parse_float=_number)))
    except Exception as error:
        msg = f"the value is not what the schema beside it says: {type(error).__name__}"
        raise DecodeError(msg) from error


def _number(written: str) -> float | str:
    return _Number(written) if rounded(written) else float(written)


@lru_cache(maxsize=_KEPT)
def _meaning_of(schema: str) -> Meaning | None:
    return _meaning(json.loads(schema))


def _meaning(schema: Any) -> Meaning | None:
    """How a value of a schema is read; None where it is what it looks like."""
    if not isinstance(schema, Mapping):
        return None
    said = cast("Mapping[str, Any]", schema)
    if said.get("name") == DECIMAL:
        return partial(amount, scale=int(said["parameters"]["scale"]))
    meant = MEANINGS.get(str(said.get("name")))
    if meant is not None:
        return meant
    kind = said.get("type")
    if kind == "struct":
        fields = {str(each["field"]): meaning for each in said["fields"] if (meaning := _meaning(each)) is not None}
        return partial(_members, fields) if fields else None
    inner = _meaning(said.get("items" if kind == "array" else "values")) if kind in {"array", "map"} else None
    return None if inner is None else partial(_each, inner)


def _members(fields: Mapping[str, Meaning], value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    members = cast("dict[str, Any]", value)
    return members | {name: meaning(members[name]) for name, meaning in fields.items() if members.get(name) is not None}


def _each(meaning: Meaning, value: Any) -> Any:
    if isinstance(value, list):
        return [each if each is None else meaning(each) for each in cast("Sequence[Any]", value)]
    if isinstance(value, dict):
        return {name: each if each is None else meaning(each) for name, each in cast("dict[str, Any]", value).items()}
    return value
