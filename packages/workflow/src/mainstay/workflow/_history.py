"""What the history of a run says: its entries, and the records that they add up to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from mainstay.core import derived_id

Row = dict[str, Any]

COMPENSATION = ":compensation"
END = "@end:0"
"""What the end of a branch of a gather is called, behind its prefix. Whatever a function calls is counted from 1."""


class Kind(StrEnum):
    """What an entry of a history says."""

    INTENT = "intent"
    """An attempt may begin from here on. The first one of a step holds its input."""
    WAIT = "wait"
    """A wait began: for a time, a signal or a child."""
    ATTEMPT = "attempt"
    """An attempt ended without a result, and another may follow."""
    DONE = "done"
    FAILED = "failed"
    UNKNOWN = "unknown"
    REOPENED = "reopened"
    """The step failed where there is no way back: it is attempted again when a person resumes the run."""
    RESUMED = "resumed"
    """A person let the parked run go on: open steps may be attempted again, with all their attempts."""

    RETRIED = "retried"
    """A person let the parked run go on from this step: it, and each step that began later, is attempted again."""
    FORKED = "forked"
    """A person began another run with what this one did before this step."""


class StepState(StrEnum):
    """What a record adds up to."""

    OPEN = "open"
    DONE = "done"
    FAILED = "failed"
    """Certainly nothing happened."""
    UNKNOWN = "unknown"
    """Something may have happened."""


_SETTLED = {Kind.DONE: StepState.DONE, Kind.FAILED: StepState.FAILED, Kind.UNKNOWN: StepState.UNKNOWN}


def step_of(key: str) -> str:
    """The name of the step that a key such as `1.0/charge:2` is of."""
    return key.removesuffix(COMPENSATION).rpartition("/")[2].rpartition(":")[0]


def is_child(key: str) -> bool:
    """Whether a key, such as `1.0/@child order:1`, is that of a child."""
    return step_of(key).startswith("@child ")


def branch_of(key: str) -> str:
    """The branch part of a key: empty for the workflow function itself, `1.0/` for a branch of a gather."""
    return key[: key.rfind("/") + 1]


@dataclass(frozen=True, slots=True)
class Keys:
    """The names by which others know the steps of one generation of a run: no two generations have one in common.

    Attributes:
        run_id: the run's id.
        generation: 1, and one more each time that the run went on with new input.
    """

    run_id: str
    generation: int

    def of(self, key: str) -> str:
        """The name of a step: `order-7:charge:1`, and `order-7:charge:1@2` in the second generation."""
        later = f"@{self.generation}" if self.generation > 1 else ""
        return f"{self.run_id}:{key}{later}"

    def of_child(self, key: str) -> str:
        """The id of the run that a child is."""
        return str(derived_id(self.of(key)))


@dataclass(slots=True)
class StepRecord:
    """What is known about one step, effect or wait of a run.

    Attributes:
        key: branch, name and occurrence: `charge:1`, or `1.0/charge:1` in the first branch of the first gather.
        position: its place in its branch; None for a compensation.
        state: `open` until it is settled.
        seq: of the entry that settled it, or of the last intent.
        input, output: JSON.
        pivot: it is a pivot, and an attempt at it began.
        waits: it is a wait, which has no effect that could be repeated.
        attempts: how many ended without a result.
        began: how many attempts began, without those that certainly did nothing.
        dangling: an attempt began whose end was not seen.
        maybe: an attempt may have taken effect.
        rest_seconds: how much is left of the wait before the next attempt.
        error: of the last attempt.
        rejected: the numbers of the entries of an attempt that was rejected. They say only that nothing happened, and
            give way to those of the next one, so that an open circuit does not grow the history.
        first: the number of its first entry; 0 for one that began in this execution.
        inherited: the name by which others know the step, where it is another run's that this one was forked from: its
            outcome counts here, and it is not this run's to undo. Empty for a step of its own.
        in_doubt: the entry of an attempt whose commit may have happened, or may yet. Whoever attempts again writes the
            same entry, so that one of the two is refused. In memory only: another worker's fence settles it too.
        closing: what shares the commit by which an ask ends without a decision, so that none comes after it. In memory
            only, too.
    """

    key: str
    position: int | None
    state: StepState = StepState.OPEN
    seq: int = 0
    input: str | None = None
    output: str | None = None
    pivot: bool = False
    waits: bool = False
    attempts: int = 0
    began: int = 0
    dangling: bool = False
    maybe: bool = False
    rest_seconds: float = 0.0
    error: dict[str, Any] = field(default_factory=dict)
    rejected: tuple[int, ...] = ()
    in_doubt: Row | None = None
    closing: tuple[tuple[Any, Mapping[str, Any]], ...] = ()
    first: int = 0
    inherited: str = ""

    @property
    def exactly_once(self) -> bool:
        """Whether it is a transactional step, and done: it shares the commit with its record, and has no intent."""
        return self.state is StepState.DONE and self.began == 0

    @property
    def in_question(self) -> bool:
        """Whether it is not known if it took effect."""
        return self.dangling or self.maybe or self.state is StepState.UNKNOWN

    @property
    def may_have_happened(self) -> bool:
        """Whether it has to be undone on the way back."""
        return self.state is StepState.DONE or (self.state is not StepState.FAILED and self.in_question)

    @property
    def maybe_twice(self) -> bool:
        """Whether the effect may have happened more than once, unless the other side honours the key."""
        return self.began > 1


@dataclass(slots=True)
class History:
    """What a run's history adds up to.

    Attributes:
        records: by key.
        places: the key that each (branch, position) has.
        last_seq: the number of the last entry.
        pivoted: a pivot is done.
        forks: the runs that were forked from this one: the step before which, by id.
    """

    records: dict[str, StepRecord] = field(default_factory=dict)
    places: dict[tuple[str, int], str] = field(default_factory=dict)
    last_seq: int = 0
    pivoted: bool = False
    forks: dict[str, str] = field(default_factory=dict)

    @property
    def pivot_in_question(self) -> StepRecord | None:
        """A pivot of which it is not known whether it took effect."""
        found = (record for record in self.records.values() if record.pivot and record.state is not StepState.DONE)
        return next((record for record in found if record.in_question), None)

    @property
    def has_way_back(self) -> bool:
        """Whether no pivot is done, or may be."""
        return not self.pivoted and self.pivot_in_question is None

    def from_step(self, key: str) -> list[StepRecord]:
        """What a retry from a step attempts again: it, and the steps that began later.

        What is certain stays as it is: transactional steps that are done, effects of other packages, signals, children
        and waits.
        """
        first = self.records[key].first
        steps = (each for each in self.records.values() if each.position is not None and each.first >= first)
        return [each for each in steps if not step_of(each.key).startswith("@") and not each.exactly_once]

    def forget_ends(self, since: int) -> None:
        """Branches that ended after an entry may end otherwise, since a step before that is attempted again."""
        for record in [each for each in self.records.values() if each.key.endswith("/" + END) and each.first > since]:
            del self.records[record.key], self.places[branch_of(record.key), record.position or 0]

    def put(self, key: str, position: int | None) -> StepRecord:
        """A new record, in its place."""
        record = self.records[key] = StepRecord(key, position)
        if position is not None:
            self.places[branch_of(key), position] = key
        return record


def recall(entries: Iterable[Mapping[str, Any]], opened: Callable[[str], str] = str) -> History:
    """Add up the entries of one run, in the order of `seq`.

    Args:
        entries: rows of the table.
        opened: makes a payload of what is stored for it.
    """
    history = History()
    for entry in entries:
        history.last_seq = max(history.last_seq, entry["seq"])
        if entry["kind"] == Kind.RESUMED:
            _resume(history)
        elif entry["kind"] == Kind.RETRIED:
            _retry(history, entry["step"])
        elif entry["kind"] == Kind.FORKED:
            history.forks[json.loads(entry["info"])["run"]] = entry["step"]
        else:
            _add(history, entry, opened)
    return history


def _resume(history: History) -> None:
    for record in history.records.values():
        if record.state is StepState.OPEN and not record.waits:
            record.maybe = record.maybe or record.dangling
            record.dangling = False
            record.attempts = 0
            record.rest_seconds = 0.0


def _retry(history: History, key: str) -> None:
    history.forget_ends(history.records[key].first)
    for record in history.from_step(key):
        record.maybe = record.maybe or record.may_have_happened
        record.state = StepState.OPEN
        record.output = None
        record.dangling = False
        record.attempts = 0
        record.rest_seconds = 0.0
        record.rejected = ()


def _add(history: History, entry: Mapping[str, Any], opened: Callable[[str], str]) -> None:
    key, kind = entry["step"], Kind(entry["kind"])
    record = history.records.get(key) or history.put(key, entry["position"])
    record.first = record.first or entry["seq"]
    info: dict[str, Any] = json.loads(entry["info"]) if entry["info"] else {}
    body = None if entry["body"] is None else opened(entry["body"])
    if record.input is None and info.get("input") is not None:
        record.input = opened(info["input"])
    if kind in {Kind.INTENT, Kind.WAIT, Kind.ATTEMPT}:
        record.rest_seconds = max(0.0, info.get("rest_seconds", 0.0) - (entry["now"] - entry["at"]))
    if kind in {Kind.INTENT, Kind.WAIT}:
        record.seq = entry["seq"]
        record.waits = kind is Kind.WAIT
        record.dangling = not record.waits
        record.began += record.dangling
        record.pivot = bool(info.get("pivot"))
        record.rejected = ()
        if body is not None:
            record.input = body
    elif kind is Kind.ATTEMPT:
        record.began -= record.dangling and not info.get("happened", True)
        record.dangling = False
        record.attempts = info["attempts"]
        record.maybe = info["maybe"]
        record.error = info["error"]
        record.rejected = (record.seq, entry["seq"]) if info.get("rejected") else ()
    elif kind is Kind.REOPENED:
        history.forget_ends(record.first)
        record.state = StepState.OPEN
        record.inherited = ""  # what is attempted again is this run's own
    else:
        record.state = _SETTLED[kind]
        record.seq = entry["seq"]
        record.dangling = False
        record.output = body
        record.error = info.get("error", {})
        record.inherited = info.get("inherited", "")
        history.pivoted = history.pivoted or bool(info.get("pivot"))
