"""What the audit trail counts."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar

from prometheus_client import REGISTRY, Counter, Gauge
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from mainstay.audit.entry import OUTCOMES

ENTRIES = Counter("mainstay_audit_entries", "Entries that were committed by this process.", ["outcome"])
LOST = Counter("mainstay_audit_lost", "Entries of failures that could not be written.")
SEALED = Counter("mainstay_audit_sealed", "Entries that this process sealed.")
REFUSED = Counter("mainstay_audit_refused", "Pending rows that this process put aside, because they are no entries.")
SIZE = Gauge(
    "mainstay_audit_log_entries", "Entries in the log, as this process last sealed it.", multiprocess_mode="livemax"
)
LAG_ASKED = Gauge(
    "mainstay_audit_lag_asked_timestamp_seconds",
    "When this process last looked for entries that wait for their seal.",
    multiprocess_mode="livemin",
)


class _Lag(Collector):
    """The age of the oldest entry that waits, as it is at the scrape: it grows also when no process looks any more."""

    multiprocess_mode: ClassVar[str] = "livemax"

    def __init__(self) -> None:
        self._sources: list[Callable[[], float]] = []

    @contextmanager
    def of(self, seconds: Callable[[], float]) -> Generator[None, None, None]:
        """Tell the lag that `seconds()` returns until the block ends."""
        self._sources.append(seconds)
        try:
            yield
        finally:
            self._sources.remove(seconds)

    def describe(self) -> Iterable[Metric]:
        """Nothing: without a running App there is no lag."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """The longest of the process's Apps."""
        family = GaugeMetricFamily("mainstay_audit_lag_seconds", "Age of the oldest entry that waits for its seal.")
        lags = [seconds() for seconds in list(self._sources)]
        if lags:
            family.add_metric((), max(lags))
        yield family


LAG = _Lag()
REGISTRY.register(LAG)

_children = {outcome: ENTRIES.labels(outcome) for outcome in OUTCOMES}
entries = _children.__getitem__
