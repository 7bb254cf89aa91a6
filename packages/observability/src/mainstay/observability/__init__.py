"""Logs, metrics, traces, health and error bodies of a service."""

from mainstay.observability.asgi import ObservabilityMiddleware
from mainstay.observability.errors import error_body
from mainstay.observability.health import Answer, HealthWatch
from mainstay.observability.metrics import CappedLabels
from mainstay.observability.module import ObservabilityModule, ProbeServer
from mainstay.observability.settings import ObservabilitySettings

__all__ = [
    "Answer",
    "CappedLabels",
    "HealthWatch",
    "ObservabilityMiddleware",
    "ObservabilityModule",
    "ObservabilitySettings",
    "ProbeServer",
    "error_body",
]
