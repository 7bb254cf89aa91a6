"""Every alert is seen firing and clearing, and each stands on metrics that there are."""

import asyncio
import importlib
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Never

import pytest
from prometheus_client import Counter

from mainstay.core import App, Health, Module, Settings
from mainstay.core.testing import eventually
from mainstay.observability import ObservabilityModule, ObservabilitySettings, ProbeServer
from mainstay_servers import Prometheus

yaml: Any = importlib.import_module("yaml")
metrics: Any = importlib.import_module("tests.test_metrics")

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "alerts").glob("*.yml"))
OF_PROMETHEUS = {"job", "instance", "le"}
OF_CLIENT = {"process_open_fds", "process_max_fds", "process_start_time_seconds"}
_NAME = re.compile(r"(?<![\w:\"$])([a-z_]+_[a-z_]+)(?![\w(])")


def rules() -> Iterator[dict[str, Any]]:
    for file in FILES:
        for group in yaml.safe_load(file.read_text())["groups"]:
            yield from ({**rule, "file": file.name} for rule in group["rules"])


class Case(NamedTuple):
    """What Prometheus has scraped once a minute, a series a name: first with the fault, later without it.

    Attributes:
        fires: the minute at which the alert must fire.
        clears: the minute at which it must not.
        series: values by series, as promtool expands them: `5+0x20` is 5 and twenty times more.
    """

    fires: int
    clears: int
    series: dict[str, str]


def gauge(name: str, bad: float, good: float) -> Case:
    """A value that is bad for 20 minutes and good afterwards."""
    return Case(19, 30, {name: f"{bad}+0x20 {good}+0x20"})


def counter(name: str, step: float, *, clears: int = 100) -> Case:
    """A count that grows for 20 minutes and then stays."""
    return Case(15, clears, {name: f"0+{step}x20 {20 * step}+0x100"})


def buckets(name: str, at: str, labels: str = "") -> Case:
    """A histogram whose observations all lie below `at` for 20 minutes, and in its lowest bucket afterwards."""
    low = f"{name}_bucket{{{labels}le="
    return Case(
        19,
        35,
        {
            f'{low}"0.001"}}': "0+0x20 0+60x40",
            f'{low}"{at}"}}': "0+60x20 1200+60x40",
            f'{low}"+Inf"}}': "0+60x20 1200+60x40",
        },
    )


