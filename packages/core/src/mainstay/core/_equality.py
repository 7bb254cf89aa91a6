"""Whether two values are equal by value, and where they are not."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from collections.abc import Set as AbstractSet
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Any, cast
from uuid import UUID

from pydantic import BaseModel

_PLAIN = frozenset({str, int, bool, type(None), bytes, Decimal, UUID, date, timedelta, complex})

Found = tuple[str, object, object]
"""The first place where two values are not equal, and both values there."""


def differ(one: Any, other: Any, path: str, opaque: list[Found]) -> Found | None:
    """Where two values are not equal; None where they are.

    Types count, so that `True` is not 1; an int that stands for a float, as Python's typing allows, is equal to it.

    Args:
        one, other: the values.
        path: where they are within the whole.
        opaque: collects pairs of a type without an equality of its own, which this cannot judge.
    """
    kind: type[Any] = one.__class__
    if kind is not type(other):
        return None if kind is int and type(other) is float and one == other else (path, one, other)
    if one is other:
        return None
    if kind in _PLAIN:
        return None if one == other else (path, one, other)
    compare = _comparison(cast("Hashable", kind))
    if compare is not None:
        return compare(one, other, path, opaque)
    if dataclasses.is_dataclass(kind):
        return _attributes(one, other, [field.name for field in dataclasses.fields(kind)], path, opaque)
    if cast("object", kind.__eq__) is object.__eq__:
        opaque.append((path, one, other))
        return None
    return None if _equal(one, other) else (path, one, other)


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:  # noqa: BLE001  an equality that fails says no
        return False


def _floats(one: float, other: float, path: str, _opaque: list[Found]) -> Found | None:
    return None if one == other or (one != one and other != other) else (path, one, other)  # noqa: PLR0124  nan


def _moments(one: Any, other: Any, path: str, _opaque: list[Found]) -> Found | None:
    same = one == other and (one.tzinfo is None) == (other.tzinfo is None) and one.utcoffset() == other.utcoffset()
    return None if same else (path, one, other)


def _sequences(one: Any, other: Any, path: str, opaque: list[Found]) -> Found | None:
    if len(one) != len(other):
        return path, one, other
    names = getattr(one, "_fields", None)
    for number, (here, there) in enumerate(zip(one, other, strict=True)):
        found = differ(here, there, f"{path}.{names[number]}" if names else f"{path}[{number}]", opaque)
        if found is not None:
            return found
    return None


def _sets(one: Any, other: Any, path: str, opaque: list[Found]) -> Found | None:
    there = {element: element for element in other}
    if len(one) != len(there):
        return path, one, other
    for element in one:
        if element not in there:
            return f"{path}[*]", element, next(iter(other))
        if (found := differ(element, there[element], f"{path}[*]", opaque)) is not None:
            return found
    return None


def _mappings(one: Any, other: Any, path: str, opaque: list[Found]) -> Found | None:
    keys = {key: key for key in other}
    if len(one) != len(keys):
        return path, one, other
    for key, value in one.items():
        if key not in keys:
            return f"{path}[key]", key, next(iter(other))
        named = f"{path}.{key}" if isinstance(key, str) and key.isidentifier() else f"{path}[*]"
        found = differ(key, keys[key], f"{path}[key]", opaque) or differ(value, other[key], named, opaque)
        if found is not None:
            return found
    return None


def _models(one: BaseModel, other: BaseModel, path: str, opaque: list[Found]) -> Found | None:
    return (
        _attributes(one, other, type(one).__pydantic_fields__, path, opaque)
        or differ(one.__pydantic_extra__, other.__pydantic_extra__, path, opaque)
        or differ(one.__pydantic_private__, other.__pydantic_private__, path, opaque)
    )


def _attributes(one: object, other: object, names: Any, path: str, opaque: list[Found]) -> Found | None:
    for name in names:
        here, there = getattr(one, name, _ABSENT), getattr(other, name, _ABSENT)
        if (found := differ(here, there, f"{path}.{name}", opaque)) is not None:
            return found
    return None


_ABSENT = object()

_Compare = Callable[[Any, Any, str, list[Found]], Found | None]

# Those that a value may be a subclass of; the types themselves are equal already.
_COMPARED: tuple[tuple[type, _Compare], ...] = (
    (BaseModel, _models),
    (Mapping, _mappings),
    (list, _sequences),
    (tuple, _sequences),
    (deque, _sequences),
    (AbstractSet, _sets),
    (float, _floats),
    (datetime, _moments),
    (time, _moments),
)


@lru_cache(maxsize=1_024)
def _comparison(kind: type[Any]) -> _Compare | None:
    """How values of a type are compared; kept, since abstract base classes take long to answer."""
    return next((compare for base, compare in _COMPARED if issubclass(kind, base)), None)
