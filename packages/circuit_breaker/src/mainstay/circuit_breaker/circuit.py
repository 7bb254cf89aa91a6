"""One circuit: the state machine, its window and its probes.

The path of a call through a closed circuit is not here: it is generated, in `_admission`. It reads `window` and adds
one to `window.successes`. Everything below runs when that is not enough: `window` is None because the circuit is not
closed, a call failed or was slow, a bucket of the window is over, or the window was replaced while the call was under
way.

A **ticket** is what a call gets at admission and brings back when it ends: the window it is to be counted in, or a
`Probe`. A ticket carries an epoch. Every change of state begins a new epoch, and what comes back with an old one is
counted as *late* and has no other effect: a success that began before an outage says nothing about its end.

The lock guards state for a few microseconds and is never held across a call, an await, a listener or a log line.
"""

from __future__ import annotations

import enum
import threading
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from mainstay.circuit_breaker.errors import CircuitOpen
from mainstay.circuit_breaker.verdicts import Verdict
from mainstay.circuit_breaker.windows import CountWindow, TimeWindow, Window, streak_of

if TYPE_CHECKING:
    from mainstay.circuit_breaker.breaker import Rules

__all__ = ["Circuit", "CircuitSnapshot", "State", "StateChange"]


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
    """Rejects it, until somebody resets the circuit."""
    DISABLED = "disabled"
    """Lets it through and draws no conclusion from what comes of it, until somebody resets the circuit."""


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


class Probe:
    """The ticket of a call through a half-open circuit."""

    __slots__ = ("epoch", "until")

    edge = float("inf")  # the generated code asks every ticket whether its bucket is over

    def __init__(self, epoch: int, until: float) -> None:
        self.epoch = epoch
        self.until = until


Ticket = CountWindow | TimeWindow | Probe

_NEVER = -inf
_FORGOTTEN = -(2**40)
_COUNTING = frozenset({State.CLOSED, State.RAMPING})
_OPEN_TO_ALL = frozenset({State.CLOSED, State.DISABLED})
_SPOKEN = {state: state.value.replace("_", " ") for state in State}


