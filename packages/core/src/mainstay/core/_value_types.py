"""What can be told from a type: which of its values can never come back equal."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, cast
from uuid import UUID

from pydantic import TypeAdapter
from pydantic_core import SchemaSerializer, SchemaValidator

Schema = Mapping[str, Any]

WRITE: dict[str, Any] = {"by_alias": False, "round_trip": True, "warnings": "none"}
READ: dict[str, Any] = {"by_alias": False, "by_name": True}
# For what others read and write, too: names as they are declared for them.
WRITE_FOR_OTHERS: dict[str, Any] = {**WRITE, "by_alias": True}
READ_FROM_OTHERS: dict[str, Any] = {**READ, "by_alias": True}

_MISSING = object()
_KEYS = frozenset({
    "str", "int", "float", "bool", "decimal", "date", "time", "datetime", "timedelta", "uuid", "url", "multi-host-url",
    "any", "bytes", "literal", "enum", "complex",
})  # fmt: skip
_NO_SCHEMA = frozenset({"metadata", "config", "serialization", "default", "expected", "members"})
_UNREADABLE = {
    "is-instance": "is read by no JSON: give the type a pydantic schema, or keep a value that it can be made from",
    "is-subclass": "is a class, which JSON does not hold: keep its name",
    "callable": "is a function, which JSON does not hold: keep its name",
    "generator": "is an iterator, which is not equal to the one that was written: annotate it as list[…]",
}
_ANY = (
    "may be anything, of which JSON does not tell a Decimal or a date from text: annotate it as what it is, or as "
    "pydantic's JsonValue"
)
_DEEPEST_SAMPLE = 5


class Look:
    """One look over the schema of a type, for what can never come back equal.

    Args:
        for_others: aliases count, and so does `Any`, which loses some of its values only.

    Attributes:
        nan_is_null: a float was passed whose inf and nan are written as null.
    """

    def __init__(self, *, for_others: bool = False) -> None:
        self._for_others = for_others
        self.nan_is_null = False
        self._definitions: dict[str, Schema] = {}
        self._seen: set[str] = set()

    def at(self, schema: Schema, path: str, ser: Schema, val: Schema) -> Iterator[tuple[str, str]]:
        """Each place that is wrong, and why.

        Args:
            schema: of pydantic's core.
            path: where it is within the whole.
            ser, val: the config that its values are written with, and read with.
        """
        kind = schema["type"]
        if kind == "definitions":
            self._definitions |= {definition["ref"]: definition for definition in schema["definitions"]}
            yield from self.at(schema["schema"], path, ser, val)
            return
        if kind == "definition-ref":
            ref = schema["schema_ref"]
            if ref not in self._seen and ref in self._definitions:
                self._seen.add(ref)
                yield from self.at(self._definitions[ref], path, ser, val)
            return
        if str(schema.get("serialization", {}).get("type", "")).startswith(("function", "to-string", "format")):
            return  # written by code of its own, which only values can judge
        if kind in _UNREADABLE:
            yield path, _UNREADABLE[kind]
        elif kind == "bytes" and not ser.get("ser_json_bytes") == val.get("val_json_bytes") in {"base64", "hex"}:
            yield path, 'is bytes: say ser_json_bytes="base64", val_json_bytes="base64" in the config of its model'
        elif kind == "model" and inspect.isabstract(schema["cls"]):
            yield path, f"is of {schema['cls'].__name__}, which is abstract: annotate it as the classes that there are"
        elif kind == "dict" and (wrong := self._wrong_key(schema.get("keys_schema", {"type": "any"}))):
            yield path, f"is a dict whose keys are {wrong}, which JSON does not hold as keys: keep a list of pairs"
        elif kind == "union" and (wrong := self._wrong_member(schema, ser)):
            yield path, f"is a union in which {wrong}: give its members a discriminator, or fields of their own"
        elif kind == "any" and self._for_others:
            yield path, _ANY
        elif kind == "float" and schema.get("allow_inf_nan", ser.get("allow_inf_nan", True)):
            self.nan_is_null |= ser.get("ser_json_inf_nan", "null") == "null"
        if kind == "model":
            ser = val = schema.get("config", {})
        elif kind == "dataclass" and "config" in schema:
            ser = val = schema["config"]
        elif kind == "typed-dict" and "config" in schema:
            val = schema["config"]
        yield from self._below(schema, path, ser, val)

    def _below(self, schema: Schema, path: str, ser: Schema, val: Schema) -> Iterator[tuple[str, str]]:
        kind = schema["type"]
        if kind == "json-or-python":
            json, python = schema["json_schema"], schema["python_schema"]
            # pydantic's JsonValue: any JSON, since Python holds nothing there that would be written as something else.
            is_json = json["type"] == "any" and python["type"] == "tagged-union"
            yield from self.at(python if is_json else json, path, ser, val)
            return
        if kind == "lax-or-strict":
            yield from self.at(schema["lax_schema"], path, ser, val)
            return
        for name, part in schema.items():
            if name in _NO_SCHEMA or (name == "fields" and kind == "dataclass"):
                continue
            if name == "fields":
                yield from self._look_at_fields(part, path, ser, val)
            else:
                for inner in _schemas(part):
                    yield from self.at(inner, path if name != "items_schema" else f"{path}[*]", ser, val)

    def _look_at_fields(self, fields: Any, path: str, ser: Schema, val: Schema) -> Iterator[tuple[str, str]]:
        named = _named(fields)
        for name, field in named:
            if field.get("serialization_exclude") is True:
                yield f"{path}.{name}", "is never written (exclude=True), so it is lost: remove it, or exclude=True"
            written = field.get("serialization_alias", name)
            if self._for_others and written not in _read_by(name, field):
                yield f"{path}.{name}", f"is written as {written!r}, by which it is not read: say alias={written!r}"
            if self._for_others and any(written == other for other, _ in named if other != name):
                yield f"{path}.{name}", f"is written as {written!r}, which is another field: give it another alias"
            yield from self.at(field["schema"], f"{path}.{name}", ser, val)

    def _wrong_key(self, schema: Schema) -> str | None:
        schema = self._bare(schema)
        kind = schema["type"]
        if "serialization" in schema or kind.startswith("function") or kind in {"chain", "custom-error"}:
            return None
        if kind == "union":
            return next((wrong for member in _members(schema) if (wrong := self._wrong_key(member))), None)
        if kind == "enum" and any(not isinstance(member.value, str) for member in schema["members"]):
            return "members of an enum that are no text"
        if kind == "literal" and any(not isinstance(value, str) for value in schema["expected"]):
            return "literals that are no text"
        return None if kind in _KEYS else f"of the kind {kind}"

    def _bare(self, schema: Schema) -> Schema:
        """The schema behind references and branches that JSON does not take."""
        while True:
            match schema["type"]:
                case "definition-ref":
                    schema = self._definitions[schema["schema_ref"]]
                case "json-or-python":
                    schema = schema["json_schema"]
                case "lax-or-strict":
                    schema = schema["lax_schema"]
                case "default" | "function-after" | "function-before" if "serialization" not in schema:
                    schema = schema["schema"]
                case _:
                    return schema

    def _wrong_member(self, schema: Schema, config: Schema) -> str | None:
        """What a sample of a member comes back as, where that is another."""
        whole: Any = {"type": "definitions", "schema": schema, "definitions": list(self._definitions.values())}
        try:
            write, read = SchemaSerializer(whole, cast("Any", config)), SchemaValidator(whole, cast("Any", config))
        except Exception:  # noqa: BLE001  a part that does not stand alone; values are compared all the same
            return None
        for member in _members(schema):
            with contextlib.suppress(Exception):  # validators of users refuse a sample as they like
                sample = self._sample(member)
                back = sample if sample is _MISSING else read.validate_json(write.to_json(sample, **WRITE), **READ)
                if type(sample) is not type(back):
                    return f"{article(type(sample).__name__)} comes back as {article(type(back).__name__)}"
        return None

    def _sample(self, schema: Schema, depth: int = 0) -> Any:
        """Some value of the type; `_MISSING` where none is at hand."""
        schema = self._bare(schema)
        kind = schema["type"]
        if depth > _DEEPEST_SAMPLE:
            return _MISSING
        if kind in _SAMPLES:
            return _SAMPLES[kind]
        if kind == "enum":
            return schema["members"][0]
        if kind in {"model", "dataclass"}:
            fields = _named(self._bare(schema["schema"]).get("fields", []))
            values = {name: self._sample(field["schema"], depth + 1) for name, field in fields}
            given = {name: value for name, value in values.items() if value is not _MISSING}
            with contextlib.suppress(Exception):  # constraints and validators of users
                return TypeAdapter(schema["cls"]).validate_python(given, **READ)
        return _MISSING


_SAMPLES: dict[str, Any] = {
    "str": "a",
    "int": 7,
    "float": 7.5,
    "bool": True,
    "none": None,
    "bytes": b"a",
    "decimal": Decimal("7.5"),
    "date": date(2026, 1, 2),
    "datetime": datetime(2026, 1, 2, 3, 4, 5),  # noqa: DTZ001  it is never compared with a moment
    "time": time(3, 4, 5),
    "timedelta": timedelta(seconds=7),
    "uuid": UUID(int=7),
}


def _read_by(name: str, field: Schema) -> set[object]:
    """The names by which a field is read: its own, and those aliases that are no path into something."""
    alias = field.get("validation_alias", [])
    if isinstance(alias, str):
        return {name, alias}
    paths = cast("list[Any]", alias if alias and isinstance(alias[0], list) else [alias])
    return {name, *(path[0] for path in paths if len(path) == 1)}


def _members(union: Schema) -> list[Schema]:
    """The schemas of a union's members, without their labels."""
    members = cast("list[Schema | tuple[Schema, str]]", union["choices"])
    return [member[0] if isinstance(member, tuple) else member for member in members]


