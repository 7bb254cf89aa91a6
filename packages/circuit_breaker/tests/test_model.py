"""The breaker against a reference that is slow, plain and obviously right: it keeps every call in a list."""

import math
import random
import types
from collections.abc import Coroutine, Generator
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mainstay.circuit_breaker import (
    BreakerConfig,
    Circuit,
    CircuitBreaker,
    CircuitOpen,
    KeyedBreaker,
    KeyedCircuit,
    State,
)
from mainstay.core.testing import VirtualClock


@dataclass
class Reference:
    """The rules of the documentation, word by word, over a list of everything that happened."""

    config: BreakerConfig
    state: State = State.CLOSED
    epoch: int = 0
    calls: list[tuple[float, bool, bool]] = field(default_factory=list)  # when, failed, slow
    opened: float = 0.0
    until: float = 0.0
    breaks: int = 0
    probes: dict[int, float] = field(default_factory=dict)
    probed: int = 0
    share: float = 1.0
    credit: float = 0.0
    ramped_at: float = 0.0
    late: int = 0
    rejected: int = 0
    # Buckets make a time window a little shorter than its seconds; where they turn is the window's own business.
    edges: list[float] = field(default_factory=list)

    def enter(self, state: State, now: float) -> None:
        if not (self.state is State.RAMPING and state is State.CLOSED):
            self.epoch += 1
            self.calls = []
            self.edges = [now]
        self.state = state
        self.probes, self.probed = {}, 0
        if state is State.CLOSED:
            self.breaks = 0

    def break_ends(self) -> float:
        config = self.config
        return self.opened + min(
            config.break_seconds * config.break_growth ** (self.breaks - 1), config.max_break_seconds
        )

    def open(self, now: float) -> None:
        self.breaks += 1
        self.opened = now
        self.until = self.break_ends()
        self.enter(State.OPEN, now)

    def reload(self, config: BreakerConfig) -> None:
        if self.config.window_calls is not None:
            self.calls = self.calls[-self.config.window_calls :]  # what has left does not come back
        self.config = config
        if self.state is State.OPEN:
            self.until = self.break_ends()

    def admit(self, now: float, number: int) -> bool:
        config = self.config
        if self.state is State.OPEN:
            if now < self.until:
                return False
            self.enter(State.HALF_OPEN, now)
        if self.state is State.HALF_OPEN:
            if any(until <= now for until in self.probes.values()):
                self.open(now)
                return False
            if len(self.probes) >= config.probes:
                return False
            self.probes[number] = now + config.probe_seconds
            return True
        if self.state is State.RAMPING:
            gained = (now - self.ramped_at) / config.ramp_seconds if config.ramp_seconds else 1.0
            self.share = min(1.0, self.share + gained)
            self.ramped_at = now
            if self.share >= 1:
                self.enter(State.CLOSED, now)
                return True
            self.credit += self.share
            if self.credit >= 1 - 1e-9:
                self.credit -= 1
                return True
            return False
        return self.state is not State.FORCED_OPEN

    def settle(self, now: float, number: int, epoch: int, *, failed: bool, slow: bool) -> None:
        if epoch != self.epoch:
            self.late += 1
            return
        self.calls.append((now, failed, slow))
        if self.state is State.HALF_OPEN:
            self.probes.pop(number, None)
            if failed or slow:
                self.open(now)
                return
            self.probed += 1
            if self.probed >= self.config.probe_successes:
                if self.config.ramp_seconds > 0:
                    self.share, self.ramped_at = self.config.ramp_start, now
                    self.credit = 1 - self.share
                    self.enter(State.RAMPING, now)
                else:
                    self.enter(State.CLOSED, now)
            return
        if failed and self.state is State.RAMPING:
            self.share /= 2
        counts = (failed or slow) and self.state in {State.CLOSED, State.RAMPING}
        outran = self.state is State.RAMPING and self.share < self.config.ramp_start / 4
        if counts and (outran or self.passed(now)):
            self.open(now)

    def window(self, now: float) -> list[tuple[float, bool, bool]]:
        config = self.config
        if config.window_calls is not None:
            return self.calls[-config.window_calls :]
        # Buckets turn at whole tenths after the window began; the nine before the current one count.
        width = config.window_seconds / 10
        began = self.edges[0]
        current = math.floor((now - began) / width + 1e-9)
        return [call for call in self.calls if math.floor((call[0] - began) / width + 1e-9) > current - 10]

    def passed(self, now: float) -> bool:
        config = self.config
        window = self.window(now)
        failures = sum(failed for _, failed, _ in window)
        slow = sum(slow for _, _, slow in window)
        streak = 0
        for _, failed, _ in reversed(self.calls):
            if not failed:
                break
            streak += 1
        return (
            (config.failure_count is not None and failures >= config.failure_count)
            or (config.consecutive_failures is not None and streak >= config.consecutive_failures)
            or (
                len(window) >= config.minimum_calls
                and (
                    (
                        config.failure_ratio is not None
                        and failures > 0
                        and failures >= config.failure_ratio * len(window)
                    )
                    or (config.slow_seconds is not None and slow > 0 and slow >= config.slow_ratio * len(window))
                )
            )
        )


