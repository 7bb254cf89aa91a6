"""Metrics as Prometheus reads them, and a bound on how many series a label can make."""

from __future__ import annotations

import os
import threading
from typing import Any, Generic, Protocol, TypeVar, cast

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector

__all__ = ["CappedLabels"]

C = TypeVar("C")
C_co = TypeVar("C_co", covariant=True)


class _Labelled(Protocol[C_co]):
    def labels(self, *values: Any) -> C_co: ...


class CappedLabels(Generic[C]):
    """The children of a labelled metric, bound once each and bounded in number.

    A child costs memory for ever (a histogram's almost 4 KiB), and asking `labels(…)` for it costs more than counting
    does. The first `limit` combinations get their own child; whatever comes later is counted under `other`, so that
    nothing that a stranger can choose fills the memory of the service and of Prometheus.

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
        self._lock = threading.Lock()

    def __call__(self, *values: str) -> C:
        """The child of these label values, or the one of `other` once there are too many."""
        child = self._children.get(values)
        if child is not None:
            return child
        with self._lock:
            if len(self._children) >= self._limit:
                return self._metric.labels(*("other" for _ in values))
            return self._children.setdefault(values, self._metric.labels(*values))


def exposition(accept: str) -> tuple[str, bytes]:
    """All metrics of the process as (content type, body) in the format that an `Accept` header asks for.

    With `PROMETHEUS_MULTIPROC_DIR` set, those of every process that writes into this folder. It takes milliseconds
    where there are thousands of series: call it on a thread.
    """
    try:
        encode, content_type = cast("tuple[Any, str]", choose_encoder(accept))
    except (TypeError, ValueError):  # a version that is no number
        encode, content_type = cast("tuple[Any, str]", choose_encoder(""))
    registry = REGISTRY
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]  # prometheus-client leaves it untyped
    return content_type, cast("bytes", encode(registry))
