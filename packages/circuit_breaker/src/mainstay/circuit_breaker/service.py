"""What a running App offers about its breakers: the operations by name, their states and numbers, health."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, InstanceOf

from mainstay.circuit_breaker._checks import require_plain
from mainstay.circuit_breaker._sampler import Sampler, worst_state
from mainstay.circuit_breaker.breaker import CircuitBreaker, KeyedBreaker
from mainstay.circuit_breaker.chaos import faults_now
from mainstay.circuit_breaker.pipeline import Pipeline
from mainstay.circuit_breaker.settings import BreakerConfig, CircuitBreakerSettings, Count, Seconds
from mainstay.circuit_breaker.states import CircuitSnapshot, State, StateChange
from mainstay.core import SYSTEM_CLOCK, Clock, ConfigurationError, Health, Retry

__all__ = ["CircuitBreakerService", "OperationConfig"]

T = TypeVar("T")
L = TypeVar("L", bound=Callable[[StateChange], object])


class OperationConfig(BaseModel):
    """The configuration of one operation in four numbers; each is a field of `BreakerConfig` by another name.

    Attributes:
        name: the operation's id, also the breaker's name.
        failure_threshold: failures within `monitoring_period` that open the circuit (`failure_count`).
        recovery_timeout: seconds that it stays open (`break_seconds`).
        monitoring_period: seconds of the window (`window_seconds`).
        retry_strategy: tries again before a failure is final; None does not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    failure_threshold: Count = 5
    recovery_timeout: Seconds = 30.0
    monitoring_period: Seconds = 60.0
    retry_strategy: InstanceOf[Retry] | None = None

    def breaker_config(self) -> BreakerConfig:
        """The same in the breaker's own terms."""
        return BreakerConfig(
            failure_ratio=None,
            failure_count=self.failure_threshold,
            window_seconds=self.monitoring_period,
            break_seconds=self.recovery_timeout,
            max_break_seconds=max(60.0, self.recovery_timeout),
        )


def config_of(settings: CircuitBreakerSettings, breaker: CircuitBreaker | KeyedBreaker) -> BreakerConfig:
    """The settings by its name, else the configuration it was written with, else the settings' defaults."""
    return settings.breakers.get(breaker.name) or breaker.rules.own_config or settings.defaults


def check_names(settings: CircuitBreakerSettings, breakers: Mapping[str, object]) -> None:
    """Refuse settings for breakers that do not exist.

    Raises:
        ConfigurationError: they do.
    """
    unknown = sorted(set(settings.breakers) - set(breakers))
    if unknown:
        msg = (
            f"CircuitBreakerSettings.breakers configures {', '.join(map(repr, unknown))}, but the features bring "
            f"{', '.join(map(repr, sorted(breakers))) or 'none'}: correct the name, or add "
            f"CircuitBreakerModule.for_feature(…) with that breaker"
        )
        raise ConfigurationError(msg)


