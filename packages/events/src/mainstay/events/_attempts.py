"""Whether an event that could not be handled is tried again, and when."""

from __future__ import annotations

import logging
from typing import NamedTuple

from mainstay.core import Clock, ConfigurationError, Outcome, RetryState
from mainstay.database import CommitUnknown
from mainstay.events._decoding import will_pass
from mainstay.events._delivery import Delivery
from mainstay.events._routes import Handling, Route
from mainstay.events._sparing import Sparing
from mainstay.events._stops import SHORTEST_SECONDS
from mainstay.events.errors import DecodeError
from mainstay.events.strategies import RetryLater

_log = logging.getLogger("mainstay.events")


class Again(NamedTuple):
    """The event is handed out once more; until then its key waits.

    Attributes:
        after_seconds: how much later.
    """

    after_seconds: float


class Attempts:
    """The attempts of one group's events.

    Args:
        group: the consumer group.
        sparing: says what was said lately.
        clock: measures ages.
    """

    def __init__(self, group: str, sparing: Sparing, clock: Clock) -> None:
        self._group = group
        self._sparing = sparing
        self._clock = clock

    def again(
        self, delivery: Delivery, route: Route | None, handling: Handling | None, error: Exception
    ) -> Again | None:
        """When it is called again where it is; None when its retry is over."""
        # Nothing happened, and it will pass: the database is away, a breaker is open. That is no verdict on the
        # event and costs no attempt: an outage of a minute must not turn a minute's events into dead letters. A
        # mistake in how the App is put together is none either: the event waits until that is mended.
        postponed = isinstance(error, ConfigurationError) or will_pass(error)
        if isinstance(error, CommitUnknown):
            # Elsewhere it would be unknown whether to try again. An event may always be handled once more.
            error.retryable = True
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
        number = delivery.postponed + 1 if postponed else delivery.attempt
        state = self._state(delivery, error, number)
        if not postponed:
            return handling.retry.delay_seconds(state)
        if not isinstance(error, ConfigurationError) and not handling.retry.retry(state):
            return None
        return max(handling.retry.wait(state), _hint(error))

    def later(
        self, delivery: Delivery, on_failure: RetryLater, handling: Handling | None, error: Exception
    ) -> float | None:
        """How long an event is set aside now, None when that is no use any more."""
        if handling is None or isinstance(error, DecodeError) or delivery.later >= len(on_failure.delays_seconds):
            return None
        if not handling.retry.retry(self._state(delivery, error, delivery.attempt)):
            return None
        seconds = on_failure.delays_seconds[delivery.later]
        delivery.later += 1
        delivery.attempt += 1
        return seconds

    def stopped(self, delivery: Delivery, handling: Handling | None, error: Exception) -> Again:
        """When it is called again although its retry is over: after the longest wait, or as the error says."""
        seconds = max(SHORTEST_SECONDS, _hint(error))
        if handling is not None:
            seconds = max(seconds, handling.retry.wait(self._state(delivery, error, delivery.attempt)))
        delivery.attempt += 1
        delivery.waited += seconds
        return Again(seconds)

    def age(self, delivery: Delivery) -> float:
        """For how many seconds it has been failing, in this process and before."""
        return delivery.aged + (0.0 if delivery.began_at is None else self._clock.monotonic() - delivery.began_at)

    def _state(self, delivery: Delivery, error: Exception, number: int) -> RetryState:
        return RetryState(number, Outcome.of_error(error), self.age(delivery), delivery.waited)


def _hint(error: Exception) -> float:
    return getattr(error, "retry_after_seconds", None) or 0.0
