"""The convention every Mainstay package follows: modules, the App, context, deadline, errors, retry, clock, health."""

from mainstay.core.app import App, Work
from mainstay.core.clock import SYSTEM_CLOCK, Clock, Timer
from mainstay.core.context import Context, Later, bind, current, rebind
from mainstay.core.deadline import (
    Deadline,
    ambient_deadline,
    deadline_error,
    deadline_fired,
    remaining_seconds,
    timeout,
)
from mainstay.core.digest import digest
from mainstay.core.drain import Drain
from mainstay.core.errors import ConfigurationError, DeadlineExceeded, MainstayError, NotBoundError
from mainstay.core.given import given, given_kinds
from mainstay.core.health import HasHealth, HasHealthParts, Health
from mainstay.core.ids import ID_RULE, checked_id, derived_id, is_id, uuid7
from mainstay.core.journal import Effect, Journal, bind_journal, once
from mainstay.core.module import Binding, Feature, Module
from mainstay.core.retry import (
    Decide,
    FullJitter,
    Outcome,
    Retry,
    RetryState,
    Wait,
    note_attempts,
    retry_if_retryable,
)
from mainstay.core.settings import Settings, stray_variables
from mainstay.core.tasks import cancelled_from_outside, spawn
from mainstay.core.values import Kept

__all__ = [
    "ID_RULE",
    "SYSTEM_CLOCK",
    "App",
    "Binding",
    "Clock",
    "ConfigurationError",
    "Context",
    "Deadline",
    "DeadlineExceeded",
    "Decide",
    "Drain",
    "Effect",
    "Feature",
    "FullJitter",
    "HasHealth",
    "HasHealthParts",
    "Health",
    "Journal",
    "Kept",
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
    "Work",
    "ambient_deadline",
    "bind",
    "bind_journal",
    "cancelled_from_outside",
    "checked_id",
    "current",
    "deadline_error",
    "deadline_fired",
    "derived_id",
    "digest",
    "given",
    "given_kinds",
    "is_id",
    "note_attempts",
    "once",
    "rebind",
    "remaining_seconds",
    "retry_if_retryable",
    "spawn",
    "stray_variables",
    "timeout",
    "uuid7",
]