CASES: dict[str, Case] = {
    "ServiceGone": Case(15, 30, {'mainstay_build_info{package="mainstay-core"}': "1+0x5 _x15 1+0x20"}),
    "HealthDown": gauge('mainstay_health{part="database.Database"}', 0, 1),
    "HealthDegraded": gauge('mainstay_health{part="database.Database"}', 0.5, 1),
    "HealthNotAsked": Case(5, 20, {"mainstay_health_round_timestamp_seconds": "0+0x10 660+60x20"}),
    "HttpErrors": Case(
        15,
        40,
        {
            'mainstay_http_requests_total{status="500"}': "0+10x20 200+0x40",
            'mainstay_http_requests_total{status="200"}': "0+60x60",
        },
    ),
    "HttpSlow": buckets("mainstay_http_request_seconds", "2.5"),
    "LoopLag": buckets("mainstay_loop_lag_seconds", "0.5", 'instance="a",'),
    "LabelsOverflow": counter('mainstay_metrics_overflow_total{metric="x"}', 1),
    "ServiceRestarts": Case(9, 40, {"process_start_time_seconds": "0+60x8 480+0x40"}),
    "FilesRunOut": Case(19, 30, {"process_open_fds": "900+0x20 100+0x20", "process_max_fds": "1024+0x40"}),
    "EventsLag": gauge('mainstay_events_lag_seconds{group="g"}', 400, 1),
    "EventsHandlerHangs": gauge('mainstay_events_oldest_in_flight_seconds{group="g"}', 130, 1),
    "EventsStopped": gauge('mainstay_events_stopped{group="g"}', 1, 0),
    "EventsKeysParked": gauge('mainstay_events_parked_age_seconds{group="g"}', 700, 0),
    "EventsQueuesGrow": gauge('mainstay_events_parked_events{group="g"}', 6000, 0),
    "EventsPaused": Case(70, 90, {'mainstay_events_paused{group="g"}': "1+0x80 0+0x20"}),
    "EventsRefused": gauge("mainstay_events_outbox_refused", 1, 0),
    "EventsDeadLetters": counter('mainstay_events_dead_letters_total{group="g"}', 1),
    "EventsMissed": counter('mainstay_events_missed_total{group="g"}', 1),
    "EventsOutboxNotRelayed": gauge("mainstay_events_outbox_age_seconds", 70, 0),
    "EventsOverdue": gauge("mainstay_events_scheduled_overdue_seconds", 70, 0),
    "WorkflowParked": gauge("mainstay_workflow_runs_parked", 2, 0),
    "WorkflowUnknown": gauge("mainstay_workflow_runs_unknown", 2, 0),
    "WorkflowRunsFail": counter('mainstay_workflow_runs_ended_total{status="failed",workflow="w"}', 1),
    "WorkflowWorkersDie": counter("mainstay_workflow_workers_buried_total", 1),
    "WorkflowSignalsExpire": counter("mainstay_workflow_signals_expired_total", 1),
    "CircuitOpen": gauge('mainstay_circuit_breaker_circuits{breaker="b",state="open"}', 1, 0),
    "CircuitFlaps": counter('mainstay_circuit_breaker_transitions_total{breaker="b",to="open"}', 1),
    "CallsRejected": Case(
        19,
        40,
        {
            'mainstay_circuit_breaker_calls_total{breaker="b",outcome="rejected"}': "0+60x20 1200+0x40",
            'mainstay_circuit_breaker_calls_total{breaker="b",outcome="success"}': "0+30x60",
        },
    ),
    "DatabasePoolFull": Case(
        19,
        30,
        {
            'mainstay_database_pool_in_use{instance="a"}': "10+0x20 3+0x20",
            'mainstay_database_pool_limit{instance="a"}': "10+0x40",
            # A process that only has the package imported has no pool.
            'mainstay_database_pool_in_use{instance="b"}': "0+0x40",
            'mainstay_database_pool_limit{instance="b"}': "0+0x40",
        },
    ),
    "DatabaseWaits": gauge("mainstay_database_pool_waiting", 1, 0),
    "DatabaseWritesSlow": buckets("mainstay_database_wait_seconds", "2.5"),
    "LeasesLost": counter("mainstay_database_leases_lost_total", 1),
    "AuditLag": gauge("mainstay_audit_lag_seconds", 130, 0),
    "AuditLagUnknown": Case(
        15,
        25,
        {
            'mainstay_audit_lag_asked_timestamp_seconds{instance="a"}': "1+0x20 1260+60x20",
            # A process that only has the package imported asks for nothing.
            'mainstay_audit_lag_asked_timestamp_seconds{instance="b"}': "0+0x40",
        },
    ),
    "AuditDown": gauge('mainstay_health{part="audit.Sealer"}', 0, 1),
    "AuditLost": counter("mainstay_audit_lost_total", 1),
    "AuditRefused": counter("mainstay_audit_refused_total", 1),
}


def with_job(series: str) -> str:
    """The series with the label that Prometheus gives to all."""
    name, brace, labels = series.partition("{")
    return f'{name}{{job="orders",{labels}' if brace else f'{name}{{job="orders"}}'


def unit_test(alert: str, case: Case) -> dict[str, Any]:
    """A test of promtool: one alert fires at its minute, and none of that name at the later one."""
    firing = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})'
    return {
        "interval": "1m",
        "input_series": [{"series": with_job(name), "values": values} for name, values in case.series.items()],
        "promql_expr_test": [
            {"expr": firing, "eval_time": f"{case.fires}m", "exp_samples": [{"labels": "{}", "value": 1}]},
            {"expr": firing, "eval_time": f"{case.clears}m", "exp_samples": []},
        ],
    }


def evaluated(promtool: str, folder: Path, cases: dict[str, Case]) -> subprocess.CompletedProcess[str]:
    tests = [unit_test(alert, case) for alert, case in cases.items()]
    document = {"rule_files": [str(file) for file in FILES], "evaluation_interval": "1m", "tests": tests}
    file = folder / "tests.yml"
    file.write_text(yaml.safe_dump(document))
    return subprocess.run([promtool, "test", "rules", str(file)], capture_output=True, text=True, check=False)


def test_every_alert_fires_and_clears(promtool: str, tmp_path: Path) -> None:
    """By Prometheus's own evaluation, with a fault for some minutes and without it afterwards."""
    subprocess.run([promtool, "check", "rules", *map(str, FILES)], check=True, capture_output=True)
    assert CASES.keys() == {rule["alert"] for rule in rules()}
    done = evaluated(promtool, tmp_path, CASES)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("fires", "clears"), [(30, 35), (19, 15)], ids=["never fires", "never clears"])
