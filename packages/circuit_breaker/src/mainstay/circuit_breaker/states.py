"""The states of a circuit, and what is told of it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = ["CircuitSnapshot", "State", "StateChange"]


class State(enum.StrEnum):
    """What a circuit does with the next call."""

    CLOSED = "closed"
    """Lets it through."""
    OPEN = "open"
    """Rejects it, until the break is over."""
    HALF_OPEN = "half_open"
    """Lets it through as a probe if a place is free."""
    RAMPING = "ramping"
    """Lets a growing share through."""
    FORCED_OPEN = "forced_open"
    """Rejects it, until `reset`."""
    DISABLED = "disabled"
    """Lets it through and draws no conclusion from its outcome, until `reset`."""


@dataclass(frozen=True, slots=True)
class StateChange:
    """A circuit went from one state into another.

    Attributes:
        name: of the breaker.
        key: of the circuit in a breaker with keys, else None.
        before, after: the states.
        reason: a sentence with the numbers that led to it.
        break_seconds: how long it will stay open at least, where `after` is `open`.
    """

    name: str
    key: object
    before: State
    after: State
    reason: str
    break_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class CircuitSnapshot:
    """A circuit at one moment.

    Attributes:
        name, key: of the breaker, and of the circuit in a breaker with keys (else None).
        state: its state. `open` stays until the first call after the break.
        calls, failures, slow: in the window.
        successes_total, failures_total, neutral_total, late_total, rejected_total: since the circuit exists.
        share: of calls let through: 1 closed, 0 open, between while ramping.
        retry_after_seconds: until calls may go through again; None unless open.
        reason: why it is in this state.
        tripped: whether `trip` opened it, and not its own calls.
    """

    name: str
    key: object
    state: State
    calls: int
    failures: int
    slow: int
    successes_total: int
    failures_total: int
    neutral_total: int
    late_total: int
    rejected_total: int
    share: float
    retry_after_seconds: float | None
    reason: str
    tripped: bool
