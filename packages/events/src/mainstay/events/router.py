"""Which function handles which event: the part of a feature that `EventsModule.for_feature` takes."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar, overload

from mainstay.core import Binding, Retry
from mainstay.events._routes import OnUnknown, Unknown
from mainstay.events._starts import Start, check_start
from mainstay.events._upcasting import Payload, Upcast
from mainstay.events.event import Event, definition_of
from mainstay.events.foreign import Debezium, Decoder, Plain
from mainstay.events.metadata import Metadata
from mainstay.events.publisher import EventPublisher
from mainstay.events.settings import EventsSettings
from mainstay.events.strategies import Fate, OnFailure, RetryLater

__all__ = ["EventRouter"]

InboxMode = bool | Literal["batch"]
Order = Literal["key", "none"]
BatchBy = Literal["key", "partition"]

_LONGEST_GROUP = 200
_LARGEST_BATCH = 1000
"""No more events of a partition are in memory at once."""

E = TypeVar("E", bound=Event)
F = TypeVar("F", bound=Event)
A = TypeVar("A")
M = TypeVar("M")
A_contra = TypeVar("A_contra", contravariant=True)
M_contra = TypeVar("M_contra", contravariant=True)
E_contra = TypeVar("E_contra", bound=Event, contravariant=True)
U = TypeVar("U", bound=Callable[[Payload], Payload])
H = TypeVar("H", bound="type[HandlesEvent[Any] | HandlesEventAndMetadata[Any]]")


class HandlesEvent(Protocol[E_contra]):
    """A handler class whose `handle` takes the event."""

    def handle(self, event: E_contra, /) -> Awaitable[None]:
        """Handle one event."""
        ...


class HandlesEventAndMetadata(Protocol[E_contra]):
    """A handler class whose `handle` takes the event and its metadata."""

    def handle(self, event: E_contra, meta: Metadata, /) -> Awaitable[None]:
        """Handle one event."""
        ...


class Handler(Protocol[A_contra]):
    """A handler function that takes an event or several; a test passes the services an App would give it by keyword."""

    __name__: str

    def __call__(self, event: A_contra, /, **services: Any) -> Awaitable[None]:
        """Handle them."""
        ...


class HandlerWithMetadata(Protocol[A_contra, M_contra]):
    """A handler function that takes metadata as well, and services as `Handler` does."""

    __name__: str

    def __call__(self, event: A_contra, meta: M_contra, /, **services: Any) -> Awaitable[None]:
        """Handle them."""
        ...


class InBatches(NamedTuple):
    """How events are handed to a handler together, as `on_batch` describes it."""

    size: int
    wait_seconds: float
    by: BatchBy


@dataclass(frozen=True, slots=True)
class Subscription:
    """One handler, as `on` or `on_batch` describes it."""

    events: tuple[type[Event], ...]
    group: str
    call: Callable[..., Awaitable[None]]
    wants_metadata: bool
    retry: Retry | None
    on_failure: OnFailure | None
    inbox: InboxMode
    timeout_seconds: float | None
    name: str
    unknown: Unknown
    concurrency: int | None = None
    order: Order = "key"
    batches: InBatches | None = None
    start: Start = "earliest"


class EventRouter:
    """The events of one feature: declares handlers, and publishes once an App runs it.

    `events = EventRouter()` at module level; `EventsModule.for_feature(events)` adds it to an App. Importing it starts
    nothing.

    Args:
        unknown_types: what becomes of events of types that no process of a group has a handler for. `skip` counts them,
            since topics carry several types; `dead-letter` sets them aside; `stop` has the partition wait, and health
            says so, until a process comes that has a handler.
        unknown_versions: what becomes of events of a handled type in a major version that no process of a group has a
            handler for: `dead-letter` (or its key is parked, where the handlers do that), `skip` or `stop`.

    Raises:
        ValueError: one of them is no such rule.
    """

    def __init__(self, *, unknown_types: OnUnknown = "skip", unknown_versions: OnUnknown = "dead-letter") -> None:
        for name, rule in (("unknown_types", unknown_types), ("unknown_versions", unknown_versions)):
            if rule not in typing.get_args(OnUnknown):
                msg = f"EventRouter({name}={rule!r}): it is 'skip', 'dead-letter' or 'stop'"
                raise ValueError(msg)
        self.unknown = Unknown(unknown_types, unknown_versions)
        self.subscriptions: list[Subscription] = []
        self.upcasts: list[Upcast] = []
        self.binding: Binding[EventPublisher] = Binding("EventRouter", remedy="EventsModule.for_feature(router)")

    @overload
    def on(
        self,
        event: type[E],
        /,
        *,
        group: str,
        retry: Retry | None = None,
        on_failure: OnFailure | None = None,
        inbox: InboxMode = False,
        timeout_seconds: float | None = None,
        concurrency: int | None = None,
        order: Order = "key",
        start: Start = "earliest",
    ) -> On[E, Metadata]: ...
    @overload
    def on(
        self,
        event: type[E],
        other: type[F],
        /,
        *,
        group: str,
        retry: Retry | None = None,
        on_failure: OnFailure | None = None,
        inbox: InboxMode = False,
        timeout_seconds: float | None = None,
        concurrency: int | None = None,
        order: Order = "key",
        start: Start = "earliest",
    ) -> On[E | F, Metadata]: ...
    @overload
    def on(
        self,
        *events: type[Event],
        group: str,
        retry: Retry | None = None,
        on_failure: OnFailure | None = None,
        inbox: InboxMode = False,
        timeout_seconds: float | None = None,
        concurrency: int | None = None,
        order: Order = "key",
        start: Start = "earliest",
    ) -> On[Any, Metadata]: ...
    def on(
        self,
        *events: type[Event],
        group: str,
        retry: Retry | None = None,
        on_failure: OnFailure | None = None,
        inbox: InboxMode = False,
        timeout_seconds: float | None = None,
        concurrency: int | None = None,
        order: Order = "key",
        start: Start = "earliest",
    ) -> On[Any, Metadata]:
        """Handle events: `@events.on(OrderPaid, group="receipts")` on an async function, or on a class with `handle`.

        The function takes the event, or the event and its `Metadata`, and services by keyword-only parameters whose
        default is `given(…)`. It is called at least once for each event, with equal keys one after the other, also
        through retries; when it keeps failing, `on_failure` says what becomes of the event.

        Args:
            events: the types to handle.
            group: who handles them. Each group receives every event once, however many processes share the work; it
                keeps its place under this name, so a name is for ever.
            retry: when to call again after an exception; by default as the settings say.
            on_failure: what becomes of an event that keeps failing. None is `park` where the App keeps its events in a
                Database, and `dead-letter` elsewhere and with `order="none"`. `park` sets its key aside: what follows
                of that key waits behind it, in order, in the Database, until a person has it tried again or skipped
                (`ParkedKeys`), and other keys go on; an event without a key becomes a dead letter. `dead-letter` sets
                the event aside and goes on with what follows. `RetryLater(…)` does so, too, and tries the event again,
                by itself, after its delays. `skip` counts and logs it, and goes on: it is lost. `stop` has its
                partition wait at it, which health says, and tries it again and again: other partitions go on.
            inbox: run the handler inside `db.transaction()` together with the note that this group has handled the
                event, so that what it writes there happens exactly once. Not for handlers that call other services: the
                transaction would stay open meanwhile. With `"batch"` it runs inside `db.batch()`: for handlers that
                write by `db.write` and publish only. They hold no connection, what they read is what was there before,
                and what many of them write is one commit, so that they are several times as fast.
            timeout_seconds: how long one call may take before it counts as failed; None waits for ever, and health says
                so.
            concurrency: the most calls of this handler at once in one process; None for as many as the group has there
                (`EventsSettings.concurrency`), which is never exceeded.
            order: `key` has events with equal keys wait for each other. With `none` they are handled side by side, in
                no order, which is faster where a few keys have most of the events.
            start: where the group begins in a topic in which it has no place yet: with the `earliest` event there is,
                with what comes from then on (`latest`), or from a time on. All handlers of a group say the same.

        Raises:
            TypeError: what is decorated cannot be a handler, with the remedy.
            ValueError: the group is empty, the timeout is not positive, `on_failure`, `inbox`, `order` or `start` is
                none, `concurrency` is less than 1, `park` comes with `order="none"`, or the group handles this type.
        """
        _check("on", events, group, on_failure, timeout_seconds)
        _check_limits(concurrency, order, on_failure)
        check_start(start)
        if inbox not in {True, False, "batch"}:
            msg = f"on(inbox={inbox!r}): it is True, False or 'batch'"
            raise ValueError(msg)
        described = partial(
            Subscription, events, group, retry=retry, on_failure=on_failure, inbox=inbox, unknown=self.unknown,
            timeout_seconds=timeout_seconds, concurrency=concurrency, order=order, start=start,
        )  # fmt: skip
        return On(self, events, described)

    @overload
    def on_batch(
        self,
        event: type[E],
        /,
        *,
        group: str,
        size: int = 100,
        wait_seconds: float = 0.5,
        by: BatchBy = "partition",
        retry: Retry | None = None,
        on_failure: OnFailure | None = None,
        inbox: bool = False,
        timeout_seconds: float | None = None,
        start: Start = "earliest",
    ) -> On[list[E], list[Metadata]]: ...
    @overload
    def on_batch(
        self,
        event: type[E],
        other: type[F],
        /,
        *,
        group: str,
        size: int = 100,
        wait_seconds: float = 0.5,
        by: BatchBy = "partition",
        retry: Retry | None = None,
        on_failure: OnFailure | None = None,
        inbox: bool = False,
        timeout_seconds: float | None = None,
        start: Start = "earliest",
    ) -> On[list[E | F], list[Metadata]]: ...
    @overload
    def on_batch(
        self,
        *events: type[Event],
        group: str,
        size: int = 100,
        wait_seconds: float = 0.5,
        by: BatchBy = "partition",
        retry: Retry | None = None,
        on_failure: OnFailure | None = None,
        inbox: bool = False,
        timeout_seconds: float | None = None,
        start: Start = "earliest",
    ) -> On[list[Any], list[Metadata]]: ...
    def on_batch(
        self,
        *events: type[Event],
        group: str,
        size: int = 100,
        wait_seconds: float = 0.5,
        by: BatchBy = "partition",
        retry: Retry | None = None,
        on_failure: OnFailure | None = None,
        inbox: bool = False,
        timeout_seconds: float | None = None,
        start: Start = "earliest",
    ) -> On[list[Any], list[Metadata]]:
        """Handle events together: on an async function, or a class with `handle`, that takes a list of events.

        `async def book(sold: list[TicketSold])`, or with their metadata, `(sold: list[TicketSold], metas:
        list[Metadata])`; services as for `on`. What is said there of one event holds for a batch as a whole: it is
        handed over at least once, fails or succeeds, is tried again. One that keeps failing is halved, and so on until
        the event that fails is alone: `on_failure` says what becomes of it. The others are handled in their order.

        Args:
            events: the types to handle; one list has events of all of them.
            group: as for `on`.
            size: the most events of a call, 1 to 1,000.
            wait_seconds: how long the first of them waits for more; 0 hands over what is there.
            by: `partition` for events of one partition of the topic, in its order, so that batches of it follow each
                other. `key` for events of one key, while those of other keys are handled at the same time.
            retry, start: as for `on`.
            on_failure: as for `on`, of an event that keeps failing alone.
            inbox: run the handler inside `db.transaction()` together with the notes that this group has handled the
                events. What it has handled already is not in the list.
            timeout_seconds: how long one call may take, however many events it has.

        Raises:
            TypeError: as for `on`.
            ValueError: as for `on`; or the size, the time, or `by` cannot be.
        """
        _check("on_batch", events, group, on_failure, timeout_seconds)
        check_start(start)
        batches = InBatches(size, wait_seconds, by)
        _check_batches(batches, events, inbox)
        described = partial(
            Subscription, events, group, retry=retry, on_failure=on_failure, inbox=inbox, unknown=self.unknown,
            timeout_seconds=timeout_seconds, batches=batches, start=start,
        )  # fmt: skip
        return On(self, events, described, several=True)

    def upcast(self, event: type[Event], /, *, from_: int) -> Callable[[U], U]:
        """Read events of an older major version: `@events.upcast(OrderPaid, from_=1)` on a plain function.

        The function takes what the JSON of an event of that version says, as a dict, and returns it as the next major
        version says it. Groups that handle the class are then called with older events, too; `Metadata.version` says
        what was written. Where the class is several versions ahead, each step has a function of its own. A group that
        has a handler for the older version itself keeps it.

        Args:
            event: the class that the events are read into in the end.
            from_: the major version that the function takes.

        Raises:
            TypeError: what is decorated is no plain function, or the class no event.
            ValueError: the class is of this version itself, or of an older one.
        """
        definition = definition_of(event)
        if not 0 <= from_ < definition.version.major:
            name, version = event.__name__, definition.version
            msg = f"upcast({name}, from_={from_}): the class is version {version}, which is not newer"
            raise ValueError(msg)

        def register(function: U) -> U:
            name = f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', repr(function))}"
            what: object = function
            if not inspect.isroutine(what) or inspect.iscoroutinefunction(what):
                msg = f"{name} is no plain function: write def, with the old payload as its parameter"
                raise TypeError(msg)
            self.upcasts = [*self.upcasts, Upcast(event, from_, function, name)]
            return function

        return register

    async def publish(self, event: Event, *, at: datetime | None = None, delay_seconds: float | None = None) -> str:
        """Publish an event, now or for later, and return its id; see `EventPublisher.publish`."""
        return await self.binding.get().publish(event, at=at, delay_seconds=delay_seconds)

    async def publish_batch(self, events: Sequence[Event]) -> list[str]:
        """Publish events together, and return their ids; see `EventPublisher.publish_batch`."""
        return await self.binding.get().publish_batch(events)

    def add(self, subscription: Subscription) -> None:
        """Add a handler, as `on` does."""
        known = [*self.subscriptions, subscription]
        one_handler_each(known)
        self.subscriptions = known


class On(Generic[A, M]):
    """A decorator of handlers, made by `EventRouter`; it gives the handler back unchanged.

    Args:
        router: where handlers are added.
        events: the types.
        described: makes the subscription, of what is known of the handler then.
        several: the handler takes lists.
    """

    def __init__(
        self,
        router: EventRouter,
        events: tuple[type[Event], ...],
        described: Callable[..., Subscription],
        *,
        several: bool = False,
    ) -> None:
        self._router = router
        self._events = events
        self._described = described
        self._several = several

    @overload
    def __call__(self, handler: H) -> H: ...
    @overload
    def __call__(self, handler: Callable[[A], Awaitable[None]]) -> Handler[A]: ...
    @overload
    def __call__(self, handler: Callable[[A, M], Awaitable[None]]) -> HandlerWithMetadata[A, M]: ...
    def __call__(self, handler: Any) -> Any:
        """Register the handler."""
        name = f"{getattr(handler, '__module__', '?')}.{getattr(handler, '__qualname__', repr(handler))}"
        call = _bound_method(handler, name) if inspect.isclass(handler) else handler
        wants_metadata = _wants_metadata(call, name, self._events, several=self._several)
        self._router.add(self._described(call=call, wants_metadata=wants_metadata, name=name))
        return handler


def _check(
    verb: str, events: tuple[type[Event], ...], group: str, on_failure: OnFailure | None, timeout_seconds: float | None
) -> None:
    """Refuse what neither kind of handler can have."""
    if not events:
        msg = f"{verb}() needs an event class: @events.{verb}(OrderPaid, group=…)"
        raise TypeError(msg)
    for event in events:
        definition_of(event)
    if not 1 <= len(group) <= _LONGEST_GROUP:
        msg = f"{verb}(group=…) needs a name of 1 to {_LONGEST_GROUP} characters: the place is kept under it"
        raise ValueError(msg)
    if not (on_failure is None or isinstance(on_failure, RetryLater) or on_failure in typing.get_args(Fate)):
        msg = f"{verb}(on_failure={on_failure!r}): it is 'park', 'dead-letter', 'skip', 'stop' or RetryLater(…)"
        raise ValueError(msg)
    if timeout_seconds is not None and not timeout_seconds > 0:
        msg = f"{verb}(timeout_seconds={timeout_seconds!r}): a call may take more than 0 seconds"
        raise ValueError(msg)


def one_handler_each(subscriptions: Sequence[Subscription]) -> None:
    """Check that no group handles a type twice: a retry for one handler would repeat the other.

    Raises:
        ValueError: naming both handlers.
    """
    handlers: dict[tuple[str, str, int], str] = {}
    for subscription in subscriptions:
        for event in subscription.events:
            definition = definition_of(event)
            key = (subscription.group, definition.type, definition.version.major)
            if key in handlers:
                msg = (
                    f"group {subscription.group!r} handles {definition.type} {definition.version.major}.x twice, "
                    f"by {handlers[key]} and {subscription.name}: give one of them a group of its own"
                )
                raise ValueError(msg)
            handlers[key] = subscription.name


def one_rule_each(subscriptions: Sequence[Subscription]) -> None:
    """Check that a group is told one thing about what it cannot handle, and one about where it begins.

    Raises:
        ValueError: naming the group and two handlers.
    """
    rules: dict[str, Subscription] = {}
    for subscription in subscriptions:
        other = rules.setdefault(subscription.group, subscription)
        if other.unknown != subscription.unknown:
            msg = (
                f"group {subscription.group!r} is told two things about what it cannot handle, by the routers of "
                f"{other.name} and {subscription.name}: give both the same unknown_types and unknown_versions"
            )
            raise ValueError(msg)
        if other.start != subscription.start:
            msg = (
                f"group {subscription.group!r} is told two things about where it begins, by {other.name} "
                f"({other.start}) and {subscription.name} ({subscription.start}): give both the same start"
            )
            raise ValueError(msg)


def decoder_each(subscriptions: Sequence[Subscription], settings: EventsSettings) -> Mapping[str, Decoder]:
    """The decoder of each topic that others write.

    Raises:
        ValueError: two classes of a topic do not say the same about how it is read, or a class has a version that its
            decoder does not find; the message names what to write.
    """
    firsts: dict[str, type[Event]] = {}
    for event in {event: None for each in subscriptions for event in each.events}:
        definition = definition_of(event)
        topic = settings.topic_of(definition)
        first = firsts.setdefault(topic, event)
        if definition_of(first).decoder != definition.decoder:
            msg = (
                f"{first.__name__} and {event.__name__} share topic {topic} and do not say the same about how it is "
                "read: give both the same decoder="
            )
            raise ValueError(msg)
        if isinstance(definition.decoder, Plain | Debezium) and definition.version.major != 1:
            name, version = event.__name__, definition.version
            msg = f"{name} is version {version}, and {definition.decoder} finds 1.0: leave version= out"
            raise ValueError(msg)
    decoders = {topic: definition_of(event).decoder for topic, event in firsts.items()}
    return {topic: decoder for topic, decoder in decoders.items() if decoder is not None}


def _bound_method(kind: type[Any], name: str) -> Callable[..., Awaitable[None]]:
    if not callable(getattr(kind, "handle", None)):
        msg = f"{name} has no method handle: write async def handle(self, event) or (self, event, meta)"
        raise TypeError(msg)
    try:
        instance = kind()
    except TypeError as error:
        msg = f"{name} cannot be made without arguments ({error}): a handler class takes none"
        raise TypeError(msg) from error
    call: Callable[..., Awaitable[None]] = instance.handle
    return call


def _check_limits(concurrency: int | None, order: Order, on_failure: OnFailure | None) -> None:
    if order not in typing.get_args(Order):
        msg = f"on(order={order!r}): it is 'key' or 'none'"
        raise ValueError(msg)
    if order == "none" and on_failure == "park":
        msg = "on(order='none', on_failure='park'): a parked key keeps an order that is not asked for: leave one out"
        raise ValueError(msg)
    if concurrency is not None and (type(concurrency) is not int or concurrency < 1):
        msg = f"on(concurrency={concurrency!r}): it is a whole number, at least 1 call at once"
        raise ValueError(msg)


def _check_batches(batches: InBatches, events: tuple[type[Event], ...], inbox: object) -> None:
    if type(batches.size) is not int or not 1 <= batches.size <= _LARGEST_BATCH:
        msg = f"on_batch(size={batches.size!r}): a batch has 1 to {_LARGEST_BATCH} events"
        raise ValueError(msg)
    if not 0 <= batches.wait_seconds < float("inf"):
        msg = f"on_batch(wait_seconds={batches.wait_seconds!r}): it is a number of seconds, 0 or more"
        raise ValueError(msg)
    if batches.by not in typing.get_args(BatchBy):
        msg = f"on_batch(by={batches.by!r}): it is 'key' or 'partition'"
        raise ValueError(msg)
    for event in events:
        if batches.by == "key" and definition_of(event).key is None:
            msg = f"on_batch(by='key'): {event.__name__} has no key; say by='partition'"
            raise ValueError(msg)
    if inbox not in {True, False}:
        msg = f"on_batch(inbox={inbox!r}): it is True or False, since the events of a batch share a transaction"
        raise ValueError(msg)


def _wants_metadata(
    call: Callable[..., Awaitable[None]], name: str, events: tuple[type[Event], ...], *, several: bool
) -> bool:
    if not inspect.iscoroutinefunction(call):
        msg = f"{name} is not an async function: write async def, and asyncio.to_thread around what blocks"
        raise TypeError(msg)
    parameters = list(inspect.signature(call).parameters.values())
    required = [
        p for p in parameters if p.default is p.empty and p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}
    ]
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if not 1 <= len(required) <= 2 or keywords:  # noqa: PLR2004  the event, and the metadata
        forms = "(event) or (event, meta: Metadata)"
        if several:
            forms = "(events: list[…]) or (events: list[…], metas: list[Metadata])"
        msg = f"{name} takes {inspect.signature(call)}: a handler takes {forms}"
        raise TypeError(msg)
    try:
        hints = typing.get_type_hints(call)
    except NameError:  # a name that exists only for type checkers, who have checked it then
        hints = {}
    _takes(hints.get(required[0].name, Any), events, name, several=several)
    if len(required) == 2:  # noqa: PLR2004  the event, and the metadata
        _takes_metadata(hints.get(required[1].name, Any), required[1].name, name, several=several)
    return len(required) == 2  # noqa: PLR2004  as above


def _takes(hint: object, events: Sequence[type[Event]], name: str, *, several: bool) -> None:
    """Check an annotation of the event, or of the events, as far as it can be seen what it says."""
    expected = _inside(hint, name) if several else hint
    if expected is not Any and inspect.isclass(expected):
        for event in events:
            if not issubclass(event, expected):
                msg = f"{name} takes a {expected.__name__}, but handles {event.__name__}: correct one of the two"
                raise TypeError(msg)


def _inside(hint: object, name: str) -> object:
    """Of what a list is, by the annotation of a parameter that is given one."""
    one_of_several = typing.get_origin(hint) in {typing.Union, types.UnionType}
    for kind in typing.get_args(hint) if one_of_several else (hint,):
        origin: object = typing.get_origin(kind) or kind
        if kind is Any or not inspect.isclass(origin):  # it cannot be seen what it says
            return Any
        if _is_wider_than_a_list(origin):
            inside: tuple[object, ...] = typing.get_args(kind)
            return inside[0] if inside else Any
    of = hint.__name__ if inspect.isclass(hint) else "…"
    takes = of if inspect.isclass(hint) else hint
    msg = f"{name} takes one {takes}, and on_batch hands over lists: annotate it list[{of}]"
    raise TypeError(msg)


def _is_wider_than_a_list(kind: type) -> bool:
    try:
        return issubclass(list, kind)
    except TypeError:  # a protocol that is for type checkers, who have checked it then
        return True


def _takes_metadata(hint: object, parameter: str, name: str, *, several: bool) -> None:
    origin: object = typing.get_origin(hint)
    if several and inspect.isclass(origin) and issubclass(list, origin):
        (hint,) = typing.get_args(hint)
        several = False
    if hint is not Any and (several or hint is not Metadata):
        what = "list of the events' Metadata" if several else "event's Metadata"
        msg = f"{name}: the second parameter {parameter!r} is the {what}; annotate it so"
        raise TypeError(msg)
