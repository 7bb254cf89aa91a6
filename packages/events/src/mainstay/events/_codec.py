"""How the values of an event class become JSON and come back, and which bytes order them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any
from uuid import UUID

from pydantic_core import to_json, to_jsonable_python

from mainstay.events.event import Event, definition_of, kept

_WRITE: dict[str, Any] = {"by_alias": True, "round_trip": True}
_QUIETLY: dict[str, Any] = {**_WRITE, "warnings": "none"}  # to ask for no warnings costs more than to write
_READ: dict[str, Any] = {"by_alias": True, "by_name": True}
_PLAIN: tuple[object, ...] = (str, int, UUID)  # whose JSON text is what str() says


class Codec:
    """How the events of one class are written and read.

    Args:
        event: the class.

    Attributes:
        definition: what the class says of itself.
        read: makes an event of JSON, or raises what pydantic does.

    Raises:
        TypeError: it is no event, or some of its values would not come back equal.
    """

    __slots__ = (
        "_kept", "_key", "_key_is_plain", "_key_stands_alone", "_name", "_nan_is_null", "_serializer", "_to_json",
        "definition", "read",
    )  # fmt: skip

    def __init__(self, event: type[Event]) -> None:
        self.definition = definition_of(event)
        self._key = self.definition.key
        self._kept = kept(event)
        self._kept.check()
        self._nan_is_null = self._kept.nan_is_null
        self._name = event.__name__
        self._serializer = event.__pydantic_serializer__
        # Called for every event: a method or a mapping of options around them costs a tenth of a small one.
        self._to_json: Callable[[Event], bytes] = partial(self._serializer.to_json, **_WRITE)
        self.read: Callable[[bytes], Any] = partial(event.__pydantic_validator__.validate_json, **_READ)
        self._key_is_plain = self._key is not None and _is_plain(event, self._key)
        self._key_stands_alone = not event.__pydantic_decorators__.model_serializers

    def write(self, event: Event) -> bytes:
        """The event as JSON.

        Raises:
            TypeError: JSON cannot hold a value of it; the message names the field.
        """
        try:
            value = self._to_json(event)
        except ValueError as error:
            raise self._unwritable(event, error) from None
        if self._nan_is_null and b"null" in value:
            self._kept.write(event)
        return value

    def compare(self, event: Event) -> None:
        """Look whether the event comes back equal.

        Raises:
            TypeError: it would not; the message names the field and both types.
        """
        try:
            self._serializer.to_json(event, **_QUIETLY)
        except ValueError as error:
            raise self._unwritable(event, error) from None
        self._kept.write(event)

    def key(self, event: Event) -> bytes | None:
        """The bytes that order the event, None where it has no key: the text of the field in JSON, without quotes."""
        if self._key is None:
            return None
        value: object = getattr(event, self._key)
        if value is None:
            return None
        if self._key_is_plain:
            return str(value).encode()
        if self._key_stands_alone:
            (said,) = self._serializer.to_python(event, mode="json", include={self._key}, **_QUIETLY).values()
        else:  # what the class writes instead of its fields has no place that is known for the key
            said = to_jsonable_python(value)
        return None if said is None else said.encode() if isinstance(said, str) else to_json(said)

    def _unwritable(self, event: Event, error: ValueError) -> TypeError:
        name = next((name for name in type(event).model_fields if not self._writes(event, name)), "it")
        reason = str(error).partition("\n")[0]
        return TypeError(f"event {self._name} cannot be published: {name}: {reason}")

    def _writes(self, event: Event, name: str) -> bool:
        try:
            self._serializer.to_json(event, include={name}, **_QUIETLY)
        except ValueError:
            return False
        return True


def _is_plain(event: type[Event], name: str) -> bool:
    field = event.model_fields[name]
    decorators = event.__pydantic_decorators__
    own = decorators.field_serializers or decorators.model_serializers
    return field.annotation in _PLAIN and not field.metadata and not own


@cache
def codec_of(event: type[Event]) -> Codec:
    """The codec of a class. Raises what `Codec` does."""
    return Codec(event)
