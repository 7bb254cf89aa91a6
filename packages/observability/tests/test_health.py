"""Health: asked in the background, answered from memory, served by a small HTTP server."""

import asyncio
import logging
import re
import subprocess
import sys
import threading
from contextlib import asynccontextmanager
from typing import ClassVar, Literal, Never

import httpx
import pytest
from prometheus_client import Counter, Histogram
from pydantic_settings import SettingsConfigDict

from mainstay.core import App, ConfigurationError, Health, Module, Settings
from mainstay.core.testing import VirtualClock, eventually
from mainstay.observability import (
    CappedLabels,
    HealthWatch,
    ObservabilityMiddleware,
    ObservabilityModule,
    ObservabilitySettings,
    ProbePaths,
    ProbeServer,
)
from mainstay.observability.metrics import exposition
from mainstay.observability.testing import metric


class PartSettings(Settings):
    model_config = SettingsConfigDict(env_prefix="MAINSTAY_TESTPART_")


class Part:
    def __init__(self):
        self.status: Literal["ok", "degraded", "down"] = "ok"
        self.asked = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def health(self):
        self.asked += 1
        await self.gate.wait()
        return Health(self.status, "it says so")


class PartModule(Module[PartSettings, Never]):
    name: ClassVar[str] = "part"

    def yields(self):
        return (Part,)

    @asynccontextmanager
    async def running(self, app):
        yield (Part(),)


def service(clock=None, health_seconds=2.0, **settings):
    return App(
        ObservabilityModule.for_root(ObservabilitySettings(service_name="s", http_port=0, **settings)),
        PartModule.for_root(),
        clock=clock or VirtualClock(),
        health_seconds=health_seconds,
    )


def client(app):
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{app.get(ProbeServer).port}")


async def test_trap_a_flood_of_probes_is_no_flood_of_checks():
    """A hundred probes ask no part; the beat does, on its own time."""
    clock = VirtualClock()
    async with service(clock) as app, client(app) as http:
        part, watch = app.get(Part), app.get(HealthWatch)
        await watch.refresh()
        asked = part.asked
        answers = await asyncio.gather(*(http.get("/health/ready") for _ in range(20)), http.get("/health"))
        assert {answer.status_code for answer in answers} == {200}
        assert part.asked == asked
        await clock.advance(5.0)
        assert part.asked == asked + 1


async def test_one_round_at_a_time():
    """Callers who want a fresh answer share the round that is under way, and one who gives up does not end it."""
    async with service() as app:
        part, watch = app.get(Part), app.get(HealthWatch)
        await watch.refresh()
        before = part.asked
        part.gate.clear()
        rounds = [asyncio.ensure_future(watch.refresh()) for _ in range(10)]
        async with asyncio.timeout(30):
            while part.asked == before:  # noqa: ASYNC110  the part is asked by somebody else's task
                await asyncio.sleep(0)
        rounds[0].cancel()
        part.gate.set()
        results = await asyncio.gather(*rounds, return_exceptions=True)
        assert part.asked == before + 1
        assert isinstance(results[0], asyncio.CancelledError)
        assert watch.latest["part.Part"].status == "ok"


async def test_trap_an_outage_of_something_shared_restarts_and_removes_nobody(caplog):
    """With a part down, this process stays live and ready, and tells people; named in the settings, it is not ready."""
    for readiness, status in ((frozenset(), 200), (frozenset({"part"}), 503)):
        async with service(readiness=readiness) as app, client(app) as http:
            part, watch = app.get(Part), app.get(HealthWatch)
            part.status = "down"
            with caplog.at_level(logging.INFO, "mainstay.observability"):
                await watch.refresh()
                await watch.refresh()
            assert (await http.get("/health/live")).status_code == 200
            assert (await http.get("/health/ready")).status_code == status
            report = (await http.get("/health")).json()
            assert report["status"] == "down"
            assert report["parts"]["part.Part"] == {"status": "down", "detail": "it says so"}
            assert metric("mainstay_health", part="part.Part") == 0
            assert caplog.text.count("part.Part is down: it says so") == 1
            part.status = "degraded"
            await watch.refresh()
            assert metric("mainstay_health", part="part.Part") == 0.5
            assert (await http.get("/health/ready")).status_code == 200
        caplog.clear()


