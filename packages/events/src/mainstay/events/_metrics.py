"""What events count. Labels are bounded: types and groups that the code declares, never what a record says."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from functools import cache

from prometheus_client import REGISTRY, Counter, Gauge
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

PUBLISHED = Counter("mainstay_events_published_total", "Events accepted by the transport or the outbox.", ["type"])
FAILED = Counter("mainstay_events_failed_total", "Handler calls that raised.", ["type", "group"])
SKIPPED = Counter("mainstay_events_skipped_total", "Events of types that the group does not handle.", ["group"])
DUPLICATES = Counter("mainstay_events_duplicates_total", "Events that the inbox had seen before.", ["group"])
DEAD_LETTERS = Counter("mainstay_events_dead_letters_total", "Events that became dead letters.", ["group"])
PARKED = Counter("mainstay_events_parked_total", "Times that a key was parked.", ["group"])
PARKED_KEYS = Gauge("mainstay_events_parked_keys", "Parked keys of topics that this process reads.", ["group"])
HANDED_OVER = Counter(
    "mainstay_events_handed_over_total", "Events for which another process of the group has a handler.", ["group"]
)
RELAYED = Counter("mainstay_events_relayed_total", "Outbox rows confirmed by the broker.")
REVOKED = Counter("mainstay_events_revoked_total", "Partitions given up to other processes.", ["group"])
MISSED = Counter("mainstay_events_missed_total", "Events that were deleted before they were read.", ["group"])
LAG = Gauge("mainstay_events_lag", "Unfinished events of the partitions this process holds, about.", ["group"])
LAG_SECONDS = Gauge("mainstay_events_lag_seconds", "For how long the oldest of these events waits.", ["group"])
OLDEST = Gauge("mainstay_events_oldest_in_flight_seconds", "Age of the oldest unfinished event.", ["group"])
OUTBOX_AGE = Gauge("mainstay_events_outbox_age_seconds", "Age of the oldest row that waits in the outbox.")
OUTBOX_REFUSED = Gauge("mainstay_events_outbox_refused", "Events that the broker refused for good.")
OUTBOX_DEPTH = Gauge("mainstay_events_outbox_depth", "Rows that wait in the outbox, at most 10,000 are counted.")


@cache
def published(type: str) -> Counter:
    """The counter of one type; types are what the code declares, so they are few."""
    return PUBLISHED.labels(type)


_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class HandlerSeconds:
    """How long one handler took, as plain numbers: `observe` runs for every event, a scrape once in a while."""

    __slots__ = ("buckets", "group", "sum", "type")

    def __init__(self, type: str, group: str) -> None:
        self.type = type
        self.group = group
        self.buckets = [0] * (len(_BOUNDS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one call."""
        self.buckets[bisect_left(_BOUNDS, seconds)] += 1
        self.sum += seconds


class _HandledCollector(Collector):
    def __init__(self) -> None:
        self.known: dict[tuple[str, str], HandlerSeconds] = {}

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(
            "mainstay_events_handled_seconds", "Seconds that successful handler calls took.", labels=["type", "group"]
        )
        for (type_, group), seconds in sorted(self.known.items()):
            total = 0
            buckets: list[tuple[str, float]] = []
            for bound, count in zip((*map(str, _BOUNDS), "+Inf"), seconds.buckets, strict=True):
                total += count
                buckets.append((bound, total))
            family.add_metric([type_, group], buckets, seconds.sum)
        yield family


_handled = _HandledCollector()
REGISTRY.register(_handled)


def handler_seconds(type: str, group: str) -> HandlerSeconds:
    """The numbers of one type in one group; they live as long as the process, as every metric does."""
    return _handled.known.setdefault((type, group), HandlerSeconds(type, group))
