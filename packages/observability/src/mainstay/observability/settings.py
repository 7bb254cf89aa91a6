"""Everything about observability that can be set."""

from __future__ import annotations

from itertools import pairwise
from math import isfinite
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator
from pydantic_settings import SettingsConfigDict

from mainstay.core import Settings

__all__ = ["LogLimits", "ObservabilitySettings", "ProbePaths", "RequestSettings"]


class LogLimits(BaseModel):
    """How much a log line may hold. What is more is cut, with a mark of how much.

    Attributes:
        value_chars: of a text, in characters; a traceback is cut in its middle.
        line_chars: of a line, in characters; its longest values are cut first, and its field `cut` names them. What
            carries lines has limits too: Loki takes 256 KB, journald 48 KB, Docker divides at 16 KB.
        depth: how many mappings and lists inside of each other are shown.
        members: how many fields a line has, and how many members of each mapping and list are shown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    value_chars: int = Field(default=8192, ge=64)
    line_chars: int = Field(default=32768, ge=2048)
    depth: int = Field(default=6, ge=1, le=32)
    members: int = Field(default=100, ge=1, le=10_000)


class ProbePaths(BaseModel):
    """Where probes and metrics are asked for.

    Attributes:
        live: whether the process has to be started again.
        ready: whether it wants traffic.
        startup: whether its start is over.
        health: everything, with details.
        metrics: as Prometheus reads them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    live: str = Field(default="/health/live", pattern="^/[^?#]*$")
    ready: str = Field(default="/health/ready", pattern="^/[^?#]*$")
    startup: str = Field(default="/health/startup", pattern="^/[^?#]*$")
    health: str = Field(default="/health", pattern="^/[^?#]*$")
    metrics: str = Field(default="/metrics", pattern="^/[^?#]*$")

    @property
    def all(self) -> frozenset[str]:
        """All of them."""
        return frozenset({self.live, self.ready, self.startup, self.health, self.metrics})

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if len(self.all) < len(type(self).model_fields):
            msg = "two of live, ready, startup, health and metrics are the same path"
            raise ValueError(msg)
        return self


class RequestSettings(BaseModel):
    """What is told of requests.

    Attributes:
        access_log: whether each request has a line of the logger `mainstay.access`; uvicorn's own is left out then.
        access_probes: whether probes have one, too.
        excluded: routes, by their templates such as `/internal/{name}`, that are not counted and have no line. Their
            errors are logged all the same.
        seconds_buckets: bounds of `mainstay_http_request_seconds`, in seconds, each above the one before.
        bytes_buckets: bounds of `mainstay_http_request_bytes` and `mainstay_http_response_bytes`, in the same way. A
            process has one set of buckets.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    access_log: bool = True
    access_probes: bool = False
    excluded: frozenset[str] = frozenset()
    seconds_buckets: tuple[float, ...] = (
        0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30
    )  # fmt: skip
    bytes_buckets: tuple[float, ...] = (256, 1024, 4096, 16_384, 65_536, 262_144, 1_048_576, 4_194_304, 16_777_216)

    @model_validator(mode="after")
    def _buckets_rise(self) -> Self:
        for name in ("seconds_buckets", "bytes_buckets"):
            bounds: tuple[float, ...] = getattr(self, name)
            if not bounds or bounds[0] <= 0 or any(not isfinite(each) for each in bounds):
                msg = f"{name}: one finite number above 0, or more"
                raise ValueError(msg)
            if any(after <= before for before, after in pairwise(bounds)):
                msg = f"{name}: each above the one before"
                raise ValueError(msg)
        return self


class ObservabilitySettings(Settings):
    """Logs, metrics and health of one process; read from `MAINSTAY_OBSERVABILITY_…` where not passed.

    Attributes:
        service_name: names the service in every log line and span.
        log_format: `json`, one object a line; `ecs`, the same by the Elastic Common Schema; `journal`, as `json` behind
            the priority that systemd reads (`<6>`); or `console` for people, in colour at a terminal.
        log_level: the least severe level that is written, of Mainstay, of libraries and of the application alike.
        log_limits: how much a line may hold.
        log_sampling: which share of lines below ERROR is written, from 0 to 1, by the beginning of the logger's name
            (`{"mainstay.access": 0.1}`) or by level (`{"DEBUG": 0.01}`); the longest name that fits counts, and a name
            before a level. Lines of one correlation id are written all or none by the same share. Errors always are.
        secret_keys: keys whose values are secrets too, alone or as part of a longer key: `iban` also hides
            `customer_iban`.
        plain_keys: whole keys that would be taken for secrets and are none, such as `session_id`.
        service_version: of the service, for `mainstay_build_info`.
        http_port: where probes, health and metrics are served by this process itself, apart from the application's own
            port. By default (None) a worker that `mainstay run` runs serves them on 9464, or where that is taken on a
            free port that its log names; another process serves nothing. 0 takes any free port, `off` serves nothing.
        http_host: the address that `http_port` listens on. `0.0.0.0` lets a container's platform reach it.
        paths: the paths of probes, health and metrics.
        requests: what is told of requests.
        metrics_public: whether the application's own port answers for metrics, to everybody.
        access_token: with it, the application's own port answers for metrics and health with details, to requests with
            the header `Authorization: Bearer <token>`. At least 16 characters.
        health_interval_seconds: how often the parts are asked for their health; probes are answered from the last
            answer.
        readiness: the parts whose `down` makes this process not ready: by their name in `App.health()`, or by its first
            word, which is a module or the group of a check. None by default: taking every replica out of service
            because one database that they share is away only adds an outage to an outage.
        not_ready_seconds: how long a web process goes on taking requests after SIGTERM, while it answers that it is not
            ready: as long as a load balancer takes to notice. 0, the default, is for where there is none.
    """

    model_config = SettingsConfigDict(env_prefix="MAINSTAY_OBSERVABILITY_")

    service_name: str = Field(min_length=1, max_length=128)
    log_format: Literal["json", "ecs", "journal", "console"] = "json"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"
    log_limits: LogLimits = LogLimits()
    log_sampling: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict)
    secret_keys: frozenset[str] = frozenset()
    plain_keys: frozenset[str] = frozenset()
    service_version: str = Field(default="unknown", min_length=1, max_length=128)
    http_port: Annotated[int, Field(ge=0, le=65535)] | Literal["off"] | None = None
    http_host: str = "127.0.0.1"
    paths: ProbePaths = ProbePaths()
    requests: RequestSettings = RequestSettings()
    metrics_public: bool = False
    access_token: SecretStr | None = Field(default=None, min_length=16)
    health_interval_seconds: float = Field(default=5.0, gt=0)
    readiness: frozenset[str] = frozenset()
    not_ready_seconds: float = Field(default=0.0, ge=0, le=3600)
