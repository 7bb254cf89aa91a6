"""What an App starts first and stops last: logging for everybody, health in the background, probes for a worker."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import ClassVar

from mainstay.core import App, ConfigurationError, Module
from mainstay.observability import _logging, _metrics, _multiprocess
from mainstay.observability._departure import announced
from mainstay.observability._http import serving
from mainstay.observability._scrapes import Scrapes
from mainstay.observability.checks import HealthCheck, HealthChecks, RunningCheck
from mainstay.observability.health import HealthWatch, known_parts
from mainstay.observability.settings import ObservabilitySettings

__all__ = ["ObservabilityModule", "ProbeServer"]

_PORT = 9464
"""Of a worker, where the settings name none: the one that OpenTelemetry's exporter for Prometheus has."""


class ProbeServer:
    """Where this process serves its probes.

    Attributes:
        port: of TCP; the one that the system chose where the settings say 0. None where nothing is served.
    """

    def __init__(self, port: int | None) -> None:
        self.port = port


class ObservabilityModule(Module[ObservabilitySettings, HealthCheck]):
    """Logs, metrics and health of a service.

    Write it first, so that the start of everything else is logged in its form.
    """

    name: ClassVar[str] = "observability"

    @property
    def service_name(self) -> str:
        """As the settings say."""
        return self.settings.service_name

    def yields(self) -> Sequence[type]:
        """The watch over the health, the checks, and the server of probes."""
        return (HealthWatch, HealthChecks, ProbeServer)

    def functions(self) -> Sequence[Callable[..., object]]:
        """The functions that the checks ask."""
        return [check.ask for check in self.parts]

    def check(self) -> None:
        """Refuse a name in `readiness` that nothing has: its `down` would never be noticed; and two checks of one name.

        Raises:
            ConfigurationError: names it, and the modules and parts that there are.
        """
        parts = list(known_parts(self.modules))
        for part in parts:
            if parts.count(part) > 1:
                msg = f"two parts of this App are called {part}: give the check another name or group"
                raise ConfigurationError(msg)
        known = {*(module.name for module in self.modules), *parts, *(part.partition(".")[0] for part in parts)}
        for name in sorted(self.settings.readiness.difference(known)):
            msg = (
                f"ObservabilitySettings.readiness names {name!r}; the parts of this App are {', '.join(sorted(known))}"
            )
            raise ConfigurationError(msg)

    @asynccontextmanager
    async def running(self, app: App) -> AsyncGenerator[Sequence[object], None]:
        """Yields a `HealthWatch`, the `HealthChecks` and a `ProbeServer`.

        Raises:
            ConfigurationError: the address of the probes cannot be listened on, or a check may take longer than the
                App lets it.
        """
        settings = self.settings
        async with AsyncExitStack() as stack:
            stack.enter_context(_logging.configured(settings))
            stack.enter_context(_multiprocess.renewed())
            scrapes = Scrapes()
            stack.enter_context(scrapes.answering())
            watch = HealthWatch(app, settings, scrapes)
            stack.enter_context(_metrics.HEALTH.of(watch))
            port = settings.http_port
            if port is None and app.worker:
                port = _PORT
            bound = None
            if isinstance(port, int):
                instead = settings.http_port is None
                bound = await stack.enter_async_context(serving(watch, settings.http_host, port, free_instead=instead))
            if not app.worker:
                stack.enter_context(announced(settings.not_ready_seconds, watch.leave))
            _metrics.tell_the_build(app, settings.service_name, settings.service_version)
            app.background("health", watch.watch)
            app.background("loop", partial(_metrics.measure_the_loop, app=app))
            yield (watch, self._checks(app), ProbeServer(bound))

    def _checks(self, app: App) -> HealthChecks:
        for check in self.parts:
            if check.timeout_seconds > app.health_seconds:
                msg = (
                    f"the check {check.part} may take {check.timeout_seconds:g} s, and the App lets a part take "
                    f"{app.health_seconds:g} s: lower its timeout_seconds, or write App(…, health_seconds=…)"
                )
                raise ConfigurationError(msg)
        return HealthChecks({check.part: RunningCheck(check, app.fill(check.ask), app.clock) for check in self.parts})
