"""Events that are published for later: when that is, and what waits until then, for a person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple, Protocol
from uuid import UUID

from mainstay.core import Health
from mainstay.events.errors import NotScheduledError
from mainstay.events.metadata import TYPE, Headers, Outgoing

__all__ = ["ScheduledEvent", "ScheduledEvents"]

_LAST_YEAR = 9998
"""A year is left, so that no clock and no zone takes a moment out of what a datetime can hold."""
_LONGEST_SECONDS = 1e10
"""A delay; about 300 years."""


class Due(NamedTuple):
    """When an event is handed on.

    Attributes:
        at: the moment, in UTC; None where there is a delay.
        delay_seconds: how long after it was published.
    """

    at: datetime | None
    delay_seconds: float | None


def due_of(at: datetime | None, delay_seconds: float | None) -> Due | None:
    """When an event is to be handed on; None at once.

    Raises:
        TypeError: both are given, or one is of another type.
        ValueError: the moment has no zone or is beyond the year 9998, or the delay is negative, not finite, or
            longer than 10,000,000,000 s.
    """
    if at is not None:
        if delay_seconds is not None:
            msg = "publish(at=…, delay_seconds=…): one of the two says when the event is handed on, not both"
            raise TypeError(msg)
        return Due(_moment(at), None)
    return None if delay_seconds is None else Due(None, _delay(delay_seconds))


def _moment(at: object) -> datetime:
    if not isinstance(at, datetime):
        msg = f"publish(at=…) takes a datetime with a time zone, and not {type(at).__name__}"
        raise TypeError(msg)
    if at.utcoffset() is None:
        msg = f"publish(at={at!r}): it has no time zone, so it names no moment; give it one, such as datetime.now(UTC)"
        raise ValueError(msg)
    try:
        moment = at.astimezone(UTC)
    except OverflowError:  # at one end of what there is
        moment = datetime.max.replace(tzinfo=UTC)
    if moment.year > _LAST_YEAR:
        msg = f"publish(at={at!r}): a moment from the year 1 to the year {_LAST_YEAR} is one that every database keeps"
        raise ValueError(msg)
    return moment


def _delay(seconds: object) -> float:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        msg = f"publish(delay_seconds=…) takes a number of seconds, an int or a float, and not {type(seconds).__name__}"
        raise TypeError(msg)
    if not 0 <= seconds <= _LONGEST_SECONDS:  # of nan neither is true
        shown = f"{seconds!r}" if isinstance(seconds, float) or abs(seconds) < _LONGEST_SECONDS else "that many"
        msg = f"publish(delay_seconds=…) takes a number of seconds from 0 to {_LONGEST_SECONDS:.0f}, and not {shown}"
        raise ValueError(msg)
    return float(seconds)


@dataclass(frozen=True, slots=True)
class ScheduledEvent:
    """An event that was published and waits for its time.

    Attributes:
        id: the event's, as `publish` has returned it and `Metadata.id` will say it.
        due: when it is handed on, in UTC.
        topic, key, value, headers: what is handed on then.
        published_at: when it was published, in UTC, to a second.
    """

    id: str
    due: datetime
    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers
    published_at: datetime

    @property
    def type(self) -> str:
        """The event's type."""
        return (dict(self.headers).get(TYPE) or b"").decode(errors="replace")


class Schedule(Protocol):
    """Where events wait for their time."""

    async def add(self, id: UUID, event: Outgoing, due: Due) -> None:
        """Keep one, in the unit of work that is open."""
        ...

    async def list(self, type: str | None, key: bytes | None, limit: int) -> Sequence[ScheduledEvent]:
        """Those that are due first; what is None is not looked at."""
        ...

    async def cancel(self, id: UUID) -> ScheduledEvent | None:
        """Take one out, in the unit of work that is open; None where it does not wait (any more)."""
        ...

    async def health(self) -> Health:
        """Whether events are handed on when their time has come."""
        ...


class ScheduledEvents:
    """The events that wait for their time; `app.get(ScheduledEvents)`, or the command `mainstay events scheduled`.

    Args:
        schedule: where they are.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule

    async def list(
        self, *, type: str | None = None, key: str | None = None, limit: int = 100
    ) -> Sequence[ScheduledEvent]:
        """The events that wait, those that are due first at the beginning.

        Args:
            type: of this type only.
            key: with this key only.
            limit: at most so many.
        """
        return await self._schedule.list(type, None if key is None else key.encode(), limit)

    async def cancel(self, id: str) -> ScheduledEvent:
        """Have an event not handed on; inside a unit of work that is so when it commits.

        Either it is cancelled or it is handed on, never both. In a workflow call it from a step, not from the workflow
        function itself, which may run again.

        Args:
            id: the event's, as `publish` returned it.

        Returns:
            What was cancelled.

        Raises:
            NotScheduledError: no event with this id waits (any more). A unit of work around the call can go on.
        """
        try:
            known: UUID | None = UUID(id)
        except ValueError:
            known = None
        cancelled = None if known is None else await self._schedule.cancel(known)
        if cancelled is None:
            msg = (
                f"no event {id} waits for its time: it was handed on or cancelled, or is of another service. List "
                "those that wait with mainstay events scheduled list"
            )
            raise NotScheduledError(msg)
        return cancelled

    async def health(self) -> Health:
        """Degraded while the time of an event has passed for long and it was not handed on."""
        return await self._schedule.health()
