"""How a group handles each type of event: which class reads it, what is called with it, what becomes of the rest."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import ValidationError

from mainstay.core import Retry, bind
from mainstay.events._codec import codec_of
from mainstay.events._decoding import OURS
from mainstay.events._metrics import FAILED_SECONDS, HANDLED_SECONDS
from mainstay.events._starts import Start
from mainstay.events._upcasting import Upcasting
from mainstay.events.errors import DecodeError
from mainstay.events.event import Event, definition_of
from mainstay.events.metadata import Metadata, Record, context_of, kind_named, version_of
from mainstay.events.strategies import OnFailure

if TYPE_CHECKING:
    from mainstay.events._spans import Spans

EventClass = type[Event]
OnUnknown = Literal["skip", "dead-letter", "stop"]


@dataclass(frozen=True, slots=True, eq=False)
class Batching:
    """How one handler is given several events at once.

    Attributes:
        call: the handler, of a list of events and a list of their metadata.
        size: the most events of a call.
        wait_seconds: how long the first of them waits for more.
        by_key: they have one key; else they are of one partition.
    """

    call: Callable[[list[Any], list[Metadata]], Awaitable[None]]
    size: int
    wait_seconds: float
    by_key: bool

    async def alone(self, event: Any, meta: Metadata) -> None:
        """Call the handler with a single event."""
        await self.call([event], [meta])


@dataclass(frozen=True, slots=True, eq=False)
class Limits:
    """How the calls of one handler stand beside each other.

    Attributes:
        at_once: the most calls at once in this process, None for as many as the group has.
        in_order: equal keys take turns.
    """

    at_once: int | None
    in_order: bool


class Handling(NamedTuple):
    """How one major version of a type is read, and what is called with it."""

    validate: Callable[[bytes], Any]
    call: Callable[..., Awaitable[None]]
    wants_metadata: bool
    retry: Retry
    on_failure: OnFailure
    batching: Batching | None = None
    limits: Limits | None = None

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


Match = tuple[Record, "Route | None", Handling | None, Exception | None]
"""A record as it is read, and how it is handled or why not; neither where the group has no use for it."""


class Route:
    """What a group does with one type of event.

    Args:
        type: its name on the wire.
        group: the consumer group, for the metrics.

    Attributes:
        versions: how exactly these versions are handled, where a call needs no more than an event.
    """

    __slots__ = (
        "_classes", "_exact", "_majors", "failed_seconds", "on_failure", "seconds", "topics", "type", "versions"
    )  # fmt: skip

    def __init__(self, type: str, group: str) -> None:
        self.type = type
        self.seconds = HANDLED_SECONDS.of(type, group)
        self.failed_seconds = FAILED_SECONDS.of(type, group)
        self.versions: dict[bytes, Handling] = {}
        self.topics: set[str] = set()
        self._exact: dict[bytes, Handling] = {}
        self.on_failure: OnFailure = "dead-letter"  # of a version that none of its handlers reads
        self._majors: dict[int, Handling] = {}
        self._classes: dict[int, EventClass] = {}

    def reads(
        self,
        event: type[Event],
        call: Callable[..., Awaitable[None]],
        *,
        wants_metadata: bool,
        retry: Retry,
        on_failure: OnFailure = "dead-letter",
        batching: Batching | None = None,
        limits: Limits | None = None,
    ) -> None:
        """Read events into this class, and call this with them."""
        definition = definition_of(event)
        handling = Handling(codec_of(event).read, call, wants_metadata, retry, on_failure, batching, limits)
        self.on_failure = _strictest(self.on_failure, on_failure)
        self._majors[definition.version.major] = handling
        self._classes[definition.version.major] = event
        version = str(definition.version).encode()
        self._exact[version] = handling
        if batching is None and limits is None:
            self.versions[version] = handling

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
        """The one for a version: any minor version of its major one will do.

        Raises:
            DecodeError: no class has this major version, or it is none.
        """
        exact = self._exact.get(version)
        if exact is not None:
            return exact
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


def _strictest(one: OnFailure, other: OnFailure) -> OnFailure:
    """The one that keeps more of the order; what is skipped or tried later is set aside where no handler reads it."""
    if "stop" in {one, other}:
        return "stop"
    return "park" if "park" in {one, other} else "dead-letter"


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
        start: where the group begins in a topic.
        spans: of the attempts; None where none are recorded.
        decoders: read the topics that others write.
    """

    unknown = Unknown()
    start: Start = "earliest"
    spans: Spans | None = None
    decoders = OURS
