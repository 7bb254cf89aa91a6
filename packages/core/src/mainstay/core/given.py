"""Services for handlers, steps and other functions that an App runs: `db: Database = given(Database)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Never, TypeVar, cast

from mainstay.core.errors import ConfigurationError, NotBoundError

__all__ = ["given", "given_kinds"]

T = TypeVar("T")


class _Given:
    """The default that stands for a service until an App fills it in."""

    __slots__ = ("kind",)

    def __init__(self, kind: type) -> None:
        self.kind = kind

    def __getattr__(self, name: str) -> Never:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)  # copying, pickling and inspecting ask for those
        kind = self.kind.__name__
        msg = (
            f"given({kind}) has not been filled in: an App does that for the functions that it runs; "
            f"a test that calls the function itself passes a {kind}"
        )
        raise NotBoundError(msg)

    def __repr__(self) -> str:
        return f"given({self.kind.__name__})"


def given(kind: type[T]) -> T:
    """The default of a keyword-only parameter that the App fills with its service of exactly this class.

        @events.on(TicketSold, group="counts")
        async def count(event: TicketSold, *, db: Database = given(Database)) -> None: ...

    A test that calls the function passes its own. A class that no module of the App yields is an error of `App(…)`.

    Raises:
        TypeError: `kind` is no class.
    """
    if not isinstance(cast("object", kind), type):
        msg = f"given({kind!r}): it takes a class, such as given(Database)"
        raise TypeError(msg)
    return cast("T", _Given(kind))


def given_kinds(function: Callable[..., Any]) -> dict[str, type]:
    """The parameters of `function` that an App fills in, and the class of each.

    Raises:
        ConfigurationError: one of them is not keyword-only.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # not every built-in has a signature
        return {}
    found: dict[str, type] = {}
    for parameter in parameters:
        if isinstance(parameter.default, _Given):
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
                name = getattr(function, "__qualname__", repr(function))
                msg = f"{name}: {parameter} must be keyword-only: put `*,` before it"
                raise ConfigurationError(msg)
            found[parameter.name] = parameter.default.kind
    return found
