"""Everything about observability that can be set."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from mainstay.core import Settings

__all__ = ["ObservabilitySettings"]


class ObservabilitySettings(Settings):
    """Logs, metrics and health of one process; read from `MAINSTAY_OBSERVABILITY_…` where not passed.

    Attributes:
        service_name: names the service in every log line and span.
        log_format: `json`, one object a line, or `console` for people.
        log_level: the least severe level that is written, of Mainstay, of libraries and of the application alike.
        http_port: where `/metrics`, `/health`, `/health/live` and `/health/ready` are served by this process itself,
            which is what a worker needs; 0 takes any free port, None (the default) serves nothing.
        http_host: the address that `http_port` listens on. `0.0.0.0` lets a container's platform reach it.
        health_interval_seconds: how often the parts are asked for their health; probes are answered from the last
            answer.
        readiness: the parts, by the first word of their name in `App.health()`, whose `down` makes this process not
            ready. None by default: taking every replica out of service because one database that they share is away
            only adds an outage to an outage.
    """

    model_config = SettingsConfigDict(env_prefix="MAINSTAY_OBSERVABILITY_")

    service_name: str = Field(min_length=1, max_length=128)
    log_format: Literal["json", "console"] = "json"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"
    http_port: int | None = Field(default=None, ge=0, le=65535)
    http_host: str = "127.0.0.1"
    health_interval_seconds: float = Field(default=5.0, gt=0)
    readiness: frozenset[str] = frozenset()
