"""Topics that others write: how a record that is no CloudEvent becomes an event.

A decoder belongs to a topic, and the classes of the topic name it: `class StockCounted(Event, type="stock.counted",
topic="warehouse.stock", key="item", decoder=Plain("stock.counted"))`. `Plain` and `Debezium` are here; anything else
that has a method `decode` is one, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, cast

from mainstay.events._connect import understood
from mainstay.events._members import members
from mainstay.events.errors import DecodeError

__all__ = ["Data", "Debezium", "Decoded", "Decoder", "Format", "Plain", "Received", "Schemas"]

Format = Literal["json", "avro", "protobuf"]

_OPERATIONS = {"c": "changed", "u": "changed", "r": "changed", "d": "deleted", "t": "truncated"}
_CONNECT = {"schema", "payload"}
_BESIDE_ITS_SCHEMA = re.compile(r'\s*\{\s*"(?:schema|payload)"\s*:')
PREFIX = 5
"""Bytes before what a serializer of a registry writes: a byte 0, and four of the schema's id, which is never 0."""
_UNTOLD = "__debezium_unavailable_value"
_UNTOLD_IN_BASE64 = "X19kZWJleml1bV91bmF2YWlsYWJsZV92YWx1ZQ=="


def is_by_registry(value: bytes) -> bool:
    """Whether bytes begin as those that a serializer of a registry writes."""
    return len(value) >= PREFIX and value[0] == 0 and any(value[1:PREFIX])


class Received(NamedTuple):
    """A record, as it was read.

    Attributes:
        topic, partition, offset: where it was.
        key, value: its bytes; None where it has none.
        headers: the last of each name.
    """

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Mapping[str, bytes | None]


class Data(NamedTuple):
    """Bytes, as their format says what they mean.

    Attributes:
        name: of the schema that they were written by, such as `com.acme.OrderPlaced`; empty without one.
        json: the same as JSON.
    """

    name: str
    json: str


class Schemas(Protocol):
    """The schema registry, as a decoder sees it."""

    def read(self, format: Literal["avro", "protobuf"], value: bytes) -> Data:
        """Read bytes that a serializer of the registry wrote: a byte 0, four of the schema's id, and then the data.

        Raises:
            SchemaError: the schema is not known yet. The record is decoded again later, as often as that takes.
            DecodeError: these are no such bytes.
        """
        ...


class Decoded(NamedTuple):
    """What a record says, as an event.

    Attributes:
        type: of the event; it is handled by the class that has it.
        json: the event's fields, as JSON.
        version: of the type.
        key: what `Metadata.key` says. Default: the record's key as text. Order is always that of the record's key.
        time: when it happened.
        attributes: what else is known, by names of lowercase letters and digits; `op` is `ce_op` in `Metadata.headers`.
    """

    type: str
    json: str
    version: str = "1.0"
    key: str | None = None
    time: datetime | None = None
    attributes: Mapping[str, str] = MappingProxyType({})


class Decoder(Protocol):
    """Makes events of the records of a topic. Equal decoders do the same: two classes of a topic have equal ones.

    A decoder is used by all processes of a group side by side with those of the release before. It should find the same
    type for a record whether or not there is a handler for it: then the event of a new type waits for the new release.
    """

    def decode(self, record: Received, schemas: Schemas) -> Decoded | None:
        """What the record says; None where it says nothing, and is skipped and counted.

        Raises:
            DecodeError: it is not what it should be: a dead letter, byte for byte. Any other exception means the same.
            SchemaError: what is needed to read it is away, and the record is not looked at before that is back.
        """
        ...


