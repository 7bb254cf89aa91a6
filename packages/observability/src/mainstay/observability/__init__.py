"""Logs, metrics, traces, health and error bodies of a service."""

from mainstay.observability.asgi import ObservabilityMiddleware, RequestFacts
from mainstay.observability.checks import (
    DatabaseHealthCheck,
    HealthCheck,
    HealthChecks,
    HTTPServiceHealthCheck,
    KafkaHealthCheck,
    RedisHealthCheck,
)
from mainstay.observability.errors import Problem, ServiceProblem, problem_of
from mainstay.observability.health import Answer, HealthWatch
from mainstay.observability.metrics import CappedLabels
from mainstay.observability.module import ObservabilityModule, ProbeServer
from mainstay.observability.probes import Probes
from mainstay.observability.settings import LogLimits, ObservabilitySettings, ProbePaths, RequestSettings

__all__ = [
    "Answer",
    "CappedLabels",
    "DatabaseHealthCheck",
    "HTTPServiceHealthCheck",
    "HealthCheck",
    "HealthChecks",
    "HealthWatch",
    "KafkaHealthCheck",
    "LogLimits",
    "ObservabilityMiddleware",
    "ObservabilityModule",
    "ObservabilitySettings",
    "ProbePaths",
    "ProbeServer",
    "Probes",
    "Problem",
    "RedisHealthCheck",
    "RequestFacts",
    "RequestSettings",
    "ServiceProblem",
    "problem_of",
]
