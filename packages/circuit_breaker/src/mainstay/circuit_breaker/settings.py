"""What can be set, with its default, its range and the reason for it. There is no second place with defaults."""

from __future__ import annotations

from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from mainstay.core import Settings

__all__ = ["BreakerConfig", "CircuitBreakerSettings"]

Seconds = Annotated[float, Field(gt=0, lt=float("inf"))]
Ratio = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]


class BreakerConfig(BaseModel):
    """When a circuit opens, and how it recovers.

    While *closed*, the outcome of each call goes into a sliding window. A failure (or a slow call) opens the circuit as
    soon as any criterion that is set holds: `failure_ratio` or `slow_ratio` with at least `minimum_calls` in the
    window, `failure_count` in the window, or `consecutive_failures` in a row. A success never opens it.

    *Open*, it rejects everything for `break_seconds`, longer after each recovery that failed. Then it is *half open*:
    at most `probes` calls at a time go through; `probe_successes` of them in a row end it, one failure opens it again.
    Last it is *ramping*: the share of calls that go through grows from `ramp_start` to 1 over `ramp_seconds`, and
    halves with each failure, so that a dependency that has just come back is not buried at once.

    Attributes:
        window_seconds: length of the window, in seconds; calls older than this count no more. (0, inf)
        window_calls: the window is this many calls instead, however old they are. [1, 1,000,000] or None
        minimum_calls: how many calls a ratio needs in the window; below it a ratio says nothing. >= 1
        failure_ratio: share of failures that opens. (0, 1] or None
        failure_count: number of failures in the window that opens. >= 1 or None
        consecutive_failures: number of failures without a success between them that opens. >= 1 or None
        slow_seconds: a call that takes longer counts as slow, also where it succeeded. (0, inf) or None
        slow_ratio: share of slow calls that opens, where `slow_seconds` is set. (0, 1]
        break_seconds: how long it stays open the first time. (0, inf)
        break_growth: factor by which the next break is longer when recovery failed. >= 1
        max_break_seconds: no break is longer, apart from jitter. At least `break_seconds`.
        break_jitter: a break is up to this share longer or shorter, so that a fleet does not come back in step. [0, 1)
        probes: calls at a time while half open. >= 1
        probe_successes: successes in a row that end half open. >= 1
        probe_seconds: a probe without an outcome for this long counts as failed and gives its place free. (0, inf)
        ramp_seconds: length of the ramp, in seconds; 0 closes at once. [0, inf)
        ramp_start: share of calls let through when the ramp begins. (0, 1]

    Raises:
        ValidationError: a value is out of its range; the message names field and range. It is a `ValueError`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    window_seconds: Seconds = 60.0
    window_calls: Count | None = None
    minimum_calls: Count = 10
    failure_ratio: Ratio | None = 0.5
    failure_count: Count | None = None
    consecutive_failures: Count | None = None
    slow_seconds: Seconds | None = None
    slow_ratio: Ratio = 0.8
    break_seconds: Seconds = 5.0
    break_growth: Annotated[float, Field(ge=1, lt=100)] = 2.0
    max_break_seconds: Seconds = 60.0
    break_jitter: Annotated[float, Field(ge=0, lt=1)] = 0.1
    probes: Count = 1
    probe_successes: Count = 2
    probe_seconds: Seconds = 30.0
    ramp_seconds: Annotated[float, Field(ge=0, lt=float("inf"))] = 10.0
    ramp_start: Ratio = 0.1

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_break_seconds < self.break_seconds:
            msg = f"max_break_seconds ({self.max_break_seconds:g}) is below break_seconds ({self.break_seconds:g})"
            raise ValueError(msg)
        if self.failure_ratio is self.failure_count is self.consecutive_failures is self.slow_seconds is None:
            msg = "nothing can open it: set failure_ratio, failure_count, consecutive_failures or slow_seconds"
            raise ValueError(msg)
        if self.window_calls is not None:
            for name in ("minimum_calls", "failure_count"):
                value = getattr(self, name)
                if value is not None and value > self.window_calls:
                    msg = f"{name} ({value}) can never be reached in a window of window_calls={self.window_calls}"
                    raise ValueError(msg)
        return self


class CircuitBreakerSettings(Settings):
    """Settings of the package, from `MAINSTAY_CIRCUIT_BREAKER_…`.

    Attributes:
        defaults: for every breaker that was written without a configuration of its own.
        breakers: by name; stronger than what the code says, so that an operator can change a breaker without a release:
            `MAINSTAY_CIRCUIT_BREAKER_BREAKERS='{"payments": {"failure_ratio": 0.3}}'`.
        history_seconds: how far back the service can draw a breaker, in seconds.
        sample_seconds: the resolution of that drawing, in seconds.
        evidence_url: `redis://…` of the Redis through which the processes of this service share evidence; None keeps
            each to itself. It may carry a password and is never printed.
        evidence_seconds: how often evidence is exchanged, in seconds. A vote counts for three times as long.
        evidence_quorum: share of the processes with evidence that must find a dependency failing to open it for all.
            (0, 1]
    """

    model_config = SettingsConfigDict(env_prefix="MAINSTAY_CIRCUIT_BREAKER_")

    defaults: BreakerConfig = BreakerConfig()
    breakers: dict[str, BreakerConfig] = Field(default_factory=dict)
    history_seconds: Seconds = 300.0
    sample_seconds: Seconds = 5.0
    evidence_url: SecretStr | None = None
    evidence_seconds: Seconds = 1.0
    evidence_quorum: Ratio = 0.5

    @field_validator("evidence_url")
    @classmethod
    def _of_redis(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        try:
            # urlsplit reads what follows an unescaped / in a password as a port, and would print it.
            parts = urlsplit(value.get_secret_value())
            usable = parts.scheme in {"redis", "rediss", "unix"} and (parts.port is None or parts.port > 0)
        except ValueError:
            usable = False
        if not usable:
            msg = "is no URL of a Redis: write redis://user:password@host:6379/0, the password percent-encoded"
            raise ValueError(msg)
        return value