@dataclass(frozen=True, slots=True)
class Plain:
    """Each value is an event, and nothing else.

    A record without a value, or whose value is null, is an event of the type `<type>.deleted`: its fields are those of
    the key where that is an object, else one field `key`. Where no type is named it is skipped.

    Args:
        type: of the events. `avro` and `protobuf` need none: it is the full name of the record's schema.
        format: of the values: `json`, or `avro` and `protobuf` by a schema registry.

    Raises:
        ValueError: JSON does not say what type it is of.
    """

    type: str | None = None
    format: Format = "json"

    def __post_init__(self) -> None:
        if self.format == "json" and self.type is None:
            msg = 'Plain() needs a type: a value in JSON does not say what it is. Write Plain("stock.counted")'
            raise ValueError(msg)

    def decode(self, record: Received, schemas: Schemas) -> Decoded | None:
        """See `Decoder`."""
        key = _Key(record.key, self.format, schemas)
        data = _read(record.value, self.format, schemas)
        if data is not None:
            return Decoded(self.type or data.name, data.json, key=key.text)
        if self.type is None:
            return None
        fields = key.fields()
        return Decoded(f"{self.type}.deleted", _object(fields or {"key": json.dumps(key.text)}), key=key.text)


@dataclass(frozen=True, slots=True)
class Debezium:
    """Each value is a change of a row, in the envelope of Debezium.

    A row that is new, changed or part of a snapshot is an event of the type `<stem>.changed`, whose fields are the row
    as it is now (`after`). One that is gone is `<stem>.deleted`: the row as it was (`before`), as far as the database
    tells, and the columns of its key. A table that was emptied is `<stem>.truncated`, without fields. The record
    without a value behind each deletion says nothing more and is skipped. In `Metadata.headers`, `ce_op` is Debezium's
    `op`. A column of which Debezium says that it does not know the value is left out: its field has its default and
    is not in `model_fields_set`. A document of MongoDB, which Debezium writes as text, is a row, too; its numbers and
    times are in MongoDB's extended JSON.

    Args:
        stem: how the types of the events begin.
        format: of keys and values: `json` with schemas or without, or `avro` and `protobuf` by a schema registry.
        partial: what becomes of an update of MongoDB that says what was changed in a document, and not what it is then.
            `refuse`: it cannot be read, and its handler says what happens then. `skip`: it is passed over and counted,
            for a connector with `capture.mode=change_streams_update_full`. That writes such an update only where the
            document was deleted soon after, so that its deletion follows.
    """

    stem: str
    format: Format = "json"
    partial: Literal["refuse", "skip"] = "refuse"

    def decode(self, record: Received, schemas: Schemas) -> Decoded | None:
        """See `Decoder`."""
        data = _read(record.value, self.format, schemas)
        if data is None:
            return None
        change = members(data.json)
        op: Any = json.loads(change.get("op", "null"))
        what = _OPERATIONS.get(op) if isinstance(op, str) else None
        if what is None:
            msg = (
                "the value is no change event of Debezium: its op is none of c, u, r, d and t. Rows that were "
                "unwrapped before they were written are read by Plain; heartbeats, messages, schema changes and what "
                "is said of transactions have topics of their own, unless they are routed to this one"
            )
            raise DecodeError(msg)
        key = _Key(record.key, self.format, schemas)
        row = "{}"
        if what == "changed":
            if _is_partial(change) and self.partial == "skip":
                return None
            row = _object(_row(change, "after"))
        elif what == "deleted":
            before = _row(change, "before", optional=True)
            is_document = change.get("before", "").startswith('"')  # which has its own id, and the key a text of that
            row = _object(before if is_document else before | (key.fields() or {}))
        return Decoded(f"{self.stem}.{what}", row, key=key.text, time=_time(change), attributes={"op": op})


class _Key:
    """The key of a record: text, or an object whose only member is the key, or several."""

    def __init__(self, key: bytes | None, format: Format, schemas: Schemas) -> None:
        self._columns: dict[str, str] | None = None
        self.text: str | None = None
        if key is None:
            return
        try:
            # Others write keys as text, or as the bytes of a number, beside values with a schema.
            data = _read(key, format, schemas) if format == "json" or is_by_registry(key) else None
        except DecodeError:
            data = None
        self.text = key.decode(errors="replace") if data is None else data.json
        if data is None:
            return
        try:
            self._columns = members(data.json)
        except DecodeError:
            self.text = _text(data.json)
            return
        self.text = _text(*self._columns.values()) if len(self._columns) == 1 else _object(self._columns)

    def fields(self) -> dict[str, str] | None:
        """The members of the key, as JSON; None where it is a mere text.

        Raises:
            DecodeError: there is no key, or its text is none.
        """
        if self.text is None or "\ufffd" in self.text or "\0" in self.text:
            msg = "the record says by its key alone what it is about, and has none that could be read"
            raise DecodeError(msg)
        return self._columns


