"""One circuit: the state machine, its window and its probes.

The path of a call through a closed circuit is not here: it is generated, in `_codegen`. It reads `window` and adds
one to `window.successes`. Everything below runs when that is not enough: `window` is None because the circuit is not
closed, a call failed or was slow, a bucket of the window is over, or the window was replaced while the call was under
way.

A **ticket** is what a call gets at admission and brings back when it ends: the window it is to be counted in, or a
`Probe`. A ticket carries an epoch. Every change of state begins a new epoch, and a ticket of an old one is counted as
*late* and has no other effect: a success that began before an outage says nothing about its end.

The lock guards state for a few microseconds and is never held across a call, an await, a listener or a log line.
Methods whose names end in `_locked` are called with the lock held.
"""

from __future__ import annotations

import threading
from math import inf

from mainstay.circuit_breaker._checks import is_number, require
from mainstay.circuit_breaker._recovery import Probation, Probe, Ramp
from mainstay.circuit_breaker._rules import Rules
from mainstay.circuit_breaker._verdicts import Verdict
from mainstay.circuit_breaker._windows import CountWindow, TimeWindow, Window, reason_to_open, streak_of
from mainstay.circuit_breaker.errors import CircuitOpen
from mainstay.circuit_breaker.settings import BreakerConfig
from mainstay.circuit_breaker.states import CircuitSnapshot, State, StateChange

__all__ = ["Circuit", "KeyedCircuit"]

Ticket = CountWindow | TimeWindow | Probe

_NEVER = -inf
_COUNTING = frozenset({State.CLOSED, State.RAMPING})
_OPEN_TO_ALL = frozenset({State.CLOSED, State.DISABLED})
_SPOKEN = {state: state.value.replace("_", " ") for state in State}


