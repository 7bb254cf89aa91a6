"""Calls to others that fail fast, recover gently and say why: breaker, bulkhead, retry, timeout, in one pipeline."""

from mainstay.circuit_breaker import _metrics as _metrics
from mainstay.circuit_breaker._admission import Policy, in_thread
from mainstay.circuit_breaker.breaker import CircuitBreaker, KeyedBreaker
from mainstay.circuit_breaker.bulkhead import Bulkhead
from mainstay.circuit_breaker.circuit import Circuit, CircuitSnapshot, State, StateChange
from mainstay.circuit_breaker.errors import (
    BulkheadFull,
    CircuitOpen,
    HarmfulOrderWarning,
    RateLimited,
    Rejected,
    Throttled,
)
from mainstay.circuit_breaker.module import CircuitBreakerModule
from mainstay.circuit_breaker.pipeline import Pipeline
from mainstay.circuit_breaker.retries import Retries
from mainstay.circuit_breaker.service import CircuitBreakerService, OperationConfig
from mainstay.circuit_breaker.settings import BreakerConfig, CircuitBreakerSettings
from mainstay.circuit_breaker.timeouts import Timeout

__all__ = [
    "BreakerConfig",
    "Bulkhead",
    "BulkheadFull",
    "Circuit",
    "CircuitBreaker",
    "CircuitBreakerModule",
    "CircuitBreakerService",
    "CircuitBreakerSettings",
    "CircuitOpen",
    "CircuitSnapshot",
    "HarmfulOrderWarning",
    "KeyedBreaker",
    "OperationConfig",
    "Pipeline",
    "Policy",
    "RateLimited",
    "Rejected",
    "Retries",
    "State",
    "StateChange",
    "Throttled",
    "Timeout",
    "in_thread",
]
