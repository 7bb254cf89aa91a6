"""The convention by which every package is configured.

`XModule.for_root(settings)` appears once in an App, `XModule.for_feature(*parts)` once for each feature.

A module is one small class: its settings, what it requires, and one async context manager that starts, yields typed
services and stops. There is nothing else to learn: no scopes, providers, factories, plugin discovery or hooks. An
`App` runs them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
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

S = TypeVar("S", bound=Settings)
P = TypeVar("P")
T = TypeVar("T")


class Module(ABC, Generic[S, P]):
    """One package's entry in an App.

    `class EventsModule(Module[EventsSettings, EventRouter])` states the type of the settings and of the parts that
    features add (a union for several, `Never` for none).

    Attributes:
        settings: what `for_root` was given, or read from the environment.
        parts: what every `for_feature` of the App added, in order; set by the App before it asks `requires`.
    """

    settings_type: ClassVar[type[Settings]]
    part_types: ClassVar[tuple[type, ...]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for base in getattr(cls, "__orig_bases__", ()):
            if get_origin(base) is Module:
                settings, parts = get_args(base)
                cls.settings_type = settings
                cls.part_types = () if parts is Never else get_args(parts) or (parts,)

    def __init__(self, settings: S) -> None:
        self.settings = settings
        self.parts: tuple[P, ...] = ()

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

    def requires(self) -> Sequence[type[Module[Any, Any]]]:
        """The modules that must run before this one, as `settings` and `parts` make necessary."""
        return ()

    @abstractmethod
    def running(self, app: App) -> AbstractAsyncContextManager[Sequence[object]]:
        """Start, yield the services, stop; written with `@asynccontextmanager`.

        Inside, `app.get` finds the services of required modules, and `app.serve` registers the work that runs only
        while the App serves. A service with `async def health()` takes part in `App.health()`.
        """


@dataclass(frozen=True, slots=True)
class Feature:
    """What `for_feature` returns: parts, and the module whose root they belong to."""

    module: type[Module[Any, Any]]
    parts: tuple[object, ...]


class Binding(Generic[T]):
    """What a router, a trail or a breaker holds while a running App has bound it.

    Args:
        owner: names the thing in errors, such as `EventRouter('orders')`.
        remedy: the line that is missing when it is used unbound.
    """

    __slots__ = ("_owner", "_remedy", "value")

    def __init__(self, owner: str, *, remedy: str) -> None:
        self._owner = owner
        self._remedy = remedy
        self.value: T | None = None

    def get(self) -> T:
        """The bound value.

        Raises:
            NotBoundError: no running App has bound it.
        """
        if self.value is None:
            msg = f"{self._owner} was used outside a running App: {self._remedy}"
            raise NotBoundError(msg)
        return self.value

    @contextmanager
    def to(self, value: T) -> Generator[None, None, None]:
        """Bind for the length of the block.

        Raises:
            ConfigurationError: another running App of this process has bound it.
        """
        if self.value is not None:
            msg = f"{self._owner} belongs to an App that is already running in this process: stop that one first"
            raise ConfigurationError(msg)
        self.value = value
        try:
            yield
        finally:
            self.value = None