class CircuitBreakerService:
    """The breakers of a running App, by name; `app.get(CircuitBreakerService)`."""

    def __init__(
        self,
        breakers: Mapping[str, CircuitBreaker | KeyedBreaker] | None = None,
        settings: CircuitBreakerSettings | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        settings = CircuitBreakerSettings() if settings is None else settings
        self._breakers = dict(breakers or {})
        self._operations: dict[str, tuple[OperationConfig, Pipeline]] = {}
        self._listeners: tuple[Callable[[StateChange], object], ...] = ()
        self._settings = settings
        self._clock = clock
        self.sampler = Sampler(
            seconds=settings.history_seconds, sample_seconds=settings.sample_seconds, clock=clock, of=self._breakers
        )

    def on_change(self, listener: L) -> L:
        """Call `listener` with every `StateChange` of every breaker, those that `execute` makes later included.

        As `CircuitBreaker.on_change`, until `unsubscribe` or until the App stops.
        """
        require_plain("CircuitBreakerService", "a listener", listener)
        self._listeners += (listener,)
        for breaker in self._breakers.values():
            breaker.on_change(listener)
        return listener

    def unsubscribe(self, listener: Callable[[StateChange], object]) -> None:
        """Call `listener` no more; nothing happens if it was not called."""
        if listener in self._listeners:
            listeners = list(self._listeners)
            listeners.remove(listener)
            self._listeners = tuple(listeners)
            for breaker in self._breakers.values():
                breaker.unsubscribe(listener)

    def _unsubscribe_all(self) -> None:
        """The App stops."""
        for listener in self._listeners:
            self.unsubscribe(listener)

    def reload(self, settings: CircuitBreakerSettings) -> None:
        """Apply other settings to the running breakers; their windows and states are kept.

        Raises:
            ConfigurationError: they configure a breaker that does not exist, or change what only a start reads (the
                history, the evidence); nothing has been applied.
        """
        check_names(settings, self._breakers)
        fixed = sorted(
            name
            for name in CircuitBreakerSettings.model_fields
            if name not in {"defaults", "breakers"} and getattr(settings, name) != getattr(self._settings, name)
        )
        if fixed:
            msg = f"CircuitBreakerSettings: a running App does not change {', '.join(fixed)}: restart it"
            raise ConfigurationError(msg)
        self._settings = settings
        for name, breaker in self._breakers.items():
            known = self._operations.get(name)
            config = config_of(settings, breaker) if known is None else self._config_of(known[0])
            if config != breaker.config:
                breaker.reload(config)

    def _config_of(self, operation: OperationConfig) -> BreakerConfig:
        return self._settings.breakers.get(operation.name) or operation.breaker_config()

    async def execute(self, operation: Callable[[], Awaitable[T]], config: OperationConfig) -> T:
        """Await `operation()` under the breaker (and the retries) of `config.name`; another config changes it in place.

        Raises:
            CircuitOpen: the operation fails too often.
        """
        known, pipeline = self._operations.get(config.name, (None, None))
        if pipeline is None or (known is not config and known != config):
            pipeline = self._arrange(config)
        return await pipeline.call(operation)

    def _arrange(self, config: OperationConfig) -> Pipeline:
        breaker = self._breakers.get(config.name)
        if breaker is None:
            breaker = CircuitBreaker(config.name, self._config_of(config), clock=self._clock)
            for listener in self._listeners:
                breaker.on_change(listener)
            self._breakers[config.name] = breaker
        elif config.name in self._operations:
            breaker.reload(self._config_of(config))
        else:
            msg = f"operation {config.name!r} has the name of a breaker that a feature brings: use that one"
            raise ValueError(msg)
        retries = () if config.retry_strategy is None else (config.retry_strategy,)
        pipeline = Pipeline(config.name, *retries, breaker)
        self._operations[config.name] = config, pipeline
        return pipeline

    def breaker(self, name: str) -> CircuitBreaker | KeyedBreaker:
        """The breaker of that name.

        Raises:
            KeyError: there is none; the message lists those there are.
        """
        try:
            return self._breakers[name]
        except KeyError:
            msg = f"no breaker {name!r}; there are {', '.join(sorted(self._breakers)) or 'none'}"
            raise KeyError(msg) from None

    def get_state(self, name: str) -> State:
        """The state of the breaker `name`; of one with keys, the worst."""
        return worst_state(self.breaker(name))

    def get_metrics(self, name: str) -> dict[str, int]:
        """Calls by outcome of the breaker `name`: success, failure, neutral, late, rejected."""
        return self.breaker(name).totals()

    def snapshot(self) -> list[CircuitSnapshot]:
        """Every circuit of every breaker, for a console."""
        return [circuit.snapshot() for _, breaker in sorted(self._breakers.items()) for circuit in breaker.circuits()]

    def draw(self, name: str) -> str:
        """The last minutes of the breaker `name` as text; see `CircuitBreakerSettings.history_seconds`."""
        return self.sampler.draw(self.breaker(name))

    async def health(self) -> Health:
        """Degraded while a circuit is not closed: this service works, with less than it should have."""
        bad = {name: state for name in self._breakers if (state := self.get_state(name)) is not State.CLOSED}
        problems = [f"{name} is {state.value.replace('_', ' ')}" for name, state in sorted(bad.items())]
        problems += [f"chaos {name} injects faults" for name in faults_now()]
        return Health("degraded", "; ".join(problems)) if problems else Health("ok")