def _text(value: str) -> str:
    try:
        said: object = json.loads(value)
    except (ValueError, RecursionError):  # a mere text, which JSON would have in quotes
        return value
    return said if isinstance(said, str) else value


def _read(value: bytes | None, format: Format, schemas: Schemas) -> Data | None:
    """What a value says; None where it says nothing."""
    if value is None:
        return None
    if format != "json":
        data = schemas.read(format, value)
        return None if data.json == "null" else data
    try:
        # What a serializer of a registry writes as JSON begins with the id of its schema, which it can be read without.
        text = (value[PREFIX:] if is_by_registry(value) else value).decode()
    except UnicodeDecodeError:
        msg = "the value is no JSON: it is not UTF-8"
        raise DecodeError(msg) from None
    payload = _payload(text)
    return None if payload.strip() == "null" else Data("", payload)


def _payload(text: str) -> str:
    """What a text in JSON says; Kafka Connect may have put it beside its schema."""
    if _BESIDE_ITS_SCHEMA.match(text):
        both = members(text)
        if both.keys() == _CONNECT and both["schema"][0] in "{n":
            return understood(both["payload"], both["schema"])
    return text


def _row(change: Mapping[str, str], name: str, *, optional: bool = False) -> dict[str, str]:
    said = change.get(name, "null")
    if optional and said == "null":
        return {}
    if _is_partial(change):
        msg = (
            "the change event says what was changed in a document, and not what it is then: have Debezium "
            "write that by capture.mode=change_streams_update_full. Of a document that was deleted soon after even "
            "that mode knows no more, and its deletion follows: skip this event, and say Debezium(…, partial='skip') "
            "for those to come"
        )
        raise DecodeError(msg)
    if said.startswith('"'):  # a document of MongoDB is written as text
        said = cast("str", json.loads(said)).strip()
        if said.startswith("{"):
            try:
                return members(said)
            except DecodeError:
                msg = f"the document {name} is no JSON object"
                raise DecodeError(msg) from None
    if not said.startswith("{"):
        msg = f"the change event has no row {name}"
        raise DecodeError(msg)
    return {column: value for column, value in members(said).items() if not _is_untold(value)}


def _is_partial(change: Mapping[str, str]) -> bool:
    """Whether an update says what was changed in a document of MongoDB, and not what it is then."""
    return change.get("after", "null") == "null" and change.get("updateDescription", "null") != "null"


def _is_untold(value: str) -> bool:
    """Whether Debezium does not know the value of a column: PostgreSQL tells no large one that was not changed."""
    if _UNTOLD not in value and _UNTOLD_IN_BASE64 not in value:
        return False
    said: Any = json.loads(value)
    while isinstance(said, list | dict):  # of an array or a map it says so for the whole
        inside = [
            *(cast("Mapping[str, Any]", said).values() if isinstance(said, dict) else cast("Sequence[Any]", said))
        ]
        if len(inside) != 1:
            return False
        (said,) = inside
    return said in {_UNTOLD, _UNTOLD_IN_BASE64}


def _time(change: Mapping[str, str]) -> datetime | None:
    """When the row was changed; where the source does not say, when that was found."""
    source = change.get("source", "null")
    said = members(source) if source.startswith("{") else {}
    for text in (said.get("ts_ms"), change.get("ts_ms")):
        if text is not None and text.isdecimal() and text != "0":
            try:
                return datetime.fromtimestamp(int(text) / 1000, UTC)
            except (ValueError, OverflowError, OSError):
                return None
    return None


def _object(fields: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in fields.items()) + "}"
