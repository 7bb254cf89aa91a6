"""What the history of a run says: its entries, and the records that they add up to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mainstay.core import MainstayError

Row = dict[str, Any]

INTENT = "intent"
"""An attempt may begin from here on. The first one of a step holds its input."""
ATTEMPT = "attempt"
"""An attempt ended without a result, and another may follow."""
DONE = "done"
FAILED = "failed"
UNKNOWN = "unknown"
RESUMED = "resumed"
"""A person let the parked run go on: open steps may be attempted again, with all their attempts."""

COMPENSATION = ":compensation"
SLEEP = "@sleep"
SIGNAL = "@signal "


def step_of(key: str) -> str:
    """The name of the step that a key such as `1.0/charge:2` is of."""
    return key.removesuffix(COMPENSATION).rpartition("/")[2].rpartition(":")[0]


@dataclass(slots=True)
class StepRecord:
    """What is known about one step of a run.

    Attributes:
        key: branch, name and occurrence: `charge:1`, or `1.0/charge:1` in the first branch of the first gather.
        position: its place in its branch; None for a compensation.
        state: `open` until it is settled.
        seq: of the entry that settled it, or of the last intent.
        input, output: JSON.
        attempts: how many ended without a result.
        began: how many attempts began.
        dangling: an attempt began whose end nobody saw.
        maybe: an attempt may have taken effect.
        rest_seconds: how much is left of the wait before the next attempt.
        error: of the last attempt.
        in_doubt: the entry of an attempt whose commit may have happened, or may yet. Whoever attempts again writes the
            same entry, so that one of the two is refused. In memory only: another worker's fence settles it too.
    """

    key: str
    position: int | None
    state: Literal["open", "done", "failed", "unknown"] = "open"
    seq: int = 0
    input: str | None = None
    output: str | None = None
    attempts: int = 0
    began: int = 0
    dangling: bool = False
    maybe: bool = False
    rest_seconds: float = 0.0
    error: dict[str, Any] = field(default_factory=dict)
    in_doubt: Row | None = None

    @property
    def maybe_twice(self) -> bool:
        """Whether the effect may have happened more than once, unless the other side honours the key."""
        return self.began > 1 or (self.began == 1 and self.dangling)


@dataclass(slots=True)
class History:
    """What a run's history adds up to.

    Attributes:
        records: by key.
        places: the key that each (branch, position) has.
        last_seq: the number of the last entry.
        pivoted: a pivot is done.
    """

    records: dict[str, StepRecord] = field(default_factory=dict)
    places: dict[tuple[str, int], str] = field(default_factory=dict)
    last_seq: int = 0
    pivoted: bool = False


def recall(entries: Iterable[Mapping[str, Any]]) -> History:
    """Add up the entries of one run, in the order of `seq`."""
    history = History()
    for entry in entries:
        history.last_seq = max(history.last_seq, entry["seq"])
        if entry["kind"] == RESUMED:
            _resume(history)
        else:
            _add(history, entry)
    return history


def _resume(history: History) -> None:
    for record in history.records.values():
        if record.state == "open" and not step_of(record.key).startswith((SLEEP, SIGNAL)):
            record.maybe = record.maybe or record.dangling
            record.dangling = False
            record.attempts = 0
            record.rest_seconds = 0.0


def _add(history: History, entry: Mapping[str, Any]) -> None:
    key, kind, position = entry["step"], entry["kind"], entry["position"]
    record = history.records.get(key)
    if record is None:
        record = history.records[key] = StepRecord(key, position)
        if position is not None:
            history.places[branch_of(key), position] = key
    info: dict[str, Any] = json.loads(entry["info"]) if entry["info"] else {}
    if record.input is None and "input" in info:
        record.input = info["input"]
    if kind == INTENT:
        record.seq = entry["seq"]
        record.began += 1
        record.dangling = "rest_seconds" not in info
        record.rest_seconds = max(0.0, info.get("rest_seconds", 0.0) - (entry["now"] - entry["at"]))
        if entry["body"] is not None:
            record.input = entry["body"]
    elif kind == ATTEMPT:
        record.dangling = False
        record.attempts = info["attempts"]
        record.maybe = info["maybe"]
        record.error = info["error"]
        record.rest_seconds = max(0.0, info["rest_seconds"] - (entry["now"] - entry["at"]))
    else:
        record.state = kind
        record.seq = entry["seq"]
        record.dangling = False
        record.output = entry["body"]
        record.error = info.get("error", {})
        history.pivoted = history.pivoted or bool(info.get("pivot"))


def branch_of(key: str) -> str:
    """The branch part of a key: empty for the workflow function itself, `1.0/` for a branch of a gather."""
    return key[: key.rfind("/") + 1]


def describe(error: BaseException) -> dict[str, Any]:
    """What is kept of an exception."""
    try:
        detail = str(error)[:2_000]
    except Exception:  # noqa: BLE001  an error's own code may fail as well
        detail = "(its text could not be made)"
    kept: dict[str, Any] = {"type": type(error).__name__, "detail": detail}
    if isinstance(error, MainstayError):
        kept["code"] = error.code
    return kept
