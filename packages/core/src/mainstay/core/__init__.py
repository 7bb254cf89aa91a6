"""The convention every Mainstay package follows: modules, the App, context, deadline, errors, retry, clock, health."""

from mainstay.core.app import App, Work
from mainstay.core.clock import SYSTEM_CLOCK, Clock, Timer
from mainstay.core.context import Context, Later, Noted, bind, current, rebind
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
from mainstay.core.errors import (
    AlreadyExists,
    ConfigurationError,
    Conflict,
    DeadlineExceeded,
    FieldError,
    Forbidden,
    InvalidRequest,
    MainstayError,
    NotBoundError,
    NotFound,
    TooManyRequests,
    Unauthenticated,
    Unavailable,
    already_exists,
    not_found,
)
from mainstay.core.given import given, given_kinds
from mainstay.core.health import HasHealth, HasHealthParts, Health
from mainstay.core.ids import ID_RULE, checked_id, derived_id, is_id, uuid7
from mainstay.core.journal import Effect, Journal, bind_journal, once
from mainstay.core.module import Binding, Feature, Module
from mainstay.core.outbound import DEADLINE_HEADER, deadline_seconds_of, outbound_headers
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
    "DEADLINE_HEADER",
    "ID_RULE",
    "SYSTEM_CLOCK",
    "AlreadyExists",
    "App",
    "Binding",
    "Clock",
    "ConfigurationError",
    "Conflict",
    "Context",
    "Deadline",
    "DeadlineExceeded",
    "Decide",
    "Drain",
    "Effect",
    "Feature",
    "FieldError",
    "Forbidden",
    "FullJitter",
    "HasHealth",
    "HasHealthParts",
    "Health",
    "InvalidRequest",
    "Journal",
    "Kept",
    "Later",
    "MainstayError",
    "Module",
    "NotBoundError",
    "NotFound",
    "Noted",
    "Outcome",
    "Retry",
    "RetryState",
    "Settings",
    "Timer",
    "TooManyRequests",
    "Unauthenticated",
    "Unavailable",
    "Wait",
    "Work",
    "already_exists",
    "ambient_deadline",
    "bind",
    "bind_journal",
    "cancelled_from_outside",
    "checked_id",
    "current",
    "deadline_error",
    "deadline_fired",
    "deadline_seconds_of",
    "derived_id",
    "digest",
    "given",
    "given_kinds",
    "is_id",
    "not_found",
    "note_attempts",
    "once",
    "outbound_headers",
    "rebind",
    "remaining_seconds",
    "retry_if_retryable",
    "spawn",
    "stray_variables",
    "timeout",
    "uuid7",
]
