"""A breaker's last minutes as text, for a terminal, a log or a ticket.

    payments   closed: ramped up over 10 s
    calls      ▁▂▅▇█▇▅▂▁      312
    failed        ▁▃█▂          41
    rejected        ▂█▅         87
    state      ·····###?//···
               5 min ago             now

Calls pay nothing for it: a sampler reads the counters every few seconds while the App runs.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mainstay.circuit_breaker.breaker import CircuitBreaker, KeyedBreaker
from mainstay.circuit_breaker.states import State
from mainstay.core import Clock, Drain

Breaker = CircuitBreaker | KeyedBreaker

BADNESS = (State.FORCED_OPEN, State.OPEN, State.HALF_OPEN, State.RAMPING, State.DISABLED, State.CLOSED)
_MARKS = {
    State.CLOSED: "·",
    State.OPEN: "#",
    State.HALF_OPEN: "?",
    State.RAMPING: "/",
    State.FORCED_OPEN: "X",
    State.DISABLED: "-",
}
_MANY = 2_000
_HEIGHTS = " ▁▂▃▄▅▆▇█"


def worst_state(breaker: Breaker) -> State:
    """The state of a breaker; of one with keys, the worst of its circuits'."""
    return min({circuit.state for circuit in breaker.circuits()}, key=BADNESS.index, default=State.CLOSED)


@dataclass(frozen=True, slots=True)
class Sample:
    """What a breaker did since the sample before."""

    calls: int
    failed: int
    rejected: int
    state: State


class Sampler:
    """The samples of some breakers.

    Args:
        of: whose, by name; looked at anew for each sample.
        seconds: how far back.
        sample_seconds: how often.
        clock: waits between samples.
    """

    def __init__(self, *, of: Mapping[str, Breaker], seconds: float, sample_seconds: float, clock: Clock) -> None:
        self.sample_seconds = sample_seconds
        self._clock = clock
        self._of = of
        self._length = max(1, round(seconds / sample_seconds))
        self._samples: dict[Breaker, deque[Sample]] = {}
        self._before: dict[Breaker, dict[str, int]] = {}
        self._look()

    def _look(self) -> None:
        for breaker in self._of.values():
            if breaker not in self._samples:
                self._samples[breaker] = deque(maxlen=self._length)
                self._before[breaker] = breaker.totals()

    async def run(self, drain: Drain) -> None:
        """Sample until the drain begins; intervals that passed at once, as in virtual time, get a sample each."""
        sampled_at = self._clock.monotonic()
        while not drain.begun:
            await drain.pause(self.sample_seconds)
            passed = int((self._clock.monotonic() - sampled_at) / self.sample_seconds)
            sampled_at += passed * self.sample_seconds
            for _ in range(min(passed, self._length)):
                if sum(len(breaker.circuits()) for breaker in self._of.values()) > _MANY:
                    await asyncio.to_thread(self.sample)  # tens of milliseconds, too long for the event loop
                else:
                    self.sample()

    def sample(self) -> None:
        """Take one sample of each breaker."""
        self._look()
        for breaker, samples in self._samples.items():
            now, before = breaker.totals(), self._before[breaker]
            self._before[breaker] = now
            gained = {outcome: now[outcome] - before[outcome] for outcome in now}
            made = gained["success"] + gained["failure"] + gained["neutral"] + gained["late"]
            samples.append(Sample(made, gained["failure"], gained["rejected"], worst_state(breaker)))

    def draw(self, breaker: Breaker) -> str:
        """The last minutes of `breaker`; scale is each line's own, its sum stands behind it."""
        samples = list(self._samples.get(breaker, ()))
        state = worst_state(breaker)
        reasons = [circuit.reason for circuit in breaker.circuits() if circuit.state is state]
        lines = [f"{breaker.name:<10} {state.value.replace('_', ' ')}: {reasons[0] if reasons else 'no keys yet'}"]
        for name, values in (
            ("calls", [sample.calls for sample in samples]),
            ("failed", [sample.failed for sample in samples]),
            ("rejected", [sample.rejected for sample in samples]),
        ):
            lines += [f"{name:<10} {_bars(values)}  {sum(values)}"]
        lines.append(f"{'state':<10} {''.join(_MARKS[sample.state] for sample in samples)}")
        ago = f"{len(samples) * self.sample_seconds:g} s ago"
        lines.append(f"{'':<10} {ago:<{max(len(ago) + 1, len(samples) - 3)}}now")
        return "\n".join(lines)


def _bars(values: Sequence[int]) -> str:
    top = max(values, default=0)
    if top == 0:
        return " " * len(values)
    # What happened at all is seen: the smallest bar is kept for it.
    return "".join(_HEIGHTS[0 if value == 0 else max(1, round(value / top * 8))] for value in values)
