"""The metrics of all processes of a service as one, where `PROMETHEUS_MULTIPROC_DIR` names their folder.

prometheus-client's own files hold counters, gauges and histograms, and nothing of collectors: the breakers' counts, the
events' histograms and what is said about the process itself would be missing. So every process also keeps a snapshot of
its collectors in the folder, which it renews every few seconds, and a scrape, which reaches any one of them, adds all
snapshots up.

- Counters and histograms are sums over all processes, those that have ended included: a sum must not fall, or
  Prometheus takes it for a restart and counts everything again. A collector whose own count falls, because what it
  counted is gone, goes on from what it had.
- Gauges are those of processes that renew their snapshots: one that hangs, or has ended, speaks for nothing. They are
  summed, or what the collector says in its attribute `multiprocess_mode` (`livesum`, `livemin` or `livemax`).
- Of prometheus-client's own gauges, those of processes that are no more are passed over.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

from prometheus_client import REGISTRY
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

_log = logging.getLogger("mainstay.observability")

BEAT_SECONDS = 5.0
_FRESH_SECONDS = 4 * BEAT_SECONDS
_PREFIX = "mainstay_"
_MODES: dict[str, Callable[[float, float], float]] = {
    "livesum": lambda one, other: one + other,
    "livemin": min,
    "livemax": max,
}
# What prometheus-client's own collectors say: memory adds up, a start or a limit does not.
_OF_PROCESSES = {
    "process_start_time_seconds": "livemax",
    "process_max_fds": "livemin",
    "process_open_fds": "livemax",
    "python_info": "livemax",
}
_ADDED = ("counter", "histogram", "summary")
_STATED = ("info", "stateset")

_Key = tuple[str, tuple[tuple[str, str], ...]]
_Family = tuple[str, str, str, str, list[tuple[str, dict[str, str], float]]]  # name, help, type, mode, samples


def folder() -> Path | None:
    """The folder of multiprocess mode; None where each process speaks for itself."""
    value = os.environ.get("PROMETHEUS_MULTIPROC_DIR")  # mainstay.core has looked at it when it was imported
    return None if value is None else Path(value)


class Snapshot:
    """What the collectors of this process say, as a file in the folder."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid = 0
        self._file = ""
        self._raw: dict[_Key, float] = {}
        self._total: dict[_Key, float] = {}

    def write(self, place: Path, *, last: bool = False) -> None:
        """Renew the file; without gauges where it is the last time."""
        with self._lock:
            if self._pid != os.getpid():  # the first time, or after a fork, when the file is the parent's
                self._pid = os.getpid()
                self._file = f"{_PREFIX}{self._pid}_{uuid4().hex}.json"
                self._total = {}
            families = [
                family
                for collector in _collectors()
                for family in self._told(collector)
                if not last or family[2] in _ADDED
            ]
            text = json.dumps({"pid": self._pid, "families": families})
            fresh = place / f"{self._file}.new"
            fresh.write_text(text)
            fresh.replace(place / self._file)

    def _told(self, collector: Collector) -> Iterator[_Family]:
        try:
            metrics = list(collector.collect())
            usual = _mode(collector)
        except Exception:  # noqa: BLE001  a collector that breaks must not take the others' metrics with it
            _log.exception("the metrics of %s could not be collected", type(collector).__name__)
            return
        for metric in metrics:
            samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            told: list[tuple[str, dict[str, str], float]] = [
                (each.name, dict(each.labels), self._count(each) if metric.type in _ADDED else each.value)
                for each in samples
            ]
            yield metric.name, metric.documentation, metric.type, _OF_PROCESSES.get(metric.name, usual), told

    def _count(self, sample: Sample) -> float:
        key = (sample.name, tuple(sorted(sample.labels.items())))
        before = self._raw.get(key, 0.0)
        self._raw[key] = sample.value
        grown = sample.value - before if sample.value >= before else sample.value
        total = self._total[key] = self._total.get(key, 0.0) + grown
        return total


def _mode(collector: Collector) -> str:
    mode = getattr(collector, "multiprocess_mode", "livesum")
    if mode not in _MODES:
        msg = f"{type(collector).__name__}.multiprocess_mode is {mode!r}; it is {', '.join(_MODES)}"
        raise ValueError(msg)
    return cast("str", mode)


def _collectors() -> list[Collector]:
    known = cast("dict[Collector, object]", cast("Any", REGISTRY)._collector_to_names)
    return [each for each in list(known) if not isinstance(each, MetricWrapperBase)]


SNAPSHOT = Snapshot()


class Together(Collector):
    """All processes' metrics, as the files in a folder have them."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def describe(self) -> Iterable[Metric]:
        """Nothing: the files say what there is."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Read all files now."""
        files = [str(path) for path in self._place.glob("*.db") if not _left_behind(path)]
        yield from cast("Iterable[Metric]", MultiProcessCollector.merge(files))  # type: ignore[no-untyped-call]  # prometheus-client leaves it untyped
        yield from _merged(self._snapshots())

    def _snapshots(self) -> Iterator[tuple[_Family, bool]]:
        now = time.time()
        for path in sorted(self._place.glob(f"{_PREFIX}*.json")):
            try:
                fresh = now - path.stat().st_mtime < _FRESH_SECONDS
                families = json.loads(path.read_text())["families"]
            except (OSError, ValueError, KeyError):  # wiped at this moment, or none of ours
                continue
            for family in families:
                yield cast("_Family", tuple(family)), fresh


def _left_behind(path: Path) -> bool:
    """Whether it holds gauges of a process that is no more."""
    kind, _, rest = path.stem.partition("_")
    mode, _, pid = rest.rpartition("_")
    if kind != "gauge" or not mode.startswith("live") or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:  # of another account: it is there
        return False
    return False


def _merged(families: Iterable[tuple[_Family, bool]]) -> Iterator[Metric]:
    merged: dict[str, Metric] = {}
    values: dict[str, dict[_Key, float]] = {}
    for (name, documentation, kind, mode, samples), fresh in families:
        added = kind in _ADDED
        if not added and not fresh:
            continue
        merged.setdefault(name, Metric(name, documentation, kind))
        known = values.setdefault(name, {})
        join = _MODES["livesum" if added else "livemax" if kind in _STATED else mode]
        for sample, labels, value in samples:
            key = (sample, tuple(labels.items()))
            known[key] = join(known[key], value) if key in known else value
    for name, metric in merged.items():
        for (sample, pairs), value in values[name].items():
            metric.add_sample(sample, dict(pairs), value)
        yield metric


@contextlib.contextmanager
def renewed() -> Generator[None, None, None]:
    """Renew this process's snapshot while the block runs, and once more at its end.

    A thread does so, and not the event loop: what hangs must be told of.
    """
    place = folder()
    if place is None:
        yield
        return
    over = threading.Event()

    def renew() -> None:
        while True:
            try:
                SNAPSHOT.write(place)
            except OSError as error:
                _log.warning("the metrics of this process cannot be written to %s: %s", place, error)
            if over.wait(BEAT_SECONDS):
                return

    thread = threading.Thread(target=renew, name="mainstay.observability snapshots", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(OSError):
            SNAPSHOT.write(place, last=True)
