"""What a configuration would have done to traffic that was recorded.

A trace is one record a call: when it began, how many seconds it took, whether it failed. `simulate` feeds it, in the
order in which things happened, to the very circuit that would run in production, and reports when it would have opened,
which calls it would have rejected, and what that would have saved and cost. `suggest` derives thresholds from the
trace.

A recorded call is no experiment: calls that a breaker would have rejected were made, so the trace may show a dependency
that suffered from them. What would have happened without them is better than what is reported here.
"""

from __future__ import annotations

import csv
import heapq
import json
import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, cast

from mainstay.circuit_breaker._rules import Rules
from mainstay.circuit_breaker.circuit import Circuit, Ticket
from mainstay.circuit_breaker.settings import BreakerConfig
from mainstay.circuit_breaker.states import State, StateChange
from mainstay.core import Clock

__all__ = ["Move", "RecordedCall", "Simulation", "Suggestion", "read_trace", "simulate", "suggest"]


@dataclass(frozen=True, slots=True, order=True)
class RecordedCall:
    """One call.

    Attributes:
        at: when it began, in seconds from any moment.
        seconds: how long it took.
        failed: whether it failed.
    """

    at: float
    seconds: float
    failed: bool


@dataclass(frozen=True, slots=True)
class Move:
    """A change of state, and when, in the trace's time."""

    at: float
    after: State
    reason: str


@dataclass(slots=True)
class Simulation:
    """What would have happened.

    Attributes:
        config: the configuration.
        calls: records in the trace.
        failures: of them, those that failed.
        moves: every change of state.
        rejected: calls that would have been rejected.
        failures_saved: of them, those that failed when they were made.
        successes_lost: of them, those that succeeded when they were made.
        seconds_saved: what callers waited for the failures that would have been saved.
        first_failure_to_open_seconds: from the first failure to the first opening; None if it never opened, or opened
            for slow calls before any failed.
    """

    config: BreakerConfig
    calls: int = 0
    failures: int = 0
    moves: list[Move] = field(default_factory=list[Move])
    rejected: int = 0
    failures_saved: int = 0
    successes_lost: int = 0
    seconds_saved: float = 0.0
    first_failure_to_open_seconds: float | None = None

    @property
    def openings(self) -> list[Move]:
        """The moments in which it would have opened."""
        return [move for move in self.moves if move.after is State.OPEN]

    def __str__(self) -> str:
        lines = [f"{self.calls} calls, {self.failures} failed; it would have opened {len(self.openings)} times"]
        lines += [f"  at {move.at:10.3f} s  {move.after.value:<9}  {move.reason}" for move in self.moves]
        lines.append(
            f"rejected {self.rejected}: {self.failures_saved} that failed ({self.seconds_saved:.1f} s waited for), "
            f"{self.successes_lost} that succeeded"
        )
        return "\n".join(lines)


class _TraceClock(Clock):
    """The trace's time."""

    __slots__ = ("at",)

    def __init__(self) -> None:
        self.at = 0.0

    def monotonic(self) -> float:
        return self.at


class _Notes(Rules):
    """Rules of a silent circuit: no log, no listener, no metric."""

    __slots__ = ("changes", "time")

    def __init__(self, config: BreakerConfig) -> None:
        self.time = _TraceClock()
        super().__init__("simulation", config, failures=(), answers=(), failed_result=None, clock=self.time)
        self.changes: list[Move] = []

    def announce(self, change: StateChange | None) -> None:
        if change is not None:
            self.changes.append(Move(self.time.at, change.after, change.reason))


