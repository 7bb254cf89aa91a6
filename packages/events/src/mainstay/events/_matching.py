"""What a record is for: the handler that takes it, or the reason why none does."""

from __future__ import annotations

from collections.abc import Mapping

from mainstay.events._batches import Batch
from mainstay.events._delivery import Assignment, Delivery
from mainstay.events._failure import KEY_IS_PARKED, Failures
from mainstay.events._pausing import Pausing
from mainstay.events._routes import Match, Route
from mainstay.events.errors import DecodeError
from mainstay.events.metadata import ONLY_GROUP, TYPE, VERSION, Record


class Matching:
    """Finds the handlers of one group's records.

    Args:
        group: the consumer group.
        routes: by event type, as headers name it.
        failures: what is known of events without a handler.

    Attributes:
        at_once: the routes that an event may take for its first headers, without being looked at more closely.
    """

    def __init__(self, group: str, routes: Mapping[bytes, Route], failures: Failures) -> None:
        self.at_once = dict(routes)
        self._only = group.encode()
        self._routes = routes
        self._failures = failures

    def heed(self, pausing: Pausing) -> None:
        """Look at each event more closely while one may be paused."""
        self.at_once.clear()
        if not pausing.of_parts:
            self.at_once.update(self._routes)

    def match(self, assignment: Assignment, record: Record, delivery: Delivery | None) -> Match:
        """A record as it is read, and how it is handled or why not; neither where the group has no use for it."""
        if isinstance(delivery, Batch) and delivery.whole is not None:
            if any(self.waits(assignment, each.record) for each in delivery.members):
                return record, None, None, KEY_IS_PARKED  # paused between two attempts
            return delivery.whole
        seen, headers, error = self._failures.decoders.seen(record)
        only = headers.get(ONLY_GROUP)
        route = self._routes.get(headers.get(TYPE) or b"")
        if delivery is not None and delivery.refused is not None:
            return seen, route, None, delivery.refused
        if only is not None and only != self._only:
            self._failures.skipped.inc()
            return seen, None, None, None
        if route is None:
            return seen, None, None, error or self._failures.without_handler(headers)
        if self.waits(assignment, record):
            return seen, route, None, KEY_IS_PARKED
        if error is not None:
            return seen, route, None, error
        try:
            return seen, route, route.handling(headers.get(VERSION) or b"1.0"), None
        except DecodeError as unknown:
            return seen, route, None, unknown

    def waits(self, assignment: Assignment, record: Record) -> bool:
        """Whether an event goes to the end of the queue of its key instead of to its handler."""
        return self._failures.waits(assignment, record)

    def follows(self, assignment: Assignment, record: Record) -> Match:
        """How an event is handled that is nothing special; neither where it must be matched in its turn."""
        seen, headers, error = self._failures.decoders.seen(record)
        route = self._routes.get(headers.get(TYPE) or b"")
        special = ONLY_GROUP in headers or id(record) in assignment.known or self.waits(assignment, record)
        if route is None or special or error is not None:
            return seen, None, None, None
        try:
            return seen, route, route.handling(headers.get(VERSION) or b"1.0"), None
        except DecodeError:
            return seen, None, None, None
