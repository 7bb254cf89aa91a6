"""The record of a run beside its function: each difference between the two is noticed here.

Every primitive takes a place in its branch by its label and arguments. A difference parks the run with a note that
names both sides; it never fails or compensates it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mainstay.workflow._branch import Branch
from mainstay.workflow._history import COMPENSATION, END, History, StepRecord, StepState
from mainstay.workflow.errors import Parked
from mainstay.workflow.tables import STEP_LENGTH

_REMEDY = (
    "it does not do the same on replay. Give the changed function a new version, or put what differs into a step; put "
    "the old code back and resume the run, and it goes on"
)

_LONGEST_KEY = STEP_LENGTH - len(COMPENSATION)

Difference = Callable[[StepRecord, str], str | None]


def other_text(record: StepRecord, arguments: str) -> str | None:
    """How arguments differ from those on record, letter by letter: those of sleeps, signals and gathers."""
    return None if record.input == arguments else f"with {arguments} where its record has {record.input}"


def other_digest(_record: StepRecord, _arguments: str) -> str:
    """How arguments differ of which the record has a digest only."""
    return "with other arguments than its record has"


def other_values(names: Sequence[str]) -> str | None:
    """How arguments differ that people's data may be a part of: only their names are told."""
    return f"with another value of its parameter {', '.join(names)} than its record has" if names else None


class Replay:
    """Gives each primitive its record, in the order in which the function calls them."""

    def __init__(self, history: History) -> None:
        self.history = history
        self._unread = {key for key, record in history.records.items() if record.position is not None}

    def enter(self, branch: Branch, label: str, arguments: str, differs: Difference = other_text) -> StepRecord:
        """Take the next place in a branch.

        Args:
            branch: where.
            label: what is called: a step's name, or `@` and the kind of the primitive.
            arguments: JSON; compared with those on record.
            differs: how arguments differ from those on record, or None.

        Raises:
            Parked: the record has something else there, or a primitive of the same branch is still running.
        """
        if branch.busy:
            msg = (
                f"{label} was called while another primitive of the same branch is running: their numbers would depend "
                "on who comes first; use flows.gather"
            )
            raise Parked(msg)
        occurrence = branch.occurrences[label] = branch.occurrences.get(label, 0) + 1
        position, branch.position = branch.position, branch.position + 1
        key = f"{branch.prefix}{label}:{occurrence}"
        expected = self.history.places.get((branch.prefix, position))
        record = self.history.records.get(key)
        if expected != key if expected is not None else record is not None:
            msg = f"the function asked for {key} where its record has {expected or 'nothing'}: {_REMEDY}"
            raise Parked(msg)
        if record is None:
            after = self._after(branch)
            if after is not None:  # nothing is begun in a branch whose gather is over
                msg = (
                    f"the function asked for {key} where its record has nothing, and goes on after that gather with "
                    f"{after}: {_REMEDY}"
                )
                raise Parked(msg)
            if len(key) > _LONGEST_KEY:
                msg = f"the key {key} is longer than {_LONGEST_KEY} characters: nest fewer gathers in each other"
                raise Parked(msg)
            record = self.history.put(key, position)
            record.input = arguments or None
        else:
            self._unread.discard(key)
            if record.input is not None and record.input != arguments:
                difference = differs(record, arguments)
                if difference is not None:
                    msg = f"the function called {key} {difference}: {_REMEDY}"
                    raise Parked(msg)
        branch.busy = True
        return record

    def _after(self, branch: Branch) -> str | None:
        """What is on record after a gather that the branch is in."""
        outer = branch.outer
        while outer is not None:
            after = self.history.places.get((outer.prefix, outer.position))
            if after is not None:
                return after
            outer = outer.outer
        return None

    def branch_ended(self, branch: Branch, *, by: str) -> StepRecord | None:
        """A branch ended; the record of that, where it is new.

        The end has a place in the record, so that what the branch does after its last step cannot change once it is
        over, though its gather goes on. A failure has none: it counts when the gather raises it, and until then the
        code may be mended.

        Args:
            branch: which.
            by: the error; empty where it has a result.

        Raises:
            Parked: the record has something else there.
        """
        key = f"{branch.prefix}{END}"
        how = f"branch {branch.prefix} of a gather ended" + (f" by {by}" if by else "")
        self.ended(how, branch.prefix)
        if key in self.history.records:
            self._unread.discard(key)
            if by:
                msg = f"{how} where its record has a result: {_REMEDY}"
                raise Parked(msg)
            return None
        return None if by or self._after(branch) is not None else self.history.put(key, branch.position)

    def ended(self, how: str, prefix: str = "") -> None:
        """The function ended, or a branch; that counts only where it has read all of its record.

        Args:
            how: it ended.
            prefix: of the branch.

        Raises:
            Parked: something is left.
        """
        own = f"{prefix}{END}"
        unread = [key for key in self._unread if key.startswith(prefix) and key != own] if prefix else self._unread
        if unread:
            left = min(unread, key=lambda key: self.history.records[key].seq)
            msg = f"{how} before {left}, which is in its record: {_REMEDY}"
            raise Parked(msg)

    def complete(self, how: str) -> None:
        """The function ended; that counts only where nothing of its record is unread or pending.

        Raises:
            Parked: something is.
        """
        self.ended(how)
        records = self.history.records.values()
        pending = [each.key for each in records if each.position is not None and each.state is StepState.OPEN]
        if pending:
            msg = f"{how} while {min(pending)} was going on, begun in a task of its own: await what the function begins"
            raise Parked(msg)
