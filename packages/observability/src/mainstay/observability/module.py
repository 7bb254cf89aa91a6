"""What an App starts first and stops last: logging for everybody, health in the background, probes for a worker."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import ClassVar, Never

from mainstay.core import App, ConfigurationError, Module
from mainstay.observability import _logging
from mainstay.observability._http import serving
from mainstay.observability.health import HealthWatch
from mainstay.observability.settings import ObservabilitySettings

__all__ = ["ObservabilityModule", "ProbeServer"]


class ProbeServer:
    """Where this process serves its probes.

    Attributes:
        port: of TCP; the one that the system chose where the settings say 0. None where nothing is served.
    """

    def __init__(self, port: int | None) -> None:
        self.port = port


class ObservabilityModule(Module[ObservabilitySettings, Never]):
    """Logs, metrics and health of a service.

    Write it first, so that the start of everything else is logged in its form.
    """

    name: ClassVar[str] = "observability"

    @property
    def service_name(self) -> str:
        """As the settings say."""
        return self.settings.service_name

    def yields(self) -> Sequence[type]:
        """The watch over the health, and the server of probes."""
        return (HealthWatch, ProbeServer)

    def check(self) -> None:
        """Refuse a part in `readiness` that the App does not have: its `down` would never be noticed.

        Raises:
            ConfigurationError: names it, and the parts that there are.
        """
        known = sorted(module.name for module in self.modules)
        for name in sorted(self.settings.readiness.difference(known)):
            msg = f"ObservabilitySettings.readiness names {name!r}; the parts of this App are {', '.join(known)}"
            raise ConfigurationError(msg)

    @asynccontextmanager
    async def running(self, app: App) -> AsyncGenerator[Sequence[object], None]:
        """Yields a `HealthWatch` and a `ProbeServer`."""
        settings = self.settings
        async with AsyncExitStack() as stack:
            stack.enter_context(_logging.configured(settings))
            watch = HealthWatch(app, settings)
            port = None
            if settings.http_port is not None:
                port = await stack.enter_async_context(serving(watch, settings.http_host, settings.http_port))
            app.background("health", watch.watch)
            yield (watch, ProbeServer(port))
