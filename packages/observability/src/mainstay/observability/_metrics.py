"""What a process tells of itself: its health, how late its event loop is, what it was built from."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import ClassVar, Protocol

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from mainstay.core import App, Drain, Health

LOOP_LAG_SECONDS = Histogram(
    "mainstay_loop_lag_seconds",
    "How much later than due the event loop ran a callback, asked once a second.",
    buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
OVERFLOW = Counter(
    "mainstay_metrics_overflow", "Times that a metric had too many label values, and `other` was taken.", ["metric"]
)
_BUILD = Gauge(
    "mainstay_build_info",
    "1; the versions of the service and of the packages that it is made of.",
    ["package", "version"],
    multiprocess_mode="livemax",
)

_LOOK_SECONDS = 1.0
_WORTH = {"ok": 1.0, "degraded": 0.5, "down": 0.0}


class Watch(Protocol):
    """What is asked for the health at every scrape."""

    @property
    def latest(self) -> Mapping[str, Health]:
        """The health by part; `down` where it is too old."""
        ...

    @property
    def asked_at(self) -> float | None:
        """When the last round ended, in seconds since 1970; None before the first."""
        ...


class _Health(Collector):
    """The health as it is at the scrape: a gauge that is set by a question stands for ever after the last one."""

    multiprocess_mode: ClassVar[str] = "livemin"

    def __init__(self) -> None:
        self._watches: list[Watch] = []

    @contextmanager
    def of(self, watch: Watch) -> Generator[None, None, None]:
        """Tell what a watch says until the block ends."""
        self._watches.append(watch)
        try:
            yield
        finally:
            self._watches.remove(watch)

    def describe(self) -> Iterable[Metric]:
        """Nothing: what there is to tell changes."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """The worst of each part over the Apps of the process."""
        worst: dict[str, float] = {}
        asked: list[float] = []
        for watch in list(self._watches):
            for part, health in watch.latest.items():
                worst[part] = min(worst.get(part, 1.0), _WORTH[health.status])
            if watch.asked_at is not None:
                asked.append(watch.asked_at)
        parts = GaugeMetricFamily("mainstay_health", "1 ok, 0.5 degraded, 0 down, by part.", labels=("part",))
        for part, value in worst.items():
            parts.add_metric((part,), value)
        yield parts
        rounds = GaugeMetricFamily(
            "mainstay_health_round_timestamp_seconds", "When all parts were last asked for their health."
        )
        if asked:
            rounds.add_metric((), min(asked))
        yield rounds


HEALTH = _Health()
REGISTRY.register(HEALTH)


async def measure_the_loop(drain: Drain, app: App) -> None:
    """Count how late the event loop is, until the drain begins."""
    while not drain.begun:
        due = app.clock.monotonic() + _LOOK_SECONDS
        await drain.pause(_LOOK_SECONDS)
        if not drain.begun:
            LOOP_LAG_SECONDS.observe(max(0.0, app.clock.monotonic() - due))


def tell_the_build(app: App, service: str, service_version: str) -> None:
    """Tell the versions of the service and of the installed packages that the App's modules come from."""
    _BUILD.labels(service, service_version).set(1)
    modules = {"core", *(module.name for module in app.modules if type(module).__module__.startswith("mainstay."))}
    for name in sorted(modules):
        package = f"mainstay-{name.replace('_', '-')}"
        try:
            _BUILD.labels(package, version(package)).set(1)
        except PackageNotFoundError:  # a module of a namespace of its own in a test
            continue
