"""Avro, as fastavro reads it."""

from __future__ import annotations

import json
from io import BytesIO
from typing import TYPE_CHECKING, Any

from fastavro import parse_schema, schemaless_reader  # pyright: ignore[reportUnknownVariableType]
from pydantic_core import to_json

from mainstay.events.errors import DecodeError
from mainstay.events.foreign import Data

if TYPE_CHECKING:
    from mainstay.events._registry import Answer


class AvroSchema:
    """See `Schema`: the schema that the writer had. What a reader makes of it is its class's affair."""

    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._name: str = schema.get("name", "") if isinstance(schema, dict) else ""  # pyright: ignore[reportUnknownMemberType]

    def read(self, payload: bytes) -> Data:
        """See `Schema`."""
        rest = BytesIO(payload)
        try:
            value = schemaless_reader(rest, self._schema, None)
        except Exception as error:
            msg = f"the value is no {self._name or 'Avro'} as its schema says: {type(error).__name__}"
            raise DecodeError(msg) from error
        if rest.read(1):
            msg = f"the value is longer than a {self._name or 'value'} of its schema"
            raise DecodeError(msg)
        # As an event's own values are written: decimals as text, bytes as base64, times by ISO 8601.
        return Data(self._name, to_json(value, bytes_mode="base64", inf_nan_mode="strings").decode())


def schema_of(answer: Answer) -> AvroSchema:
    """The schema, with those that it names.

    Raises:
        Exception: fastavro does not take it.
    """
    named: dict[str, Any] = {}
    _name(answer, named, set())
    return AvroSchema(parse_schema(json.loads(answer.text), named_schemas=named))


def _name(answer: Answer, named: dict[str, Any], done: set[str]) -> None:
    for each in answer.references.values():
        if each.text not in done:
            done.add(each.text)
            _name(each, named, done)
            parse_schema(json.loads(each.text), named_schemas=named)
