"""What one process says of the entries it has written, so that one which vanishes before it is sealed is missed.

Between commit and seal an entry is a row like any other, and who may delete rows may delete it without a trace in the
tree. So every process numbers its entries, counts those whose transactions committed, and now and then writes a signed
statement, itself an entry of the log: *of my numbers 1 to 57 all were committed but 3 and 9*. The verifier looks for
every number that a statement names.

A number belongs to an attempt, not to a commit: what rolls back leaves a hole, which the statement names as missing. A
transaction that is still open when the statement is made is missing too, and `late` in a later one. No lock is held
and nobody waits for anybody; that is why the numbers have holes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from uuid import uuid4

from mainstay.observability.audit.errors import InvalidNote

STATEMENT = "mainstay.audit.statement"


@dataclass(frozen=True, slots=True)
class Statement:
    """One producer's word for a stretch of its numbers.

    Attributes:
        producer: who says it.
        sequence: this is its sequence-th statement, from 1.
        first, last: the numbers it is about, both included.
        missing: those of them that were not committed when it was made.
        late: numbers of earlier statements that were missing there and have been committed since.
    """

    producer: str
    sequence: int
    first: int
    last: int
    missing: frozenset[int]
    late: frozenset[int]

    def to_text(self) -> str:
        """The text that is signed."""
        return (
            f"{STATEMENT}\n{self.producer}\n{self.sequence}\n{self.first} {self.last}\n"
            f"missing {_spell(self.missing)}\nlate {_spell(self.late)}\n"
        )

    @classmethod
    def from_text(cls, text: str) -> Statement:
        """Read it.

        Raises:
            InvalidNote: it is no statement.
        """
        try:
            kind, producer, sequence, stretch, missing, late, _end = text.split("\n")
            first, last = stretch.split(" ")
            found = cls(
                producer,
                int(sequence),
                int(first),
                int(last),
                frozenset(_read(missing.removeprefix("missing "))),
                frozenset(_read(late.removeprefix("late "))),
            )
            if kind != STATEMENT or found.to_text() != text:
                raise ValueError
        except ValueError as error:
            msg = "the signed text is no statement of a producer"
            raise InvalidNote(msg) from error
        return found


class Producer:
    """The numbers of one process; belongs to one event loop.

    Attributes:
        name: random for each start, so that no two processes share their numbers.
    """

    def __init__(self) -> None:
        self.name = uuid4().hex
        self._issued = 0
        self._reported = 0
        self._sequence = 0
        self._committed: set[int] = set()
        self._draft: tuple[Statement, frozenset[int]] | None = None

    def issue(self) -> int:
        """The number for an entry that is about to be written."""
        self._issued += 1
        return self._issued

    def committed(self, number: int) -> None:
        """The entry with this number is durable."""
        self._committed.add(number)

    def statement(self) -> Statement | None:
        """What is to be said now; the same again until `said`, None where there is nothing new."""
        if self._draft is None and self._committed:
            first, last = self._reported + 1, self._issued
            told = frozenset(self._committed)
            missing = frozenset(range(first, last + 1)) - told
            late = frozenset(number for number in told if number < first)
            self._draft = (Statement(self.name, self._sequence + 1, first, last, missing, late), told)
        return self._draft and self._draft[0]

    def said(self) -> None:
        """The statement is durable."""
        assert self._draft is not None  # noqa: S101  called after statement()
        statement, told = self._draft
        self._draft = None
        self._sequence = statement.sequence
        self._reported = statement.last
        self._committed -= told


def _spell(numbers: Iterable[int]) -> str:
    runs: list[str] = []
    for _, group in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ",".join(runs)


def _read(text: str) -> Iterable[int]:
    for run in text.split(",") if text else ():
        first, _, last = run.partition("-")
        yield from range(int(first), int(last or first) + 1)