class Circuit:
    """A state machine for one dependency, or one key of it. A breaker has one, or one for each key."""

    __slots__ = (
        "_asked",
        "_breaks",
        "_broke_at",
        "_come_back_seconds",
        "_recovery",
        "_retired",
        "_tripped",
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
        "window",
    )

    def __init__(self, rules: Rules, key: object = None) -> None:
        self.rules = rules
        self.key = key
        self.lock = threading.Lock()
        self.state = State.CLOSED
        self.reason = "new"
        self.epoch = 0
        self.counted: Window = _window(rules, 0)
        # The window while the circuit is closed or disabled, else None: the one thing that the fast path looks at.
        self.window: Window | None = self.counted
        self.late = self.neutral = self.rejected = 0
        self._retired = (0, 0)  # successes and failures in windows of earlier epochs
        self._recovery: Probation | Ramp | None = None  # while it is half open or ramping
        self._breaks = 0  # breaks since it was last closed
        self._broke_at = 0.0
        self._tripped = False
        # The break's end while it is open, else long past: a call that asks earlier is rejected without a lock. One
        # that sees the end a moment late loses nothing.
        self.shut_until = _NEVER
        self._come_back_seconds: float | None = None  # while it is forced open: when callers are told to come back
        self._asked = 0.0  # when the last rejected call asked

    # What people do with it

    def force_open(self, reason: str = "forced open by hand", *, retry_after_seconds: float | None = None) -> None:
        """Reject every call until `reset`.

        Args:
            reason: for the log, and for the snapshot.
            retry_after_seconds: when rejected callers are told to try again, each time anew. By default after the
                configuration's `break_seconds`. > 0

        Raises:
            ValueError: `retry_after_seconds` is no such number.
        """
        after = retry_after_seconds
        in_range = after is None or (is_number(after) and 0 < after < inf)
        require(repr(self.rules.name), "retry_after_seconds", after, "more than 0 and finite, or None", holds=in_range)
        self._move(State.FORCED_OPEN, reason, retry_after_seconds)

    def disable(self, reason: str = "disabled by hand") -> None:
        """Let every call through and draw no conclusion from its outcome, until `reset`."""
        self._move(State.DISABLED, reason)

    def reset(self, reason: str = "reset by hand") -> None:
        """Close with an empty window."""
        self._move(State.CLOSED, reason)

    def trip(self, reason: str) -> None:
        """Open as if a threshold had been passed; it recovers by itself. Does nothing unless closed or ramping."""
        with self.lock:
            change = self._open_locked(reason, tripped=True) if self.state in _COUNTING else None
        self.rules.announce(change)

    def _move(self, to: State, reason: str, come_back_seconds: float | None = None) -> None:
        with self.lock:
            self._breaks = 0
            change = self._enter_locked(to, reason)
            self._come_back_seconds = come_back_seconds
        self.rules.announce(change)

    def snapshot(self) -> CircuitSnapshot:
        """Everything about it, consistent in itself."""
        with self.lock:
            now = self.rules.now()
            calls, failures, slow = self.counted.totals(now)
            successes, failed = self._sums_locked()
            ramp = self._recovery
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
                ramp.share if isinstance(ramp, Ramp) else float(self.state in _OPEN_TO_ALL),
                max(0.0, self.shut_until - now) if self.state is State.OPEN else None,
                self.reason,
                self._tripped,
            )

    def _sums_locked(self) -> tuple[int, int]:
        """Successes and failures since the circuit exists."""
        return self._retired[0] + self.counted.successes, self._retired[1] + self.counted.failures

    def _outcomes(self) -> tuple[int, int, int, int, int]:
        """Successes, failures, neutral, late and rejected calls since the circuit exists; none ever goes back."""
        with self.lock:  # or the moment in which one window follows another could be seen
            return (*self._sums_locked(), self.neutral, self.late, self.rejected)

    # Admission and settling

    def _admit(self) -> Ticket | None:
        """Decide about a call when `window` is None: its ticket, or None. Then the caller raises `_rejection()`."""
        now = self.rules.now()
        with self.lock:
            change, ticket = self._decide_locked(now)
            self._asked = now
            self.rejected += ticket is None
        self.rules.announce(change)
        return ticket

    def _rejection(self) -> CircuitOpen:
        """The reason why the call that asked last was not admitted."""
        state, recovery, config = self.state, self._recovery, self.rules.config
        after = 0.0  # it has just closed
        if state is State.OPEN:
            after = self.shut_until - self._asked
        elif state is State.FORCED_OPEN:
            after = config.break_seconds if self._come_back_seconds is None else self._come_back_seconds
        elif isinstance(recovery, Probation):
            # When the probe ends is not known. Its lease is the latest, a break is what failure would cost.
            lease = min((probe.until for probe in recovery.probes), default=self._asked) - self._asked
            after = min(config.break_seconds, lease)
        elif state is State.RAMPING:
            after = min(config.ramp_seconds, 1.0)
        return CircuitOpen(self.rules.name, _SPOKEN[state], after)

    def _decide_locked(self, now: float) -> tuple[StateChange | None, Ticket | None]:
        change: StateChange | None = None
        config = self.rules.config
        if self.state is State.OPEN:
            if now < self.shut_until:
                return None, None
            change = self._enter_locked(State.HALF_OPEN, "the break is over")
        recovery = self._recovery
        if isinstance(recovery, Probation):
            if any(probe.until <= now for probe in recovery.probes):
                return self._open_locked(f"a probe had no outcome within {config.probe_seconds:g} s"), None
            if len(recovery.probes) >= config.probes:
                return change, None
            return change, recovery.begin(self.epoch, now + config.probe_seconds)
        if recovery is not None:
            recovery.grow(now, config.ramp_seconds)  # a reload may have taken the ramp away
            if recovery.share >= 1:
                return self._enter_locked(State.CLOSED, f"ramped up over {config.ramp_seconds:g} s"), self.counted
            return None, self.counted if recovery.admits() else None
        if self.state is State.FORCED_OPEN:
            return None, None
        return None, self.counted  # another has closed or disabled it a moment ago

    def _succeeded(self, ticket: Ticket, seconds: float | None = None) -> None:
        """Settle a call that the fast path did not: its window is no longer, or was never, the closed circuit's."""
        change = None
        with self.lock:
            if ticket.epoch != self.epoch:
                self.late += 1
                return
            self.counted.turn(self.rules.now())
            self.counted.successes += 1
            slow = self._mark_slow_locked(seconds)
            recovery, config = self._recovery, self.rules.config
            if isinstance(ticket, Probe) and isinstance(recovery, Probation):
                recovery.end(ticket)
                recovery.successes += 1
                if slow:
                    change = self._open_locked(f"a probe took longer than {config.slow_seconds:g} s")
                elif recovery.successes >= config.probe_successes:
                    change = self._recover_locked(f"{recovery.successes} probes in a row succeeded")
            elif slow:
                change = self._judge_window_locked()
        self.rules.announce(change)

    def _was_slow(self, ticket: Ticket) -> None:
        """Count the call that was just counted as slow; the fast path calls this after a slow success."""
        with self.lock:
            if ticket.epoch != self.epoch:
                return
            self.counted.mark_slow(self.rules.now())
            change = self._judge_window_locked()
        self.rules.announce(change)

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
                if isinstance(ticket, Probe) and isinstance(self._recovery, Probation):
                    self._recovery.end(ticket)

    def _failed(self, ticket: Ticket, seconds: float | None = None, what: str = "a bad result") -> None:
        """Settle a call that failed."""
        with self.lock:
            if ticket.epoch != self.epoch:
                self.late += 1
                return
            self.counted.fail(self.rules.now())
            self._mark_slow_locked(seconds)
            change = None
            ramp = self._recovery
            if isinstance(ticket, Probe):
                change = self._open_locked(f"a probe failed with {what}")
            elif isinstance(ramp, Ramp):
                ramp.share /= 2
                change = self._judge_window_locked()
                if change is None and ramp.share < self.rules.config.ramp_start / 4:
                    change = self._open_locked("failures outran the ramp")
            else:
                change = self._judge_window_locked()
        self.rules.announce(change)

    def _mark_slow_locked(self, seconds: float | None) -> bool:
        limit = self.rules.config.slow_seconds
        if seconds is None or limit is None or seconds <= limit:
            return False
        self.counted.mark_slow(self.rules.now())
        return True

    def _judge_window_locked(self) -> StateChange | None:
        """Open if the window meets a criterion."""
        if self.state not in _COUNTING:
            return None
        reason = reason_to_open(self.counted, self.rules.config, self.rules.now())
        return None if reason is None else self._open_locked(reason)

    # Moving between states

    def _open_locked(self, reason: str, *, tripped: bool = False) -> StateChange:
        seconds = self.rules.break_seconds(self._breaks)
        self._breaks += 1
        change = self._enter_locked(State.OPEN, reason, seconds)
        self._tripped = tripped
        self._broke_at = self.rules.now()
        self.shut_until = self._broke_at + seconds
        return change

    def _recover_locked(self, reason: str) -> StateChange:
        config = self.rules.config
        ramps = config.ramp_seconds > 0 and config.ramp_start < 1
        return self._enter_locked(State.RAMPING if ramps else State.CLOSED, reason)

    def _enter_locked(self, to: State, reason: str, break_seconds: float | None = None) -> StateChange:
        before, self.state, self.reason = self.state, to, reason
        self.window = None  # first: from here on no call is let through by the fast path
        self.shut_until = _NEVER
        self._tripped = False
        # The calls of a ramp are evidence about the same, recovered dependency: they stay.
        if not (before is State.RAMPING and to is State.CLOSED):
            self._begin_epoch_locked()
        self._recovery = _recovery(self.rules, to)
        if to is State.CLOSED:
            self._breaks = 0
        if to in _OPEN_TO_ALL:
            self.window = self.counted
        return StateChange(self.rules.name, self.key, before, to, reason, break_seconds)

    def _begin_epoch_locked(self) -> None:
        self.epoch += 1
        self._retired = self._sums_locked()
        self.counted = _window(self.rules, self.epoch)


