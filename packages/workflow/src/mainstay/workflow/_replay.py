"""The record of a run beside its function: each difference between the two is noticed here.

Every primitive takes a place in its branch by its label and arguments. A difference parks the run with a note that
names both sides; it never fails or compensates it.
"""

from __future__ import annotations

from collections.abc import Callable

from mainstay.workflow._branch import Branch
from mainstay.workflow._history import History, StepRecord, StepState
from mainstay.workflow.errors import Parked

_REMEDY = (
    "it does not do the same on replay. Give the changed function a new version, or put what differs into a step; put "
    "the old code back and resume the run, and it goes on"
)

SameArguments = Callable[[StepRecord, str], bool]


def same_text(record: StepRecord, arguments: str) -> bool:
    """Whether arguments are those on record, letter by letter."""
    return record.input == arguments


class Replay:
    """Gives each primitive its record, in the order in which the function calls them."""

    def __init__(self, history: History) -> None:
        self.history = history
        self._unread = {key for key, record in history.records.items() if record.position is not None}

    def enter(self, branch: Branch, label: str, arguments: str, same: SameArguments = same_text) -> StepRecord:
        """Take the next place in a branch.

        Args:
            branch: where.
            label: what is called: a step's name, or `@` and the kind of the primitive.
            arguments: JSON; compared with those on record.
            same: whether arguments are equal to those on record.

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
            record = self.history.put(key, position)
            record.input = arguments or None
        else:
            self._unread.discard(key)
            if record.input is not None and record.input != arguments and not same(record, arguments):
                msg = f"the function called {key} with other arguments than its record has: {_REMEDY}"
                raise Parked(msg)
        branch.busy = True
        return record

    def ended(self, how: str) -> None:
        """The function ended; that counts only where it has read all of its record, and nothing of it is pending.

        Raises:
            Parked: something is left.
        """
        if self._unread:
            left = min(self._unread, key=lambda key: self.history.records[key].seq)
            msg = f"{how} before {left}, which is in its record: {_REMEDY}"
            raise Parked(msg)
        records = self.history.records.values()
        pending = [each.key for each in records if each.position is not None and each.state is StepState.OPEN]
        if pending:
            msg = f"{how} while {min(pending)} was going on, begun in a task of its own: await what the function begins"
            raise Parked(msg)