def test_what_does_not_fire_or_clear_is_noticed(promtool: str, tmp_path: Path, fires: int, clears: int) -> None:
    """The test above can fail."""
    case = CASES["HealthDown"]._replace(fires=fires, clears=clears)
    assert evaluated(promtool, tmp_path, {"HealthDown": case}).returncode != 0


def test_alerts_stand_on_metrics_that_there_are() -> None:
    """Each expression names metrics and labels of the code, and each rule says what happened, what to do, and where."""
    known = {
        name: set(metric.labels)
        for package in metrics.PACKAGES
        for metric in metrics.declared(package)
        for name in (metric.name, f"{metric.name}_bucket")
    }
    for rule in rules():
        names = [name for name in _NAME.findall(rule["expr"]) if name.startswith(("mainstay_", "process_"))]
        assert names, rule
        assert set(names) <= known.keys() | OF_CLIENT, rule
        labels = OF_PROMETHEUS | set[str]().union(*(known.get(name, set()) for name in names))
        said = {word for by in re.findall(r"by \(([\w, ]+)\)", rule["expr"]) for word in by.split(", ")}
        said |= set(re.findall(r"[{,](\w+)=", rule["expr"]))
        said |= set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
        assert said <= labels, rule
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations", "file"}, rule
        assert rule["labels"]["severity"] in {"page", "ticket"}, rule
        assert {"summary", "remedy", "runbook"} == set(rule["annotations"]), rule
        page = ROOT / rule["annotations"]["runbook"]
        assert page.name == f"{rule['alert']}.md"
        assert page.read_text().startswith(f"# {rule['alert']}\n"), rule
        assert f"alerts/{rule['file']}" in page.read_text()
    pages = {path.stem for path in (ROOT / "docs" / "runbooks").glob("*.md")} - {"README"}
    assert pages == {rule["alert"] for rule in rules()}
    index = (ROOT / "docs" / "runbooks" / "README.md").read_text()
    assert sorted(re.findall(r"\]\((\w+)\.md\)", index)) == sorted(pages)


class ShopSettings(Settings, env_prefix="MAINSTAY_TESTSHOP_"):
    """Nothing to set."""


class Shop:
    """A part whose health a test decides."""

    def __init__(self) -> None:
        self.now = Health("down", "closed")

    async def health(self) -> Health:
        return self.now


class ShopModule(Module[ShopSettings, Never]):
    """Puts a shop into an App."""

    name: ClassVar[str] = "shop"

    def yields(self):
        return (Shop,)

    @asynccontextmanager
    async def running(self, app):
        yield (Shop(),)


@pytest.mark.usefixtures("prometheus")
async def test_a_prometheus_sees_what_an_app_says() -> None:
    """A real one scrapes a real App: a part that is down fires the alert of the committed rules, and clears it.

    The exemplars are there too: a scrape asks for the format that has them.
    """
    text = (ROOT / "alerts" / "service.yml").read_text()
    at_once = re.sub(r"\n +for: \w+", "", text)  # the waiting is what promtool tests
    settings = ObservabilitySettings(service_name="orders", http_port=0, health_interval_seconds=0.2)
    app = App(ObservabilityModule.for_root(settings), ShopModule.for_root())
    Counter("mainstay_test_traced", "For this test.").inc(exemplar={"trace_id": "4bf92f3577b34da6a3ce929d0e0e4736"})
    async with app:
        server = Prometheus("orders", [f"127.0.0.1:{app.get(ProbeServer).port}"], [at_once])
        try:
            await asyncio.to_thread(server.start)

            async def firing() -> list[dict[str, Any]]:
                alerts = (await asyncio.to_thread(server.ask, "alerts"))["alerts"]
                return [alert for alert in alerts if alert["state"] == "firing"]

            async def fires() -> bool:
                return bool(await firing())

            await eventually(fires, seconds=120, every_seconds=0.3)
            (alert,) = await firing()
            assert alert["labels"] == {
                "alertname": "HealthDown", "job": "orders", "part": "shop.Shop", "severity": "page"
            }  # fmt: skip
            span = {"start": str(time.time() - 600), "end": str(time.time() + 600)}
            (found,) = await asyncio.to_thread(
                server.ask, "query_exemplars", query="mainstay_test_traced_total", **span
            )
            assert found["exemplars"][0]["labels"] == {"trace_id": "4bf92f3577b34da6a3ce929d0e0e4736"}
            assert alert["annotations"]["summary"] == "shop.Shop of orders is down."
            app.get(Shop).now = Health("ok")

            async def cleared() -> bool:
                return not await firing()

            await eventually(cleared, seconds=120, every_seconds=0.3)
        finally:
            await asyncio.to_thread(server.remove)
