"""What the runs of one worker share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mainstay.core import Clock
from mainstay.database import Database
from mainstay.workflow._payloads import Payloads
from mainstay.workflow._recording import Places
from mainstay.workflow.step import AnyStep


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the runs of one worker share.

    Attributes:
        executing: places for steps that are being executed.
        unrecorded: places for results that are not recorded yet.
        keep_signals_seconds: how long a signal that was received is known again.
        steps: every step of the App, by name.
        payloads: how inputs and results are stored.
        wake: tells the worker of this process that a run may be in the queue, or has news.
        cancel: tells it that a run is to be cancelled.
    """

    database: Database
    clock: Clock
    executing: Places
    unrecorded: Places
    suspend_after_seconds: float
    keep_signals_seconds: float
    steps: Mapping[str, AnyStep]
    payloads: Payloads
    wake: Callable[[str], None]
    cancel: Callable[[str], None]
