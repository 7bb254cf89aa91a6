"""Values that cross a boundary come back equal: kept as JSON, read back and compared, or refused by name.

What is written to a record and read by another process passes through a type's serializer and its validator, which
agree less often than one thinks: a field and its alias, a subclass with fields of its own, `bytes` that are no UTF-8, a
`datetime` in an `Any`. `Kept` is the one place that looks. The *type* is looked at where it is declared, as far as it
says that its values can never come back equal; each *value* is read back when it is first written, and compared.

Fields are written and read by their own names, so that aliases, which are for other people's JSON, change nothing here.
Computed fields are not written. inf, nan and bytes have a form in JSON, except where a model has a config of its own.

What others read, such as an event, is kept `for_others`: by its aliases, and its owner decides when to look at a value.
So `Any`, which loses some values only, is refused, too.
"""

from __future__ import annotations

import contextlib
import json
import re
from functools import cached_property
from typing import Any, Generic, TypeVar, cast

from pydantic import ConfigDict, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_core import PydanticSerializationError, SchemaSerializer, SchemaValidator

from mainstay.core._equality import Found, differ
from mainstay.core._value_types import (
    READ,
    READ_FROM_OTHERS,
    WRITE,
    WRITE_FOR_OTHERS,
    Look,
    Schema,
    article,
    secret_in,
)

__all__ = ["Kept"]

T = TypeVar("T")

# What a type has no config of its own for.
_CONFIG = ConfigDict(ser_json_inf_nan="constants", ser_json_bytes="base64", val_json_bytes="base64")


_MOST_PROBLEMS = 5
_NAN = '; inf and nan are null in JSON, unless the config of their model says ser_json_inf_nan="strings"'