def _named(fields: Any) -> list[tuple[str, Schema]]:
    """Fields by name, in the form of models or in that of dataclasses."""
    if isinstance(fields, dict):
        return list(cast("dict[str, Schema]", fields).items())
    return [(field["name"], field) for field in cast("list[Schema]", fields)]


def _schemas(part: object) -> Iterator[Schema]:
    """The schemas in one entry of a schema."""
    if isinstance(part, dict):
        inner = cast("dict[str, Any]", part)
        if isinstance(inner.get("type"), str):
            yield inner
        else:  # the choices of a tagged union
            for value in inner.values():
                yield from _schemas(value)
    elif isinstance(part, list | tuple):
        for value in cast("list[Any]", part):
            yield from _schemas(value)


def secret_in(schema: Any, name: str = "it") -> str | None:
    """The property of a JSON schema that is never written out, as pydantic's `SecretStr` is not; None without one."""
    inner: list[tuple[str, Any]] = []
    if isinstance(schema, dict):
        parts = cast("dict[str, Any]", schema)
        if parts.get("writeOnly") is True:
            return name
        for key, part in parts.items():
            named = key == "properties" and isinstance(part, dict)
            inner += cast("dict[str, Any]", part).items() if named else [(name, part)]
    elif isinstance(schema, list):
        inner = [(name, part) for part in cast("list[Any]", cast("object", schema))]
    return next((found for name, part in inner if (found := secret_in(part, name)) is not None), None)


def article(name: str) -> str:
    """The name with its article."""
    return f"an {name}" if name[:1] in "aeiouAEIO" else f"a {name}"
