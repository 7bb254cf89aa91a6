"""The convention by which every package is configured.

`XModule.for_root(settings)` appears once in an App, `XModule.for_feature(*parts)` once for each feature.

A module is one small class: its settings, what it requires, and one async context manager that starts, yields typed
services and stops. There is nothing else to learn: no scopes, providers, factories, plugin discovery or hooks. An
`App` runs them.
"""

from __future__ import annotations

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Generic,
    Never,
    Self,
    TypeVar,
    cast,
    get_args,
    get_origin,
)

from mainstay.core.errors import ConfigurationError, NotBoundError
from mainstay.core.settings import Settings

if TYPE_CHECKING:
    from mainstay.core.app import App

__all__ = ["Binding", "Feature", "Module"]

S = TypeVar("S", bound=Settings)
P = TypeVar("P")
T = TypeVar("T")


class Module(ABC, Generic[S, P]):
    """One package's entry in an App.

    `class EventsModule(Module[EventsSettings, EventRouter])` states the type of the settings and of the parts that
    features add (a union for several, `Never` for none).

    Attributes:
        name: the one word by which the package appears in health, logs, metrics and task names, such as `events`.
        settings: the ones that `for_root` was given, or read from the environment.
        parts: everything that the App's `for_feature` entries added, in order; set by the App before anything is asked.
        modules: all modules of the App, in the order in which they start; set by the App before `check`.
        looking: whether the App is started to be looked at, by `mainstay check` and `health`; `running` then changes
            nothing that is stored.

    Raises:
        TypeError: a subclass has no `name`, or one that is not a lower-case word.
    """

    name: ClassVar[str]
    settings_type: ClassVar[type[Settings]]
    part_types: ClassVar[tuple[type, ...]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for base in getattr(cls, "__orig_bases__", ()):
            if get_origin(base) is Module:
                settings, parts = get_args(base)
                cls.settings_type = settings
                cls.part_types = () if parts is Never else get_args(parts) or (parts,)
        name = getattr(cls, "name", None)
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            msg = f"{cls.__name__}.name is {name!r}; it is a lower-case word: name: ClassVar[str] = 'orders'"
            raise TypeError(msg)

    def __init__(self, settings: S) -> None:
        self.settings = settings
        self.parts: tuple[P, ...] = ()
        self.modules: tuple[Module[Any, Any], ...] = ()
        self.looking = False

    @classmethod
    def for_root(cls, settings: S | None = None) -> Self:
        """Configure the package, once in an App; without settings they are read from the environment.

        Raises:
            ConfigurationError: the settings are of another package, or the environment does not make valid ones.
        """
        if settings is None:
            try:
                settings = cast("S", cls.settings_type())
            except ConfigurationError as error:
                msg = f"{cls.__name__}.for_root: {error}"
                raise ConfigurationError(msg) from None
        elif not isinstance(settings, cls.settings_type):
            msg = (
                f"{cls.__name__}.for_root takes {cls.settings_type.__name__}, not {type(settings).__name__}: "
                f"write {cls.__name__}.for_root({cls.settings_type.__name__}(…))"
            )
            raise ConfigurationError(msg)
        return cls(settings)

    @classmethod
    def for_feature(cls, *parts: P) -> Feature:
        """Add what one feature brings to the package that `for_root` configures.

        Raises:
            ConfigurationError: a part is of a kind that this package does not take.
        """
        for part in parts:
            if not isinstance(part, cls.part_types):
                kinds = " or ".join(kind.__name__ for kind in cls.part_types) or "nothing"
                msg = f"{cls.__name__}.for_feature takes {kinds}, not {type(part).__name__} ({part!r})"
                raise ConfigurationError(msg)
        return Feature(cls, parts)

    @property
    def service_name(self) -> str | None:
        """What `settings` call the whole service; None where they do not."""
        return None

    def requires(self) -> Sequence[type[Module[Any, Any]]]:
        """The modules that must run before this one, as `settings` and `parts` make necessary."""
        return ()

    def yields(self) -> Sequence[type]:
        """The classes of the services that `running` will yield, as `settings` and `parts` make them."""
        return ()

    def functions(self) -> Iterable[Callable[..., Any]]:
        """The functions of `parts` that the App will call: handlers, steps, audited functions.

        `App` checks that every `given(…)` of theirs has a service, and that every router they use belongs to it.
        """
        return ()

    def check(self) -> None:
        """Find everything that is wrong with `settings`, `parts` and the settings of other `modules`, without starting.

        `App` calls this when it is constructed; nothing is connected or bound yet.

        Raises:
            ConfigurationError: names the thing and the remedy.
        """

    def describe(self) -> Mapping[str, Sequence[str]]:
        """What `parts` hold, for people: by kind, a line each. `mainstay describe` prints it; nothing is started."""
        return {}

    def only_looking(self) -> None:
        """Prepare for a start that changes nothing that is stored, such as by `mainstay check`: set `looking`."""
        self.looking = True

    async def inspect(self, app: App) -> Sequence[str]:
        """Look for what will go wrong once there is traffic, for `mainstay check`.

        Args:
            app: it is started, after `only_looking`, and does not serve.

        Returns:
            A sentence for each finding, which names the thing and the remedy; none where all is well.
        """
        del app
        return ()

    @abstractmethod
    def running(self, app: App) -> AbstractAsyncContextManager[Sequence[object]]:
        """Start, yield the services, stop; written with `@asynccontextmanager`.

        Inside, `app.get` finds the services of required modules; `app.background` takes work that runs from start to
        stop, `app.serve` work that runs only while the App serves. A service with `async def health()` takes part in
        `App.health()`.
        """


@dataclass(frozen=True, slots=True)
class Feature:
    """What `for_feature` returns: parts, and the module whose root they belong to."""

    module: type[Module[Any, Any]]
    parts: tuple[object, ...]


class Binding(Generic[T]):
    """The link from a router or a trail to the running App that has it; kept in its attribute `binding`.

    Args:
        kind: the class of its owner, such as `EventRouter`. Errors add the place in the code that made it.
        remedy: the line that is missing when it is used unbound, such as `EventsModule.for_feature(router)`; None for a
            thing that works unbound too.
    """

    __slots__ = ("owner", "remedy", "value")

    def __init__(self, kind: str, *, remedy: str | None) -> None:
        self.owner = f"the {kind} made at {_place_outside()}"
        self.remedy = remedy
        self.value: T | None = None

    def get(self) -> T:
        """The bound value.

        Raises:
            NotBoundError: no running App has bound it.
        """
        if self.value is None:
            msg = f"{self.owner} belongs to no running App: add {self.remedy} to the App, and use it while that runs"
            raise NotBoundError(msg)
        return self.value

    @contextmanager
    def to(self, value: T) -> Generator[None, None, None]:
        """Bind for the length of the block.

        Raises:
            ConfigurationError: another running App of this process has bound it.
        """
        if self.value is not None:
            msg = f"{self.owner} belongs to an App that is already running in this process: stop that one first"
            raise ConfigurationError(msg)
        self.value = value
        try:
            yield
        finally:
            self.value = None


def _place_outside() -> str:
    """The file and line, outside these packages, that is being run."""
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith("mainstay."):
        frame = frame.f_back
    return f"{frame.f_globals.get('__name__', '?')}:{frame.f_lineno}"
