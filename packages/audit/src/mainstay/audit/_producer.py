"""What one process says of the entries it has written, so that nobody can change what waits for its seal unseen.

Between commit and seal an entry is a row like any other, and who may change rows may change it without a trace in the
tree. So every process numbers its entries and now and then writes a signed statement, itself an entry of the log: *of
my numbers 1 to 57 all were committed but 3 and 9, and their bytes hash to this*. The verifier looks for every number
that a statement names, and for its bytes. The statement of a process that stops says that it is the final one; what
has a number beyond that, its producer never wrote.

A number belongs to an attempt, not to a commit: what rolls back leaves a hole, which the statement names as missing. A
transaction that is still open when the statement is made is missing too, and `late` in a later one. No lock is held
and nobody waits for anybody; that is why the numbers have holes. A hole may fill without any statement saying so: the
process was killed before the next one, or never learned whether its commit had happened. So the statement has the hash
of what was issued for each missing number, and nothing else is believed to belong there.
"""

from __future__ import annotations

import binascii
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby, islice
from uuid import UUID, uuid4

from mainstay.audit.errors import InvalidNote
from mainstay.core import derived_id

STATEMENT = "mainstay.audit.statement"

# What one statement is about at most, so that it fits into an entry; the next one says the rest.
_NUMBERS = 10_000
_MISSING = 500
_LATE = 1_000


@dataclass(frozen=True, slots=True)
class Statement:
    """One producer's word for a stretch of its numbers.

    Attributes:
        producer: who says it.
        sequence: this is its sequence-th statement, from 1.
        first, last: the numbers it is about, both included; at most 10,000.
        final: the producer has stopped and issues no number beyond `last`.
        missing: those of the numbers that were not committed when it was made, with the hash of what they were issued
            for: the hash of a leaf of the tree.
        late: numbers of earlier statements that were missing there and have been committed since.
        digest: SHA-256 over the leaf hashes of the committed entries, in the order of `committed`.
    """

    producer: str
    sequence: int
    first: int
    last: int
    final: bool
    missing: Mapping[int, bytes]
    late: frozenset[int]
    digest: bytes

    def committed(self) -> Iterator[int]:
        """The numbers that it says are committed, in their order."""
        yield from sorted(self.late)
        yield from (number for number in range(self.first, self.last + 1) if number not in self.missing)

    def agrees(self, hashes: Iterable[bytes]) -> bool:
        """Whether these are the hashes of what it says is committed, in its order."""
        return _digest(hashes) == self.digest

    @property
    def entry_id(self) -> UUID:
        """The id of the entry that holds it."""
        return derived_id(f"{STATEMENT}:{self.producer}:{self.sequence}")

    def to_text(self) -> str:
        """The text that is signed."""
        missing = "".join(f"{number} {b64encode(value).decode()}\n" for number, value in sorted(self.missing.items()))
        return (
            f"{STATEMENT}\n{self.producer}\n{self.sequence}{' final' if self.final else ''}\n{self.first} {self.last}\n"
            f"late {_spell(self.late)}\n{b64encode(self.digest).decode()}\n{missing}"
        )

    @classmethod
    def from_text(cls, text: str) -> Statement:
        """Read it.

        Raises:
            InvalidNote: it is no statement.
        """
        try:
            kind, producer, sequence, stretch, late, digest, *missing, _end = text.split("\n")
            first, last = (int(number) for number in stretch.split(" "))
            pairs = (line.split(" ") for line in missing)
            found = cls(
                producer,
                int(sequence.removesuffix(" final")),
                first,
                last,
                sequence.endswith(" final"),
                {int(number): b64decode(value, validate=True) for number, value in pairs},
                frozenset(islice(_read(late.removeprefix("late ")), _LATE + 1)),
                b64decode(digest, validate=True),
            )
            if kind != STATEMENT or last - first >= _NUMBERS or found.to_text() != text:
                raise ValueError
        except (ValueError, binascii.Error) as error:
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
        self._finished = False
        self._open: dict[int, bytes] = {}  # beyond the reported ones: issued, and not known to be committed
        self._committed: dict[int, bytes] = {}  # in no statement yet
        self._draft: Statement | None = None

    @property
    def next(self) -> int:
        """The number for an entry that is about to be written."""
        return self._issued + 1

    def issue(self, leaf: bytes) -> None:
        """The next number goes to the entry with this hash."""
        self._issued += 1
        self._open[self._issued] = leaf

    def committed(self, number: int, leaf: bytes) -> None:
        """The entry with this number and hash is durable."""
        self._open.pop(number, None)
        self._committed[number] = leaf

    def statement(self, *, final: bool = False) -> Statement | None:
        """What is to be said now; the same again until `said`, None where there is nothing new.

        Args:
            final: nothing will be issued any more, so that one of the statements has to say so.
        """
        if self._draft is None and (self._committed or (final and self._issued and not self._finished)):
            first = self._reported + 1
            last = min(self._issued, self._reported + _NUMBERS)
            # They are in the order of their numbers: the one beyond those that fit is where the next one begins.
            beyond = next(islice(self._open, _MISSING, None), last + 1)
            last = min(last, beyond - 1)
            missing = {number: leaf for number, leaf in self._open.items() if number <= last}
            late = frozenset(islice((number for number in self._committed if number < first), _LATE))
            told = [*sorted(late), *(number for number in range(first, last + 1) if number not in missing)]
            ends = final and last == self._issued and len(self._committed) == len(told)
            digest = _digest(self._committed[number] for number in told)
            self._draft = Statement(self.name, self._sequence + 1, first, last, ends, missing, late, digest)
        return self._draft

    def said(self) -> None:
        """The statement is durable."""
        statement = self._draft
        assert statement is not None  # noqa: S101  called after statement()
        self._draft = None
        self._sequence = statement.sequence
        self._reported = statement.last
        self._finished = statement.final
        for number in statement.committed():
            del self._committed[number]
        for number in statement.missing:
            self._open.pop(number, None)


def _digest(hashes: Iterable[bytes]) -> bytes:
    return sha256(b"".join(hashes)).digest()


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
