"""The App that a command is about."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

from mainstay.cli.terminal import aside
from mainstay.core import App, ConfigurationError, Module, Settings

__all__ = ["ServiceError", "app_to_run", "named_app", "needed_app", "object_at", "settings_of"]

S = TypeVar("S", bound=Settings)

APP: ContextVar[str | None] = ContextVar("mainstay_cli_app", default=None)
VARIABLE = "MAINSTAY_APP"
_EXAMPLE = "orders.main:app"


class ServiceError(Exception):
    """An error of the service's own code, which is the cause of this one and is shown with its traceback.

    Args:
        status: the exit status of the command.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def object_at(place: str, kind: type[Any], example: str) -> Any:
    """Import what stands at `module:name`; modules of the current directory are found.

    What the module prints on standard output goes to standard error, since the former is the command's.

    Args:
        place: such as `orders.main:app`.
        kind: the class that it must be of.
        example: what to write, for the error.

    Raises:
        ConfigurationError: there is no such module or name, or it is of another class, or the module made one itself
            or ended the process.
        ServiceError: the module raised another error.
    """
    with aside():
        return _imported(place, kind, example)


@contextmanager
def _without_collector() -> Generator[None, None, None]:
    """Keep the garbage collector away: what is imported stays, and to look through it is a sixth of a start."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _imported(place: str, kind: type[Any], example: str) -> Any:
    name, _, attribute = place.partition(":")
    if not name or not attribute or name.startswith("."):
        msg = f"{place!r} names nothing: write module:name, such as {example}"
        raise ConfigurationError(msg)
    if "" not in sys.path and os.getcwd() not in sys.path:  # noqa: PTH109  sys.path holds strings
        sys.path.insert(0, "")
    try:
        with _without_collector():
            found: Any = importlib.import_module(name)
        for part in attribute.split("."):
            found = getattr(found, part, None)
    except ConfigurationError:
        raise
    except SystemExit as end:
        msg = f"{place!r}: the import of {name} exits ({end.code!r}), so there is nothing to look at"
        raise ConfigurationError(msg) from None
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is None or not f"{name}.".startswith(f"{missing}."):
            msg = f"{place!r}: the import of {name} failed"
            raise ServiceError(msg, 2) from error
        msg = f"{place!r}: there is no module {missing} here or among what is installed; write it as {example}"
        raise ConfigurationError(msg) from None
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
    place = _place()
    return None if not place else cast("App", object_at(place, App, _EXAMPLE))


def _place() -> str | None:
    return APP.get() or os.environ.get(VARIABLE)


def needed_app() -> App:
    """The same, where a command can do nothing without one.

    Raises:
        ConfigurationError: none is named.
    """
    return cast("App", object_at(_needed_place(), App, _EXAMPLE))


def app_to_run() -> App:
    """The same, for a worker: what its module prints on standard output stays there."""
    return cast("App", _imported(_needed_place(), App, _EXAMPLE))


def _needed_place() -> str:
    place = _place()
    if not place:
        msg = f"no App is named: pass --app {_EXAMPLE} or set {VARIABLE}"
        raise ConfigurationError(msg)
    return place


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