def changed(config: BreakerConfig, seed: int) -> BreakerConfig:
    """Other thresholds, in a window of the same kind; its length in seconds stays, since that moves whole buckets."""
    choose = random.Random(seed).choice  # noqa: S311  makes the mixture repeatable
    changes = {
        "window_calls": None if config.window_calls is None else choose((5, 8, 13)),
        "minimum_calls": choose((1, 3, 5)),
        "failure_ratio": choose((None, 0.25, 1.0)),
        "consecutive_failures": choose((2, 4)),
        "slow_seconds": choose((None, 1.0, 3.0)),
        "break_seconds": choose((1.0, 4.0)),
        "probes": choose((1, 3)),
        "probe_successes": choose((1, 3)),
        "ramp_seconds": choose((0.0, 2.0, 4.0)),
    }
    return BreakerConfig.model_validate(config.model_dump() | changes)


class Boom(Exception):
    pass


@types.coroutine
def outcome_of_call() -> Generator[None, bool, bool]:
    """Wait until the machine says whether the call fails."""
    return (yield)


@dataclass
class UnderWay:
    """A call through the decorated function, held in the middle."""

    coroutine: Coroutine[None, bool, None]
    epoch: int
    began: float
    measured: bool


configs = st.builds(
    BreakerConfig,
    window_seconds=st.just(5.0),  # buckets of half a second, exact in binary: no call falls on a rounded edge
    window_calls=st.sampled_from([None, 5, 8, 13]),
    minimum_calls=st.integers(1, 5),
    failure_ratio=st.sampled_from([None, 0.25, 0.5, 1.0]),
    failure_count=st.sampled_from([None, 3, 4]),
    consecutive_failures=st.sampled_from([2, 3, 4]),
    slow_seconds=st.sampled_from([None, 1.0]),
    slow_ratio=st.sampled_from([0.5, 1.0]),
    break_seconds=st.sampled_from([2.0, 4.0]),
    break_growth=st.sampled_from([1.0, 2.0]),
    max_break_seconds=st.just(8.0),
    break_jitter=st.just(0.0),
    probes=st.integers(1, 3),
    probe_successes=st.integers(1, 3),
    probe_seconds=st.just(6.0),
    ramp_seconds=st.sampled_from([0.0, 4.0]),
    ramp_start=st.sampled_from([0.25, 0.5]),
)


