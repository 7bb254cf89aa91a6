"""What goes wrong in a run, decided by its seed before it begins; and how little of it is needed.

A plan is a list of faults, each of which strikes at a *moment*: at an await of a handler, at a commit, or between a
handler's end and the note of it. The moments of a run are numbered as they come, and a fault strikes at the first that
suits it from its number on. So a plan can be made smaller by leaving out faults and events, and is still a plan.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

Seed = int | str

_MOST_FAULTS = 6
_COMMITS = 0.35
_RELAYED = 0.3
_SEED = re.compile(r"(?P<number>\d+)(?: faults (?P<faults>[\d,]+|none))?(?: events (?P<events>[\d,]+))?")


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        moment: from which moment on.
        commits: whether it strikes at a commit only; these are few among the moments, and most is decided there.
        kind: where among the kinds that suit the moment, between 0 and 1.
        amount: how much of it, between 0 and 1.
    """

    moment: int
    commits: bool
    kind: float
    amount: float


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a run depends on.

    Attributes:
        number: the seed's number; None for the run in which nothing goes wrong.
        processes: how many share the work.
        pace_seconds: how long the publisher waits between two events, at most.
        hurry: how long things take, from 0 (no time at all) to 1.
        faults: by their places in the seed's list.
        events: the places of the events that are published.
        whole: how many faults and events there are in the seed.
        relayed: whether events go through an outbox and a broker, instead of to the log itself.
    """

    number: int | None
    processes: int
    pace_seconds: float
    hurry: float
    faults: dict[int, Fault]
    events: tuple[int, ...]
    whole: tuple[int, int]
    relayed: bool = False

    @property
    def seed(self) -> Seed:
        """The seed that makes this very plan again."""
        faults, events = self.whole
        said = str(self.number or 0)
        if len(self.faults) < faults:
            said += f" faults {','.join(map(str, self.faults)) or 'none'}"
        if len(self.events) < events:
            said += f" events {','.join(map(str, self.events))}"
        return int(said) if said.isdecimal() else said


def calm(events: int, places: Sequence[int] | None = None) -> Plan:
    """The plan in which nothing goes wrong; with the events of `places` only, where that is given."""
    return Plan(None, 1, 1.0, 0.0, {}, tuple(range(events) if places is None else places), (0, events))


def plan_of(seed: Seed, moments: int, events: int) -> Plan:
    """The plan that belongs to a seed.

    Args:
        seed: a number, or what a failure has printed.
        moments: how many there are when nothing goes wrong.
        events: how many there are to publish.

    Raises:
        ValueError: it is no seed.
    """
    said = _SEED.fullmatch(str(seed))
    if said is None:
        msg = f"{seed!r} is no seed: it is a number, or the text that a failure has printed"
        raise ValueError(msg)
    number = int(said["number"])
    random = Random(f"mainstay {number}")  # noqa: S311  the same each time is the point
    processes = 1 if random.random() < 0.5 else 2
    pace_seconds = (0.0, 0.05, 1.0)[int(random.random() * 3)]
    hurry = random.random()
    count = 1
    while count < _MOST_FAULTS and random.random() < 0.6:
        count += 1
    faults = {
        place: Fault(int(random.random() * moments), random.random() < _COMMITS, random.random(), random.random())
        for place in range(count)
    }
    relayed = random.random() < _RELAYED
    if said["faults"] is not None:
        kept = [] if said["faults"] == "none" else [int(place) for place in said["faults"].split(",")]
        faults = {place: faults[place] for place in kept}
    published = range(events) if said["events"] is None else [int(place) for place in said["events"].split(",")]
    return Plan(number, processes, pace_seconds, hurry, faults, tuple(published), (count, events), relayed)


def shrunk(plan: Plan, fails: Callable[[Plan], bool], tries: int) -> Plan:
    """The smallest plan that is found to fail as well: with fewest faults, then with fewest events.

    Args:
        plan: one that fails.
        fails: runs a plan.
        tries: how many may be run.
    """
    left = tries

    def still(smaller: Plan) -> bool:
        nonlocal left
        left -= 1
        return left >= 0 and fails(smaller)

    faults = _fewest(list(plan.faults), lambda kept: still(_with(plan, kept)))
    fewer = _with(plan, faults)
    events = _fewest(list(plan.events), lambda kept: bool(kept) and still(replace(fewer, events=tuple(kept))))
    return replace(fewer, events=tuple(events))


def _with(plan: Plan, places: Sequence[int]) -> Plan:
    return replace(plan, faults={place: fault for place, fault in plan.faults.items() if place in places})


def _fewest(items: list[int], still: Callable[[list[int]], bool]) -> list[int]:
    """The smallest list found for which `still` holds: parts are left out, large ones first."""
    size = max(1, len(items) // 2)
    while items and size:
        at = 0
        while at < len(items):
            kept = items[:at] + items[at + size :]
            if still(kept):
                items = kept
            else:
                at += size
        size //= 2
    return items