def simulate(trace: Iterable[RecordedCall], config: BreakerConfig) -> Simulation:
    """Feed a trace to a circuit with `config`; breaks are without jitter, so that the answer is always the same."""
    rules = _Notes(BreakerConfig.model_validate(config.model_dump() | {"break_jitter": 0.0}))
    time = rules.time
    records = sorted(trace)
    time.at = records[0].at if records else 0.0
    circuit = Circuit(rules)
    report = Simulation(config)
    first_failure = math.inf
    ends: list[tuple[float, int, Ticket, RecordedCall]] = []

    def settle(until: float) -> None:
        while ends and ends[0][0] <= until:
            at, _, ticket, record = heapq.heappop(ends)
            time.at = max(time.at, at)
            if record.failed:
                circuit._failed(ticket, record.seconds, "a recorded failure")
            else:
                circuit._succeeded(ticket, record.seconds)

    for number, record in enumerate(records):
        settle(record.at)
        time.at = record.at
        report.calls += 1
        report.failures += record.failed
        if record.failed:
            first_failure = min(first_failure, record.at)
        ticket = circuit.window or circuit._admit()
        if ticket is None:
            report.rejected += 1
            report.failures_saved += record.failed
            report.successes_lost += not record.failed
            report.seconds_saved += record.seconds if record.failed else 0.0
        else:
            heapq.heappush(ends, (record.at + record.seconds, number, ticket, record))
    settle(math.inf)
    report.moves = rules.changes
    if report.openings and report.openings[0].at >= first_failure:
        report.first_failure_to_open_seconds = report.openings[0].at - first_failure
    return report


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A configuration derived from a trace, and why each number is what it is."""

    config: BreakerConfig
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        changed = self.config.model_dump(exclude_defaults=True)
        return "\n".join(
            (f"BreakerConfig({', '.join(f'{key}={value!r}' for key, value in changed.items())})", *self.reasons)
        )


def suggest(trace: Iterable[RecordedCall]) -> Suggestion:
    """Thresholds for a dependency that usually behaves as in the trace.

    Raises:
        ValueError: fewer than 100 records, or all at one moment: they say nothing about what is usual.
    """
    records = sorted(trace)
    span = records[-1].at - records[0].at if records else 0.0
    if len(records) < _ENOUGH or span <= 0:
        msg = (
            f"a trace of {len(records)} calls over {span:g} s says nothing about what is usual: give {_ENOUGH} or more"
        )
        raise ValueError(msg)
    rate = len(records) / span
    window = min(300.0, max(10.0, _rounded(50 / rate)))
    minimum = max(5, min(100, round(rate * window / 5)))
    shares = [failed for failed, calls in _by_window(records, window) if calls >= minimum] or [
        sum(record.failed for record in records) / len(records)
    ]
    usual = statistics.median(shares)
    ratio = min(0.9, max(0.25, _rounded(3 * usual + 0.1)))
    good = sorted(record.seconds for record in records if not record.failed) or [1.0]
    p99 = good[min(len(good) - 1, int(0.99 * len(good)))]
    slow = max(0.001, _rounded(3 * p99))
    config = BreakerConfig(window_seconds=window, minimum_calls=minimum, failure_ratio=ratio, slow_seconds=slow)
    return Suggestion(
        config,
        (
            f"window_seconds: at {rate:.3g} calls a second, {window:g} s hold about {rate * window:.0f} calls",
            "minimum_calls: a fifth of them, so that it can open within a fifth of the window",
            f"failure_ratio: usually {usual:.1%} fail; three times that and a tenth, at least a quarter",
            f"slow_seconds: 99 in 100 good answers come within {p99:.3g} s; three times that",
        ),
    )


_ENOUGH = 100


def _by_window(records: list[RecordedCall], window: float) -> Iterator[tuple[float, int]]:
    """Share of failures and number of calls, for each stretch of `window` seconds."""
    stretches: dict[int, list[bool]] = {}
    for record in records:
        stretches.setdefault(int((record.at - records[0].at) / window), []).append(record.failed)
    for failed in stretches.values():
        yield sum(failed) / len(failed), len(failed)


def _rounded(value: float) -> float:
    """To two significant digits, as people write thresholds."""
    return float(f"{value:.2g}")


def read_trace(path: Path) -> list[RecordedCall]:
    """Read a trace: CSV with a heading (`.csv`), or else JSON lines. Fields: at, seconds, failed.

    Raises:
        ValueError: a line that cannot be read (the message names line and field), or no line at all.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets begin a file with a mark
        lines = _csv(file) if path.suffix.lower() == ".csv" else _json(file)
        records = [_record(path, number, fields) for number, fields in lines]
    if not records:
        msg = f"{path.name} has no records: one call a line, with the fields at, seconds, failed"
        raise ValueError(msg)
    return records


def _csv(file: TextIO) -> Iterator[tuple[int, object]]:
    reader = csv.DictReader(file, skipinitialspace=True)
    for fields in reader:
        yield reader.line_num, fields


def _json(file: TextIO) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError:
                yield number, None


def _record(path: Path, number: int, fields: object) -> RecordedCall:
    where = f"{path.name}, line {number}"
    if not isinstance(fields, dict):
        msg = f"{where}: no object with the fields at, seconds, failed"
        raise ValueError(msg)  # noqa: TRY004  it is the file that is wrong, not an argument's type
    found = cast("dict[str, Any]", fields)
    numbers: list[float] = []
    for name in ("at", "seconds"):
        try:
            value = float(found[name])
        except (KeyError, TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value) or (name == "seconds" and value < 0):
            msg = f"{where}: {name} is {found.get(name)!r}; it is a number of seconds"
            raise ValueError(msg)
        numbers.append(value)
    failed = {"true": True, "1": True, "false": False, "0": False}.get(str(found.get("failed")).lower())
    if failed is None:
        msg = f"{where}: failed is {found.get('failed')!r}; it is true or false"
        raise ValueError(msg)
    return RecordedCall(numbers[0], numbers[1], failed)
