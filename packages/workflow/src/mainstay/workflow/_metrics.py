"""What the package counts; children are bound once."""

from __future__ import annotations

from functools import cache

from prometheus_client import Counter, Gauge, Histogram

RUNS_STARTED = Counter("mainstay_workflow_runs_started", "Runs that were started here.", ["workflow"])
RUNS_ENDED = Counter("mainstay_workflow_runs_ended", "Runs that ended in this process.", ["workflow", "status"])
RUNS_CONTINUED = Counter("mainstay_workflow_runs_continued", "Runs that went on with new input here.", ["workflow"])
RUNS_DELETED = Counter("mainstay_workflow_runs_deleted", "Ended runs that were kept no longer.", ["status"])
SIGNALS_EXPIRED = Counter("mainstay_workflow_signals_expired", "Signals for runs that there never were.")
WORKERS_BURIED = Counter("mainstay_workflow_workers_buried", "Dead workers whose runs went back into the queue.")
RUNS_ACTIVE = Gauge("mainstay_workflow_runs_active", "Runs that this worker executes.", multiprocess_mode="livesum")
RUNS_PARKED = Gauge("mainstay_workflow_runs_parked", "Runs that wait for a person.", multiprocess_mode="livemax")
RUNS_UNKNOWN = Gauge(
    "mainstay_workflow_runs_unknown",
    "Queued runs of workflows that this worker does not know.",
    multiprocess_mode="livemax",
)
STEPS = Counter("mainstay_workflow_steps", "Steps and compensations that ended here.", ["step", "outcome"])
STEP_SECONDS = Histogram(
    "mainstay_workflow_step_seconds",
    "How long one attempt took.",
    buckets=(0.001, 0.01, 0.1, 0.5, 1, 5, 10, 60),
)

_started = cache(RUNS_STARTED.labels)
_ended = cache(RUNS_ENDED.labels)
_continued = cache(RUNS_CONTINUED.labels)
_steps = cache(STEPS.labels)


def count_start(workflow: str, number: int = 1) -> None:
    """So many runs were started."""
    _started(workflow).inc(number)


def count_end(workflow: str, status: str) -> None:
    """A run ended."""
    _ended(workflow, status).inc()


def count_continued(workflow: str) -> None:
    """A run went on with new input."""
    _continued(workflow).inc()


def count_step(step: str, outcome: str) -> None:
    """A step ended."""
    _steps(step, outcome).inc()
