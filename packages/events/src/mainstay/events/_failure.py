"""What becomes of an event that could not be handled: tried again after a wait, or kept as a dead letter."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from mainstay.core import Clock, ConfigurationError, MainstayError, Outcome, RetryState
from mainstay.events._delivery import Delivery, Handling, Route
from mainstay.events._metrics import FAILED
from mainstay.events._sparing import Sparing
from mainstay.events.errors import DecodeError

_log = logging.getLogger("mainstay.events")

_BURY_SECONDS = (1.0, 30.0)
"""The first and the longest wait before a dead letter that could not be stored is tried again."""


class Again(NamedTuple):
    """The event is handed out once more; until then its key waits.

    Attributes:
        after_seconds: how much later.
    """

    after_seconds: float


class Failures:
    """Decides about one group's failures; asked by the dispatcher for nothing else.

    Args:
        group: the consumer group.
        bury: stores a dead letter; returns when it is durable.
        clock: measures ages.
    """

    def __init__(self, group: str, *, bury: Callable[[Delivery, Exception], Awaitable[None]], clock: Clock) -> None:
        self._group = group
        self._bury = bury
        self._clock = clock
        self._sparing = Sparing(clock)

    async def failed(
        self, delivery: Delivery, route: Route | None, handling: Handling | None, error: Exception
    ) -> Again | None:
        """Deal with a failure; None when the event needs nothing more, because it is a dead letter now."""
        if delivery.verdict is None:
            if route is not None:
                FAILED.labels(route.type, self._group).inc()
            again = self._again(delivery, route, handling, error)
            if again is not None:
                return again
            _log.error("%s in group %s becomes a dead letter after attempt %d", delivery.record_name, self._group,
                       delivery.attempt, exc_info=error)  # fmt: skip
            delivery.verdict = error
            delivery.waited = 0.0
        try:
            await self._bury(delivery, error)
        except Exception:  # noqa: BLE001  whatever it is, the event must not be lost
            # Committing now would lose the event. It stays unfinished, and so does everything behind it.
            first, longest = _BURY_SECONDS
            delivery.waited = min(max(first, delivery.waited * 2), longest)
            _log.exception("a dead letter of group %s could not be stored, again in %g s", self._group, delivery.waited)
            return Again(delivery.waited)
        return None

    def _again(
        self, delivery: Delivery, route: Route | None, handling: Handling | None, error: Exception
    ) -> Again | None:
        # Nothing happened, and it will pass: the database is away, a breaker is open. That is no verdict on the
        # event and costs no attempt: an outage of a minute must not turn a minute's events into dead letters. A
        # mistake in how the App is put together is none either: the event waits until that is mended.
        postponed = isinstance(error, ConfigurationError) or (
            isinstance(error, MainstayError) and error.no_effect and error.retryable
        )
        delay = self._delay(delivery, handling, error, postponed=postponed)
        if delay is None:
            return None
        left_out = self._sparing.due(f"{type(error).__name__} {route and route.type}")
        if left_out is not None:
            more = f", as did {left_out} others meanwhile" if left_out else ""
            _log.warning(
                "%s in group %s failed at attempt %d%s, again in %.2f s", delivery.record_name, self._group,
                delivery.attempt, more, delay, exc_info=error,
            )  # fmt: skip
        if postponed:
            delivery.postponed += 1
        else:
            delivery.attempt += 1
        delivery.waited += delay
        return Again(delay)

    def _delay(
        self, delivery: Delivery, handling: Handling | None, error: Exception, *, postponed: bool
    ) -> float | None:
        if handling is None or isinstance(error, DecodeError):
            return None
        age = self._clock.monotonic() - (delivery.began_at or 0.0)
        number = delivery.postponed + 1 if postponed else delivery.attempt
        state = RetryState(number, Outcome.of_error(error), age, delivery.waited)
        if not postponed:
            return handling.retry.delay_seconds(state)
        if not isinstance(error, ConfigurationError) and not handling.retry.retry(state):
            return None
        hint: float = getattr(error, "retry_after_seconds", None) or 0.0
        return max(handling.retry.wait(state), hint)
