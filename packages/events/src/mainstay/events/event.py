"""What an event is: an immutable pydantic model that knows its type, its version and its key."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar, Unpack

from pydantic import BaseModel, ConfigDict

from mainstay.core import Kept
from mainstay.events.foreign import Decoder

__all__ = ["Event", "Version"]

TOPIC_RULE = "1 to 249 letters, digits, '.', '_' and '-', as Kafka's rule is, on every transport"

E = TypeVar("E", bound="Event")

_TYPE = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", re.ASCII)
_VERSION = re.compile(r"(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})", re.ASCII)
_TOPIC = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,249}", re.ASCII)


class Version(NamedTuple):
    """The version of an event type, compared by its numbers: 1.10 is newer than 1.9.

    Attributes:
        major: equal between writer and reader; a new one is another class.
        minor: counts the fields that were added.
    """

    major: int
    minor: int

    @classmethod
    def parse(cls, text: str) -> Version:
        """The version that a text such as `1.10` says.

        Raises:
            ValueError: it is not two whole numbers joined by a dot.
        """
        if (found := _VERSION.fullmatch(text)) is None:
            msg = f"version {text!r} must be two numbers, major.minor, like 1.0"
            raise ValueError(msg)
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


@dataclass(frozen=True, slots=True)
class EventDefinition:
    """What the keywords of an event class said.

    Attributes:
        type: the stable name on the wire, such as `order.paid`.
        version: a reader of a major version reads all of its minor ones: those only add fields.
        key: the field whose value orders events: those with equal keys are handled one after the other. None: no order.
        topic: where its events travel, unless the settings say otherwise. None: as its type says.
        decoder: reads the topic, which others write. None: it holds CloudEvents.
    """

    type: str
    version: Version
    key: str | None
    topic: str | None
    decoder: Decoder | None = None


class Event(BaseModel):
    """Base of every event: `class OrderPaid(Event, type="order.paid", version="1.0", key="order_id"): …`.

    `topic="…"` says where its events travel, if not on the topic that its type names: `order`. `topics` in the settings
    overrides both.

    `decoder=…` says that others write the topic, and how its records are read: see `mainstay.events.foreign`. All
    classes of the topic say the same. What this service publishes there itself is a CloudEvent as everywhere, and is
    read as one.

    Immutable. Unknown fields are ignored when an event is read, so that a publisher may add some before its readers
    know them. A class without `type=` is abstract: it carries fields for others to inherit.

    What is published is read back equal: fields are written by their aliases and read by these or their names, computed
    fields are not written, `bytes` are base64, and inf and nan are text.

    Raises:
        TypeError: the type, the version, the topic or the key is not well formed, the key names no field, or a field
            has values that would not come back equal; the message names it and the remedy.
    """

    model_config = ConfigDict(
        frozen=True, extra="ignore", ser_json_inf_nan="strings", ser_json_bytes="base64", val_json_bytes="base64"
    )

    __event__: ClassVar[EventDefinition | None] = None

    def __init_subclass__(
        cls,
        *,
        type: str | None = None,
        version: str | None = None,
        key: str | None = None,
        topic: str | None = None,
        decoder: Decoder | None = None,
        **config: Unpack[ConfigDict],
    ) -> None:
        super().__init_subclass__(**config)

    @classmethod
    def __pydantic_init_subclass__(
        cls,
        *,
        type: str | None = None,
        version: str | None = None,
        key: str | None = None,
        topic: str | None = None,
        decoder: Decoder | None = None,
        **kwargs: Any,
    ) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if type is None:
            if any(word is not None for word in (version, key, topic, decoder)):
                msg = f"class {cls.__name__}(Event, …) has version=, key=, topic= or decoder= but no type=: add it"
                raise TypeError(msg)
            cls.__event__ = None
            return
        if _TYPE.fullmatch(type) is None or not is_topic(type):
            msg = (
                f"{cls.__name__}: type={type!r} must be words of letters, digits, _ and - joined by dots, like "
                "order.paid, at most 249 characters"
            )
            raise TypeError(msg)
        try:
            number = Version.parse("1.0" if version is None else version)
        except ValueError as error:
            msg = f"{cls.__name__}: {error}"
            raise TypeError(msg) from None
        if topic is not None and not is_topic(topic):
            msg = f"{cls.__name__}: topic={topic!r} is no name of a topic: {TOPIC_RULE}"
            raise TypeError(msg)
        if key is not None and key not in cls.model_fields:
            fields = ", ".join(cls.model_fields) or "none"
            msg = f"{cls.__name__}: key={key!r} names no field; the fields are {fields}"
            raise TypeError(msg)
        cls.__event__ = EventDefinition(type, number, key, topic, decoder)
        if cls.__pydantic_complete__:  # else when it is first used
            kept(cls).check()


def is_topic(text: str) -> bool:
    """Whether a transport takes this as the name of a topic: `TOPIC_RULE`."""
    return _TOPIC.fullmatch(text) is not None


def kept(event: type[E]) -> Kept[E]:
    """The values of an event class as others read them."""
    return Kept(event, f"event {event.__name__}", for_others=True)


def definition_of(event: type[Event]) -> EventDefinition:
    """The keywords of an event class.

    Raises:
        TypeError: the class is no event, or an abstract one.
    """
    definition = getattr(event, "__event__", None)
    if not isinstance(definition, EventDefinition):
        name = getattr(event, "__name__", repr(event))
        msg = f'{name} is not an event: write class {name}(Event, type="…", version="1.0", key="…")'
        raise TypeError(msg)
    return definition
