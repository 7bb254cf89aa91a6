"""Metrics are what an operator's alerts stand on: each is on its package's page, and nothing is there that is not."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = sorted(path.parent.name for path in (ROOT / "packages").glob("*/pyproject.toml"))
SUFFIXES = {"Counter": "_total", "CounterMetricFamily": "_total"}
KINDS = {
    "Counter",
    "Gauge",
    "Histogram",
    "Summary",
    "CounterMetricFamily",
    "GaugeMetricFamily",
    "HistogramMetricFamily",
}
NAME = re.compile(r"(?:mainstay_|(?<=…)_)[a-z_]*[a-z](?![a-z_])")
LABELS = {
    "breaker", "by", "from", "group", "kind", "method", "metric", "outcome", "package", "part", "reason", "route",
    "state", "status", "step", "to", "type", "version", "workflow",
}  # fmt: skip
"""What series may differ by: what the code declares, or a handful of constants. Never a key, an id or a tenant."""


class Declared(NamedTuple):
    """A metric as the code says it."""

    name: str
    labels: tuple[str, ...]


def _declared(tree: ast.AST) -> Iterator[Declared]:
    for node in ast.walk(tree):
        if (
            not isinstance(node, ast.Call)
            or not isinstance(node.func, ast.Name)
            or node.func.id.lstrip("_") not in KINDS
        ):
            continue
        first = node.args[0] if node.args else None
        if not isinstance(first, ast.Constant) or not isinstance(first.value, str):
            continue
        by_name = [keyword.value for keyword in node.keywords if keyword.arg in {"labels", "labelnames"}]
        lists = [each for each in (*node.args[2:], *by_name) if isinstance(each, ast.List | ast.Tuple)]
        labels = tuple(str(each.value) for found in lists for each in found.elts if isinstance(each, ast.Constant))
        yield Declared(first.value.removesuffix("_total") + SUFFIXES.get(node.func.id, ""), labels)


def declared(package: str) -> list[Declared]:
    """Return the metrics that the source of a package declares."""
    found = [
        metric
        for path in sorted((ROOT / "packages" / package / "src").rglob("*.py"))
        for metric in _declared(ast.parse(path.read_text()))
    ]
    return sorted(found)


def named(text: str) -> set[str]:
    """Return the names that a text says, and the ends of those that it abbreviates with an ellipsis."""
    return set(NAME.findall(text))


def says(text: set[str], name: str) -> bool:
    """Whether a name is among what a text says."""
    return name in text or any(each.startswith("_") and name.endswith(each) for each in text)


with_metrics = pytest.mark.parametrize("package", [name for name in PACKAGES if declared(name)])


@with_metrics
def test_each_metric_is_on_the_page_and_each_on_the_page_is_a_metric(package: str) -> None:
    """By its whole name or with an ellipsis for what is before; the section "Seen from outside" names nothing else."""
    page = (ROOT / "docs" / f"{package}.md").read_text()
    section = page.partition("\n## Seen from outside\n")[2].partition("\n## ")[0]
    names = {metric.name for metric in declared(package)}
    assert [name for name in sorted(names) if not says(named(page), name)] == []
    assert [name for name in sorted(named(section)) if not any(each.endswith(name) for each in names)] == []


@with_metrics
def test_no_label_is_what_a_record_says(package: str) -> None:
    """Each value of a label is a series that is kept for ever: keys, ids and tenants have no bound."""
    assert {label for metric in declared(package) for label in metric.labels} <= LABELS


def modeless(tree: ast.AST) -> list[str]:
    """The gauges that do not say how those of several processes become one."""
    gauges = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.lstrip("_") == "Gauge"
    ]
    return [
        ast.unparse(gauge.args[0])
        for gauge in gauges
        if not any(
            keyword.arg == "multiprocess_mode" and ast.unparse(keyword.value).startswith("'live")
            for keyword in gauge.keywords
        )
    ]


@with_metrics
def test_each_gauge_says_what_several_processes_make_of_it(package: str) -> None:
    """Without a mode each process has a series of its own, by its pid, which stays when the process has ended."""
    for path in sorted((ROOT / "packages" / package / "src").rglob("*.py")):
        assert modeless(ast.parse(path.read_text())) == [], path


def test_the_check_finds_what_is_wrong() -> None:
    """A metric that no page names, one that no code has, and a label without a bound."""
    source = 'A = Counter("mainstay_x_sold", "Sold.", ["event_id"])\nB = Gauge("mainstay_x_age_seconds", "Age.")'
    assert list(_declared(ast.parse(source))) == [
        Declared("mainstay_x_sold_total", ("event_id",)), Declared("mainstay_x_age_seconds", ())
    ]  # fmt: skip
    assert modeless(ast.parse(source)) == ["'mainstay_x_age_seconds'"]
    assert says(named("`mainstay_x_sold_total` and `…_age_seconds`"), "mainstay_x_age_seconds")
    assert not says(named("`mainstay_x_sold_total`"), "mainstay_x_sold")
