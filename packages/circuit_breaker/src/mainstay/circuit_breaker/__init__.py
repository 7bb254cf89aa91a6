"""Calls to others that fail fast, recover gently and say why: breaker, bulkhead, retry, timeout, in one pipeline."""

from mainstay.circuit_breaker import _metrics as _metrics
from mainstay.circuit_breaker.adaptive import AdaptiveBulkhead
from mainstay.circuit_breaker.breaker import CircuitBreaker, KeyedBreaker
from mainstay.circuit_breaker.bulkhead import Bulkhead
from mainstay.circuit_breaker.chaos import Chaos, Fault
from mainstay.circuit_breaker.circuit import Circuit, KeyedCircuit
from mainstay.circuit_breaker.errors import (
    BulkheadFull,
    CircuitBreakerError,
    CircuitOpen,
    HarmfulOrderWarning,
    RateLimited,
    Rejected,
    Throttled,
)
from mainstay.circuit_breaker.fallback import Fallback
from mainstay.circuit_breaker.hedge import Hedge
from mainstay.circuit_breaker.limits import Budget, RateLimit
from mainstay.circuit_breaker.module import CircuitBreakerModule
from mainstay.circuit_breaker.pipeline import Pipeline
from mainstay.circuit_breaker.policy import Policy
from mainstay.circuit_breaker.ready import http_read, http_write, sql_transaction
from mainstay.circuit_breaker.retries import Retries
from mainstay.circuit_breaker.service import CircuitBreakerService, OperationConfig
from mainstay.circuit_breaker.settings import BreakerConfig, CircuitBreakerSettings
from mainstay.circuit_breaker.states import CircuitSnapshot, State, StateChange
from mainstay.circuit_breaker.timeouts import Timeout, in_thread

__all__ = [
    "AdaptiveBulkhead",
    "BreakerConfig",
    "Budget",
    "Bulkhead",
    "BulkheadFull",
    "Chaos",
    "Circuit",
    "CircuitBreaker",
    "CircuitBreakerError",
    "CircuitBreakerModule",
    "CircuitBreakerService",
    "CircuitBreakerSettings",
    "CircuitOpen",
    "CircuitSnapshot",
    "Fallback",
    "Fault",
    "HarmfulOrderWarning",
    "Hedge",
    "KeyedBreaker",
    "KeyedCircuit",
    "OperationConfig",
    "Pipeline",
    "Policy",
    "RateLimit",
    "RateLimited",
    "Rejected",
    "Retries",
    "State",
    "StateChange",
    "Throttled",
    "Timeout",
    "http_read",
    "http_write",
    "in_thread",
    "sql_transaction",
]
