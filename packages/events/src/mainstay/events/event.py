"""What an event is: an immutable pydantic model that knows its type, its version and its key."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, Unpack

from pydantic import BaseModel, ConfigDict

from mainstay.core import Kept

__all__ = ["Event"]

E = TypeVar("E", bound="Event")

_TYPE = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", re.ASCII)
_VERSION = re.compile(r"(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)", re.ASCII)


@dataclass(frozen=True, slots=True)
class EventDefinition:
    """What the keywords of an event class said.

    Attributes:
        type: the stable name on the wire, such as `order.paid`.
        version: `major.minor`. A reader of a major version reads all of its minor ones: those only add fields.
        key: the field whose value orders events: those with equal keys are handled one after the other. None: no order.
    """

    type: str
    version: str
    key: str | None

    @property
    def major(self) -> str:
        """The part of the version that must be equal between writer and reader."""
        return self.version.partition(".")[0]


class Event(BaseModel):
    """Base of every event: `class OrderPaid(Event, type="order.paid", version="1.0", key="order_id"): …`.

    Immutable. Unknown fields are ignored when an event is read, so that a publisher may add some before its readers
    know them. A class without `type=` is abstract: it carries fields for others to inherit.

    What is published is read back equal: fields are written by their aliases and read by these or their names, computed
    fields are not written, `bytes` are base64, and inf and nan are text.

    Raises:
        TypeError: the type, the version or the key is not well formed, the key names no field, or a field has values
            that would not come back equal; the message names it and the remedy.
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
        **kwargs: Any,
    ) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if type is None:
            if version is not None or key is not None:
                msg = f"class {cls.__name__}(Event, …) has version= or key= but no type=: add it"
                raise TypeError(msg)
            cls.__event__ = None
            return
        if _TYPE.fullmatch(type) is None:
            msg = f"{cls.__name__}: type={type!r} is words of letters, digits, _ and - joined by dots, like order.paid"
            raise TypeError(msg)
        version = "1.0" if version is None else version
        if _VERSION.fullmatch(version) is None:
            msg = f"{cls.__name__}: version={version!r} must be two numbers, major.minor, like 1.0"
            raise TypeError(msg)
        if key is not None and key not in cls.model_fields:
            fields = ", ".join(cls.model_fields) or "none"
            msg = f"{cls.__name__}: key={key!r} names no field; the fields are {fields}"
            raise TypeError(msg)
        cls.__event__ = EventDefinition(type, version, key)
        if cls.__pydantic_complete__:  # else when it is first used
            kept(cls).check()


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