async def test_not_ready_before_the_start_is_over_and_while_draining():
    """A process that starts or drains is alive and wants no traffic."""
    seen = {}

    class SlowModule(Module[PartSettings, Never]):
        name: ClassVar[str] = "slow"

        @asynccontextmanager
        async def running(self, app):
            async def worker(drain):
                await drain.wait()
                seen["draining"] = app.get(HealthWatch).ready()

            app.serve("slow", worker)
            async with client(app) as http:
                seen["starting"] = (await http.get("/health/ready")).status_code
                seen["alive"] = (await http.get("/health/live")).status_code
            yield ()

    app = App(
        ObservabilityModule.for_root(ObservabilitySettings(service_name="s", http_port=0)),
        SlowModule.for_root(),
    )
    async with app.running(serve=True):
        assert app.get(HealthWatch).ready()
    assert seen == {"starting": 503, "alive": 200, "draining": False}


async def test_a_check_that_cannot_be_asked_does_not_freeze_the_last_answer(monkeypatch, caplog):
    """When asking itself breaks, that is the answer, and the watch goes on."""
    async with service() as app:
        watch = app.get(HealthWatch)

        async def broken():
            msg = "broken"
            raise RuntimeError(msg)

        monkeypatch.setattr(app, "health", broken)
        assert (await watch.refresh())["app"].status == "down"
        monkeypatch.undo()
        assert "app" not in await watch.refresh()
        assert metric("mainstay_health", part="app") == 0


async def raw(port, request):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        if not request.endswith(b"\r\n\r\n"):
            writer.write_eof()
        return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()


