"""Reads the whole log and says whether it is the one that was signed.

What it finds, and by what:

- changed, deleted or reordered entries: the tree over the stored bytes has not the signed root;
- a truncated tail: the log is shorter than a checkpoint says; if checkpoints were removed with it, shorter than the
  checkpoint that the verifier remembers from last time;
- a whole tree rewritten by somebody who has the key: the remembered checkpoint is not on the way to the new one;
- a forged checkpoint: no known key signed it;
- an entry deleted, changed or added before it was sealed: its producer's signed statement names a number that is
  nowhere, its hash is not that of the stored bytes, or the number is one that the producer never issued;
- a sealer that stopped, or whose newest work was removed: the newest checkpoint is older than it may be.

Without a remembered checkpoint, whoever can write the database can remove entries and checkpoints from the end
together. So keep `Report.checkpoint`, outside of the database, and hand it to the next verification.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import sqlalchemy as sa

from mainstay.audit import _tree, tables
from mainstay.audit._producer import STATEMENT, Statement
from mainstay.audit.entry import Entry
from mainstay.audit.errors import InvalidEntry, InvalidNote, TamperedLog
from mainstay.audit.merkle import Frontier, leaf_hash
from mainstay.audit.note import Checkpoint, VerifierKey, open_note
from mainstay.database import Database

__all__ = ["Problem", "Report", "verify"]

Kind = Literal[
    "changed", "deleted", "truncated", "rewritten", "forged", "unsigned", "malformed", "copied", "unsealed", "stale"
]

_CHUNK = 2000
_CHECKPOINTS = (
    sa.select(tables.checkpoints.c.number, tables.raw(tables.checkpoints.c.note))
    .where(tables.checkpoints.c.number > sa.bindparam("after"))
    .order_by(tables.checkpoints.c.number)
    .limit(_CHUNK)
)
_LOG = (
    sa.select(tables.log.c.leaf, tables.raw(tables.log.c.entry_id), tables.raw(tables.log.c.data))
    .where(tables.log.c.leaf > sa.bindparam("after"))
    .order_by(tables.log.c.leaf)
    .limit(_CHUNK)
)
_PENDING = (
    sa.select(tables.pending.c.seq, tables.raw(tables.pending.c.data))
    .where(tables.pending.c.seq > sa.bindparam("after"))
    .order_by(tables.pending.c.seq)
    .limit(_CHUNK)
)
_PLACE = sa.tuple_(tables.nodes.c.level, tables.nodes.c.position)
_NODES = (
    sa.select(tables.nodes.c.level, tables.nodes.c.position, tables.raw(tables.nodes.c.hash))
    .where(sa.tuple_(sa.bindparam("level", type_=sa.Integer), sa.bindparam("after", type_=sa.BigInteger)) < _PLACE)
    .order_by(tables.nodes.c.level, tables.nodes.c.position)
    .limit(_CHUNK)
)
_NUMBERLESS = sa.select(tables.checkpoints.c.number).where(tables.checkpoints.c.number < 1).limit(1)
_ENDS = sa.select(sa.func.min(tables.log.c.leaf).label("lowest"), sa.func.max(tables.log.c.leaf).label("highest"))
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        kind: `changed` (bytes, order or a stored node), `deleted`, `truncated`, `rewritten`, `forged` (a checkpoint or
            a statement), `unsigned` (entries that no checkpoint covers), `malformed` (no entry), `copied` (a number
            twice), `unsealed` (gone before it was sealed), `stale` (the newest checkpoint is too old).
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
        unfinished: how many of them have no final statement in the log: they run, were killed, or somebody removed it
            before it was sealed.
        unstated: numbered entries that no statement covers yet: of running processes and of those that were killed. For
            them, a deletion or change before the seal would not be noticed.
        checkpoint: the newest checkpoint, to be remembered; None for an empty log.
        age_seconds: how long ago that was signed, by its own word and the clock here; None where there is none.
        problems: what is wrong; empty when all is well.
    """

    entries: int
    statements: int
    pending: int
    checkpoints: int
    producers: int
    unfinished: int
    unstated: int
    checkpoint: str | None
    age_seconds: float | None
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
    max_age_seconds: float | None = None,
) -> Report:
    """Check the whole log, every checkpoint and every statement. Reads only; sealing may go on meanwhile.

    Args:
        database: where the log is.
        keys: verifier keys (or their text) of the sealers; they are believed for statements too.
        producers: verifier keys of processes that only write: believed for statements, never for checkpoints.
        remembered: `Report.checkpoint` of the last verification.
        max_age_seconds: how old the newest checkpoint may be: some times the sealers' `idle_checkpoint_seconds`, since
            they sign so often even when nothing happens. None: of any age.

    Raises:
        InvalidNote: one of `keys` or `producers` is no verifier key.
        ValueError: `max_age_seconds` is negative, or not a number, with which no age would ever be too old.
        DatabaseError: the database cannot be read.
    """
    if max_age_seconds is not None and not max_age_seconds >= 0:
        msg = f"max_age_seconds={max_age_seconds!r}: a number of seconds, 0 or more"
        raise ValueError(msg)
    sealers = [_key(key) for key in keys]
    check = _Check(database, sealers, [*sealers, *(_key(key) for key in producers)])
    await check.checkpoints(remembered, max_age_seconds)
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

    def add(self, number: int) -> bool:
        """Whether it is new."""
        word, bit = number >> 12, 1 << (number & 4095)
        bits = self._words.get(word, 0)
        if bits & bit:
            return False
        self._words[word] = bits | bit
        return True

    def __contains__(self, number: int) -> bool:
        return bool(self._words.get(number >> 12, 0) >> (number & 4095) & 1)


