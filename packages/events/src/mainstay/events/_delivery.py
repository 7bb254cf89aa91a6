"""What is handed from transports to a group's handlers: partitions, and their records on the way through."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from hashlib import blake2b
from typing import Literal, NamedTuple
from uuid import UUID

from mainstay.core import Timer
from mainstay.events.metadata import Record

_LONGEST_KEY = 1024
_MOST = 500
"""Records of one partition that are asked for at once."""


class Assignment:
    """A partition while this process holds it: what was handed out, and how far it is finished.

    Args:
        topic: of which.
        number: of the partition.
        queue: this is no partition, but the queue of a parked key that was read from it: the one with this name, which
            is the key of its events, unless it is that of one event by itself.

    Attributes:
        window: what was handed out, from the first that is not finished on.
        behind: of that, what is finished, by identity and in the order in which it ended.
        unread: of that, what no caller has looked at yet.
        has_turns: callers are given what is unread.
        busy: the keys of events that are being handled, and what waits behind each.
        known: what is known of events before their first call, by identity of their records.
        record_bytes: about how large a record is, by the last that were handed out; 0 before the first.
        most: how many records to ask for at once.
        finished: the last record before which all are finished, once it can be committed.
        parked: the names of the queues of parked keys, to whose ends the events of these keys go; see `queue_of`.
        holder: under which name this process holds it, where that is noted; see `_crashes`.
    """

    __slots__ = (
        "behind", "busy", "finished", "has_turns", "holder", "known", "most", "number", "open", "parked", "queue",
        "record_bytes", "topic", "unread", "window",
    )  # fmt: skip

    def __init__(self, topic: str, number: int, *, queue: bytes | None = None) -> None:
        self.topic = topic
        self.number = number
        self.queue = queue
        self.open = True
        self.window: deque[Record] = deque()
        self.behind: dict[int, Record] = {}
        self.unread: deque[Record] = deque()
        self.has_turns = False
        self.busy: dict[bytes, deque[Record] | None] = {}
        self.known: dict[int, Delivery] = {}
        self.record_bytes = 0
        self.most = 16  # until their size is known
        self.finished: Record | None = None
        self.parked: set[bytes] = set()
        self.holder: UUID | None = None

    def finish(self, record: Record) -> None:
        """Note the end of an event; what left the window last can be committed."""
        window, behind = self.window, self.behind
        if window[0] is not record:
            behind[id(record)] = record
            return
        self.finished = window.popleft()
        while behind and behind.pop(id(window[0]), None) is not None:
            self.finished = window.popleft()

    def next_of(self, key: bytes) -> Record | None:
        """What waits first behind a key whose event has ended; without one the key is not busy any more."""
        waiting = self.busy[key]
        if not waiting:
            del self.busy[key]
            return None
        record = waiting.popleft()
        if not waiting:
            self.busy[key] = None
        return record

    def __repr__(self) -> str:
        return f"{self.topic}/{self.number}"


def queue_of(key: bytes) -> bytes:
    """The name of the queue of a parked key: the key itself, or a digest of one that is too long for an index."""
    return key if len(key) <= _LONGEST_KEY else blake2b(key, digest_size=32).digest()


def note_sizes(assignments: Collection[Assignment], fetched: Mapping[Assignment, Sequence[Record]], share: int) -> None:
    """Decide how many records to ask for next, of partitions that are as yet unread as of the others.

    Args:
        assignments: all partitions.
        fetched: what was read of some.
        share: how many bytes of each may be in memory.
    """
    for assignment, records in fetched.items():
        assignment.record_bytes = sum(map(_size_of, records)) // len(records)
        assignment.most = min(_MOST, max(1, share // assignment.record_bytes))
    known = min((each.most for each in assignments if each.record_bytes), default=1)
    for assignment in assignments:  # or one that stays empty would keep all pages small
        if not assignment.record_bytes:
            assignment.most = known


def _size_of(record: Record) -> int:
    return len(record.value or b"") + len(record.key or b"") + 128  # headers are about as long, always


class Verdict(NamedTuple):
    """What becomes of an event, once that is certain; it stays so until it is durable.

    Attributes:
        error: why.
        fate: `park` sets its key aside with it, `later` the event alone; else it is a dead letter, or skipped.
        due_seconds: when what is set aside is tried again, from then on; None when a person says so.
    """

    error: Exception
    fate: Literal["park", "later", "dead-letter", "skip"]
    due_seconds: float | None = None


class Delivery:
    """What is on its way through a group, from its first failure on or from the first thing known of it.

    One record, unless it is a `Batch`.
    """

    __slots__ = (
        "again_at",
        "aged",
        "assignment",
        "attempt",
        "before_call",
        "began_at",
        "done",
        "error",
        "kept",
        "later",
        "postponed",
        "record",
        "refused",
        "released",
        "timer",
        "verdict",
        "waited",
    )  # fmt: skip

    def __init__(self, assignment: Assignment, record: Record) -> None:
        self.assignment = assignment
        self.record = record
        self.began_at: float | None = None  # when its first call began
        self.aged = 0.0  # how long it has been failing before this process had it
        self.done = False
        self.kept = False  # it stays the first of the queue of its parked key
        self.attempt = 1
        self.before_call: Callable[[], Awaitable[None]] | None = None  # once, when nothing is left to wait for
        self.postponed = 0
        self.later = 0  # how many of the delays of a `RetryLater` it has been given
        self.waited = 0.0
        self.error: Exception | None = None  # the last one, of an event whose key may be parked meanwhile
        self.timer: Timer | None = None  # until its next attempt
        self.again_at = 0.0
        self.refused: Exception | None = None  # why it is never called
        self.verdict: Verdict | None = None
        self.released = False  # its key is not busy with it

    def parts(self, seen: Record) -> Sequence[Record]:
        """The records that are handed over, as they are read, where its own is read as `seen`."""
        return (seen,)

    def split(self) -> bool:
        """Have parts of it tried by themselves instead of giving it up; False where there are none."""
        return False

    def finish(self) -> Record | None:
        """Note its end; what waits behind its key."""
        self.assignment.finish(self.record)
        key = self.record.key
        return None if key is None or self.released else self.assignment.next_of(key)

    def judge(self, verdict: Verdict) -> None:
        """Say what becomes of it: it is not called any more."""
        self.verdict = verdict
        self.refused = verdict.error

    @property
    def record_name(self) -> str:
        """Where its record is, for a log."""
        return f"{self.record.topic}/{self.record.partition}@{self.record.offset}"
