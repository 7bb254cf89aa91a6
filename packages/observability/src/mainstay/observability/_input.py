"""What an invalid request is told: where it is wrong and what is expected there, and nothing of what was sent.

Three things could repeat the input. Messages: pydantic puts what was sent into some of its own, and those of validators
are code of others; so a message is made anew by pydantic from the kind of mistake and what the model expects, or is a
sentence of ours. A validator that wants to say something to the caller raises a `MainstayError` that is a `ValueError`,
too: its public message is shown. Locations: a key of a mapping is input; so a name is shown only where the model has
it. And the input itself, which pydantic puts beside each mistake.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any, cast, get_args

from pydantic import TypeAdapter
from pydantic_core import PydanticKnownError
from pydantic_core.core_schema import ErrorType

from mainstay.core import FieldError, MainstayError

SHOWN = 100
"""So many mistakes are told; a body may have as many as it has values."""

_KNOWN = frozenset(get_args(ErrorType))
_UNKNOWN = "Input is not valid"
# Messages that pydantic makes of the input, or of what was raised over it.
_TELLING = {
    "assertion_error": _UNKNOWN,
    "bytes_invalid_encoding": "Data is not in the expected encoding",
    "date_from_datetime_parsing": "Input should be a valid date",
    "date_parsing": "Input should be a valid date in the format YYYY-MM-DD",
    "datetime_from_date_parsing": "Input should be a valid datetime or date",
    "datetime_object_invalid": "Invalid datetime object",
    "datetime_parsing": "Input should be a valid datetime",
    "get_attribute_error": "Error extracting attribute",
    "iteration_error": "Error iterating over object",
    "json_invalid": "Input should be valid JSON",
    "mapping_type": "Input should be a valid mapping",
    "time_delta_parsing": "Input should be a valid duration",
    "time_parsing": "Input should be in a valid time format",
    "timezone_offset": "The offset from UTC is not the expected one",
    "union_tag_invalid": "The tag names none of the expected kinds",
    "url_parsing": "Input should be a valid URL",
    "url_syntax_violation": "Input violated strict URL syntax rules",
    "uuid_parsing": "Input should be a valid UUID",
    "value_error": _UNKNOWN,
}
_CHOSEN = "*"
_PLACES = frozenset({"body", "query", "path", "header", "cookie", "response"})
# Names under which pydantic-core keeps what is not part of a value's form.
_SKIPPED = frozenset({"metadata", "serialization", "default", "expected", "ref", "schema_ref"})
_LONGEST = 128


def told(mistakes: Iterable[Mapping[str, Any]], names: Collection[str]) -> tuple[FieldError, ...]:
    """The mistakes as a caller is told them, as many as are shown.

    Args:
        mistakes: as pydantic lists them.
        names: those of the model, which are no input.
    """
    found = list[FieldError]()
    for mistake in mistakes:
        if len(found) == SHOWN:
            break
        kind, message = _said(mistake)
        place, *rest = mistake.get("loc") or ("body",)
        location = [_shown(place, _PLACES), *(_shown(part, names) for part in rest)]
        found.append(FieldError(tuple(location), message, kind))
    return tuple(found)


def _said(mistake: Mapping[str, Any]) -> tuple[str, str]:
    kind, context = str(mistake.get("type", "value_error")), cast("dict[str, Any]", mistake.get("ctx") or {})
    own = context.get("error")
    if isinstance(own, MainstayError):
        return own.code, own.public_message
    if kind not in _KNOWN:  # a validator's own; its type is a literal, its message may hold anything
        return kind[:_LONGEST], _UNKNOWN
    if kind in _TELLING:
        return kind, _TELLING[kind]
    try:
        return kind, PydanticKnownError(cast("ErrorType", kind), context or None).message()
    except Exception:  # noqa: BLE001  a mistake that has pydantic's name and was not made by pydantic
        return kind, _UNKNOWN


def _shown(part: object, names: Collection[str]) -> str | int:
    if isinstance(part, int):
        return int(part)
    return part if isinstance(part, str) and part in names else _CHOSEN


def names_of(annotations: Iterable[object]) -> frozenset[str]:
    """Every name that a mistake in a value of one of these types can have in its location."""
    names = set[str]()
    for annotation in annotations:
        with suppress(Exception):  # a type of others; its names are then not known, and not shown
            names |= _names_of(annotation)
    return frozenset(names)


@lru_cache(maxsize=1024)
def _names_of(annotation: Any) -> frozenset[str]:
    names, left, seen = set[str](), list[object]([TypeAdapter[Any](annotation).core_schema]), set[int]()
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, Mapping):
            node = cast("Mapping[str, object]", each)
            names.update(_names_in(node))
            left.extend(value for name, value in node.items() if name not in _SKIPPED)
        elif isinstance(each, list | tuple):
            left.extend(cast("Iterable[object]", each))
    return frozenset(names)


def _names_in(node: Mapping[str, object]) -> Iterator[str]:
    """The names that one node of a core schema brings: of fields, their aliases, tags and alternatives of a union."""
    for place in ("type", "name", "alias", "cls_name"):
        if isinstance(name := node.get(place), str):
            yield name
    if isinstance(kind := node.get("cls"), type):
        yield kind.__name__
    for place in ("fields", "choices"):
        inside = node.get(place)
        if isinstance(inside, Mapping):
            yield from (str(name) for name in cast("Mapping[object, object]", inside))
        elif isinstance(inside, list) and place == "choices":
            for choice in cast("list[object]", inside):
                if isinstance(choice, tuple):  # a schema and what it is called
                    yield from _texts(cast("tuple[object, ...]", choice)[1:])
    alias = node.get("validation_alias")
    yield from _texts(alias)


def _texts(alias: object) -> Iterator[str]:
    """The texts in an alias: one, a path, or several of them."""
    if isinstance(alias, str):
        yield alias
    elif isinstance(alias, list | tuple):
        for each in cast("Iterable[object]", alias):
            yield from _texts(each)