@dataclass(slots=True)
class _Producer:
    """What the log holds of one process, and what that process says.

    Attributes:
        sealed: the numbers of its entries.
        hashes: of those that are in none of its statements, the hashes.
        missing: what it says of the numbers that were not committed: the hashes of what they were issued for.
        statements: by their sequence.
        waiting: statements with numbers that were not sealed before them.
        last: the last number that a statement is about.
        final: one of them was the final one.
    """

    sealed: _Numbers = field(default_factory=_Numbers)
    hashes: dict[int, bytes] = field(default_factory=dict[int, bytes])
    missing: dict[int, bytes] = field(default_factory=dict[int, bytes])
    statements: dict[int, Statement] = field(default_factory=dict[int, Statement])
    waiting: list[Statement] = field(default_factory=list[Statement])
    last: int = 0
    final: bool = False


class _Check:
    def __init__(self, database: Database, sealers: list[VerifierKey], believed: list[VerifierKey]) -> None:
        self._database = database
        self._sealers = sealers
        self._believed = believed
        self._problems: list[Problem] = []
        self._expected: list[tuple[int, bytes, str]] = []  # size, root, and whose word that is
        self._frontier = Frontier()
        self._roots: dict[tuple[int, int], bytes] = {}  # stored nodes as they must be
        self._producers: dict[str, _Producer] = {}
        self._checkpoints = 0
        self._newest: str | None = None
        self._age: float | None = None
        self._covered = self._remembered = self._size = 0
        self._statements = self._unstated = 0

    def _problem(self, kind: Kind, detail: str) -> None:
        self._problems.append(Problem(kind, detail))

    def _several(self, kind: Kind, details: Sequence[str]) -> None:
        for detail in details[:_SHOWN]:
            self._problem(kind, detail)
        if len(details) > _SHOWN:
            self._problem(kind, f"and {len(details) - _SHOWN} more")

    # What was signed

    async def checkpoints(self, remembered: str | None, max_age_seconds: float | None) -> None:
        if remembered is not None:
            try:
                known = Checkpoint.open(remembered, self._sealers)
            except InvalidNote as error:
                self._problem("forged", f"the remembered checkpoint: {error}")
            else:
                self._expected.append((known.size, known.root, "the remembered checkpoint"))
                self._remembered = known.size
        if await self._database.read(_NUMBERLESS):
            self._problem("forged", "there are checkpoints before the first one")
        after, following = 0, 1
        while rows := await self._database.read(_CHECKPOINTS, {"after": after}):
            for row in rows:
                after = row.number
                if after != following:
                    self._problem("deleted", f"checkpoint {after!r} is where {following} belongs")
                following = after + 1 if isinstance(after, int) else following
                try:
                    checkpoint = Checkpoint.open(row.note if isinstance(row.note, str) else "", self._sealers)
                except InvalidNote as error:
                    self._problem("forged", f"checkpoint {after!r}: {error}")
                    continue
                self._checkpoints += 1
                if checkpoint.size < self._covered:
                    self._problem("forged", f"checkpoint {after!r} is of a smaller log than the one before it")
                self._covered = max(self._covered, checkpoint.size)
                self._newest = row.note
                self._age = _age(checkpoint.time)
                self._expected.append((checkpoint.size, checkpoint.root, f"checkpoint {after!r}"))
        self._expected.sort(key=lambda expected: expected[0])
        self._size = max((size for size, _, _ in self._expected), default=0)
        if max_age_seconds is not None and (self._age is None or self._age > max_age_seconds):
            told = "there is no checkpoint" if self._age is None else f"the newest checkpoint is {self._age:.0f} s old"
            self._problem("stale", f"{told}: nobody seals, or what was sealed since has been removed")

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
                    self._problem("deleted", f"entry {after + 1} of the log is missing: the next one is {row.leaf!r}")
                    return  # the tree cannot be followed any further
                if not isinstance(row.data, bytes):
                    self._problem("changed", f"entry {row.leaf} is no bytes but a {type(row.data).__name__}")
                    return
                after = row.leaf
                leaf = leaf_hash(row.data)
                for node in self._frontier.append(leaf):
                    self._roots[node.level, node.position] = node.hash
                self._entry(row, leaf)
                while expected is not None and expected[0] == self._frontier.size:
                    expected = self._compare(expected, waiting)
        if self._frontier.size < self._size:
            short = next(whose for size, _, whose in self._expected if size > self._frontier.size)
            self._problem(
                "truncated", f"the log has {self._frontier.size} entries, {short} says that there were {self._size}"
            )
        elif self._covered < self._remembered:
            self._problem(
                "truncated", f"the checkpoints end at {self._covered} entries, {self._remembered} are remembered"
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
        if row.highest is None:
            return False
        if not isinstance(row.highest, int) or row.lowest < 0:
            return True
        return row.highest >= self._size and row.highest >= await self._size_now()

    async def _size_now(self) -> int:
        """The size that the newest checkpoint signs by now; 0 where it signs none."""
        try:
            latest = await _tree.latest_checkpoint(self._database)
            return 0 if latest is None else Checkpoint.open(latest[1], self._sealers).size
        except (InvalidNote, TamperedLog):
            return 0

    def _entry(self, row: sa.Row[Any], leaf: bytes) -> None:
        try:
            entry = Entry.from_bytes(row.data)
        except InvalidEntry as error:
            self._problem("malformed", f"entry {row.leaf}: {error}")
            return
        if row.entry_id not in (entry.id, entry.id.hex):
            self._problem("changed", f"entry {row.leaf} is filed under {row.entry_id} and says that it is {entry.id}")
        if entry.action == STATEMENT:
            self._statement(row.leaf, entry)
            return
        if entry.number < 1:
            self._problem("forged", f"entry {row.leaf} has no number of its producer")
            return
        producer = self._producers.setdefault(entry.producer, _Producer())
        if producer.sealed.add(entry.number):
            producer.hashes[entry.number] = leaf
        else:
            self._problem("copied", f"entry {row.leaf} repeats number {entry.number} of producer {entry.producer}")

    def _statement(self, leaf: int, entry: Entry) -> None:
        note = entry.detail.get("note")
        try:
            text, _ = open_note(str(note), self._believed)
            statement = Statement.from_text(text)
        except InvalidNote as error:
            self._problem("forged", f"the statement in entry {leaf}: {error}")
            return
        name = statement.producer
        # The signature covers the statement: what is around it must say nothing else.
        if entry != Entry(
            statement.entry_id, STATEMENT, "succeeded", entry.time, producer=name, number=0, detail={"note": note}
        ):
            self._problem("forged", f"entry {leaf} says more than the statement in it, which is of producer {name}")
            return
        self._statements += 1
        producer = self._producers.setdefault(name, _Producer())
        known = producer.statements.setdefault(statement.sequence, statement)
        if known != statement:
            self._problem("forged", f"producer {name} says two things in statement {statement.sequence}")
        if known is not statement:
            return
        producer.missing.update(statement.missing)
        producer.last = max(producer.last, statement.last)
        producer.final = producer.final or statement.final
        self._agrees(producer, statement)

    def _agrees(self, producer: _Producer, statement: Statement) -> None:
        """Compare what it says with what was found; if not all was found, later."""
        numbers = list(statement.committed())
        if not all(number in producer.hashes for number in numbers):
            producer.waiting.append(statement)
        elif not statement.agrees(producer.hashes.pop(number) for number in numbers):
            self._problem(
                "changed",
                f"one of the numbers {_stretch(numbers)} of producer {statement.producer} is not what its statement "
                f"{statement.sequence} says: it was changed before it was sealed",
            )

    async def nodes(self) -> None:
        """The stored nodes are what proofs are made of, and one beyond them would be in the way of the next batch."""
        missing = dict(self._roots)
        beyond: list[tuple[object, object]] = []
        after = (-(2**31), -(2**63))
        while rows := await self._database.read(_NODES, {"level": after[0], "after": after[1]}):
            for row in rows:
                after = (row.level, row.position)
                if after not in self._roots:
                    beyond.append(after)
                elif row.hash == missing[after]:
                    del missing[after]
        self._several(
            "changed",
            [f"the stored node {place} of level {level} is not what its entries give" for level, place in missing],
        )
        size = max(self._size, await self._size_now()) if beyond else 0
        self._several(
            "forged",
            [f"the log has no node {place!r} of level {level!r}" for level, place in beyond
             if not _tree.within(level, place, size)],
        )  # fmt: skip

    # What producers say

    async def pending(self) -> int:
        """Look for every number that a statement names: also among the pending, and what was sealed meanwhile."""
        wanted = {
            (name, number)
            for name, producer in self._producers.items()
            for statement in producer.waiting
            for number in statement.committed()
            if number not in producer.sealed
        }
        count = 0
        after = -1
        while rows := await self._database.read(_PENDING, {"after": after}):
            count += len(rows)
            after = rows[-1].seq
            self._find(rows, wanted)
        after = self._frontier.size - 1
        while wanted and (rows := await self._database.read(_LOG, {"after": after})):
            after = rows[-1].leaf
            self._find(rows, wanted)
        for name, producer in self._producers.items():
            self._settle(name, producer)
        return count

    def _find(self, rows: Sequence[sa.Row[Any]], wanted: set[tuple[str, int]]) -> None:
        for row in rows if wanted else ():
            try:
                entry = Entry.from_bytes(row.data)
            except InvalidEntry:
                continue
            if (entry.producer, entry.number) in wanted:
                wanted.discard((entry.producer, entry.number))
                self._producers[entry.producer].hashes[entry.number] = leaf_hash(row.data)

    def _settle(self, name: str, producer: _Producer) -> None:
        waiting, producer.waiting = producer.waiting, []
        for statement in waiting:
            self._agrees(producer, statement)
        for statement in producer.waiting:
            numbers = list(statement.committed())
            gone = [number for number in numbers if producer.hashes.pop(number, None) is None]
            self._several(
                "unsealed", [f"number {number} of producer {name} was committed and never sealed" for number in gone]
            )
        said = producer.statements
        gone = [sequence for sequence in range(1, max(said, default=0) + 1) if sequence not in said]
        self._several(
            "unsealed", [f"statement {sequence} of producer {name} was made and never sealed" for sequence in gone]
        )
        # What is left is in no statement: it may belong to a later one, to none after a kill, or to nobody.
        added: list[str] = []
        for number, leaf in producer.hashes.items():
            issued = producer.missing.get(number)
            never = producer.final and number > producer.last if issued is None else leaf != issued
            if never:
                added.append(f"number {number} of producer {name} is in the log, and {name} never wrote it")
            else:
                self._unstated += 1
        self._several("forged", added)

    def report(self, pending: int) -> Report:
        return Report(
            entries=self._frontier.size,
            statements=self._statements,
            pending=pending,
            checkpoints=self._checkpoints,
            producers=len(self._producers),
            unfinished=sum(not producer.final for producer in self._producers.values()),
            unstated=self._unstated,
            checkpoint=self._newest,
            age_seconds=self._age,
            problems=tuple(self._problems),
        )


def _age(time: str) -> float | None:
    """How long ago that was, in seconds, by the clock of this machine."""
    try:
        return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds())
    except (ValueError, TypeError):
        return None


def _stretch(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
