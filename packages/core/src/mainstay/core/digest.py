"""A short text that stands for a value: equal for equal values, in each process and in later releases.

It is what a record keeps of a value that is only ever compared. The order of a set or of a mapping does not count. Of
models and dataclasses it says the fields that were given and are not their defaults, so that a release may add a field
with a default, and a field that is filled by `uuid4` or by the clock does not make each one another.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from enum import Enum
from typing import Any, cast

from pydantic import BaseModel
from pydantic_core import to_json

__all__ = ["digest"]


def digest(value: object) -> str:
    """32 hexadecimal digits for a value.

    Args:
        value: what JSON has, and models, dataclasses, sets, enumerations, dates, Decimal, UUID, bytes. Of a value of
            any other type that pydantic cannot write, only the type counts.
    """
    return hashlib.sha256(_text(value).encode()).hexdigest()[:32]


def _text(value: Any) -> str:
    if isinstance(value, Enum):
        return _text(value.value)
    if value is None or isinstance(value, str | bool | int | float):
        return json.dumps(value)
    if isinstance(value, BaseModel):
        return _members(_given(value))
    if isinstance(value, Mapping):
        return _members(cast("Mapping[object, Any]", value).items())
    if isinstance(value, list | tuple | deque):
        return f"[{','.join(map(_text, cast('Iterable[Any]', value)))}]"
    if isinstance(value, AbstractSet):
        return f"<{','.join(sorted(map(_text, cast('Iterable[Any]', value))))}>"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _members(_not_default(value))
    return to_json(value, bytes_mode="hex", inf_nan_mode="constants", fallback=_type_of).decode()


def _members(pairs: Iterable[tuple[Any, Any]]) -> str:
    return f"{{{','.join(sorted(f'{_text(name)}:{_text(value)}' for name, value in pairs))}}}"


def _given(model: BaseModel) -> Iterator[tuple[str, Any]]:
    fields = type(model).model_fields
    for name in model.model_fields_set:
        value, field = getattr(model, name), fields.get(name)
        if field is None or not _is_default(value, field.default, field.default_factory):
            yield name, value


def _not_default(value: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(value):
        here = getattr(value, field.name)
        if not _is_default(here, field.default, field.default_factory):
            yield field.name, here


def _is_default(value: object, default: object, factory: object) -> bool:
    if any(factory is empty for empty in (list, dict, set, tuple, frozenset)):
        return not value
    return type(value) is type(default) and _text(value) == _text(default)


def _type_of(value: object) -> str:
    return type(value).__qualname__