class BreakerMachine(RuleBasedStateMachine):
    """Calls of the decorated function end in every way and order, and all else happens: the two never differ."""

    seen: ClassVar[set[State]] = set()

    @initialize(config=configs, keyed=st.booleans())
    def begin(self, config: BreakerConfig, keyed: bool) -> None:
        self.clock = VirtualClock()
        self.reference = Reference(config, edges=[0.0])
        self.under_way: dict[int, UnderWay] = {}
        self.number = 0
        self.circuit: Circuit
        breaker: CircuitBreaker | KeyedBreaker
        if keyed:
            breaker = KeyedBreaker("model", config, key=lambda: "key", clock=self.clock)
            self.circuit = breaker["key"]
        else:
            breaker = CircuitBreaker("model", config, clock=self.clock)
            self.circuit = breaker.circuit
        self.breaker = breaker

        @breaker
        async def dependency() -> None:
            if await outcome_of_call():
                raise Boom

        self.dependency = dependency

    @rule(seconds=st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0, 9.0]))
    def wait(self, seconds: float) -> None:
        self.clock.tick(seconds)

    @rule()
    def call(self) -> None:
        now = self.clock.monotonic()
        self.number += 1
        expected = self.reference.admit(now, self.number)
        coroutine = self.dependency()
        try:
            coroutine.send(None)
        except CircuitOpen:
            assert not expected
            self.reference.rejected += 1
            return
        assert expected
        measured = self.reference.config.slow_seconds is not None
        self.under_way[self.number] = UnderWay(coroutine, self.reference.epoch, now, measured)

    @rule(failures=st.integers(0, 4), successes=st.integers(0, 4))
    def call_and_settle(self, failures: int, successes: int) -> None:
        for failed in [True] * failures + [False] * successes:
            self.call()
            if self.number in self.under_way:
                self._settle(self.number, failed=failed)

    @rule(seconds=st.sampled_from([0.5, 1.0, 1.25, 4.0]), failed=st.booleans())
    def call_for(self, seconds: float, failed: bool) -> None:
        self.call()
        self.clock.tick(seconds)
        if self.number in self.under_way:
            self._settle(self.number, failed=failed)

    @precondition(lambda self: self.reference.state in {State.OPEN, State.HALF_OPEN, State.RAMPING})
    @rule(seconds=st.sampled_from([0.5, 2.0, 8.0]))
    def recover(self, seconds: float) -> None:
        self.clock.tick(seconds)
        self.call_and_settle(failures=0, successes=1)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), failed=st.booleans())
    def settle(self, data: st.DataObject, failed: bool) -> None:
        self._settle(data.draw(st.sampled_from(sorted(self.under_way))), failed=failed)

    @precondition(lambda self: len(self.under_way) > 1)
    @rule(failed=st.booleans())
    def settle_all(self, failed: bool) -> None:
        for number in sorted(self.under_way):
            self._settle(number, failed=failed)

    def _settle(self, number: int, *, failed: bool) -> None:
        call = self.under_way.pop(number)
        now, limit = self.clock.monotonic(), self.reference.config.slow_seconds
        # A call that began without a measurement was not measured.
        slow = call.measured and limit is not None and now - call.began > limit
        self.reference.settle(now, number, call.epoch, failed=failed, slow=slow)
        with pytest.raises(Boom if failed else StopIteration):
            call.coroutine.send(failed)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def go_away(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.under_way)))
        call = self.under_way.pop(number)
        call.coroutine.close()
        if call.epoch == self.reference.epoch:
            self.reference.probes.pop(number, None)

    @rule(how=st.sampled_from([State.FORCED_OPEN, State.DISABLED, State.CLOSED]))
    def intervene(self, how: State) -> None:
        {
            State.FORCED_OPEN: self.circuit.force_open,
            State.DISABLED: self.circuit.disable,
            State.CLOSED: self.circuit.reset,
        }[how]()
        self.reference.breaks = 0
        self.reference.enter(how, self.clock.monotonic())

    @rule(seed=st.integers(0, 10_000))
    def reload(self, seed: int) -> None:
        config = changed(self.reference.config, seed)
        self.breaker.reload(config)
        self.reference.reload(config)

    def teardown(self) -> None:
        for call in getattr(self, "under_way", {}).values():
            call.coroutine.close()

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "breaker"):
            return
        BreakerMachine.seen.add(self.circuit.state)
        snapshot = self.circuit.snapshot()
        window = self.reference.window(self.clock.monotonic())
        assert snapshot.state is self.reference.state
        assert snapshot.late_total == self.reference.late
        assert snapshot.rejected_total == self.reference.rejected
        if isinstance(self.circuit, KeyedCircuit):
            assert self.circuit.under_way == len(self.under_way)
        assert (snapshot.calls, snapshot.failures, snapshot.slow) == (
            len(window),
            sum(failed for _, failed, _ in window),
            sum(slow for _, _, slow in window),
        )
        if snapshot.state is State.OPEN:
            assert snapshot.retry_after_seconds == max(0.0, self.reference.until - self.clock.monotonic())


def test_the_breaker_agrees_with_the_reference() -> None:
    """Over thousands of random histories, in which every state is reached, the two never differ."""
    BreakerMachine.seen.clear()
    run_state_machine_as_test(  # more steps than by default: a recovery takes a dozen
        BreakerMachine,
        settings=settings(
            max_examples=120,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
    assert BreakerMachine.seen == set(State)
