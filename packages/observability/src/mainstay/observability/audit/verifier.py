"""Reads the whole log and says whether it is the one that was signed.

What it finds, and by what:

- changed, deleted or reordered entries: the tree over the stored bytes has not the signed root;
- a truncated tail: the log is shorter than a checkpoint says; if checkpoints were removed with it, shorter than the
  checkpoint that the verifier remembers from last time;
- a whole tree rewritten by somebody who has the key: the remembered checkpoint is not on the way to the new one;
- a forged checkpoint: no known key signed it;
- an entry deleted before it was sealed: its producer's signed statement names a number that is nowhere.

Without a remembered checkpoint, whoever can write the database can remove entries and checkpoints from the end
together. So keep `Report.checkpoint`, outside of the database, and hand it to the next verification.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sa

from mainstay.database import Database
from mainstay.observability.audit import tables
from mainstay.observability.audit.entry import Entry
from mainstay.observability.audit.errors import InvalidEntry, InvalidNote
from mainstay.observability.audit.merkle import STORED_LEVELS, Frontier, leaf_hash
from mainstay.observability.audit.note import Checkpoint, VerifierKey, open_note
from mainstay.observability.audit.producer import STATEMENT, Statement

Kind = Literal["changed", "deleted", "truncated", "rewritten", "forged", "unsigned", "malformed", "copied", "unsealed"]

_CHUNK = 2000
_CHECKPOINTS = (
    sa.select(tables.checkpoints.c.number, tables.checkpoints.c.size, tables.checkpoints.c.note)
    .where(tables.checkpoints.c.number > sa.bindparam("after"))
    .order_by(tables.checkpoints.c.number)
    .limit(_CHUNK)
)
_LOG = (
    sa.select(tables.log.c.leaf, tables.log.c.entry_id, tables.log.c.data)
    .where(tables.log.c.leaf > sa.bindparam("after"))
    .order_by(tables.log.c.leaf)
    .limit(_CHUNK)
)
_PENDING = (
    sa.select(tables.pending.c.seq, tables.pending.c.data)
    .where(tables.pending.c.seq > sa.bindparam("after"))
    .order_by(tables.pending.c.seq)
    .limit(_CHUNK)
)
_NODES = (
    sa.select(tables.nodes.c.level, tables.nodes.c.position, tables.nodes.c.hash)
    .where(tables.nodes.c.level == sa.bindparam("level"), tables.nodes.c.position > sa.bindparam("after"))
    .order_by(tables.nodes.c.position)
    .limit(_CHUNK)
)
_ENDS = sa.select(sa.func.min(tables.log.c.leaf).label("lowest"), sa.func.max(tables.log.c.leaf).label("highest"))
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        kind: `changed` (bytes, order or a stored node), `deleted`, `truncated`, `rewritten`, `forged` (a checkpoint or
            a statement), `unsigned` (entries that no checkpoint covers), `malformed` (no entry), `copied` (a number
            twice), `unsealed` (gone before it was sealed).
        detail: where, as exactly as can be told.
    """

    kind: Kind
    detail: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a verification found.

    Attributes:
        entries: entries in the log that a checkpoint covers, statements of producers included.
        statements: how many of them are statements.
        pending: entries that wait for their seal.
        checkpoints: signed checkpoints that were checked.
        producers: processes that wrote entries.
        unstated: numbered entries that no statement covers yet: of running processes and of those that were killed. For
            them, a deletion before the seal would not be noticed.
        checkpoint: the newest checkpoint, to be remembered; None for an empty log.
        problems: what is wrong; empty when all is well.
    """

    entries: int
    statements: int
    pending: int
    checkpoints: int
    producers: int
    unstated: int
    checkpoint: str | None
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


async def verify(
    database: Database,
    keys: Iterable[VerifierKey | str],
    *,
    producers: Iterable[VerifierKey | str] = (),
    remembered: str | None = None,
) -> Report:
    """Check the whole log, every checkpoint and every statement. Reads only; sealing may go on meanwhile.

    Args:
        database: where the log is.
        keys: verifier keys (or their text) of the sealers; they are believed for statements too.
        producers: verifier keys of processes that only write: believed for statements, never for checkpoints.
        remembered: `Report.checkpoint` of the last verification.

    Raises:
        InvalidNote: one of `keys` or `producers` is no verifier key.
        DatabaseError: the database cannot be read.
    """
    sealers = [_key(key) for key in keys]
    check = _Check(database, sealers, [*sealers, *(_key(key) for key in producers)])
    await check.checkpoints(remembered)
    await check.log()
    await check.nodes()
    pending = await check.pending()
    return check.report(pending)


def _key(key: VerifierKey | str) -> VerifierKey:
    return key if isinstance(key, VerifierKey) else VerifierKey.parse(key)


class _Numbers:
    """A set of positive integers that are mostly neighbours: a bit each."""

    def __init__(self) -> None:
        self._words: dict[int, int] = {}
        self.count = 0

    def add(self, number: int) -> bool:
        """Whether it is new."""
        word, bit = number >> 12, 1 << (number & 4095)
        bits = self._words.get(word, 0)
        if bits & bit:
            return False
        self._words[word] = bits | bit
        self.count += 1
        return True

    def __contains__(self, number: int) -> bool:
        return bool(self._words.get(number >> 12, 0) >> (number & 4095) & 1)

    def __iter__(self) -> Iterator[int]:
        for word, bits in self._words.items():
            yield from (word << 12 | place for place in range(bits.bit_length()) if bits >> place & 1)


class _Check:
    def __init__(self, database: Database, sealers: list[VerifierKey], believed: list[VerifierKey]) -> None:
        self._database = database
        self._sealers = sealers
        self._believed = believed
        self._problems: list[Problem] = []
        self._expected: list[tuple[int, bytes, str]] = []  # size, root, and whose word that is
        self._frontier = Frontier()
        self._roots: dict[tuple[int, int], bytes] = {}  # stored nodes as they must be
        self._sealed: dict[str, _Numbers] = {}
        self._stated: dict[str, _Numbers] = {}
        self._sequences: dict[str, dict[int, Statement]] = {}
        self._checkpoints = 0
        self._newest: str | None = None
        self._size = 0

    def _problem(self, kind: Kind, detail: str) -> None:
        self._problems.append(Problem(kind, detail))

    # What was signed

    async def checkpoints(self, remembered: str | None) -> None:
        if remembered is not None:
            try:
                known = Checkpoint.open(remembered, self._sealers)
            except InvalidNote as error:
                self._problem("forged", f"the remembered checkpoint: {error}")
            else:
                self._expected.append((known.size, known.root, "the remembered checkpoint"))
        after = largest = -1
        while rows := await self._database.read(_CHECKPOINTS, {"after": after}):
            for row in rows:
                after = row.number
                try:
                    checkpoint = Checkpoint.open(row.note, self._sealers)
                except InvalidNote as error:
                    self._problem("forged", f"checkpoint {row.number}: {error}")
                    continue
                self._checkpoints += 1
                if checkpoint.size < largest:
                    self._problem("forged", f"checkpoint {row.number} is of a smaller log than the one before it")
                largest = max(largest, checkpoint.size)
                self._newest = row.note
                self._expected.append((checkpoint.size, checkpoint.root, f"checkpoint {row.number}"))
        self._expected.sort(key=lambda expected: expected[0])
        self._size = max((size for size, _, _ in self._expected), default=0)

    # What is there

    async def log(self) -> None:
        waiting = iter(self._expected)
        expected = next(waiting, None)
        while expected is not None and expected[0] == 0:
            expected = self._compare(expected, waiting)
        after = -1
        while self._frontier.size < self._size:
            rows = await self._database.read(_LOG, {"after": after})
            if not rows:
                break
            for row in rows:
                if self._frontier.size >= self._size:
                    break
                if row.leaf != after + 1:
                    gap = f"{after + 1}" if row.leaf == after + 2 else f"{after + 1} to {row.leaf - 1}"
                    self._problem("deleted", f"entry {gap} of the log is missing")
                    return  # the tree cannot be followed any further
                after = row.leaf
                data = bytes(row.data)
                for node in self._frontier.append(leaf_hash(data)):
                    self._roots[node.level, node.position] = node.hash
                self._entry(row.leaf, row.entry_id, data)
                while expected is not None and expected[0] == self._frontier.size:
                    expected = self._compare(expected, waiting)
        if self._frontier.size < self._size:
            short = next(whose for size, _, whose in self._expected if size > self._frontier.size)
            self._problem(
                "truncated", f"the log has {self._frontier.size} entries, {short} says that there were {self._size}"
            )
        elif await self._sealed_without_checkpoint():
            self._problem("unsigned", f"there are entries outside of the {self._size} that a checkpoint covers")

    def _compare(
        self, expected: tuple[int, bytes, str], waiting: Iterator[tuple[int, bytes, str]]
    ) -> tuple[int, bytes, str] | None:
        size, root, whose = expected
        if self._frontier.root() == root:
            return next(waiting, None)
        if whose == "the remembered checkpoint":
            self._problem("rewritten", f"the first {size} entries are not those of {whose}")
            return next(waiting, None)
        earlier = max((known for known, _, _ in self._expected if known < size), default=0)
        self._problem(
            "changed",
            f"the entries do not have the root that {whose} signs: one of {earlier} to {size - 1} was changed",
        )
        return None  # every later root differs for the same reason

    async def _sealed_without_checkpoint(self) -> bool:
        """Whether there are entries that no checkpoint covers, not even one that was signed while we were reading."""
        row = (await self._database.read(_ENDS))[0]
        lowest, highest = row.lowest, row.highest
        if lowest is not None and lowest < 0:
            return True
        if highest is None or highest < self._size:
            return False
        newest = sa.select(tables.checkpoints.c.note).order_by(tables.checkpoints.c.number.desc()).limit(1)
        rows = await self._database.read(newest)
        try:
            return not rows or highest >= Checkpoint.open(rows[0].note, self._sealers).size
        except InvalidNote:
            return True

    def _entry(self, leaf: int, entry_id: object, data: bytes) -> None:
        try:
            entry = Entry.from_bytes(data)
        except InvalidEntry as error:
            self._problem("malformed", f"entry {leaf}: {error}")
            return
        if entry.id != entry_id:
            self._problem("changed", f"entry {leaf} is filed under {entry_id} and says that it is {entry.id}")
        if entry.number:
            if not self._sealed.setdefault(entry.producer, _Numbers()).add(entry.number):
                self._problem("copied", f"entry {leaf} repeats number {entry.number} of producer {entry.producer}")
        elif entry.action == STATEMENT:
            self._statement(leaf, entry)

    def _statement(self, leaf: int, entry: Entry) -> None:
        try:
            text, _ = open_note(str(entry.detail.get("note")), self._believed)
            statement = Statement.from_text(text)
        except InvalidNote as error:
            self._problem("forged", f"the statement in entry {leaf}: {error}")
            return
        known = self._sequences.setdefault(statement.producer, {})
        if known.setdefault(statement.sequence, statement) != statement:
            self._problem("forged", f"producer {statement.producer} says two things in statement {statement.sequence}")

    async def nodes(self) -> None:
        """The stored nodes are what proofs are made of."""
        level = STORED_LEVELS
        while any(known == level for known, _ in self._roots):
            after = -1
            found: dict[tuple[int, int], bytes] = {}
            while rows := await self._database.read(_NODES, {"level": level, "after": after}):
                found |= {(row.level, row.position): bytes(row.hash) for row in rows}
                after = rows[-1].position
            for (known, position), value in self._roots.items():
                if known == level and found.get((known, position)) != value:
                    self._problem(
                        "changed", f"the stored node {position} of level {level} is not what its entries give"
                    )
            level += STORED_LEVELS

    # What must be there and is not

    async def pending(self) -> int:
        """Find every number that a statement names: in the log, among the pending, or sealed while we were reading."""
        missing = self._unsealed()
        count = 0
        after = -1
        while rows := await self._database.read(_PENDING, {"after": after}):
            count += len(rows)
            after = rows[-1].seq
            for row in rows:
                self._found(bytes(row.data), missing)
        after = self._frontier.size - 1
        while missing and (rows := await self._database.read(_LOG, {"after": after})):
            after = rows[-1].leaf
            for row in rows:
                self._found(bytes(row.data), missing)
        for producer, number in sorted(missing)[:_SHOWN]:
            self._problem("unsealed", f"number {number} of producer {producer} was committed and never sealed")
        if len(missing) > _SHOWN:
            self._problem("unsealed", f"and {len(missing) - _SHOWN} more")
        return count

    def _unsealed(self) -> set[tuple[str, int]]:
        missing: set[tuple[str, int]] = set()
        for producer, statements in self._sequences.items():
            stated = self._stated[producer] = _Numbers()
            for sequence in range(1, max(statements) + 1):
                statement = statements.get(sequence)
                if statement is None:
                    self._problem("unsealed", f"statement {sequence} of producer {producer} was made and never sealed")
                    continue
                for number in range(statement.first, statement.last + 1):
                    if number not in statement.missing:
                        stated.add(number)
                for number in statement.late:
                    stated.add(number)
            sealed = self._sealed.get(producer, _Numbers())
            missing |= {(producer, number) for number in stated if number not in sealed}
        return missing

    def _found(self, data: bytes, missing: set[tuple[str, int]]) -> None:
        try:
            entry = Entry.from_bytes(data)
        except InvalidEntry:
            return
        missing.discard((entry.producer, entry.number))

    def report(self, pending: int) -> Report:
        unstated = sum(
            sum(number not in self._stated.get(producer, _Numbers()) for number in numbers)
            for producer, numbers in self._sealed.items()
        )
        return Report(
            entries=self._frontier.size,
            statements=sum(len(statements) for statements in self._sequences.values()),
            pending=pending,
            checkpoints=self._checkpoints,
            producers=len(self._sealed.keys() | self._sequences.keys()),
            unstated=unstated,
            checkpoint=self._newest,
            problems=tuple(self._problems),
        )
