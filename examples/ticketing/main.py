"""The office put together: the only file that knows every module. Settings come from the environment."""

from __future__ import annotations

from mainstay.audit import AuditModule
from mainstay.circuit_breaker import CircuitBreakerModule
from mainstay.core import App
from mainstay.database import DatabaseModule
from mainstay.events import EventsModule
from mainstay.observability import ObservabilityModule, ObservabilitySettings
from mainstay.workflow import WorkflowModule
from ticketing import payments, projections, saga
from ticketing.office import OfficeModule

app = App(
    ObservabilityModule.for_root(ObservabilitySettings(service_name="ticketing")),
    DatabaseModule.for_root(),
    EventsModule.for_root(),
    EventsModule.for_feature(saga.events, projections.events),
    CircuitBreakerModule.for_root(),
    CircuitBreakerModule.for_feature(payments.policies),
    WorkflowModule.for_root(),
    WorkflowModule.for_feature(saga.flows),
    AuditModule.for_root(),
    AuditModule.for_feature(saga.audit),
    OfficeModule.for_root(),
)
