"""What a function takes and returns, as JSON text: the form in which inputs and results are kept.

Every value is written through the type that the function states for it and read back through the same type, also the
first time (`mainstay.core.values`): code that sees a result live sees what it will see on replay.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Awaitable, Callable, Mapping
from functools import cached_property
from typing import Any, Literal, NotRequired, get_type_hints

from typing_extensions import TypedDict

from mainstay.core import Kept, digest, given_kinds

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Signature:
    """The parameters and the result of a function.

    Args:
        function: may be wrapped by decorators that keep `__wrapped__`, as `functools.wraps` does.
        kind: what the function is, for messages.

    Raises:
        TypeError: it is no function of its kind, or takes `*args` or `**kwargs`. Annotations are looked at by `check`,
            when everything that they name is defined.
    """

    def __init__(self, function: Callable[..., Any], *, kind: str) -> None:
        self.function = function
        self.name: str = getattr(function, "__name__", type(function).__name__)
        self.kind = kind
        if kind in {"step", "workflow"} and _no_plain_function(function):
            msg = (
                f"a {kind} is a plain `async def` function, and not a {type(function).__name__}: its name and its "
                "parameters are part of records. Write a function that calls it"
            )
            raise TypeError(msg)
        if not is_async(function) and (kind == "workflow" or not _may_be_in_a_thread(function)):
            which = "an `async def`" if kind == "workflow" else "an `async def` or a `def`"
            msg = f"{kind} {self.name} must be {which} function"
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
        self._defaults = {
            name: parameter.default
            for name, parameter in self._signature.parameters.items()
            if parameter.default is not parameter.empty
        }
        self._positional = tuple(p.name for p in self._signature.parameters.values() if p.kind in _POSITIONAL)
        self.keywords = tuple(p.name for p in self._signature.parameters.values() if p.kind is not p.POSITIONAL_ONLY)

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
    def _arguments(self) -> Kept[Mapping[str, Any]]:
        fields: dict[str, Any] = {
            name: NotRequired[self._hints[name]] if name in self._defaults else self._hints[name]
            for name in self.parameters
        }
        kind: Any = TypedDict(f"{self.name}_arguments", fields)  # type: ignore[misc]  # built from a signature
        return Kept(kind, f"{self.kind} {self.name}: its arguments")

    @cached_property
    def _result(self) -> Kept[Any]:
        return Kept(self._hints["return"], f"{self.kind} {self.name}: its result")

    def hint(self, of: int | Literal["return"]) -> Any:
        """The type of a parameter, by its place, or of the result."""
        return self._hints[of if isinstance(of, str) else self.parameters[of]]

    def check(self) -> None:
        """Resolve every annotation, and refuse types and defaults that would not come back equal.

        Raises:
            TypeError: an annotation is missing, names nothing, or is of a type that cannot be kept as JSON.
        """
        self._arguments.check()
        self._result.check()
        for name, default in self._defaults.items():
            kept: Kept[object] = Kept(
                self._hints[name], f"{self.kind} {self.name}: the default of its parameter {name}"
            )
            kept.keep(default)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by name, defaults among them: a run keeps those that it was started with.

        Raises:
            TypeError: they do not fit the function.
        """
        if not kwargs and len(args) == len(self._positional) == len(self.parameters):
            return dict(zip(self._positional, args, strict=True))
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            msg = f"{self.kind} {self.name}: {error}"
            raise TypeError(msg) from None
        bound.apply_defaults()
        return bound.arguments

    def dump_arguments(self, arguments: Mapping[str, Any]) -> str:
        """Arguments by name as a JSON object. Raises what `keep_arguments` does."""
        return self._arguments.write(arguments)

    def keep_arguments(self, arguments: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
        """Arguments by name as a JSON object, and what `load_arguments` will make of that.

        Raises:
            TypeError: a value would not come back equal as its parameter's type.
        """
        return self._arguments.keep(arguments)

    def load_arguments(self, text: str) -> dict[str, Any]:
        """What `dump_arguments` wrote, possibly by a release whose function had fewer parameters.

        Raises:
            ValueError: it does not fit the parameters.
        """
        return {**self._defaults, **self._arguments.read(text)}

    def given_arguments(self, text: str) -> dict[str, Any]:
        """What `load_arguments` gives, without what the function would have as a default."""
        defaults = {name: digest(default) for name, default in self._defaults.items()}
        return {
            name: value for name, value in self._arguments.read(text).items() if digest(value) != defaults.get(name)
        }

    def fit_arguments(self, text: str) -> dict[str, Any]:
        """What `load_arguments` gives, where nothing of the text is left over: it may have been written by hand.

        Raises:
            ValueError: it does not fit the parameters, or has values for others.
        """
        arguments = self.load_arguments(text)
        surplus = json.loads(text).keys() - self.parameters
        if surplus:
            msg = f"it has no parameter {', '.join(sorted(surplus))}"
            raise ValueError(msg)
        return arguments

    def same_arguments(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Whether arguments by name are equal by value, in any order of a set or a mapping."""
        return self._arguments.same(one, other)

    def differing(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
        """The names of the parameters whose arguments are not equal by value."""
        if self.same_arguments(one, other):
            return []
        names = [name for name in self.parameters if not self.same_arguments(one, {**one, name: other[name]})]
        return names or list(self.parameters)

    def keep_result(self, value: object) -> tuple[str, Any]:
        """A result as JSON, and what `load_result` will make of that.

        Raises:
            TypeError: it would not come back equal as the type that the function states.
        """
        return self._result.keep(value)

    def load_result(self, text: str) -> Any:
        """What `keep_result` wrote.

        Raises:
            ValueError: it does not fit the type that the function states.
        """
        return self._result.read(text)

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


def _no_plain_function(function: object) -> bool:
    return isinstance(function, functools.partial | classmethod | staticmethod) or inspect.ismethod(function)


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a function, or what is inside its decorators, is an `async def`."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(inspect.unwrap(function))


def _may_be_in_a_thread(function: Callable[..., Any]) -> bool:
    inner = inspect.unwrap(function)
    generates = inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner)
    return inspect.isfunction(inner) and not generates
