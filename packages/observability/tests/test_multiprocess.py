"""Several processes of one service: a scrape reaches any of them, and tells of all."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from mainstay.core.testing import eventually
from mainstay.observability import _multiprocess
from mainstay.observability.metrics import exposition

SERVICE = """
    import os
    from fastapi import FastAPI
    from prometheus_client import REGISTRY, Gauge
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.registry import Collector
    from mainstay.core import App
    from mainstay.observability import ObservabilityModule, ObservabilitySettings
    from mainstay.observability.fastapi import instrument

    held = Gauge("shop_held", "One a process.", multiprocess_mode="livesum")
    held.set(1)

    class Calls(Collector):
        count = 0

        def collect(self):
            yield CounterMetricFamily("shop_calls", "As a breaker counts.", value=self.count)
            yield GaugeMetricFamily("shop_processes", "One each.", value=1)
            buckets = [("1.0", self.count), ("+Inf", self.count)]
            yield HistogramMetricFamily("shop_seconds", "As events count.", buckets=buckets, sum_value=self.count)

    REGISTRY.register(Calls())
    settings = ObservabilitySettings(service_name="orders", metrics_public=True)
    app = App(ObservabilityModule.for_root(settings))
    api = FastAPI(lifespan=app.lifespan)

    @api.get("/call")
    async def call() -> int:
        Calls.count += 1
        return os.getpid()

    instrument(api, app)
"""


async def processes(port, wanted, without=frozenset()):
    """Call until so many processes have answered; which ones, and how many calls it took."""
    pids: set[int] = set()
    calls = 0
    async with asyncio.timeout(120):
        while len(pids) < wanted:
            # A connection of its own each time, or one process would answer all.
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
                try:
                    pid = (await http.get("/call")).json()
                except httpx.TransportError:  # of the one that is being killed
                    continue
            calls += 1
            pids |= {pid} - without
    return pids, calls


async def scraped(port):
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        text = (await http.get("/metrics")).text
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}


async def test_two_workers_of_uvicorn_are_one_service(tmp_path):
    """Counts of collectors, histograms and the process's own metrics are whole, also after one process was killed."""
    (tmp_path / "metrics").mkdir()
    (tmp_path / "shop.py").write_text(textwrap.dedent(SERVICE))
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "metrics")}
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "uvicorn", "shop:api", "--workers", "2", "--port", "0"),
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    assert child.stderr is not None
    try:
        async with asyncio.timeout(60):
            while not (found := re.search(rb"running on http://127.0.0.1:(\d+)", await child.stderr.readline())):
                pass
        drained = asyncio.ensure_future(child.stderr.read())
        port = int(found[1])
        pids, calls = await processes(port, 2)

        async def all_told():
            metrics = await scraped(port)
            return metrics["shop_calls_total"] == calls and metrics["shop_held"] == 2 and metrics["shop_processes"] == 2

        await eventually(all_told, seconds=120, what="both processes in one scrape")
        metrics = await scraped(port)
        assert metrics['shop_seconds_bucket{le="+Inf"}'] == calls
        assert metrics['mainstay_http_requests_total{method="GET",route="/call",status="200"}'] == calls
        assert metrics["process_cpu_seconds_total"] > 0
        assert metrics["process_open_fds"] > 0
        assert 'python_info{implementation="CPython"' in str(metrics)
        assert metrics['mainstay_build_info{package="orders",version="unknown"}'] == 1
        assert [name for name in metrics if "pid=" in name] == []

        os.kill(killed := pids.pop(), signal.SIGKILL)
        _, more = await processes(port, 2, without=frozenset({killed}))
        calls += more

        async def told_of_the_living():
            metrics = await scraped(port)
            assert metrics["shop_calls_total"] <= calls
            return metrics["shop_calls_total"] == calls and metrics["shop_held"] == 2 and metrics["shop_processes"] == 2

        await eventually(told_of_the_living, seconds=120, what="the counts of the dead and the gauges of the living")
        child.terminate()
        await drained
    finally:
        if child.returncode is None:
            child.terminate()
        await child.wait()


