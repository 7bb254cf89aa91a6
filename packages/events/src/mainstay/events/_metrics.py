"""What events count. Labels are bounded: types and groups that the code declares, never what a record says."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cache

from prometheus_client import REGISTRY, Counter, Gauge
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

PUBLISHED = Counter("mainstay_events_published_total", "Events accepted by the transport or the outbox.", ["type"])
FAILED = Counter("mainstay_events_failed_total", "Handler calls that raised.", ["type", "group"])
SKIPPED = Counter("mainstay_events_skipped_total", "Events of types that the group does not handle.", ["group"])
SKIPPED_FAILURES = Counter(
    "mainstay_events_skipped_failures_total", "Events that kept failing and were skipped.", ["group"]
)
DUPLICATES = Counter("mainstay_events_duplicates_total", "Events that the inbox had seen before.", ["group"])
DEAD_LETTERS = Counter("mainstay_events_dead_letters_total", "Events that became dead letters.", ["group"])
PARKED = Counter("mainstay_events_parked_total", "Times that a key was parked.", ["group"])
PARKED_KEYS = Gauge("mainstay_events_parked_keys", "Keys that are parked.", ["group"], multiprocess_mode="livemax")
PARKED_EVENTS = Gauge(
    "mainstay_events_parked_events",
    "Events of parked keys, at most 10,000 are counted.",
    ["group"],
    multiprocess_mode="livemax",
)
PARKED_AGE = Gauge(
    "mainstay_events_parked_age_seconds",
    "For how long the oldest parked key that is stuck has been failing.",
    ["group"],
    multiprocess_mode="livemax",
)
SET_ASIDE = Counter("mainstay_events_set_aside_total", "Times that an event was set aside.", ["group"])
SET_ASIDE_EVENTS = Gauge(
    "mainstay_events_set_aside_events", "Events that wait to be tried later.", ["group"], multiprocess_mode="livemax"
)
STOPPED = Gauge(
    "mainstay_events_stopped",
    "Events at which a partition of this process has stopped.",
    ["group"],
    multiprocess_mode="livesum",
)
PAUSED = Gauge(
    "mainstay_events_paused",
    "Pauses by a person: of the group, of kinds of events, of keys.",
    ["group"],
    multiprocess_mode="livemax",
)
HANDED_OVER = Counter(
    "mainstay_events_handed_over_total", "Events for which another process of the group has a handler.", ["group"]
)
RELAYED = Counter("mainstay_events_relayed_total", "Outbox rows confirmed by the broker.")
REVOKED = Counter("mainstay_events_revoked_total", "Partitions given up to other processes.", ["group"])
MISSED = Counter("mainstay_events_missed_total", "Events that were deleted before they were read.", ["group"])
LAG = Gauge(
    "mainstay_events_lag",
    "Unfinished events of the partitions this process holds, about.",
    ["group"],
    multiprocess_mode="livesum",
)
LAG_SECONDS = Gauge(
    "mainstay_events_lag_seconds",
    "For how long the oldest of these events waits.",
    ["group"],
    multiprocess_mode="livemax",
)
OLDEST = Gauge(
    "mainstay_events_oldest_in_flight_seconds",
    "Age of the oldest unfinished event.",
    ["group"],
    multiprocess_mode="livemax",
)
IN_FLIGHT_BYTES = Gauge(
    "mainstay_events_in_flight_bytes",
    "Bytes of unfinished events in memory, about.",
    ["group"],
    multiprocess_mode="livesum",
)
PARTITIONS = Gauge(
    "mainstay_events_partitions", "Partitions that this process holds.", ["group"], multiprocess_mode="livesum"
)
OUTBOX_AGE = Gauge(
    "mainstay_events_outbox_age_seconds", "Age of the oldest row that waits in the outbox.", multiprocess_mode="livemax"
)
OUTBOX_REFUSED = Gauge(
    "mainstay_events_outbox_refused",
    "Events of the outbox that the broker refused for good, or that cannot be read.",
    multiprocess_mode="livemax",
)
SCHEDULED = Gauge(
    "mainstay_events_scheduled",
    "Events that wait for their time, at most 10,000 are counted.",
    multiprocess_mode="livemax",
)
OVERDUE = Gauge(
    "mainstay_events_scheduled_overdue_seconds",
    "For how long the time of the first of them has passed.",
    multiprocess_mode="livemax",
)
OUTBOX_DEPTH = Gauge(
    "mainstay_events_outbox_depth",
    "Rows that wait in the outbox, at most 10,000 are counted.",
    multiprocess_mode="livemax",
)


@cache
def published(type: str) -> Counter:
    """The counter of one type; types are what the code declares, so they are few."""
    return PUBLISHED.labels(type)


_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Seconds:
    """How long something took, as plain numbers: `observe` runs for every event, a scrape once in a while."""

    __slots__ = ("buckets", "sum")

    def __init__(self) -> None:
        self.buckets = [0] * (len(_BOUNDS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self.buckets[bisect_left(_BOUNDS, seconds)] += 1
        self.sum += seconds


class _Histogram(Collector):
    """A histogram of such numbers; each lives as long as the process, as every metric does."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str] = ()) -> None:
        self._name = name
        self._documentation = documentation
        self._labels = labels
        self._known: dict[tuple[str, ...], Seconds] = {}
        REGISTRY.register(self)

    def of(self, *labels: str) -> Seconds:
        """The numbers under these labels."""
        return self._known.setdefault(labels, Seconds())

    def collect(self) -> Iterator[Metric]:
        """What there is by now."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labels)
        for labels, seconds in sorted(self._known.items()):
            total = 0
            buckets: list[tuple[str, float]] = []
            for bound, count in zip((*map(str, _BOUNDS), "+Inf"), seconds.buckets, strict=True):
                total += count
                buckets.append((bound, total))
            family.add_metric(labels, buckets, seconds.sum)
        yield family


HANDLED_SECONDS = _Histogram(
    "mainstay_events_handled_seconds", "Seconds that successful handler calls took.", ["type", "group"]
)
FAILED_SECONDS = _Histogram(
    "mainstay_events_failed_seconds", "Seconds that handler calls took that raised.", ["type", "group"]
)
PUBLISHED_SECONDS = _Histogram("mainstay_events_published_seconds", "Seconds that publishing took, a batch once.").of()
