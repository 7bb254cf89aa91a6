"""The App that a command is about."""

from __future__ import annotations

import importlib
import os
import sys
from contextvars import ContextVar
from typing import Any, TypeVar, cast

from mainstay.core import App, ConfigurationError, Module, Settings

__all__ = ["named_app", "object_at", "settings_of"]

S = TypeVar("S", bound=Settings)

APP: ContextVar[str | None] = ContextVar("mainstay_cli_app", default=None)
VARIABLE = "MAINSTAY_APP"


def object_at(place: str, kind: type[Any], example: str) -> Any:
    """Import what stands at `module:name`; modules of the current directory are found.

    Args:
        place: such as `orders.main:app`.
        kind: the class that it must be of.
        example: what to write, for the error.

    Raises:
        ConfigurationError: there is no such module or name, or it is of another class. An error inside the module
            passes as it is, if it is not an import of the module itself.
    """
    name, _, attribute = place.partition(":")
    if not name or not attribute:
        msg = f"{place!r} names nothing: write module:name, such as {example}"
        raise ConfigurationError(msg)
    if "" not in sys.path and os.getcwd() not in sys.path:  # noqa: PTH109  sys.path holds strings
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        msg = f"{place!r}: there is no module {error.name} here or among what is installed; write it as {example}"
        raise ConfigurationError(msg) from None
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, kind):
        what = "there is nothing" if found is None else f"there is a {type(found).__name__}, not a {kind.__name__},"
        msg = f"{what} at {place!r}: write module:name, such as {example}"
        raise ConfigurationError(msg)
    return found


def named_app() -> App | None:
    """The App that `--app` or MAINSTAY_APP names; None without either.

    Raises:
        ConfigurationError: there is no App there.
    """
    place = APP.get() or os.environ.get(VARIABLE)
    return None if not place else cast("App", object_at(place, App, "orders.main:app"))


def needed_app() -> App:
    """The same, where a command can do nothing without one.

    Raises:
        ConfigurationError: none is named.
    """
    app = named_app()
    if app is None:
        msg = f"no App is named: pass --app orders.main:app or set {VARIABLE}"
        raise ConfigurationError(msg)
    return app


def settings_of(module: type[Module[S, Any]]) -> S:
    """The settings of a package: those of the named App, without one those of the environment.

    Raises:
        ConfigurationError: the App lacks the module, or the environment makes no valid settings.
    """
    app = named_app()
    if app is None:
        return cast("S", module.settings_type())
    for each in app.modules:
        if type(each) is module:
            return each.settings
    msg = f"the App has no {module.__name__}: add {module.__name__}.for_root() to it"
    raise ConfigurationError(msg)
