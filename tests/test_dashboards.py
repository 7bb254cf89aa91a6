"""Grafana's dashboards are made from one description, in Grafana's own form, on metrics that there are."""

import importlib
import json
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

yaml: Any = importlib.import_module("yaml")
metrics: Any = importlib.import_module("tests.test_metrics")

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "dashboards").glob("*.json"))
OF_CLIENT = {
    "process_cpu_seconds_total",
    "process_resident_memory_bytes",
    "process_open_fds",
    "process_start_time_seconds",
}
HISTOGRAMS = ("_bucket", "_count", "_sum")
_NAME = re.compile(r"\b(?:mainstay|process)_[a-z_]+")


def documents() -> dict[str, dict[str, Any]]:
    return {file.stem: json.loads(file.read_text()) for file in FILES}


def expressions() -> list[str]:
    return [
        target["expr"]
        for document in documents().values()
        for panel in document["panels"]
        for target in panel.get("targets", ())
    ]


def test_the_files_are_what_the_description_makes() -> None:
    """`python tools/dashboards.py` writes them, and a panel that is added by hand would be lost."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import dashboards, json; print(json.dumps({k.stem: v for k, v in dashboards.texts().items()}))",
        ],
        cwd=ROOT / "tools",
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == {file.stem: file.read_text() for file in FILES}, "run: make dashboards"


def beside(given: Any, read: Any, place: str = "") -> list[str]:
    """The places at which Grafana's types know less than is given, or something else."""
    if isinstance(given, dict):
        if not isinstance(read, dict):
            return [place]
        return [each for key, value in given.items() for each in beside(value, read.get(key), f"{place}.{key}")]
    if isinstance(given, list):
        if not isinstance(read, list) or len(given) != len(read):
            return [place]
        return [each for one, other in zip(given, read, strict=True) for each in beside(one, other, f"{place}[]")]
    return [] if given == read else [place]


def as_grafana_reads(document: dict[str, Any]) -> dict[str, Any]:
    register_default_plugins()
    read: dict[str, Any] = json.loads(JSONEncoder().encode(Dashboard.from_json(document)))
    return read


@pytest.mark.parametrize("name", [file.stem for file in FILES])
def test_each_is_in_the_form_of_grafana(name: str) -> None:
    """By Grafana's own types, which drop a field that they do not know; ids differ, and no panel covers another."""
    document = documents()[name]
    assert beside(document, as_grafana_reads(document)) == []
    panels = document["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        apart = (
            one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        )  # fmt: skip
        assert apart, (one, other)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
    assert all(target["refId"] for panel in panels for target in panel.get("targets", ()))


def test_a_field_that_grafana_does_not_know_is_noticed() -> None:
    """The test above can fail."""
    document = documents()["service"]
    document["panels"][1]["headline"] = "misspelt"
    document["panels"][1]["fieldConfig"]["defaults"]["units"] = "s"
    assert beside(document, as_grafana_reads(document)) == [
        ".panels[].fieldConfig.defaults.units",
        ".panels[].headline",
    ]


def test_they_draw_metrics_that_there_are(promtool: str, tmp_path: Path) -> None:
    """Each expression is one for Prometheus, names metrics and labels of the code, and keeps to the chosen service."""
    known = {
        name: set(metric.labels)
        for package in metrics.PACKAGES
        for metric in metrics.declared(package)
        for name in (metric.name, *(metric.name + suffix for suffix in HISTOGRAMS))
    }
    rules = []
    for number, expr in enumerate(expressions()):
        names = _NAME.findall(expr)
        assert names, expr
        assert set(names) <= known.keys() | OF_CLIENT, expr
        assert expr.count('job=~"$job"') == len(names), expr
        labels = {"job", "instance", "le"} | set[str]().union(*(known.get(name, set()) for name in names))
        said = {word for by in re.findall(r"by \(([\w, ]+)\)", expr) for word in by.split(", ")}
        assert said | set(re.findall(r"[{,] ?(\w+)[=!]", expr)) <= labels, expr
        asked = expr.replace("$__rate_interval", "5m").replace("$job", ".+")
        rules.append({"record": f"panel:number:{number}", "expr": asked})
    for document in documents().values():
        (query,) = (each["query"]["query"] for each in document["templating"]["list"] if each["name"] == "job")
        assert _NAME.findall(query)[0] in known
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run([promtool, "check", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