def use_config(circuit: Circuit) -> None:
    """Take over a new configuration of the rules: keep what the window holds."""
    with circuit.lock:
        rules, window = circuit.rules, circuit.counted
        now = rules.now()
        if not _resized(window, rules.config, now):
            passable, circuit.window = circuit.window is not None, None  # while no call counts, nothing is lost
            totals = window.totals(now)
            successes, failures = circuit._sums_locked()
            circuit.counted = _window(rules, circuit.epoch)
            circuit.counted.seed(totals, streak_of(window))
            circuit._retired = (successes - circuit.counted.successes, failures - circuit.counted.failures)
            circuit.window = circuit.counted if passable else None
        if circuit.state is State.OPEN:
            circuit.shut_until = circuit._broke_at + rules.break_seconds(circuit._breaks - 1)


def use_clock(circuit: Circuit) -> None:
    """Take over another clock of the rules: readings of two clocks do not compare, so the window begins anew."""
    with circuit.lock:
        passable, circuit.window = circuit.window is not None, None
        circuit._begin_epoch_locked()
        circuit.window = circuit.counted if passable else None
        if isinstance(circuit._recovery, Ramp):
            circuit._recovery.since = circuit.rules.now()
        else:
            circuit._recovery = _recovery(circuit.rules, circuit.state)
        if circuit.state is State.OPEN:
            circuit._broke_at = circuit.shut_until = _NEVER  # the break is over


