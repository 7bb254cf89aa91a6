"""Events of older major versions, read into the classes of today: step by step, as the routers' upcasters say."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from pydantic_core import from_json, to_json

from mainstay.events._codec import codec_of
from mainstay.events.errors import DecodeError
from mainstay.events.event import Event, definition_of
from mainstay.events.metadata import kind_named

Payload = dict[str, Any]
"""What the JSON of an event says."""


class Upcast(NamedTuple):
    """One step, as `EventRouter.upcast` describes it: from a major version of a type to the next one."""

    event: type[Event]
    from_: int
    call: Callable[[Payload], Payload]
    name: str

    @property
    def place(self) -> tuple[str, int]:
        """The type and the major version that it begins with."""
        return definition_of(self.event).type, self.from_


class Upcasting:
    """The chains of all routers of an App.

    Args:
        upcasts: the steps.

    Raises:
        ValueError: two steps begin with the same version, or a chain has a hole; the message names what to write.
    """

    def __init__(self, upcasts: Iterable[Upcast]) -> None:
        self._steps: dict[tuple[str, int], Upcast] = {}
        for step in upcasts:
            other = self._steps.setdefault(step.place, step)
            if other is not step:
                which = kind_named(*step.place)
                msg = f"{which} is upcast twice, by {other.name} and {step.name}: remove one of them"
                raise ValueError(msg)
        for step in self._steps.values():
            definition = definition_of(step.event)
            for major in range(step.from_, definition.version.major):
                if (definition.type, major) not in self._steps:
                    name = step.event.__name__
                    msg = (
                        f"{step.name} reads {definition.type} {step.from_}.x into {name}, which is version "
                        f"{definition.version}, and nothing leads on from {major}.x: write "
                        f"@events.upcast({name}, from_={major})"
                    )
                    raise ValueError(msg)

    def older(self, event: type[Event], handled: Collection[int]) -> dict[int, Callable[[bytes], Any]]:
        """How events of older major versions are read into a class, down to one that has a handler of its own."""
        definition = definition_of(event)
        found: dict[int, Callable[[bytes], Any]] = {}
        steps: list[Upcast] = []
        major = definition.version.major - 1
        while major not in handled and (step := self._steps.get((definition.type, major))) is not None:
            steps.insert(0, step)
            found[major] = partial(_read, codec_of(event).read, tuple(steps))
            major -= 1
        return found


def _read(read: Callable[[bytes], Any], steps: Sequence[Upcast], value: bytes) -> Any:
    written = kind_named(*steps[0].place)
    try:
        payload = from_json(value)
    except ValueError:
        payload = None
    if not isinstance(payload, dict):
        msg = f"{written} cannot be read: the value is no JSON object"
        raise DecodeError(msg)
    for step in steps:
        try:
            payload = step.call(payload)  # pyright: ignore[reportUnknownArgumentType]  as it was written
        except Exception as error:
            msg = f"{written} cannot be read: {step.name} raised {error.__class__.__name__}"
            raise DecodeError(msg) from error
    try:
        value = to_json(payload)
    except ValueError as error:
        msg = f"{written} cannot be read: {steps[-1].name} returned what JSON cannot hold"
        raise DecodeError(msg) from error
    return read(value)
