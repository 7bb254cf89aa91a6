"""What is handed from transports to a group's handlers: partitions, their records, and how each type is handled."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Literal, NamedTuple
from uuid import UUID

from pydantic import ValidationError

from mainstay.core import Retry, Timer, bind
from mainstay.events._codec import codec_of
from mainstay.events._metrics import handler_seconds
from mainstay.events._upcasting import Upcasting
from mainstay.events.errors import DecodeError
from mainstay.events.event import Event, definition_of
from mainstay.events.metadata import Metadata, Record, context_of, kind_named, version_of

EventClass = type[Event]
OnUnknown = Literal["skip", "dead-letter", "stop"]


class Assignment:
    """A partition while this process holds it: what was handed out, and how far it is finished.

    Args:
        topic: of which.
        number: of the partition.
        queue: this is no partition, but the queue of a parked key that was read from it.

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
        parked: the keys whose events go to the end of their queues.
        holder: under which name this process holds it, where that is noted; see `_crashes`.
    """

    __slots__ = (
        "behind", "busy", "finished", "has_turns", "holder", "known", "most", "number", "open", "parked", "queue",
        "record_bytes", "topic", "unread", "window",
    )  # fmt: skip

    def __init__(self, topic: str, number: int, *, queue: bool = False) -> None:
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
        if waiting is None:
            del self.busy[key]
            return None
        record = waiting.popleft()
        if not waiting:
            self.busy[key] = None
        return record

    def __repr__(self) -> str:
        return f"{self.topic}/{self.number}"


class Verdict(NamedTuple):
    """What becomes of an event, once that is certain; it stays so until it is durable.

    Attributes:
        error: why.
        parks: its key is parked; else it becomes a dead letter.
        due_seconds: when the key is tried again, from its parking on; None when a person says so.
    """

    error: Exception
    parks: bool
    due_seconds: float | None = None


class Delivery:
    """One record on its way through a group, from its first failure on or from the first thing known of it."""

    __slots__ = (
        "again_at",
        "aged",
        "assignment",
        "attempt",
        "began_at",
        "done",
        "error",
        "kept",
        "postponed",
        "record",
        "refused",
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
        self.postponed = 0
        self.waited = 0.0
        self.error: Exception | None = None  # the last one
        self.timer: Timer | None = None  # until its next attempt
        self.again_at = 0.0
        self.refused: Exception | None = None  # why it is never called
        self.verdict: Verdict | None = None

    def judge(self, verdict: Verdict) -> None:
        """Say what becomes of it: it is not called any more."""
        self.verdict = verdict
        self.refused = verdict.error

    @property
    def record_name(self) -> str:
        """Where its record is, for a log."""
        return f"{self.record.topic}/{self.record.partition}@{self.record.offset}"


class Handling(NamedTuple):
    """How one major version of a type is read, and what is called with it."""

    validate: Callable[[bytes], Any]
    call: Callable[..., Awaitable[None]]
    wants_metadata: bool
    retry: Retry
    parks: bool

    def read(self, type: str, value: bytes) -> Any:
        """The event, as a handler is given it.

        Raises:
            DecodeError: it cannot be read; the message names the fields.
        """
        try:
            return self.validate(value)
        except Exception as invalid:  # noqa: BLE001  an event's own validator may raise anything
            raise unreadable(type, invalid) from invalid.__cause__

    async def tried(self, event: Any, record: Record, group: str) -> None:
        """Call the handler outside of any delivery, in the event's context."""
        headers = dict(record.headers)
        arguments = (event, Metadata(record, group=group, headers=headers)) if self.wants_metadata else (event,)
        with bind(context_of(headers)):
            await self.call(*arguments)


class Route:
    """What a group does with one type of event.

    Args:
        type: its name on the wire.
        group: the consumer group, for the metrics.
    """

    __slots__ = ("_classes", "_majors", "parks", "seconds", "type", "versions")

    def __init__(self, type: str, group: str) -> None:
        self.type = type
        self.seconds = handler_seconds(type, group)
        self.versions: dict[bytes, Handling] = {}
        self.parks = False  # as one of its handlers says: of a version that none of them reads
        self._majors: dict[int, Handling] = {}
        self._classes: dict[int, EventClass] = {}

    def reads(
        self,
        event: type[Event],
        call: Callable[..., Awaitable[None]],
        *,
        wants_metadata: bool,
        retry: Retry,
        parks: bool = False,
    ) -> None:
        """Read events into this class, and call this with them."""
        definition = definition_of(event)
        handling = Handling(codec_of(event).read, call, wants_metadata, retry, parks)
        self.parks = self.parks or parks
        self._majors[definition.version.major] = handling
        self._classes[definition.version.major] = event
        self.versions[str(definition.version).encode()] = handling

    def reads_older(self, upcasting: Upcasting) -> None:
        """Read older major versions, too, into the classes that there are by now."""
        for major, event in self._classes.items():
            for older, read in upcasting.older(event, self._classes).items():
                self._majors[older] = self._majors[major]._replace(validate=read)

    @property
    def kinds(self) -> set[str]:
        """The names of what is handled, such as `order.paid 2.x`."""
        return {kind_named(self.type, major) for major in self._majors}

    def handling(self, version: bytes) -> Handling:
        """The one for a version that is not exactly a declared one: any other minor version will do.

        Raises:
            DecodeError: no class has this major version, or it is none.
        """
        text = version.decode(errors="replace")
        try:
            handling = self._majors.get(version_of(text).major)
        except ValueError as error:
            msg = f"{self.type}: {error}"
            raise DecodeError(msg) from None
        if handling is None:
            known = ", ".join(f"{major}.x" for major in sorted(self._majors))
            msg = f"{self.type} has version {text!r}; this group reads {known}: declare a class for that version"
            raise DecodeError(msg)
        return handling


def unreadable(type: str, invalid: Exception) -> DecodeError:
    """What is wrong with which field; never the value, which may be anybody's secret."""
    if isinstance(invalid, DecodeError):
        return invalid
    if not isinstance(invalid, ValidationError):
        error = DecodeError(f"{type} cannot be read: its class raised {invalid.__class__.__name__}")
        error.__cause__ = invalid
        return error
    problems = (
        f"{'.'.join(map(str, problem['loc'])) or 'the value'}: {problem['msg']}"
        for problem in invalid.errors(include_input=False, include_url=False, include_context=False)[:5]
    )
    return DecodeError(f"{type} cannot be read: {'; '.join(problems)}")


class Unknown(NamedTuple):
    """What becomes of events that no process of a group can handle, as its routers say.

    Attributes:
        types: of those of types without a handler.
        versions: of those of a handled type, in a major version without a handler.
    """

    types: OnUnknown = "skip"
    versions: OnUnknown = "dead-letter"


class Routes(dict[str, Route]):
    """What a group does with each type.

    Attributes:
        unknown: what becomes of all others.
    """

    unknown = Unknown()
