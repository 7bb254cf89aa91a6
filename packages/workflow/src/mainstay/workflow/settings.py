"""The settings of the package."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from mainstay.core import Settings

__all__ = ["WorkflowSettings"]


DAY_SECONDS = 86_400.0


class WorkflowSettings(Settings):
    """Read from `MAINSTAY_WORKFLOW_…`; each concerns one worker, that is one serving process.

    Attributes:
        max_runs: the most runs that are executed at once; the others wait in the queue.
        max_executing: the most steps that are executed at once, over all runs.
        max_threads: the most plain `def` steps that are executed at once; the others wait for a thread.
        max_unrecorded: with so many steps executed and not yet recorded, no further one begins: beside those that are
            being executed, they are what a kill makes the next worker repeat.
        max_attempts: how often a run is claimed without making progress before it is parked; a graceful stop is no
            attempt.
        lease_seconds: how long after the death of a worker others take over its runs, at most.
        suspend_after_seconds: a run that waits for longer than this (a sleep, or before a late attempt) leaves the
            worker's memory and comes back through the queue.
        keep_completed_days, keep_failed_days, keep_cancelled_days, keep_terminated_days: how long after its end a run
            that ended so is kept, with its history and signals; without one, for ever. A child is kept as long as its
            parent. When the run is deleted, its id is free for another run.
        keep_signals_days: for how long a signal is kept whose run was never started, or is deleted; and at least how
            long one that was received is known again, where its run went on with new input.
        poll_seconds: how often the queue is looked into for runs that other processes started.
    """

    model_config = SettingsConfigDict(env_prefix="MAINSTAY_WORKFLOW_")

    max_runs: int = Field(default=1_000, ge=1)
    max_executing: int = Field(default=1_000, ge=1)
    max_threads: int = Field(default=32, ge=1)
    max_unrecorded: int = Field(default=128, ge=1)
    max_attempts: int = Field(default=10, ge=1)
    lease_seconds: float = Field(default=5.0, ge=0.5)
    suspend_after_seconds: float = Field(default=10.0, gt=0)
    keep_completed_days: float | None = Field(default=None, gt=0)
    keep_failed_days: float | None = Field(default=None, gt=0)
    keep_cancelled_days: float | None = Field(default=None, gt=0)
    keep_terminated_days: float | None = Field(default=None, gt=0)
    keep_signals_days: float = Field(default=30.0, gt=0)
    poll_seconds: float = Field(default=0.2, gt=0, le=60)
