"""The package's entry in an App."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import ClassVar

from mainstay.circuit_breaker._evidence import SharedEvidence
from mainstay.circuit_breaker.breaker import CircuitBreaker, KeyedBreaker
from mainstay.circuit_breaker.pipeline import Pipeline
from mainstay.circuit_breaker.service import CircuitBreakerService, check_names, config_of
from mainstay.circuit_breaker.settings import CircuitBreakerSettings
from mainstay.core import App, ConfigurationError, Module

__all__ = ["CircuitBreakerModule"]


class CircuitBreakerModule(Module[CircuitBreakerSettings, CircuitBreaker | KeyedBreaker | Pipeline]):
    """Configures breakers, on their own or in pipelines, from the settings, and yields a `CircuitBreakerService`.

    A breaker works without it, with the configuration that it was written with.
    """

    name: ClassVar[str] = "circuit_breaker"

    def yields(self) -> Sequence[type]:
        """The service, and the shared evidence where the settings ask for it."""
        evidence = () if self.settings.evidence_url is None else (SharedEvidence,)
        return (CircuitBreakerService, *evidence)

    def check(self) -> None:
        """Refuse two breakers of one name, and settings of one that does not exist.

        Raises:
            ConfigurationError: names them.
        """
        self.breakers()

    def breakers(self) -> dict[str, CircuitBreaker | KeyedBreaker]:
        """The breakers of all features, by name.

        Raises:
            ConfigurationError: two breakers have one name, or the settings configure one that does not exist.
        """
        found: dict[str, CircuitBreaker | KeyedBreaker] = {}
        for part in self.parts:
            for breaker in part.breakers() if isinstance(part, Pipeline) else (part,):
                if found.setdefault(breaker.name, breaker) is not breaker:
                    msg = f"two breakers are called {breaker.name!r}: give one another name, or use one object for both"
                    raise ConfigurationError(msg)
        check_names(self.settings, found)
        return found

    def describe(self) -> Mapping[str, Sequence[str]]:
        """The breakers, and the pipelines with their policies from the outside in."""
        return {
            "breakers": sorted(self.breakers()),
            "pipelines": [repr(part).strip("<>") for part in self.parts if isinstance(part, Pipeline)],
        }

    @asynccontextmanager
    async def running(self, app: App) -> AsyncGenerator[Sequence[object]]:
        """Bind the breakers for as long as the App runs, and keep their history; share evidence if told to."""
        settings, breakers = self.settings, self.breakers()
        service = CircuitBreakerService(breakers, settings, app.clock)
        services: list[object] = [service]
        app.background("sampler", service.sampler.run)
        if settings.evidence_url is not None:
            evidence = SharedEvidence(
                settings.evidence_url.get_secret_value(),
                service._breakers,
                every_seconds=settings.evidence_seconds,
                quorum=settings.evidence_quorum,
                clock=app.clock,
            )
            services.append(evidence)
            app.background("evidence", evidence.run)
        with ExitStack() as bound:
            for breaker in breakers.values():
                bound.enter_context(breaker._bound(self, config_of(settings, breaker), app.clock))
            bound.callback(service._unsubscribe_all)
            yield services
