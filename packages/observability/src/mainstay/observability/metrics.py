"""Metrics as Prometheus reads them, and a bound on how many series a label can make."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, Generic, Protocol, TypeVar, cast

from prometheus_client import REGISTRY, CollectorRegistry, Counter
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric

from mainstay.observability._metrics import OVERFLOW
from mainstay.observability._multiprocess import SNAPSHOT, Together, folder

__all__ = ["CappedLabels"]

C = TypeVar("C")
C_co = TypeVar("C_co", covariant=True)


class _Labelled(Protocol[C_co]):
    def labels(self, *values: Any) -> C_co: ...
    def describe(self) -> Iterable[Metric]: ...


class CappedLabels(Generic[C]):
    """The children of a labelled metric, bound once each and bounded in number.

    A child costs memory for ever (a histogram's almost 4 KiB), and asking `labels(…)` for it costs more than counting
    does. The first `limit` combinations get their own child; whatever comes later is counted under `other`, so that
    nothing that a stranger can choose fills the memory of the service and of Prometheus. Each such time is counted in
    `mainstay_metrics_overflow_total`, under the metric's name.

    Args:
        metric: a Counter, Gauge, Histogram or Summary with labels.
        limit: how many combinations of label values get a child of their own.
    """

    def __init__(self, metric: _Labelled[C], limit: int) -> None:
        if limit < 1:
            msg = f"CappedLabels(limit={limit}): at least 1"
            raise ValueError(msg)
        self._metric = metric
        self._limit = limit
        self._children: dict[tuple[str, ...], C] = {}
        self._overflow: Counter | None = None
        self._lock = threading.Lock()

    def __call__(self, *values: str) -> C:
        """The child of these label values, or the one of `other` once there are too many."""
        child = self._children.get(values)
        if child is not None:
            return child
        with self._lock:
            if len(self._children) < self._limit:
                return self._children.setdefault(values, self._metric.labels(*values))
            if self._overflow is None:
                self._overflow = OVERFLOW.labels(next(iter(self._metric.describe())).name)
        self._overflow.inc()
        return self._metric.labels(*("other" for _ in values))


def exposition(accept: str) -> tuple[str, bytes]:
    """All metrics of the process as (content type, body) in the format that an `Accept` header asks for.

    With `PROMETHEUS_MULTIPROC_DIR` set, those of every process that writes into this folder. It takes milliseconds
    where there are thousands of series: call it on a thread.
    """
    encode, content_type = encoder(accept)
    registry, place = REGISTRY, folder()
    if place is not None:
        SNAPSHOT.write(place)
        registry = CollectorRegistry()
        registry.register(Together(place))
    return content_type, cast("bytes", encode(registry))


def encoder(accept: str) -> tuple[Any, str]:
    """What writes the format that an `Accept` header asks for, and its content type."""
    try:
        return cast("tuple[Any, str]", choose_encoder(accept))
    except (TypeError, ValueError):  # a version that is no number
        return cast("tuple[Any, str]", choose_encoder(""))