class Kept(Generic[T]):
    """A type whose values are kept as JSON.

    Args:
        kind: the type, with `Annotated` and everything that pydantic understands.
        what: what it is the type of, for messages: "step charge: its result".
        for_others: programs of others read and write it, too, by the aliases of its fields.
    """

    def __init__(self, kind: type[T], what: str, *, for_others: bool = False) -> None:
        self._kind: Any = kind
        self._refused = f"{what} cannot be {'published' if for_others else 'kept'}"
        self._for_others = for_others
        self._write = WRITE_FOR_OTHERS if for_others else WRITE
        self._read = READ_FROM_OTHERS if for_others else READ
        self._checked = False
        self._nan_is_null = False

    @property
    def nan_is_null(self) -> bool:
        """Whether a float is in it whose inf and nan are written as null: a null that is written may be one of them."""
        self.check()
        return self._nan_is_null

    def check(self) -> None:
        """Refuse a type whose values can never come back equal.

        Raises:
            TypeError: the message names the field, and the remedy.
        """
        if self._checked:  # a router is checked by each App that takes it, and to look at a type takes milliseconds
            return
        with contextlib.suppress(PydanticUserError):  # a type that JSON Schema cannot describe
            if (name := secret_in(self._adapter.json_schema(mode="serialization"))) is not None:
                msg = (
                    f"{self._refused}: {name} holds a secret, which would be written as asterisks; pass a "
                    "reference to it, and look it up where it is used"
                )
                raise TypeError(msg)
        config = cast("Schema", _CONFIG)
        look = Look(for_others=self._for_others)
        for path, reason in look.at(self._adapter.core_schema, "", config, config):
            msg = f"{self._refused}: {path.removeprefix('.') or 'it'} {reason}"
            raise TypeError(msg)
        self._nan_is_null = look.nan_is_null
        self._checked = True

    def write(self, value: T) -> str:
        """The value as JSON. Raises what `keep` does."""
        return self.keep(value)[0]

    def keep(self, value: T) -> tuple[str, T]:
        """The value as JSON, and what `read` makes of that.

        Raises:
            TypeError: it would not come back equal; the message names the field and both types, never the value.
        """
        try:
            written = self._serializer.to_json(value, **self._write)
            back: T = self._validator.validate_json(written, **self._read)
            text = written.decode()
        except ValidationError as error:
            problem = error.errors(include_url=False, include_context=False)[0]
            lost = problem["type"] == "float_type" and problem["input"] is None
            msg = f"{self._refused}: {_problems(error)[0]}{_NAN if lost else ''}"
            raise TypeError(msg) from None
        except (PydanticSerializationError, ValueError, RecursionError) as error:
            said = str(error).partition("\n")[0].partition(" [input_value")[0]
            msg = f"{self._refused}: {said}"
            raise TypeError(msg) from None
        except Exception as error:  # noqa: BLE001  the code of the type may raise anything
            msg = f"{self._refused}: {_broke(error)}"
            raise TypeError(msg) from None
        if (found := self._difference(value, back, written)) is not None:
            path, here, there = found
            name, other = type(here).__name__, type(there).__name__
            back_as = f"another {other}" if name == other else article(other)
            lost = isinstance(here, float) and there is None
            remedy = _NAN if lost else "; convert it first, or annotate it as what it is"
            msg = f"{self._refused} as annotated: {_at(path)}{article(name)} comes back as {back_as}{remedy}"
            raise TypeError(msg)
        return text, back

    def read(self, text: str) -> T:
        """What `keep` wrote, possibly by another release.

        Raises:
            ValueError: it does not fit the type; the message names the fields, never their values.
        """
        try:
            value: T = self._validator.validate_json(text, **self._read)
        except ValidationError as error:
            raise ValueError("; ".join(_problems(error))) from None
        except Exception as error:  # noqa: BLE001  the same
            raise ValueError(_broke(error)) from None
        return value

    def same(self, one: T, other: T) -> bool:
        """Whether two values are equal; those without an equality of their own by what is written of them."""
        return self._difference(one, other, None) is None

    def _difference(self, one: T, other: T, written: bytes | None) -> Found | None:
        opaque: list[Found] = []
        found = differ(one, other, "", opaque)
        if found is None and opaque:
            written = self._serializer.to_json(one, **self._write) if written is None else written
            # Read again, since a mapping may have been written in another order.
            if json.loads(written) != json.loads(self._serializer.to_json(other, **self._write)):
                return opaque[0]
        return found

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        kind = self._kind

        class Wrapped:
            """The type, in a form that lets a config be given from outside for what has none of its own."""

            @classmethod
            def __get_pydantic_core_schema__(cls, _source: object, handler: GetCoreSchemaHandler) -> Any:
                return handler.generate_schema(kind)

        try:
            adapter: TypeAdapter[Any] = TypeAdapter(Wrapped, config=_CONFIG)
            adapter.rebuild()
        except PydanticUserError as error:
            reason = error.message.partition("\n")[0]
            msg = f"{self._refused} as JSON: {reason}"
            raise TypeError(msg) from error
        return adapter

    @cached_property
    def _serializer(self) -> SchemaSerializer:
        return self._adapter.serializer

    @cached_property
    def _validator(self) -> SchemaValidator:
        return cast("SchemaValidator", self._adapter.validator)


_IDENTIFIER = re.compile(r"[^\W\d]\w*")


def _hidden(location: tuple[int | str, ...]) -> str:
    """A place as pydantic names it, without the keys of mappings that are no names."""
    return "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" if _IDENTIFIER.fullmatch(part) else "[*]"
        for part in location
    )


def _problems(error: ValidationError) -> list[str]:
    """What is wrong with which field, the first few of them; never a value, which may be anybody's secret."""
    found = error.errors(include_input=False, include_url=False, include_context=False)[:_MOST_PROBLEMS]
    return [f"{_at(_hidden(problem['loc']))}{problem['msg']}" for problem in found]


def _broke(error: Exception) -> str:
    """What a validator of the type raised, and where; its text may be of somebody's data."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "its type" if trace is None else trace.tb_frame.f_code.co_qualname
    return f"{where} raised {type(error).__name__}"


def _at(path: str) -> str:
    return f"{path.removeprefix('.')}: " if path else ""
