"""What a function takes and returns, as JSON text: the form in which inputs and results are kept.

Every value is written through the type that the function states for it and read back through the same type, also the
first time: code that sees a result live sees what it will see on replay.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Awaitable, Callable, Mapping
from functools import cached_property
from typing import Any, Literal, NotRequired, cast, get_type_hints

from pydantic import TypeAdapter
from pydantic.errors import PydanticUserError
from pydantic_core import PydanticSerializationError
from typing_extensions import TypedDict

from mainstay.core import given_kinds

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Signature:
    """The parameters and the result of an async function.

    Args:
        function: may be wrapped by decorators that keep `__wrapped__`, as `functools.wraps` does.
        kind: what the function is, for messages.

    Raises:
        TypeError: it is no async function, or takes `*args` or `**kwargs`. Annotations are looked at by `check`, when
            everything that they name is defined.
    """

    def __init__(self, function: Callable[..., Any], *, kind: str) -> None:
        self.function = function
        self.name: str = getattr(function, "__name__", type(function).__name__)
        self.kind = kind
        if not (inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(inspect.unwrap(function))):
            msg = f"{kind} {self.name} must be an `async def` function"
            raise TypeError(msg)
        self.given = given_kinds(function)
        if self.given and kind == "workflow":
            names = ", ".join(self.given)
            msg = f"workflow {self.name} is given {names}, which a replay must not depend on: give it to its steps"
            raise TypeError(msg)
        whole = inspect.signature(function)
        # The services are the App's: no part of what is kept.
        kept = [parameter for name, parameter in whole.parameters.items() if name not in self.given]
        self._signature = whole.replace(parameters=kept)
        for parameter in self._signature.parameters.values():
            if parameter.kind in {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
                msg = f"{kind} {self.name} takes *{parameter.name}: name each parameter, so that its input can be kept"
                raise TypeError(msg)
        self.parameters = tuple(self._signature.parameters)
        self._positional = tuple(p.name for p in self._signature.parameters.values() if p.kind in _POSITIONAL)

    @cached_property
    def _hints(self) -> dict[str, Any]:
        function = inspect.unwrap(self.function)
        try:
            hints = get_type_hints(function, include_extras=True)
        except NameError as error:
            msg = f"{self.kind} {self.name}: its annotations name {error.name!r}, which its module does not define"
            raise TypeError(msg) from error
        for name in (*self.parameters, "return"):
            if name not in hints:
                what = "result" if name == "return" else f"parameter {name}"
                msg = f"{self.kind} {self.name}: annotate its {what}, so that it can be kept as JSON"
                raise TypeError(msg)
        return hints

    @cached_property
    def _arguments(self) -> TypeAdapter[Any]:
        optional = {p.name for p in self._signature.parameters.values() if p.default is not p.empty}
        fields: dict[str, Any] = {
            name: NotRequired[self._hints[name]] if name in optional else self._hints[name] for name in self.parameters
        }
        return self._adapter(TypedDict(f"{self.name}_arguments", fields), "parameters")  # type: ignore[operator]  # built from a signature

    @cached_property
    def _result(self) -> TypeAdapter[Any]:
        return self._adapter(self._hints["return"], "result")

    def _adapter(self, kind: Any, what: str) -> TypeAdapter[Any]:
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(kind)
        except PydanticUserError as error:
            msg = f"{self.kind} {self.name}: its {what} cannot be kept as JSON: {error.message}"
            raise TypeError(msg) from error
        with contextlib.suppress(PydanticUserError):  # a type that JSON Schema cannot describe
            if _hides(adapter.json_schema(mode="serialization")):
                msg = (
                    f"{self.kind} {self.name}: its {what} hold a secret, which would be kept as asterisks: pass a "
                    "reference to it, and look it up in the step"
                )
                raise TypeError(msg)
        return adapter

    def hint(self, of: int | Literal["return"]) -> Any:
        """The type of a parameter, by its place, or of the result."""
        return self._hints[of if isinstance(of, str) else self.parameters[of]]

    def check(self) -> None:
        """Resolve every annotation.

        Raises:
            TypeError: one is missing, names nothing, or is of a type that cannot be kept as JSON.
        """
        _ = self._arguments, self._result

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by name.

        Raises:
            TypeError: they do not fit the function.
        """
        if not kwargs and len(args) == len(self._positional) == len(self.parameters):
            return dict(zip(self._positional, args, strict=True))
        try:
            return self._signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            msg = f"{self.kind} {self.name}: {error}"
            raise TypeError(msg) from None

    def dump_arguments(self, arguments: Mapping[str, Any]) -> str:
        """Arguments by name as a JSON object.

        Raises:
            TypeError: a value is not of its parameter's type.
        """
        return self._keep(self._arguments, arguments, "arguments")[0]

    def load_arguments(self, text: str) -> dict[str, Any]:
        """What `dump_arguments` wrote."""
        arguments: dict[str, Any] = self._arguments.validate_json(text)
        return arguments

    def keep_result(self, value: object) -> tuple[str, Any]:
        """A result as JSON, and what `load_result` will make of that.

        Raises:
            TypeError: it is not of the type that the function states.
        """
        return self._keep(self._result, value, "result")

    def load_result(self, text: str) -> Any:
        """What `keep_result` wrote."""
        return self._result.validate_json(text)

    def _keep(self, adapter: TypeAdapter[Any], value: object, what: str) -> tuple[str, Any]:
        try:
            text = adapter.serializer.to_json(value, warnings="error")
            # Not every wrong value is noticed when it is written, and a record that cannot be read is worth nothing.
            return text.decode(), adapter.validator.validate_json(text)
        except (PydanticSerializationError, ValueError) as error:
            msg = f"{self.kind} {self.name}: its {what} cannot be kept as its annotation says: {error}"
            raise TypeError(msg) from None

    def call(
        self, arguments: Mapping[str, Any], *leading: object, function: Callable[..., Awaitable[Any]] | None = None
    ) -> Awaitable[Any]:
        """Call the function, or another with the same parameters after `leading` ones, with arguments by name."""
        arguments = dict(arguments)
        positional: list[object] = []
        for name in self._positional:
            if name not in arguments:
                break
            positional.append(arguments.pop(name))
        called: Awaitable[Any] = (function or self.function)(*leading, *positional, **arguments)
        return called


def _hides(schema: object) -> bool:
    """Whether a JSON schema has a part that is never written out, as pydantic's `SecretStr` is not."""
    if isinstance(schema, dict):
        parts = cast("dict[str, object]", schema)
        return parts.get("writeOnly") is True or any(map(_hides, parts.values()))
    return isinstance(schema, list) and any(map(_hides, cast("list[object]", schema)))
