"""Pipelines for common cases. The numbers are beginnings: `mainstay breakers suggest` finds yours.

Each call makes a new pipeline with a breaker of that name: make it once, where the client is made. `clock` is for all
of its policies; a running App's clock reaches its breaker only.
"""

from __future__ import annotations

from mainstay.circuit_breaker.breaker import CircuitBreaker
from mainstay.circuit_breaker.bulkhead import Bulkhead
from mainstay.circuit_breaker.limits import Budget
from mainstay.circuit_breaker.pipeline import Pipeline
from mainstay.circuit_breaker.retries import Retries
from mainstay.circuit_breaker.settings import BreakerConfig
from mainstay.circuit_breaker.timeouts import Timeout
from mainstay.core import SYSTEM_CLOCK, Clock, FullJitter, Retry

__all__ = ["http_read", "http_write", "sql_transaction"]


def http_read(name: str, *, clock: Clock = SYSTEM_CLOCK) -> Pipeline:
    """For calls that may be repeated: GET, or a POST with an idempotency key.

    Three attempts of 3 s each within 10 s, because most failures of a healthy service are gone at the second attempt; a
    budget of a fifth, so that attempts cannot multiply an outage; a slow answer counts against the service as well.
    """
    return Pipeline(
        name,
        Timeout(10, name=name, clock=clock),
        Retries(
            Retry(attempts=3, wait=FullJitter(0.05, 2.0), clock=clock),
            budget=Budget(0.2, throttle=None, name=name, clock=clock),
        ),
        CircuitBreaker(name, BreakerConfig(slow_seconds=2.0), clock=clock),
        Bulkhead(64, queue=64, name=name, clock=clock),
        Timeout(3, name=name, clock=clock),
    )


def http_write(name: str, *, clock: Clock = SYSTEM_CLOCK) -> Pipeline:
    """For calls that must not be repeated: no retry, since a request that timed out may have been carried out.

    One attempt of 10 s, because giving up early on a write only trades a slow answer for an unknown outcome; a smaller
    bulkhead without a queue to speak of, because a write that waits in memory is lost when the process dies.
    """
    return Pipeline(
        name,
        CircuitBreaker(name, clock=clock),
        Bulkhead(32, queue=8, max_wait_seconds=0.5, name=name, clock=clock),
        Timeout(10, name=name, clock=clock),
    )


def sql_transaction(
    name: str, *, pool_size: int = 10, answers: tuple[type[Exception], ...] = (), clock: Clock = SYSTEM_CLOCK
) -> Pipeline:
    """For queries: no retry, since only a whole transaction can be repeated; it belongs around the transaction.

    As many calls at a time as the pool has connections, and a queue of twice that, so that waiting happens here, where
    it is bounded and seen. The breaker needs many failures in a row or a clear majority: a database is rarely half
    sick, and a breaker that opens on a burst of bad statements takes down more than it protects.

    Args:
        name: of the database.
        pool_size: connections in the pool. >= 1
        answers: errors that a healthy database gives, such as SQLAlchemy's `IntegrityError` and `ProgrammingError`.
    """
    config = BreakerConfig(failure_ratio=0.8, minimum_calls=20, consecutive_failures=10, break_seconds=2.0, probes=2)
    return Pipeline(
        name,
        CircuitBreaker(name, config, answers=answers, clock=clock),
        Bulkhead(pool_size, queue=2 * pool_size, max_wait_seconds=2.0, name=name, clock=clock),
        Timeout(30, name=name, clock=clock),
    )