async def test_the_small_server_speaks_just_enough_http():
    """Four paths, GET and HEAD, and a clear refusal of everything else."""
    async with service() as app, client(app) as http:
        port = app.get(ProbeServer).port
        assert "# EOF" in (await http.get("/metrics", headers={"accept": "application/openmetrics-text"})).text
        assert (await http.get("/health/live?x=1")).status_code == 200
        head = await http.head("/health/live")
        assert (head.content, head.headers["content-length"]) == (b"", "16")
        assert (await http.get("/")).status_code == 404
        assert (await http.post("/health/live")).status_code == 405
        assert b" 400 " in await raw(port, b"nonsense\r\n\r\n")
        assert b" 400 " in await raw(port, b"GET / HTTP/1.1")
        assert b" 400 " in await raw(port, b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\n\r\n")


async def test_stopping_does_not_wait_for_a_silent_caller():
    """A connection that sends nothing ends with the App."""
    async with service() as app:
        reader, writer = await asyncio.open_connection("127.0.0.1", app.get(ProbeServer).port)
        await asyncio.sleep(0)
    assert await reader.read() == b""
    writer.close()


async def test_a_probe_that_breaks_is_logged_and_closes(monkeypatch, caplog):
    """An error inside an answer ends that connection only."""
    async with service() as app, client(app) as http:

        def broken(_accept):
            msg = "broken"
            raise RuntimeError(msg)

        monkeypatch.setattr("mainstay.observability._scrapes.exposition", broken)
        with caplog.at_level(logging.ERROR, "mainstay.observability"), pytest.raises(httpx.RemoteProtocolError):
            await http.get("/metrics")
        assert "could not be answered" in caplog.text
        assert (await http.get("/health/live")).status_code == 200


async def test_a_worker_serves_probes_unless_it_is_told_not_to():
    """On the usual port, or where that is taken on a free one; a process that has another server has no second."""
    ports = []
    for port in (None, None, "off"):
        app = App(ObservabilityModule.for_root(ObservabilitySettings(service_name="s", http_port=port)))
        running = app.running(serve=True, until=asyncio.Event())
        await running.__aenter__()
        ports.append((app, running))
    try:
        first, second, off = (app.get(ProbeServer).port for app, _ in ports)
        assert first
        assert second not in (None, first, 9464)
        assert off is None
        async with client(ports[1][0]) as http:
            assert (await http.get("/health/startup")).status_code == 200
    finally:
        for _, running in reversed(ports):
            await running.__aexit__(None, None, None)


async def test_paths_are_settings_and_details_are_for_those_who_may_see_them():
    """On the application's port metrics and details are hidden without the token; on their own port they are not."""
    token = "a-token-of-16-characters"
    paths = ProbePaths(live="/healthz", metrics="/internal/metrics")
    async with service(paths=paths, access_token=token) as app, client(app) as own:

        async def nothing(scope, receive, send):
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        api = httpx.ASGITransport(ObservabilityMiddleware(nothing, app=app))
        async with httpx.AsyncClient(transport=api, base_url="http://public") as public:
            for path, status in (
                ("/healthz", 200),
                ("/internal/metrics", 404),
                ("/health", 404),
                ("/health/live", 404),
            ):
                assert (await public.get(path)).status_code == status
                assert (await own.get(path)).status_code == (404 if path == "/health/live" else 200)
            for said, status in ((token, 200), (token[:-1], 404), ("ü", 404)):
                headers = [(b"authorization", f"Bearer {said}".encode("latin-1"))]
                assert (await public.get("/health", headers=headers)).status_code == status
                assert (await public.get("/internal/metrics", headers=headers)).status_code == status
    with pytest.raises(ConfigurationError, match="the same path"):
        service(paths={"live": "/x", "ready": "/x"})


async def test_scrapes_share_one_look_and_wait_for_no_other_work(monkeypatch):
    """While one is under way others share it; it has a thread of its own, since those of the loop may all hang."""
    gate, looks = threading.Event(), []

    def counted(accept):
        looks.append(accept)
        gate.wait(60)
        return "text/plain", b"x"

    monkeypatch.setattr("mainstay.observability._scrapes.exposition", counted)
    async with service() as app:
        loop, busy = asyncio.get_running_loop(), threading.Event()
        hanging = [loop.run_in_executor(None, busy.wait, 60) for _ in range(200)]
        scrapes = [asyncio.ensure_future(app.get(HealthWatch).answer("/metrics", private=True)) for _ in range(50)]
        await eventually(lambda: bool(looks))
        scrapes[0].cancel()
        gate.set()
        answers = await asyncio.gather(*scrapes, return_exceptions=True)
        assert [getattr(each, "body", each) for each in answers[1:]] == [b"x"] * 49
        assert len(looks) == 1
        busy.set()
        await asyncio.gather(*hanging)
        assert (await app.get(HealthWatch).answer("/metrics", private=True)).body == b"x"
        assert len(looks) == 2


async def test_a_port_in_use_is_a_configuration_error():
    """Two processes on one port: the second says which setting to change."""
    async with service() as app:
        taken = app.get(ProbeServer).port
        other = App(ObservabilityModule.for_root(ObservabilitySettings(service_name="s", http_port=taken)))
        with pytest.raises(ConfigurationError, match="MAINSTAY_OBSERVABILITY_HTTP_PORT"):
            await other.__aenter__()


async def test_without_a_port_nothing_is_served():
    """A web service needs no second server."""
    async with App(ObservabilityModule.for_root(ObservabilitySettings(service_name="s"))) as app:
        assert app.get(ProbeServer).port is None


def test_label_values_are_capped():
    """Beyond the limit everything is counted under `other`; children are the same object each time."""
    counter = Counter("mainstay_test_capped", "For this test.", ["a", "b"], registry=None)
    capped = CappedLabels(counter, 2)
    for n in range(5):
        capped(str(n), "x").inc()
    assert capped("0", "x") is capped("0", "x")
    values = {
        tuple(sample.labels.values()): sample.value
        for sample in next(iter(counter.collect())).samples
        if sample.name.endswith("total")
    }
    assert values == {("0", "x"): 1, ("1", "x"): 1, ("other", "other"): 3}
    with pytest.raises(ValueError, match="at least 1"):
        CappedLabels(counter, 0)


def test_trap_several_processes_are_put_together(monkeypatch, tmp_path):
    """With the folder of multiprocess mode set, any process serves the sum of all, also of those that have ended."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    code = (
        "from mainstay.observability._red import count\n"
        "count('GET', '/orders/{id}', '200').inc()\n"
        "count('GET', '/orders/{id}', '200').inc()\n"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], check=True)
    content_type, body = exposition("")
    assert content_type.startswith("text/plain")
    assert b'mainstay_http_requests_total{method="GET",route="/orders/{id}",status="200"} 4.0' in body


class Unlike(BaseException):
    """What no `except Exception` catches."""


@pytest.mark.parametrize("how", ["hangs", "swallows its cancellation", "is cancelled", "raises", "returns nothing"])
async def test_trap_14_no_part_freezes_the_last_answer(how):
    """A part that was ok and then hangs, is cancelled, raises a BaseException or forgets its answer is down at once.

    The watch goes on: the round after the part has recovered says so.
    """
    clock, recovered, asked = VirtualClock(), asyncio.Event(), 0

    async def health():
        nonlocal asked
        asked += 1
        if recovered.is_set():
            return Health("ok")
        if how == "is cancelled":
            raise asyncio.CancelledError
        if how == "raises":
            raise Unlike
        while how != "returns nothing" and not recovered.is_set():
            try:
                await recovered.wait()
            except asyncio.CancelledError:
                if how == "hangs":
                    raise
        return None

    async with service(clock, 0.01, readiness=frozenset({"part"})) as app:
        part, watch = app.get(Part), app.get(HealthWatch)
        assert (await watch.refresh())["part.Part"].status == "ok"
        assert watch.ready()
        part.health = health
        for _ in range(2):
            assert (await watch.refresh())["part.Part"].status == "down"
            assert not watch.ready()
        recovered.set()
        await clock.advance(5.0)
        assert watch.latest["part.Part"].status == "ok"
        assert watch.ready()
        before = asked
        await clock.advance(5.0)
        assert asked == before + 1


async def test_trap_14_a_round_that_somebody_cancels_does_not_end_the_watch(monkeypatch):
    """The beat ends with the App only, whatever breaks asking, and another task's cancellation is not its own."""
    clock = VirtualClock()
    async with service(clock) as app:
        watch = app.get(HealthWatch)

        for error in (asyncio.CancelledError(), Unlike()):

            async def broken(error=error):
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(app, "health", broken)
                await clock.advance(5.0)
                assert watch.latest["app"].status == "down"
            await clock.advance(5.0)
            assert watch.latest["part.Part"].status == "ok"
        app.get(Part).gate.clear()
        await clock.advance(5.0)
        (asking,) = [task for task in asyncio.all_tasks() if task.get_name() == "observability.health.round"]
        asking.cancel()
        app.get(Part).gate.set()
        asked = app.get(Part).asked
        await clock.advance(5.0)
        assert app.get(Part).asked == asked + 1


async def test_trap_14_an_answer_that_nobody_renews_is_down():
    """Should asking stop for good, the last answer does not stand: after some intervals it counts as down."""
    clock = VirtualClock()
    async with service(clock, readiness=frozenset({"part"})) as app, client(app) as http:
        watch = app.get(HealthWatch)
        await watch.refresh()
        (beat,) = [task for task in asyncio.all_tasks() if task.get_name() == "observability.health"]
        beat.cancel()
        await clock.advance(15.0)
        assert watch.ready()
        await clock.advance(5.0)
        assert not watch.ready()
        assert watch.latest["part.Part"] == Health("down", "not asked for 20 s")
        assert (await http.get("/health")).json()["parts"]["part.Part"]["status"] == "down"


def test_trap_13_the_folder_is_wiped_before_the_start_not_while_processes_run(monkeypatch, tmp_path):
    """Files of an earlier run count until they are wiped; wiped under a living process, its counts are lost."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    code = (
        "import sys\n"
        "from mainstay.observability._red import count\n"
        "for _ in sys.stdin:\n"
        "    count('GET', '/orders', '200').inc()\n"
        "    print('counted', flush=True)\n"
    )

    def run():
        return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def count(process):
        process.stdin.write("one\n")
        process.stdin.flush()
        assert process.stdout.readline() == "counted\n"

    def wipe():
        for file in tmp_path.iterdir():
            file.unlink()

    def total():
        lines = exposition("")[1].decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("mainstay_http_requests_total{"))

    with run() as earlier:
        count(earlier)
        count(earlier)
    with run() as process:
        count(process)
        assert total() == 3.0
    wipe()
    assert total() == 0.0
    with run() as process:
        count(process)
        assert total() == 1.0
        wipe()
        count(process)
        assert total() == 0.0


@pytest.mark.parametrize("name", ["prat", "part.Prat", "observability.HealthWatch"])
def test_readiness_refuses_what_no_part_is_called(name):
    """By module or by part; a name that nothing has would count as up for ever."""
    with pytest.raises(ConfigurationError, match=f"readiness names '{name}'; the parts of this App are .*part.Part"):
        service(readiness=frozenset({name}))


@pytest.mark.parametrize("name", ["part", "part.Part"])
async def test_what_was_never_asked_is_not_ready(name):
    """A part that readiness names has no answer at first; it is asked then, and not at the next beat."""
    app = service(readiness=frozenset({name}), health_seconds=60.0)
    async with app:
        watch, part = app.get(HealthWatch), app.get(Part)
        part.gate.clear()
        assert not watch.ready()
        await eventually(lambda: part.asked > 0 or watch.ready())
        assert not watch.ready()
        part.gate.set()
        await eventually(watch.ready)


async def test_probes_of_what_cannot_be_asked_are_no_flood_of_rounds(monkeypatch):
    """The round that does not wait for the beat is one, however many probes find that it told nothing."""
    app, asked = service(readiness=frozenset({"part"})), 0
    async with app:
        watch = app.get(HealthWatch)

        async def broken():
            nonlocal asked
            asked += 1
            raise OSError

        await watch.refresh()
        monkeypatch.setattr(app, "health", broken)
        await watch.refresh()
        for _ in range(100):
            assert not watch.ready()
            for _ in range(10):
                await asyncio.sleep(0)
        assert asked <= 2


class Crashing(Module[PartSettings, Never]):
    """Work that ends, and a part that knows nothing of it."""

    name: ClassVar[str] = "crashing"
    crash = asyncio.Event()

    def yields(self):
        return (Part,)

    @asynccontextmanager
    async def running(self, app):
        async def relay(_drain):
            await self.crash.wait()
            msg = "broken"
            raise RuntimeError(msg)

        app.serve("relay", relay)
        yield (Part(),)


async def test_crashed_work_stands_under_the_name_of_its_module():
    """Its module's other parts are up, and the process is not ready: what it is there for is not done."""
    Crashing.crash = asyncio.Event()
    settings = ObservabilitySettings(service_name="s", readiness=frozenset({"crashing"}))
    app = App(ObservabilityModule.for_root(settings), Crashing.for_root(), clock=VirtualClock())
    async with app.running(serve=True):
        watch = app.get(HealthWatch)
        await watch.refresh()
        assert watch.ready()
        Crashing.crash.set()
        async with asyncio.timeout(60):
            while watch.latest.get("crashing.relay") is None:
                await watch.refresh()
        assert watch.latest["crashing.Part"].status == "ok"
        assert not watch.ready()


async def test_the_start_is_over_once():
    """A startup probe sees the end of the start, and the drain does not take it back."""
    app = service()
    async with app:
        watch = app.get(HealthWatch)
        assert (await watch.answer("/health/startup")).status == 200
    assert (await watch.answer("/health/ready")).status == 503
    assert (await watch.answer("/health/startup")).status == 200


async def test_what_is_scraped_does_not_outlive_the_watch(monkeypatch):
    """The gauge is computed at the scrape: it falls when a round never ends, and the last round says since when."""
    clock = VirtualClock()
    async with service(clock) as app:
        await app.get(HealthWatch).refresh()
        assert metric("mainstay_health", part="part.Part") == 1
        asked = metric("mainstay_health_round_timestamp_seconds")
        assert asked == clock.now().timestamp()
        monkeypatch.setattr(app, "health", asyncio.Event().wait)
        await clock.advance(25.0)
        assert "mainstay_health{" in exposition("")[1].decode()
        assert metric("mainstay_health", part="part.Part") == 0
        assert metric("mainstay_health_round_timestamp_seconds") == asked
    assert "mainstay_health{" not in exposition("")[1].decode()


async def test_the_build_and_the_loop_are_told():
    """The versions of service and packages, and how late the loop ran, once a second."""
    clock = VirtualClock()
    async with service(clock, service_version="2026.11"):
        assert metric("mainstay_build_info", package="s", version="2026.11") == 1
        assert re.search(
            r'mainstay_build_info\{package="mainstay-core",version="[0-9.]+"\} 1.0', exposition("")[1].decode()
        )
        before = metric("mainstay_loop_lag_seconds_count")
        await clock.advance(3.0)
        assert metric("mainstay_loop_lag_seconds_count") > before


def test_what_does_not_fit_is_counted_under_the_name_of_the_metric():
    """Every time that `other` is taken, so that an alert can name the metric whose labels grow."""
    name = "mainstay_metrics_overflow_total"
    capped = CappedLabels(Histogram("mainstay_test_overflowing", "For this test.", ["a"], registry=None), 1)
    before = metric(name, metric="mainstay_test_overflowing")
    for value in ("x", "y", "z", "x", "y"):
        capped(value).observe(1)
    assert metric(name, metric="mainstay_test_overflowing") - before == 3


def test_exemplars_come_out():
    """In OpenMetrics, which Prometheus asks for, a bucket and a counter name the trace of one that they counted."""
    exemplar = {"trace_id": "4bf92f3577b34da6a3ce929d0e0e4736"}
    seconds = CappedLabels(Histogram("mainstay_test_exemplar_seconds", "For this test.", ["a"]), 1)
    seconds("x").observe(0.3, exemplar)
    content_type, body = exposition("application/openmetrics-text;version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert re.search(r'exemplar_seconds_bucket\{.*le="0.5"\} 1.0 # \{trace_id="4bf9.*"\} 0.3', body.decode())