class KeyedCircuit(Circuit):
    """The circuit of one key, which is forgotten when there are too many keys.

    Attributes:
        under_way: calls that hold it.
        forgotten: it counts no further call; the key has, or will get, another.
    """

    __slots__ = ("forgotten", "under_way")

    def __init__(self, rules: Rules, key: object) -> None:
        super().__init__(rules, key)
        self.under_way = 0
        self.forgotten = False

    def _hold(self) -> bool:
        """Count a call under way; False if the circuit has been forgotten and counts no more."""
        with self.lock:
            if self.forgotten:
                return False
            self.under_way += 1
            return True

    def _let_go(self) -> None:
        """The call has ended."""
        with self.lock:
            self.under_way -= 1

    def _is_forgettable(self) -> bool:
        """Whether nothing bad is lost with it."""
        with self.lock:
            return self._holds_nothing_locked(strict=False)

    def _forget(self, *, strict: bool) -> bool:
        """Count no further call, if nothing is lost with it."""
        with self.lock:  # a failure is counted under it, so that none comes between the two looks
            if not self._holds_nothing_locked(strict=strict) or self.under_way:
                return False
            self.forgotten = True  # between this and the look at it there is no call, as on the fast path
            return True

    def _holds_nothing_locked(self, *, strict: bool) -> bool:
        """Closed, no call under way, and an empty window (strict) or one without anything bad."""
        if self.state is not State.CLOSED or self.under_way:
            return False
        calls, failures, slow = self.counted.totals(self.rules.now())
        return calls == 0 if strict else failures == slow == 0


def _window(rules: Rules, epoch: int) -> Window:
    config = rules.config
    if config.window_calls is not None:
        return CountWindow(config.window_calls, epoch)
    return TimeWindow(config.window_seconds, epoch, rules.now())


def _resized(window: Window, config: BreakerConfig, now: float) -> bool:
    """Give the window the length that is configured now; False where it takes another window."""
    if config.window_calls is not None and isinstance(window, CountWindow):
        return window.resize(config.window_calls)
    if config.window_calls is None and isinstance(window, TimeWindow):
        window.resize(config.window_seconds, now)
        return True
    return False


def _recovery(rules: Rules, state: State) -> Probation | Ramp | None:
    if state is State.HALF_OPEN:
        return Probation()
    if state is State.RAMPING:
        return Ramp(rules.config.ramp_start, rules.now())
    return None
