"""The App: starts modules in the order of their needs, serves, drains, and stops them in reverse."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, Self, TypeVar, cast, overload

from mainstay.core.clock import SYSTEM_CLOCK, Clock
from mainstay.core.context import spawn
from mainstay.core.errors import ConfigurationError, NotBoundError
from mainstay.core.health import HasHealth, Health
from mainstay.core.module import Feature, Module
from mainstay.core.settings import stray_variables

T = TypeVar("T")
AnyModule = Module[Any, Any]
Worker = Callable[[asyncio.Event], Awaitable[None]]
"""Work that runs while an App serves. When the event is set it takes nothing new, finishes what it has, and returns;
at the end of the drain time it is cancelled."""

_log = logging.getLogger("mainstay.core")


class App:
    """A service, put together from modules.

    Args:
        modules: `XModule.for_root(…)` once for each package, `XModule.for_feature(…)` as often as there are features.
        drain_seconds: how long work in progress may take to finish when the App stops.
        health_seconds: how long one part's health may take to answer before it counts as down.
        clock: what every module measures time with.

    Raises:
        ConfigurationError: a missing requirement, a second root, a feature without its root, a circle of requirements,
            or an environment variable with a misspelt prefix; the message names the line to write.
    """

    def __init__(
        self,
        *modules: AnyModule | Feature,
        drain_seconds: float = 30.0,
        health_seconds: float = 2.0,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.clock = clock
        self._drain_seconds = drain_seconds
        self.health_seconds = health_seconds
        self._modules = _in_order_of_need(_attach(modules))
        stray = stray_variables([module.settings_type for module in self._modules])
        if stray:
            _log.warning("no package in this process reads %s", ", ".join(stray))
        self._services: dict[type, object] = {}
        self._owners: dict[type, str] = {}
        self._workers: list[tuple[str, Worker]] = []
        self._crashed: tuple[str, BaseException] | None = None
        self._late_checks: set[asyncio.Task[Health]] = set()
        self._running = False
        self._started = False
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

    def serve(self, name: str, worker: Worker) -> None:
        """Register work for the time in which the App serves; modules call this while they start."""
        self._workers.append((name, worker))

    @property
    def started(self) -> bool:
        """Whether every module has started and none is stopping: what a readiness probe asks."""
        return self._started

    async def health(self) -> dict[str, Health]:
        """What every part says of itself, by module; asked side by side, each within `health_seconds`."""
        parts = {
            f"{self._owners[kind]}.{kind.__name__}": service
            for kind, service in self._services.items()
            if isinstance(service, HasHealth)
        }
        # A check that outlived its round is not asked again before it has ended, or there were one more each round.
        self._late_checks = {check for check in self._late_checks if not check.done()}
        late = {check.get_name() for check in self._late_checks}
        # Tasks of their own, because a check that swallows its cancellation would hold up whoever awaits it.
        checks = {name: spawn(self._ask(part), name=name) for name, part in parts.items() if name not in late}
        try:
            if checks:
                await asyncio.wait(checks.values(), timeout=self.health_seconds)
        finally:
            for check in checks.values():
                if not check.done():
                    check.cancel()
                    self._late_checks.add(check)
        report = dict.fromkeys(parts, Health("down", f"no answer within {self.health_seconds:g} s"))
        report |= {name: check.result() for name, check in checks.items() if check.done() and not check.cancelled()}
        if self._crashed is not None:
            name, error = self._crashed
            report[name] = Health("down", f"stopped by {type(error).__name__}")
        return report

    async def _ask(self, part: HasHealth) -> Health:
        try:
            health = cast("object", await part.health())  # parts may be unchecked
            if isinstance(health, Health) and health.status in ("ok", "degraded", "down"):
                return health
            return Health("down", f"the check returned a {type(health).__name__}, which is no Health")
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001  a check that breaks is an answer too, whatever breaks it
            if not _cancelled_from_outside(error):
                _log.exception("the health check of %s failed", type(part).__name__)
            return Health("down", f"the check failed with {type(error).__name__}")

    async def _end_late_checks(self) -> None:
        checks, self._late_checks = self._late_checks, set()
        for check in checks:
            check.cancel()
        if checks:
            _, stuck = await asyncio.wait(checks, timeout=self.health_seconds)
            for check in stuck:
                _log.error("the health check of %s does not end, although it was cancelled", check.get_name())

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
        async with self.running(serve=serve):
            yield

    def run(self) -> None:
        """Run as a worker: start, serve until SIGTERM or SIGINT, drain, stop. A second signal ends the drain.

        Raises:
            Exception: what stopped a worker that must not stop; so the process ends with a status other than 0 and its
                supervisor starts it again.
        """
        asyncio.run(self._run())

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        me = cast("asyncio.Task[None]", asyncio.current_task())
        stopping = asyncio.Event()

        def stop(name: str) -> None:
            if stopping.is_set():
                _log.warning("%s again: stopping at once", name)
                me.cancel()
            else:
                _log.info("%s: draining for at most %g s", name, self._drain_seconds)
                stopping.set()

        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, stop, number.name)
        try:
            async with self.running(serve=True, until=stopping):
                await stopping.wait()
        except asyncio.CancelledError:
            if not stopping.is_set():
                raise
        finally:
            for number in signals:
                loop.remove_signal_handler(number)
        if self._crashed is not None:
            raise self._crashed[1]

    @asynccontextmanager
    async def running(self, *, serve: bool = False, until: asyncio.Event | None = None) -> AsyncGenerator[Self, None]:
        """Start every module, yield the App, stop them in reverse; what had started is stopped when a start fails.

        Args:
            serve: also run consumers, relays, claims and sealers. They start when everything has started, and are
                drained before anything stops.
            until: set when a worker ends that should not have.

        Raises:
            ConfigurationError: the App is already running.
        """
        if self._running:
            msg = "this App is already running"
            raise ConfigurationError(msg)
        self._running = True
        self._crashed = None
        try:
            async with AsyncExitStack() as stack:
                stack.push_async_callback(self._end_late_checks)
                for module in self._modules:
                    await self._start(module, stack)
                if serve:
                    await stack.enter_async_context(self._serving(until))
                self._started = True
                try:
                    yield self
                finally:
                    self._started = False
        finally:
            self._running = False
            self._services.clear()
            self._owners.clear()
            self._workers.clear()

    async def _start(self, module: AnyModule, stack: AsyncExitStack) -> None:
        try:
            services = await stack.enter_async_context(module.running(self))
        except Exception as error:
            error.add_note(f"while starting {type(module).__name__}")
            raise
        for service in services:
            kind = type(service)
            if kind in self._services:
                msg = f"{type(module).__name__} and {self._owners[kind]} both yield a {kind.__name__}"
                raise ConfigurationError(msg)
            self._services[kind] = service
            self._owners[kind] = type(module).__name__.removesuffix("Module").lower()

    @asynccontextmanager
    async def _serving(self, until: asyncio.Event | None) -> AsyncGenerator[None, None]:
        draining = asyncio.Event()
        tasks = [spawn(self._guard(name, worker, draining, until), name=name) for name, worker in self._workers]
        try:
            yield
        finally:
            draining.set()
            await _drain(tasks, self._drain_seconds)

    async def _guard(self, name: str, worker: Worker, draining: asyncio.Event, until: asyncio.Event | None) -> None:
        try:
            await worker(draining)
            if draining.is_set():
                return
            msg = f"{name} returned although nobody asked it to stop"
            raise RuntimeError(msg)
        except BaseException as error:
            if draining.is_set() and isinstance(error, asyncio.CancelledError):
                raise  # _drain did that; before it, a cancellation is a crash like any other
            _log.critical("%s stopped: the App no longer does all of its work", name, exc_info=error)
            self._crashed = self._crashed or (name, error)
            if until is not None:
                until.set()


def _cancelled_from_outside(error: BaseException) -> bool:
    """Whether `error` is the cancellation that somebody asked of this task, not one that its work made up."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