class Circuit:
    """A state machine for one dependency, or one key of it. Made by `CircuitBreaker`, by itself or for each key."""

    __slots__ = (
        "_asked",
        "_breaks",
        "_credit",
        "_probed",
        "_probes",
        "_retired",
        "_share",
        "_since",
        "counted",
        "epoch",
        "key",
        "late",
        "lock",
        "neutral",
        "reason",
        "rejected",
        "rules",
        "shut_until",
        "state",
        "under_way",
        "window",
    )

    def __init__(self, rules: Rules, key: object = None) -> None:
        self.rules = rules
        self.key = key
        self.lock = threading.Lock()
        self.state = State.CLOSED
        self.reason = "new"
        self.epoch = 0
        self.counted: Window = self._new_window()
        # The window while the circuit is closed or disabled, else None: the one thing that the fast path looks at.
        self.window: Window | None = self.counted
        self.late = self.neutral = self.rejected = 0
        self.under_way = 0  # counted for circuits with keys only; far below zero once it is forgotten
        self._retired = (0, 0)  # successes and failures in windows of earlier epochs
        self._probes: tuple[Probe, ...] = ()
        self._probed = 0  # probes that succeeded, in a row
        self._breaks = 0  # breaks since it was last closed
        # The break's end while it is open, else long past: a call that asks earlier is rejected without a lock. One
        # that sees the end a moment late loses nothing.
        self.shut_until = _NEVER
        self._asked = 0.0  # when the last rejected call asked
        self._share = 1.0
        self._credit = 0.0
        self._since = 0.0  # when the share was last raised; while it is open, when the break began

    # What people do with it

    def force_open(self, reason: str = "forced open by hand") -> None:
        """Reject every call until `reset`."""
        self._move(State.FORCED_OPEN, reason)

    def disable(self, reason: str = "disabled by hand") -> None:
        """Let every call through, whatever comes of it, until `reset`."""
        self._move(State.DISABLED, reason)

    def reset(self, reason: str = "reset by hand") -> None:
        """Close with an empty window."""
        self._move(State.CLOSED, reason)

    def trip(self, reason: str) -> None:
        """Open as if a threshold had been passed; it recovers by itself. Does nothing unless closed or ramping."""
        with self.lock:
            change = self._open(reason) if self.state in _COUNTING else None
        self._announce(change)

    def _move(self, to: State, reason: str) -> None:
        with self.lock:
            self._breaks = 0
            change = self._enter(to, reason)
        self._announce(change)

    def snapshot(self) -> CircuitSnapshot:
        """Everything about it, consistent in itself."""
        with self.lock:
            now = self.rules.now()
            calls, failures, slow = self.counted.totals(now)
            successes, failed = self._sums()
            share = self._share if self.state is State.RAMPING else float(self.state in _OPEN_TO_ALL)
            return CircuitSnapshot(
                self.rules.name,
                self.key,
                self.state,
                calls,
                failures,
                slow,
                successes,
                failed,
                self.neutral,
                self.late,
                self.rejected,
                share,
                max(0.0, self.shut_until - now) if self.state is State.OPEN else None,
                self.reason,
            )

    def _sums(self) -> tuple[int, int]:
        """Successes and failures since the circuit exists."""
        return self._retired[0] + self.counted.successes, self._retired[1] + self.counted.failures

    def _outcomes(self) -> tuple[int, int, int, int, int]:
        """Successes, failures, neutral, late and rejected calls since the circuit exists; none ever goes back."""
        with self.lock:  # or the moment in which one window follows another could be seen
            return (*self._sums(), self.neutral, self.late, self.rejected)

    def _hold(self) -> bool:
        """Count a call under way; False if the circuit has been forgotten and counts no more."""
        with self.lock:
            self.under_way += 1
            return self.under_way > 0

    def _let_go(self) -> None:
        """The call has ended."""
        with self.lock:
            self.under_way -= 1

    def _is_forgettable(self) -> bool:
        """Whether nothing bad is lost with it."""
        with self.lock:
            return self._holds_nothing(strict=False)

    def _forget(self, *, strict: bool) -> bool:
        """Count no further call, if nothing is lost with it."""
        with self.lock:  # a failure is counted under it, so that none comes between the two looks
            if not self._holds_nothing(strict=strict) or self.under_way:
                return False
            self.under_way = _FORGOTTEN  # between this and the look at it there is no call, as on the fast path
            return True

    def _holds_nothing(self, *, strict: bool) -> bool:
        """Closed, no call under way, and an empty window (strict) or one without anything bad."""
        if self.state is not State.CLOSED or self.under_way:
            return False
        calls, failures, slow = self.counted.totals(self.rules.now())
        return calls == 0 if strict else failures == slow == 0

    # Admission and settling

    def _admit(self) -> Ticket | None:
        """Decide about a call when `window` is None: its ticket, or None. Then the caller raises `_rejection()`."""
        now = self.rules.now()
        with self.lock:
            change, ticket = self._decide(now)
            self._asked = now
            self.rejected += ticket is None
        self._announce(change)
        return ticket

    def _rejection(self) -> CircuitOpen:
        """Why the call that asked last was not admitted."""
        state, config = self.state, self.rules.config
        after: float | None = 0.0  # it has just closed
        if state is State.OPEN:
            after = self.shut_until - self._asked
        elif state is State.FORCED_OPEN:
            after = None
        elif state is State.HALF_OPEN:
            # Nobody knows when the probe ends. Its lease is the latest, a break is what failure would cost.
            lease = min((probe.until for probe in self._probes), default=self._asked) - self._asked
            after = min(config.break_seconds, lease)
        elif state is State.RAMPING:
            after = min(config.ramp_seconds, 1.0)
        return CircuitOpen(self.rules.name, _SPOKEN[state], after)

    def _decide(self, now: float) -> tuple[StateChange | None, Ticket | None]:
        change: StateChange | None = None
        config = self.rules.config
        if self.state is State.OPEN:
            if now < self.shut_until:
                return None, None
            change = self._enter(State.HALF_OPEN, "the break is over")
        if self.state is State.HALF_OPEN:
            if any(probe.until <= now for probe in self._probes):
                return self._open(f"a probe had no outcome within {config.probe_seconds:g} s"), None
            if len(self._probes) >= config.probes:
                return change, None
            probe = Probe(self.epoch, now + config.probe_seconds)
            self._probes = (*self._probes, probe)
            return change, probe
        if self.state is State.RAMPING:
            # A reload may have taken the ramp away.
            gained = (now - self._since) / config.ramp_seconds if config.ramp_seconds else 1.0
            self._share = min(1.0, self._share + gained)
            self._since = now
            if self._share >= 1:
                return self._enter(State.CLOSED, f"ramped up over {config.ramp_seconds:g} s"), self.counted
            self._credit += self._share
            if self._credit >= 1 - 1e-9:
                self._credit -= 1
                return None, self.counted
            return None, None
        if self.state is State.FORCED_OPEN:
            return None, None
        return None, self.counted  # closed or disabled by somebody else a moment ago

    def _succeeded(self, ticket: Ticket, seconds: float | None = None) -> None:
        """Settle a call that the fast path did not: its window is no longer, or was never, the closed circuit's."""
        change = None
        with self.lock:
            if ticket.epoch != self.epoch:
                self.late += 1
                return
            self.counted.turn(self.rules.now())
            self.counted.successes += 1
            slow = self._mark_slow(seconds)
            if isinstance(ticket, Probe):
                self._probes = tuple(probe for probe in self._probes if probe is not ticket)
                config = self.rules.config
                self._probed += 1
                if slow:
                    change = self._open(f"a probe took longer than {config.slow_seconds:g} s")
                elif self._probed >= config.probe_successes:
                    change = self._recover(f"{self._probed} probes in a row succeeded")
            elif slow:
                change = self._judge_window()
        self._announce(change)

    def _was_slow(self, ticket: Ticket) -> None:
        """Count the call that was just counted as slow; the fast path calls this after a slow success."""
        with self.lock:
            if ticket.epoch != self.epoch:
                return
            self.counted.mark_slow(self.rules.now())
            change = self._judge_window()
        self._announce(change)

    def _renew(self, probe: Probe) -> None:
        """An item of a stream came: the probe is alive."""
        probe.until = self.rules.now() + self.rules.config.probe_seconds

    def _turn(self) -> None:
        """A bucket of the window is over."""
        with self.lock:
            self.counted.turn(self.rules.now())

    def _raised(self, ticket: Ticket, error: BaseException, seconds: float | None = None) -> None:
        """Settle a call that ended with `error`."""
        verdict = self.rules.judge(error)
        if verdict is Verdict.FAILURE:
            self._failed(ticket, seconds, type(error).__name__)
        elif verdict is Verdict.ANSWER:
            self._succeeded(ticket, seconds)
        else:
            with self.lock:
                self.neutral += 1
                if isinstance(ticket, Probe):
                    self._probes = tuple(probe for probe in self._probes if probe is not ticket)

    def _failed(self, ticket: Ticket, seconds: float | None = None, what: str = "a bad result") -> None:
        """Settle a call that failed."""
        with self.lock:
            if ticket.epoch != self.epoch:
                self.late += 1
                return
            self.counted.fail(self.rules.now())
            self._mark_slow(seconds)
            change = None
            if isinstance(ticket, Probe):
                change = self._open(f"a probe failed with {what}")
            elif self.state is State.RAMPING:
                self._share /= 2
                change = self._judge_window()
                if change is None and self._share < self.rules.config.ramp_start / 4:
                    change = self._open("failures outran the ramp")
            else:
                change = self._judge_window()
        self._announce(change)

    def _mark_slow(self, seconds: float | None) -> bool:
        limit = self.rules.config.slow_seconds
        if seconds is None or limit is None or seconds <= limit:
            return False
        self.counted.mark_slow(self.rules.now())
        return True

    def _judge_window(self) -> StateChange | None:
        """Open if a criterion holds. Under the lock."""
        if self.state not in _COUNTING:
            return None
        config = self.rules.config
        calls, failures, slow = self.counted.totals(self.rules.now())
        if config.failure_count is not None and failures >= config.failure_count:
            return self._open(f"{failures} failures in the window")
        streak = streak_of(self.counted)  # successes end it without a trace, and a slow one gets here too
        if config.consecutive_failures is not None and streak >= config.consecutive_failures:
            return self._open(f"{streak} failures in a row")
        if calls >= config.minimum_calls:
            # A ratio as it is written, not as it is stored: 0.3 of 10 calls is 3, though 3 / 10 < 0.3 might round
            # otherwise.
            if config.failure_ratio is not None and failures >= config.failure_ratio * calls - 1e-9 and failures:
                return self._open(f"{failures} of {calls} calls failed")
            if config.slow_seconds is not None and slow >= config.slow_ratio * calls - 1e-9 and slow:
                return self._open(f"{slow} of {calls} calls took longer than {config.slow_seconds:g} s")
        return None

    # Moving between states, under the lock

    def _open(self, reason: str) -> StateChange:
        rules = self.rules
        seconds = rules.break_seconds(self._breaks)
        self._breaks += 1
        change = self._enter(State.OPEN, reason, seconds)
        self._since = rules.now()
        self.shut_until = self._since + seconds
        return change

    def _recover(self, reason: str) -> StateChange:
        config = self.rules.config
        if config.ramp_seconds > 0 and config.ramp_start < 1:
            self._share = config.ramp_start
            self._credit = 1 - config.ramp_start  # the first one goes through
            self._since = self.rules.now()
            return self._enter(State.RAMPING, reason)
        return self._enter(State.CLOSED, reason)

    def _enter(self, to: State, reason: str, break_seconds: float | None = None) -> StateChange:
        before, self.state, self.reason = self.state, to, reason
        self.window = None  # first: from here on nobody is let through by the fast path
        self.shut_until = _NEVER
        if before is State.RAMPING and to is State.CLOSED:
            pass  # the calls of the ramp are evidence about the same, recovered dependency
        else:
            self.epoch += 1
            self._retired = self._sums()
            self.counted = self._new_window()
        self._probes = ()
        self._probed = 0
        if to is State.CLOSED:
            self._breaks = 0
        if to in _OPEN_TO_ALL:
            self.window = self.counted
        return StateChange(self.rules.name, self.key, before, to, reason, break_seconds)

    def _reconfigured(self) -> None:
        """The rules have a new configuration: keep what the window holds."""
        with self.lock:
            config, window, now = self.rules.config, self.counted, self.rules.now()
            if config.window_calls is not None and isinstance(window, CountWindow):
                kept = window.resize(config.window_calls)
            elif config.window_calls is None and isinstance(window, TimeWindow):
                kept = True
                window.resize(config.window_seconds, now)
            else:
                kept = False
            if not kept:
                passable, self.window = self.window is not None, None  # while nobody counts, nothing is lost
                totals = window.totals(now)
                successes, failures = self._sums()
                self.counted = self._new_window()
                self.counted.seed(totals, streak_of(window))
                self._retired = (successes - self.counted.successes, failures - self.counted.failures)
                self.window = self.counted if passable else None
            if self.state is State.OPEN:
                self.shut_until = self._since + self.rules.break_seconds(self._breaks - 1)

    def _reclocked(self) -> None:
        """The rules have another clock: readings of two clocks do not compare, so the window begins anew."""
        with self.lock:
            passable, self.window = self.window is not None, None
            self._retired = self._sums()
            self.epoch += 1
            self.counted = self._new_window()
            self.window = self.counted if passable else None
            self._probes = ()
            self._since = self.rules.now()
            if self.state is State.OPEN:
                self._since = self.shut_until = _NEVER  # the break is over

    def _announce(self, change: StateChange | None) -> None:
        """Outside the lock."""
        if change is not None:
            self.rules.announce(change)

    def _new_window(self) -> Window:
        config = self.rules.config
        if config.window_calls is not None:
            return CountWindow(config.window_calls, self.epoch)
        return TimeWindow(config.window_seconds, self.epoch, self.rules.now())
