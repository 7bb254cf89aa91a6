"""Avro, as fastavro reads it.

What a value means beside its type, an amount or a time, is read here by readers of our own names: fastavro rounds a
decimal to the precision of its schema, which not every writer keeps, and knows nothing of what Kafka Connect calls a
type. A schema that names itself is read by fastavro's reader in Python: the one in C calls itself for each level of a
value without a limit, and a few thousand bytes would end the process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from uuid import UUID

from fastavro import parse_schema, schemaless_reader  # pyright: ignore[reportUnknownVariableType]  it has no types
from fastavro._read_py import schemaless_reader as read_in_python  # pyright: ignore[reportUnknownVariableType]  it has no types
from fastavro.read import LOGICAL_READERS  # pyright: ignore[reportUnknownVariableType]  it has no types
from pydantic_core import to_json

from mainstay.events._connect import DECIMAL, MEANINGS, NANOSECONDS, Meaning, amount
from mainstay.events.errors import DecodeError
from mainstay.events.foreign import Data

if TYPE_CHECKING:
    from mainstay.events._registry import Answer

_AMOUNT = "mainstay.amount"
_UUID_SIZE = 16
_MEANT: dict[tuple[str, str], str] = {
    ("long", "timestamp-nanos"): "mainstay.nanoseconds",
    ("long", "local-timestamp-nanos"): "mainstay.nanoseconds",
    ("fixed", "uuid"): "mainstay.uuid",
}
"""What fastavro leaves as it is, by type and logical type, and the name of its reader here."""


def _reader(meaning: Meaning) -> Callable[[Any, Any, Any], Any]:
    return lambda value, _written_by, _read_by: meaning(value)


def _scaled(value: Any, written_by: Any, _read_by: Any) -> Any:
    return amount(value, int(written_by.get("scale", 0)))


cast("dict[str, Any]", LOGICAL_READERS).update(
    {
        f"bytes-{_AMOUNT}": _scaled,
        f"fixed-{_AMOUNT}": _scaled,
        "long-mainstay.nanoseconds": _reader(NANOSECONDS),
        "fixed-mainstay.uuid": _reader(lambda value: str(UUID(bytes=value)) if len(value) == _UUID_SIZE else value),
        **{f"{kind}-{name}": _reader(each) for name, each in MEANINGS.items() for kind in ("int", "long", "record")},
    }
)


class _Branch(NamedTuple):
    """A schema, alone or one of a union.

    Attributes:
        name: of the schema; empty where it has none.
        read: what was written by it.
    """

    name: str
    read: Callable[[BytesIO], Any]


class AvroSchema:
    """See `Schema`: the schema that the writer had. What a reader makes of it is its class's affair.

    Args:
        branches: of a union all, in their order.
        union: before each value stands which one it is by.
    """

    def __init__(self, branches: list[_Branch], *, union: bool) -> None:
        self._branches = branches
        self._union = union

    def read(self, payload: bytes) -> Data:
        """See `Schema`."""
        rest = BytesIO(payload)
        name = "" if self._union else self._branches[0].name
        try:
            number = cast("int", schemaless_reader(rest, "long", None)) if self._union else 0
            name, read = self._branches[number if number >= 0 else len(self._branches)]
            # As an event's own values are written: decimals as text, bytes as base64, times by ISO 8601.
            text = to_json(read(rest), bytes_mode="base64", inf_nan_mode="strings").decode()
        except Exception as error:
            msg = f"the value is no {name or 'Avro'} as its schema says: {type(error).__name__}"
            raise DecodeError(msg) from error
        if rest.read(1):
            msg = f"the value is longer than a {name or 'value'} of its schema"
            raise DecodeError(msg)
        return Data(name, text)


def schema_of(answer: Answer) -> AvroSchema:
    """The schema, with those that it names.

    Raises:
        Exception: fastavro does not take it.
    """
    named: dict[str, Any] = {}
    _name(answer, named, set())
    schema = _meant(json.loads(answer.text))
    union = isinstance(schema, list)
    branches = cast("Sequence[Any]", schema) if union else [schema]
    return AvroSchema([_branch(each, number, named) for number, each in enumerate(branches)], union=union)


def _name(answer: Answer, named: dict[str, Any], done: set[str]) -> None:
    for each in answer.references.values():
        if each.text not in done:
            done.add(each.text)
            _name(each, named, done)
            parse_schema(_meant(json.loads(each.text)), named_schemas=named)


def _branch(schema: Any, number: int, named: dict[str, Any]) -> _Branch:
    # In Avro a record is its fields and nothing else. A field of a record of our own says what its names mean.
    field = {"name": "value", "type": schema}
    whole: Any = parse_schema({"type": "record", "name": f"MainstayValue{number}", "fields": [field]}, named)
    said: Any = whole["fields"][0]["type"]
    name: Any = ""
    if isinstance(said, str):
        name = said if said in named else ""
    elif isinstance(said, dict):
        name = cast("Mapping[str, Any]", said).get("name", "")
    read = cast("Any", read_in_python if _names_itself(said, named, frozenset(), set()) else schemaless_reader)

    def value(rest: BytesIO) -> Any:
        return read(rest, whole, None)["value"]

    return _Branch(str(name), value)


def _meant(schema: Any) -> Any:
    """A schema whose logical types have the names of our readers; without defaults, of which a writer's has no use."""
    if isinstance(schema, list):
        return [_meant(each) for each in cast("Sequence[Any]", schema)]
    if not isinstance(schema, dict):
        return schema
    said = {name: value for name, value in cast("dict[str, Any]", schema).items() if name != "default"}
    for part in ("type", "items", "values"):
        if part in said:
            said[part] = _meant(said[part])
    if isinstance(said.get("fields"), list):
        said["fields"] = [_meant(each) for each in said["fields"]]
    meaning = _meaning(said)
    return said if meaning is None else said | {"logicalType": meaning}


def _meaning(schema: Mapping[str, Any]) -> str | None:
    logical, kind, name = schema.get("logicalType"), schema.get("type"), schema.get("connect.name")
    if logical == "decimal" or (logical is None and name == DECIMAL):
        scale = schema.get("scale", 0)
        return _AMOUNT if isinstance(scale, int) else None
    if logical is None:
        return str(name) if name in MEANINGS else None
    return _MEANT.get((str(kind), str(logical)))


def _names_itself(schema: Any, named: Mapping[str, Any], within: frozenset[str], done: set[str]) -> bool:
    """Whether values of a schema may hold others of the same."""
    if isinstance(schema, list):
        return any(_names_itself(each, named, within, done) for each in cast("Sequence[Any]", schema))
    said: Any = named.get(schema, {}) if isinstance(schema, str) else schema
    name = str(said.get("name", ""))
    if name and name in within:
        return True
    if name and name in done:
        return False
    parts = [*(each["type"] for each in said.get("fields", ())), said.get("items"), said.get("values")]
    if isinstance(said.get("type"), dict | list):
        parts.append(said["type"])
    inner = within | {name} if name else within
    found = any(_names_itself(each, named, inner, done) for each in parts if each is not None)
    done.add(name)
    return found