@pytest.mark.parametrize("folder", ["missing", "file", ""])
def test_a_folder_that_is_none_is_named(tmp_path, folder):
    """At the first import of any package, before prometheus-client fails with the name of a file that it would make."""
    (tmp_path / "file").write_text("")
    value = str(tmp_path / folder) if folder else ""
    done = subprocess.run(
        [sys.executable, "-c", "import mainstay.core, mainstay.observability"],
        env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": value},
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("mainstay.core.errors.ConfigurationError: PROMETHEUS_MULTIPROC_DIR"), done.stderr
    assert value in last
    assert "before the service starts" in last or "when the service starts" in last


class Source:
    """A collector that says what it is told to."""

    multiprocess_mode = "livemin"

    def __init__(self):
        self.families = []

    def collect(self):
        return self.families


@pytest.fixture
def source(monkeypatch):
    source = Source()
    monkeypatch.setattr(_multiprocess, "_collectors", lambda: [source])
    return source


def said(place):
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in _multiprocess.Together(place).collect()
        for sample in family.samples
    }


def test_a_sum_never_falls(tmp_path, source):
    """What a collector counted stays when its subject is gone, or Prometheus would count everything once more."""
    snapshot = _multiprocess.Snapshot()
    for value, total in ((5, 5), (7, 7), (1, 8), (None, None), (4, 11)):
        counter = CounterMetricFamily("shop_calls", "Of a breaker.", value=value)
        source.families = [counter] if value is not None else []
        snapshot.write(tmp_path)
        assert said(tmp_path).get(("shop_calls_total",)) == total


def test_gauges_are_of_those_who_renew_them(tmp_path, source):
    """A process that hangs or has ended speaks for nothing but its counts; a gauge is joined as its collector says."""

    def told(health, seconds):
        buckets = [("1.0", seconds), ("+Inf", 2 * seconds)]
        return [
            GaugeMetricFamily("shop_health", "By part.", value=health),
            HistogramMetricFamily("shop_seconds", "Of calls.", buckets=buckets, sum_value=seconds),
        ]

    for health, seconds in ((0.5, 3), (1.0, 4)):
        source.families = told(health, seconds)
        _multiprocess.Snapshot().write(tmp_path)
    assert said(tmp_path) == {
        ("shop_health",): 0.5,
        ("shop_seconds_bucket", "1.0"): 7, ("shop_seconds_bucket", "+Inf"): 14,
        ("shop_seconds_count",): 14, ("shop_seconds_sum",): 7,
    }  # fmt: skip
    long_ago = time.time() - 60
    for file in tmp_path.iterdir():
        if json.loads(file.read_text())["families"][0][4][0][2] == 0.5:
            os.utime(file, (long_ago, long_ago))
    assert said(tmp_path)["shop_health",] == 1.0
    assert said(tmp_path)["shop_seconds_sum",] == 7


def test_a_collector_that_breaks_takes_no_other_with_it(tmp_path, monkeypatch, caplog):
    """It is logged, and the rest is told; a mode that there is not is such a mistake."""
    broken, whole = Source(), Source()
    broken.multiprocess_mode = "sometimes"
    broken.families = whole.families = [CounterMetricFamily("shop_calls", "Of a breaker.", value=1)]
    monkeypatch.setattr(_multiprocess, "_collectors", lambda: [broken, whole])
    _multiprocess.Snapshot().write(tmp_path)
    assert said(tmp_path) == {("shop_calls_total",): 1}
    assert "could not be collected" in caplog.text
    assert "livesum, livemin, livemax" in caplog.text


def test_files_of_others_in_the_folder_do_no_harm(tmp_path, monkeypatch):
    """A snapshot that was cut off, and a file of another tool, are passed over."""
    (tmp_path / "mainstay_1_x.json").write_text("{")
    (tmp_path / "mainstay_2_x.json").write_text('{"else": 1}')
    (tmp_path / "notes.txt").write_text("")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert b"process_cpu_seconds_total" in exposition("")[1]
    assert len(list(Path(tmp_path).glob("mainstay_*.json"))) == 3
