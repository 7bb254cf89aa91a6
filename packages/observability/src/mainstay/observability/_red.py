"""Rate, errors and duration of requests, by the template of their route; and of WebSockets, by how they ended."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric

from mainstay.core import ConfigurationError
from mainstay.observability._facts import RequestFacts
from mainstay.observability.metrics import CappedLabels
from mainstay.observability.settings import RequestSettings

REQUESTS = Counter("mainstay_http_requests", "Requests answered.", ["method", "route", "status"])
IN_PROGRESS = Gauge("mainstay_http_requests_in_progress", "Requests being answered.", multiprocess_mode="livesum")
SOCKETS = Counter("mainstay_websockets", "WebSockets ended, by their close code, or by the status of a refusal.",
                  ["route", "status"])  # fmt: skip
SOCKETS_OPEN = Gauge("mainstay_websockets_open", "WebSockets that are open.", multiprocess_mode="livesum")
SOCKET_SECONDS = Histogram(
    "mainstay_websocket_seconds",
    "How long WebSockets were open.",
    ["route"],
    buckets=(0.1, 1, 10, 60, 300, 900, 3600, 14_400, 86_400),
)

# Templates are as many as the application has routes; the bound is for applications that make routes from data.
count = CappedLabels(REQUESTS, 2000)
_socket_count = CappedLabels(SOCKETS, 500)
_socket_seconds = CappedLabels(SOCKET_SECONDS, 100)

_CODES = range(1000, 1016)  # of WebSockets; those above are the application's and the peer's own, as many as they like
_STATUSES = range(100, 600)


class _Sizes:
    """Seconds and bytes of one method and route: they are looked up together."""

    __slots__ = ("read", "seconds", "sent")

    def __init__(self, seconds: Histogram, read: Histogram, sent: Histogram) -> None:
        self.seconds = seconds
        self.read = read
        self.sent = sent


class Histograms:
    """The histograms of requests, with the buckets of one set of settings."""

    def __init__(self, settings: RequestSettings, registry: CollectorRegistry) -> None:
        self.buckets = (settings.seconds_buckets, settings.bytes_buckets)
        self._registry = registry
        self.seconds = Histogram(
            "mainstay_http_request_seconds",
            "From the request's first byte to its answer's last; what runs in the background afterwards is not in it.",
            ["method", "route"],
            buckets=settings.seconds_buckets,
            registry=registry,
        )
        self.read = Histogram(
            "mainstay_http_request_bytes",
            "Of the bodies of requests that have one, as far as they were read.",
            ["method", "route"],
            buckets=settings.bytes_buckets,
            registry=registry,
        )
        self.sent = Histogram(
            "mainstay_http_response_bytes",
            "Of the bodies of answers.",
            ["method", "route"],
            buckets=settings.bytes_buckets,
            registry=registry,
        )
        self.of = CappedLabels(self, 500)

    def labels(self, *values: str) -> _Sizes:
        """The histograms of a method and a route."""
        return _Sizes(self.seconds.labels(*values), self.read.labels(*values), self.sent.labels(*values))

    def describe(self) -> Iterable[Metric]:
        """What they are called when there are too many of them."""
        return self.seconds.describe()

    def used(self) -> bool:
        """Whether anything was observed already."""
        return any(metric.samples for metric in self.seconds.collect())

    def withdraw(self) -> None:
        """Leave the registry."""
        for each in (self.seconds, self.read, self.sent):
            self._registry.unregister(each)


_current = Histograms(RequestSettings(), REGISTRY)
_changing = threading.Lock()


def histograms(settings: RequestSettings) -> Histograms:
    """The histograms of this process, with the buckets of the settings.

    Raises:
        ConfigurationError: requests were counted already in other buckets.
    """
    global _current  # noqa: PLW0603  the registry is the process's, too
    with _changing:
        if _current.buckets != (settings.seconds_buckets, settings.bytes_buckets):
            if _current.used():
                msg = (
                    "the requests of this process are counted already in other buckets than those of "
                    "RequestSettings(seconds_buckets=…, bytes_buckets=…): give all its Apps the same"
                )
                raise ConfigurationError(msg)
            _current.withdraw()
            _current = Histograms(settings, REGISTRY)
        return _current


def measure(facts: RequestFacts, route: str, own: Histograms) -> None:
    """Count a request that is over."""
    method = facts.method
    status = facts.status
    count(method, route, str(status) if status in _STATUSES else "other").inc()
    sizes = own.of(method, route)
    trace = facts.traceparent
    # An exemplar leads to a trace, so the trace must have been kept: that is the last bit of its flags.
    kept = trace is not None and int(trace[53:55], 16) & 1
    sizes.seconds.observe(facts.seconds(), {"trace_id": trace[3:35]} if trace is not None and kept else None)
    if facts.request_bytes:
        sizes.read.observe(facts.request_bytes)
    sizes.sent.observe(facts.response_bytes)


def measure_socket(facts: RequestFacts, route: str, *, accepted: bool) -> None:
    """Count a WebSocket that is over."""
    code = facts.status
    known = code in _CODES or code in _STATUSES
    _socket_count(route, str(code) if known else f"{str(code)[:1]}xxx").inc()
    if accepted:
        _socket_seconds(route).observe(facts.seconds())
