"""The App: starts modules in the order of their needs, serves, drains, and stops them in reverse."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial, wraps
from math import inf
from typing import Any, Self, TypeVar, cast, overload

from mainstay.core import _process
from mainstay.core._composition import AnyModule, composed
from mainstay.core._health_round import HealthRound, parts_of
from mainstay.core._metrics_folder import check_folder
from mainstay.core._work import Crew, Work, ended_by
from mainstay.core.clock import SYSTEM_CLOCK, Clock
from mainstay.core.errors import ConfigurationError, NotBoundError
from mainstay.core.given import given_kinds
from mainstay.core.health import Health
from mainstay.core.module import Feature
from mainstay.core.settings import refuse_misspelt_prefixes

__all__ = ["App", "Work"]

T = TypeVar("T")

_log = logging.getLogger("mainstay.core")

check_folder()

_LEAST_DRAIN_SECONDS = 1.0  # for work that is drained after other work has used up the drain time
_STOP_SECONDS = 5.0  # after the drain time: for the modules' own stops


class App:
    """A service, put together from modules.

    Args:
        modules: `XModule.for_root(…)` once for each package, `XModule.for_feature(…)` as often as there are features.
        drain_seconds: how long work in progress may take to finish when the App stops.
        health_seconds: how long one part's health may take to answer before it counts as down.
        clock: what every module measures time with.

    Attributes:
        modules: in the order in which they start.
        worker: whether `run` runs it, so that the process has no other server.

    Raises:
        ConfigurationError: anything that is wrong and can be seen without starting: a missing requirement, a second
            root, a feature without its root, a circle of requirements, settings or parts that a module refuses, a
            function that is given a service or uses a router that the App does not have, an environment variable with
            a misspelt prefix. The message names the line to write.
    """

    def __init__(
        self,
        *modules: AnyModule | Feature,
        drain_seconds: float = 30.0,
        health_seconds: float = 2.0,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.clock = clock
        self.health_seconds = health_seconds
        self.modules: Sequence[AnyModule] = composed(modules)
        refuse_misspelt_prefixes([module.settings_type for module in self.modules])
        self._drain_seconds = drain_seconds
        self._services: dict[type, object] = {}
        self._owners: dict[type, str] = {}
        self._health_round = HealthRound(health_seconds)
        self._crashes: dict[str, BaseException] = {}
        self._stuck: list[str] = []
        self._until: asyncio.Event | None = None
        self._drained_at = self._stopped_at = inf
        self._serving: list[tuple[str, Work]] = []
        self._crew: Crew | None = None  # of the module that is starting, afterwards of the App itself
        self._starting: str | None = None
        self.worker = self._running = self._started = False
        self._stack: AsyncExitStack | None = None

    # What modules and applications use while it runs

    def get(self, kind: type[T]) -> T:
        """The running service of exactly this class.

        Raises:
            NotBoundError: the App is not running, or no module yields such a service.
        """
        try:
            return cast("T", self._services[kind])
        except KeyError:
            have = ", ".join(sorted(known.__name__ for known in self._services)) or "none: the App is not running"
            msg = f"no service {kind.__name__} in this App; it has {have}"
            raise NotBoundError(msg) from None

    def fill(self, function: Callable[..., T]) -> Callable[..., T]:
        """The function with every `given(…)` parameter filled by the services of this App, at its calls.

        Raises:
            ConfigurationError: such a parameter is not keyword-only.
        """
        kinds = given_kinds(function)
        if not kinds:
            return function

        @wraps(function)
        def filled(*args: object, **kwargs: object) -> T:
            services: dict[str, object] = {name: self.get(kind) for name, kind in kinds.items()}
            return function(*args, **{**services, **kwargs})

        return filled

    def background(self, name: str, work: Work) -> None:
        """Run `work` from now until the App stops; in a module, from its start until just before its own stop.

        Args:
            name: of the task; called by a starting module, it is put behind the module's name and a dot.
            work: takes a `Drain`. If it ends before the drain begins, in whichever way, that is a crash: it is logged
                at once, the App's health shows it as down, and a worker process ends with a status other than 0.

        Raises:
            NotBoundError: the App is not running.
        """
        if self._crew is None:
            msg = f"background({name!r}) outside a running App: start it first"
            raise NotBoundError(msg)
        self._crew.start(self._full(name), work)

    def serve(self, name: str, work: Work) -> None:
        """Register `work` for the time in which the App serves; modules call this while they start.

        Name and work are as for `background`.
        """
        self._serving.append((self._full(name), work))

    def _full(self, name: str) -> str:
        return name if self._starting is None else f"{self._starting}.{name}"

    def _crashed(self, name: str, error: BaseException) -> None:
        self._crashes.setdefault(name, error)
        if self._until is not None:
            self._until.set()

    @property
    def started(self) -> bool:
        """Whether every module has started and none is stopping: what a readiness probe asks."""
        return self._started

    async def health(self) -> dict[str, Health]:
        """The health of every part, by the module's name and the part's class; asked side by side.

        Work that has crashed is down, under its full name; a `HasHealthParts` names its parts itself.
        """
        report = await self._health_round.ask(parts_of(self._services, self._owners))
        stopped = {name: f"stopped by {type(error).__name__}" for name, error in self._crashes.items()}
        return report | {name: Health("down", detail) for name, detail in stopped.items()}

    # The three ways to run it

    async def __aenter__(self) -> Self:
        stack = AsyncExitStack()
        await stack.enter_async_context(self.running())
        self._stack = stack
        return self

    async def __aexit__(self, *details: object) -> None:
        stack, self._stack = self._stack, None
        if stack is not None:
            await stack.aclose()

    @overload
    def lifespan(self, asgi: object, /, *, serve: bool = False) -> AbstractAsyncContextManager[None]: ...
    @overload
    def lifespan(self, /, *, serve: bool = False) -> Callable[[object], AbstractAsyncContextManager[None]]: ...
    def lifespan(
        self, asgi: object = None, /, *, serve: bool = False
    ) -> AbstractAsyncContextManager[None] | Callable[[object], AbstractAsyncContextManager[None]]:
        """The ASGI lifespan: `FastAPI(lifespan=app.lifespan)`; with `lifespan(serve=True)` the process also serves."""
        return partial(self._lifespan, serve=serve) if asgi is None else self._lifespan(asgi, serve=serve)

    @asynccontextmanager
    async def _lifespan(self, _asgi: object, *, serve: bool) -> AsyncGenerator[None, None]:
        try:
            async with self.running(serve=serve):
                yield
        finally:
            # A server that is not ours waits for ever: for threads, and for tasks that swallow their cancellation.
            loop = asyncio.get_running_loop()
            left = max(0.0, self._drained_at - loop.time()) if self._drained_at < inf else 0.0
            _process.watch_the_end(left, loop, stuck=bool(self._stuck))

    def run(self) -> None:
        """Run as a worker, on the main thread: start, serve until SIGTERM or SIGINT, drain, stop.

        While it serves, the garbage collector leaves alone what was there before (`gc.freeze`). A signal during the
        start ends the start. The stop ends: a task or a thread that does not is named in the log some seconds after the
        drain time, and the process exits with status 1. A second signal ends the process at once.

        Raises:
            SystemExit: a mistake in the configuration kept it from starting, or it was called elsewhere than on the
                main thread outside of an event loop: status 2, with the message on standard error, and no traceback.
            Exception: the crash of a piece of background work, for the supervisor to start the process again.
        """
        try:
            _process.run(self._work, self._drain_seconds)
        except ConfigurationError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201  there may be no logging yet
            raise SystemExit(2) from error

    async def _work(self, stopping: asyncio.Event) -> None:
        async with AsyncExitStack() as stack:
            async with ended_by(stopping):  # a start may hang, such as on a database that does
                await stack.enter_async_context(self.running(serve=True, until=stopping))
            _process.spare_the_collector()
            await stopping.wait()
        if self._stuck:
            raise _process.Stuck
        for name, error in self._crashes.items():
            if isinstance(error, Exception):
                raise error
            # `sys.exit(0)` in a piece of work must not end the process as if all were well.
            msg = f"{name} was stopped by {type(error).__name__}"
            raise RuntimeError(msg) from error

    @asynccontextmanager
    async def running(self, *, serve: bool = False, until: asyncio.Event | None = None) -> AsyncGenerator[Self, None]:
        """Start every module, yield the App, stop them in reverse; what had started is stopped when a start fails.

        Args:
            serve: also run consumers, relays, claims and sealers. They start when everything has started, and are
                drained before anything stops.
            until: set when a piece of background work crashes.

        Raises:
            ConfigurationError: the App is already running.
        """
        if self._running:
            msg = "this App is already running"
            raise ConfigurationError(msg)
        self._running = True
        self._crashes.clear()
        self._stuck = []
        self._drained_at = self._stopped_at = inf
        self._until, self.worker = until, until is not None
        try:
            async with AsyncExitStack() as stack:
                stack.push_async_callback(self._health_round.end)
                for module in self.modules:
                    await self._start(module, stack)
                self._crew = await stack.enter_async_context(self._new_crew())
                if serve:
                    crew = await stack.enter_async_context(self._new_crew())
                    for name, work in self._serving:
                        crew.start(name, work)
                self._started = True
                try:
                    yield self
                finally:
                    self._started = False
        finally:
            self._running = False
            self._crew = None
            self._until = None
            self._services.clear()
            self._owners.clear()
            self._serving.clear()

    @asynccontextmanager
    async def _new_crew(self) -> AsyncGenerator[Crew, None]:
        crew = Crew(self.clock, self._crashed)
        try:
            yield crew
        finally:
            await self._end(crew)

    async def _end(self, crew: Crew) -> None:
        now = asyncio.get_running_loop().time()
        self._drained_at = min(self._drained_at, now + self._drain_seconds)  # one drain time for all that is drained
        least = min(_LEAST_DRAIN_SECONDS, self._drain_seconds)
        self._stuck += await crew.end(max(least, self._drained_at - now))

    async def _start(self, module: AnyModule, stack: AsyncExitStack) -> None:
        crew = self._crew = Crew(self.clock, self._crashed)
        self._starting = module.name
        context = module.running(self)
        try:
            services = await context.__aenter__()
        except BaseException as error:
            self._stuck += await crew.cancel()
            if isinstance(error, Exception):
                error.add_note(f"while starting {type(module).__name__}")
            raise
        finally:
            self._starting = None
        stack.push_async_exit(partial(self._stop, module.name, context))
        stack.push_async_callback(self._end, crew)  # so it ends just before the module's own stop
        for service in services:
            self._add(service, module)
        missing = {kind.__name__ for kind in module.yields()} - {type(service).__name__ for service in services}
        if missing:
            msg = f"{type(module).__name__} states that it yields {', '.join(sorted(missing))}, and did not"
            raise ConfigurationError(msg)

    async def _stop(self, name: str, context: AbstractAsyncContextManager[object], *details: Any) -> bool | None:
        """Let a module stop, for as long as the App has; then it is cancelled, and those before it still stop."""
        now = asyncio.get_running_loop().time()
        self._stopped_at = min(self._stopped_at, now + self._drain_seconds + _STOP_SECONDS)
        seconds = max(_LEAST_DRAIN_SECONDS, self._stopped_at - now)
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                return await context.__aexit__(*details)
        except asyncio.CancelledError:
            # Not the one that ended the App, which the module passes on unchanged: a second one, such as a signal's.
            _log.error("the stop of the module %s was cut short by a cancellation", name)
            raise
        except TimeoutError as error:
            if not limit.expired():
                raise
            _log.error("the module %s did not stop within %g s and was cancelled", name, seconds, exc_info=error)
            self._stuck.append(name)
            return None

    def _add(self, service: object, module: AnyModule) -> None:
        kind, name = type(service), type(module).__name__
        if kind not in module.yields():
            msg = f"{name} yielded a {kind.__name__}, which its method `yields` does not state"
            raise ConfigurationError(msg)
        if kind in self._services:
            msg = f"{name} and the module {self._owners[kind]} both yield a {kind.__name__}"
            raise ConfigurationError(msg)
        self._services[kind] = service
        self._owners[kind] = module.name