async def _drain(tasks: list[asyncio.Task[None]], seconds: float) -> None:
    """Wait for `tasks`, then cancel what is left; none survives this, also when the wait itself is cancelled."""
    if not tasks:
        return
    try:
        _, late = await asyncio.wait(tasks, timeout=seconds)
        for task in late:
            _log.warning("%s did not finish within %g s and is cancelled", task.get_name(), seconds)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _attach(entries: tuple[AnyModule | Feature, ...]) -> list[AnyModule]:
    roots: dict[type[AnyModule], AnyModule] = {}
    for entry in entries:
        if not isinstance(cast("object", entry), Module | Feature):  # callers may be unchecked
            msg = f"an App takes XModule.for_root(…) and XModule.for_feature(…), not {entry!r}"
            raise ConfigurationError(msg)
        if isinstance(entry, Module):
            kind = type(entry)
            if kind in roots:
                msg = f"{kind.__name__}.for_root appears twice: keep one, and add what features bring with for_feature"
                raise ConfigurationError(msg)
            roots[kind] = entry
    parts: dict[type[AnyModule], list[object]] = {kind: [] for kind in roots}
    for entry in entries:
        if isinstance(entry, Feature):
            if entry.module not in roots:
                name = entry.module.__name__
                msg = f"{name}.for_feature is there without its root: add {name}.for_root() to the App"
                raise ConfigurationError(msg)
            known = parts[entry.module]
            for part in entry.parts:
                if any(part is other for other in known):
                    msg = f"{entry.module.__name__}.for_feature was given {part!r} twice"
                    raise ConfigurationError(msg)
                known.append(part)
    for kind, root in roots.items():
        root.parts = tuple(parts[kind])
    return list(roots.values())


def _in_order_of_need(modules: list[AnyModule]) -> list[AnyModule]:
    """Requirements first, otherwise as written."""
    by_kind = {type(module): module for module in modules}
    ordered: list[AnyModule] = []
    open_: list[str] = []

    def visit(module: AnyModule) -> None:
        if module in ordered:
            return
        name = type(module).__name__
        if name in open_:
            msg = f"modules require each other in a circle: {' → '.join([*open_, name])}"
            raise ConfigurationError(msg)
        open_.append(name)
        for kind in module.requires():
            if kind not in by_kind:
                msg = f"{name} requires {kind.__name__}: add {kind.__name__}.for_root() to the App"
                raise ConfigurationError(msg)
            visit(by_kind[kind])
        open_.pop()
        ordered.append(module)

    for module in modules:
        visit(module)
    return ordered
