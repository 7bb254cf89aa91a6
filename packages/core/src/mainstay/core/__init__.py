"""The convention every Mainstay package follows: modules, the App, context, deadline, errors, retry, clock, health."""

from mainstay.core.app import App, Worker
from mainstay.core.clock import SYSTEM_CLOCK, Clock, Timer
from mainstay.core.context import Context, Later, bind, current, rebind, spawn
from mainstay.core.deadline import Deadline, deadline_fired, remaining_seconds, timeout
from mainstay.core.errors import ConfigurationError, DeadlineExceeded, MainstayError, NotBoundError
from mainstay.core.health import HasHealth, Health
from mainstay.core.ids import derived_id, uuid7
from mainstay.core.journal import Effect, Journal, bind_journal, once
from mainstay.core.module import Binding, Feature, Module
from mainstay.core.retry import (
    Decide,
    FullJitter,
    Outcome,
    Retry,
    RetryState,
    Wait,
    retry_if_retryable,
)
from mainstay.core.settings import Settings

__all__ = [
    "SYSTEM_CLOCK",
    "App",
    "Binding",
    "Clock",
    "ConfigurationError",
    "Context",
    "Deadline",
    "DeadlineExceeded",
    "Decide",
    "Effect",
    "Feature",
    "FullJitter",
    "HasHealth",
    "Health",
    "Journal",
    "Later",
    "MainstayError",
    "Module",
    "NotBoundError",
    "Outcome",
    "Retry",
    "RetryState",
    "Settings",
    "Timer",
    "Wait",
    "Worker",
    "bind",
    "bind_journal",
    "current",
    "deadline_fired",
    "derived_id",
    "once",
    "rebind",
    "remaining_seconds",
    "retry_if_retryable",
    "spawn",
    "timeout",
    "uuid7",
]
