"""Grafana's dashboards in `dashboards/`, from one description: `python tools/dashboards.py` writes them.

A panel is a title, a unit and what it draws; where it stands, its id and the rest of Grafana's form follow from that.
In an expression `{@}` stands for the job that the reader has chosen.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "dashboards"
SELECTED = 'job=~"$job"'
_COLUMNS, _WIDTH, _HEIGHT = 24, 8, 7
_DATASOURCE = {"type": "prometheus", "uid": "$datasource"}
_SCHEMA = 38  # of Grafana's form: that of version 10.1


@dataclass(frozen=True)
class Panel:
    """What one panel draws.

    Attributes:
        title: above it.
        unit: of Grafana's list, such as `s`, `reqps`, `bytes`, `short`.
        lines: expressions of Prometheus by their legends.
        kind: `timeseries`, `stat` or `table`.
        description: what a reader should know; shown behind the title.
    """

    title: str
    unit: str
    lines: dict[str, str]
    kind: str = "timeseries"
    description: str = ""


@dataclass(frozen=True)
class Dashboard:
    """One page: rows of panels by their headings.

    Attributes:
        title: behind "Mainstay: ".
        known_by: a metric that every process has which this page is about.
        rows: panels by the heading of their row.
    """

    title: str
    known_by: str
    rows: dict[str, list[Panel]]


def rate(metric: str, by: str, *, where: str = "") -> str:
    """The sum of a counter's rates by some labels."""
    chosen = f"@, {where}" if where else "@"
    return f"sum by ({by}) (rate({metric}{{{chosen}}}[$__rate_interval]))"


def quantile(share: float, metric: str, by: str = "") -> str:
    """A quantile of a histogram by some labels."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share:g}, sum by ({labels}) (rate({metric}_bucket{{@}}[$__rate_interval])))"


def quantiles(title: str, metric: str, *, unit: str = "s") -> Panel:
    """The middle and the slow end of a histogram."""
    return Panel(title, unit, {f"p{share * 100:g}": quantile(share, metric) for share in (0.5, 0.95, 0.99)})


def most(metric: str, by: str) -> str:
    """The highest value of a gauge by some labels."""
    return f"max by ({by}) ({metric}{{@}})"


def total(metric: str, by: str) -> str:
    """The sum of a gauge over processes by some labels."""
    return f"sum by ({by}) ({metric}{{@}})"


_HTTP, _EVENTS, _RUNS = "mainstay_http", "mainstay_events", "mainstay_workflow"
_BREAKER, _DATABASE, _AUDIT = "mainstay_circuit_breaker", "mainstay_database", "mainstay_audit"

DASHBOARDS = {
    "service": Dashboard(
        "service",
        "mainstay_build_info",
        {
            "Requests": [
                Panel("Requests", "reqps", {"{{route}}": rate(f"{_HTTP}_requests_total", "route")}),
                Panel(
                    "Failed",
                    "reqps",
                    {"{{route}} {{status}}": rate(f"{_HTTP}_requests_total", "route, status", where='status=~"5.."')},
                    description="Answered with 5xx. Each has one line in the log, with its code and correlation id.",
                ),
                Panel(
                    "Refused", "reqps", {"{{status}}": rate(f"{_HTTP}_requests_total", "status", where='status=~"4.."')}
                ),
                quantiles("Time to answer", f"{_HTTP}_request_seconds"),
                Panel("p99 by route", "s", {"{{route}}": quantile(0.99, f"{_HTTP}_request_seconds", "route")}),
                Panel("In progress", "short", {"{{instance}}": total(f"{_HTTP}_requests_in_progress", "instance")}),
                quantiles("Bytes of requests", f"{_HTTP}_request_bytes", unit="bytes"),
                quantiles("Bytes of answers", f"{_HTTP}_response_bytes", unit="bytes"),
                Panel("Open WebSockets", "short", {"{{instance}}": total("mainstay_websockets_open", "instance")}),
            ],
            "Health": [
                Panel(
                    "Health by part",
                    "short",
                    {"{{part}}": "min by (part) (mainstay_health{@})"},
                    description="1 ok, 0.5 degraded, 0 down: the worst of all processes.",
                ),
                Panel(
                    "Since the last round of checks",
                    "s",
                    {"{{instance}}": "time() - min by (instance) (mainstay_health_round_timestamp_seconds{@})"},
                ),
                Panel(
                    "Versions",
                    "short",
                    {"{{package}} {{version}}": "count by (package, version) (mainstay_build_info{@})"},
                    kind="stat",
                ),
            ],
            "Process": [
                Panel(
                    "How late the event loop is, p99",
                    "s",
                    {"{{instance}}": quantile(0.99, "mainstay_loop_lag_seconds", "instance")},
                ),
                Panel(
                    "Processor",
                    "percentunit",
                    {"{{instance}}": "sum by (instance) (rate(process_cpu_seconds_total{@}[$__rate_interval]))"},
                ),
                Panel("Memory", "bytes", {"{{instance}}": total("process_resident_memory_bytes", "instance")}),
                Panel("Open files and connections", "short", {"{{instance}}": most("process_open_fds", "instance")}),
                Panel("Up since", "s", {"{{instance}}": "time() - max by (instance) (process_start_time_seconds{@})"}),
                Panel(
                    "Label values that had no room",
                    "short",
                    {"{{metric}}": "sum by (metric) (increase(mainstay_metrics_overflow_total{@}[$__rate_interval]))"},
                ),
            ],
        },
    ),
    "events": Dashboard(
        "events",
        f"{_EVENTS}_outbox_depth",
        {
            "Published": [
                Panel("Published", "cps", {"{{type}}": rate(f"{_EVENTS}_published_total", "type")}),
                quantiles("Time to publish", f"{_EVENTS}_published_seconds"),
                Panel("Relayed to the broker", "cps", {"{{instance}}": rate(f"{_EVENTS}_relayed_total", "instance")}),
                Panel("Rows in the outbox", "short", {"rows": f"max({_EVENTS}_outbox_depth{{@}})"}),
                Panel("Oldest row in the outbox", "s", {"age": f"max({_EVENTS}_outbox_age_seconds{{@}})"}),
                Panel("Refused by the broker", "short", {"events": f"max({_EVENTS}_outbox_refused{{@}})"}),
                Panel("Scheduled for later", "short", {"events": f"max({_EVENTS}_scheduled{{@}})"}),
                Panel("Overdue", "s", {"time": f"max({_EVENTS}_scheduled_overdue_seconds{{@}})"}),
            ],
            "Handled": [
                Panel(
                    "Handled", "cps", {"{{group}} {{type}}": rate(f"{_EVENTS}_handled_seconds_count", "group, type")}
                ),
                Panel("Failed", "cps", {"{{group}} {{type}}": rate(f"{_EVENTS}_failed_total", "group, type")}),
                Panel("p99 of a handler", "s", {"{{type}}": quantile(0.99, f"{_EVENTS}_handled_seconds", "type")}),
                Panel("Lag, in events", "short", {"{{group}}": total(f"{_EVENTS}_lag", "group")}),
                Panel("Lag, in time", "s", {"{{group}}": most(f"{_EVENTS}_lag_seconds", "group")}),
                Panel(
                    "Oldest event in flight", "s", {"{{group}}": most(f"{_EVENTS}_oldest_in_flight_seconds", "group")}
                ),
                Panel("Bytes in flight", "bytes", {"{{group}}": total(f"{_EVENTS}_in_flight_bytes", "group")}),
                Panel(
                    "Partitions", "short", {"{{group}} {{instance}}": total(f"{_EVENTS}_partitions", "group, instance")}
                ),
                Panel("Partitions given up", "cps", {"{{group}}": rate(f"{_EVENTS}_revoked_total", "group")}),
            ],
            "What needs a person": [
                Panel("Parked keys", "short", {"{{group}}": most(f"{_EVENTS}_parked_keys", "group")}),
                Panel("Events of parked keys", "short", {"{{group}}": most(f"{_EVENTS}_parked_events", "group")}),
                Panel(
                    "Oldest parked key that is stuck",
                    "s",
                    {"{{group}}": most(f"{_EVENTS}_parked_age_seconds", "group")},
                ),
                Panel("Stopped partitions", "short", {"{{group}}": total(f"{_EVENTS}_stopped", "group")}),
                Panel("Paused", "short", {"{{group}}": most(f"{_EVENTS}_paused", "group")}),
                Panel("Set aside", "short", {"{{group}}": most(f"{_EVENTS}_set_aside_events", "group")}),
                Panel("Dead letters", "cps", {"{{group}}": rate(f"{_EVENTS}_dead_letters_total", "group")}),
                Panel(
                    "Skipped after failures", "cps", {"{{group}}": rate(f"{_EVENTS}_skipped_failures_total", "group")}
                ),
                Panel("Missed", "cps", {"{{group}}": rate(f"{_EVENTS}_missed_total", "group")}),
                Panel("Duplicates", "cps", {"{{group}}": rate(f"{_EVENTS}_duplicates_total", "group")}),
            ],
        },
    ),
    "workflow": Dashboard(
        "workflow",
        f"{_RUNS}_runs_active",
        {
            "Runs": [
                Panel("Started", "cps", {"{{workflow}}": rate(f"{_RUNS}_runs_started_total", "workflow")}),
                Panel(
                    "Ended", "cps", {"{{workflow}} {{status}}": rate(f"{_RUNS}_runs_ended_total", "workflow, status")}
                ),
                Panel("Executed now", "short", {"{{instance}}": total(f"{_RUNS}_runs_active", "instance")}),
                Panel("Waiting for a person", "short", {"runs": f"max({_RUNS}_runs_parked{{@}})"}),
                Panel("Of unknown workflows or versions", "short", {"runs": f"max({_RUNS}_runs_unknown{{@}})"}),
                Panel(
                    "Going on with new input",
                    "cps",
                    {"{{workflow}}": rate(f"{_RUNS}_runs_continued_total", "workflow")},
                ),
            ],
            "Steps": [
                Panel("Steps", "cps", {"{{step}} {{outcome}}": rate(f"{_RUNS}_steps_total", "step, outcome")}),
                quantiles("Time of an attempt", f"{_RUNS}_step_seconds"),
                Panel("Workers that died", "cps", {"workers": rate(f"{_RUNS}_workers_buried_total", "job")}),
                Panel("Signals that expired", "cps", {"signals": rate(f"{_RUNS}_signals_expired_total", "job")}),
                Panel("Runs kept no longer", "cps", {"{{status}}": rate(f"{_RUNS}_runs_deleted_total", "status")}),
            ],
        },
    ),
    "breakers": Dashboard(
        "circuit breakers",
        f"{_BREAKER}_circuits",
        {
            "Calls": [
                Panel("Calls", "cps", {"{{breaker}}": rate(f"{_BREAKER}_calls_total", "breaker")}),
                Panel(
                    "Failed",
                    "percentunit",
                    {
                        "{{breaker}}": rate(f"{_BREAKER}_calls_total", "breaker", where='outcome=~"failure|late"')
                        + " / "
                        + rate(f"{_BREAKER}_calls_total", "breaker", where='outcome!="rejected"')
                    },
                    description="Of the calls that were made: failures, and answers that came too late.",
                ),
                Panel(
                    "Refused",
                    "cps",
                    {"{{breaker}}": rate(f"{_BREAKER}_calls_total", "breaker", where='outcome="rejected"')},
                ),
            ],
            "Circuits": [
                Panel(
                    "Not closed",
                    "short",
                    {"{{breaker}} {{state}}": f'sum by (breaker, state) ({_BREAKER}_circuits{{@, state!="closed"}})'},
                ),
                Panel(
                    "Changes", "cps", {"{{breaker}} to {{to}}": rate(f"{_BREAKER}_transitions_total", "breaker, to")}
                ),
            ],
        },
    ),
    "database": Dashboard(
        "database",
        f"{_DATABASE}_pool_limit",
        {
            "Writes": [
                Panel("Commits", "cps", {"{{by}}": rate(f"{_DATABASE}_commits_total", "by")}),
                Panel("Rows made durable", "cps", {"{{instance}}": rate(f"{_DATABASE}_rows_total", "instance")}),
                quantiles("Time until durable", f"{_DATABASE}_wait_seconds"),
                quantiles("Rows that shared a commit", f"{_DATABASE}_batch_rows", unit="short"),
            ],
            "Connections": [
                Panel(
                    "In use, of the limit",
                    "percentunit",
                    {
                        "{{instance}}": f"{total(f'{_DATABASE}_pool_in_use', 'instance')} / "
                        f"({total(f'{_DATABASE}_pool_limit', 'instance')} > 0)"
                    },
                ),
                Panel("Waiting for one", "short", {"{{instance}}": total(f"{_DATABASE}_pool_waiting", "instance")}),
                Panel("At most, by all processes", "short", {"{{job}}": total(f"{_DATABASE}_pool_limit", "job")}),
            ],
            "Leases": [
                Panel("Held", "short", {"{{instance}}": total(f"{_DATABASE}_leases_held", "instance")}),
                Panel("Lost", "cps", {"{{instance}}": rate(f"{_DATABASE}_leases_lost_total", "instance")}),
                Panel(
                    "Hints are heard", "short", {"{{instance}}": f"min by (instance) ({_DATABASE}_hears_hints{{@}})"}
                ),
            ],
        },
    ),
    "audit": Dashboard(
        "audit",
        f"{_AUDIT}_log_entries",
        {
            "Entries": [
                Panel("Written", "cps", {"{{outcome}}": rate(f"{_AUDIT}_entries_total", "outcome")}),
                Panel("Sealed", "cps", {"{{instance}}": rate(f"{_AUDIT}_sealed_total", "instance")}),
                Panel("In the log", "short", {"entries": f"max({_AUDIT}_log_entries{{@}})"}),
            ],
            "What must not be": [
                Panel("Oldest entry without a seal", "s", {"{{job}}": most(f"{_AUDIT}_lag_seconds", "job")}),
                Panel(
                    "Since it was looked for",
                    "s",
                    {"{{instance}}": f"time() - min by (instance) ({_AUDIT}_lag_asked_timestamp_seconds{{@}} > 0)"},
                ),
                Panel("Lost", "cps", {"{{instance}}": rate(f"{_AUDIT}_lost_total", "instance")}),
                Panel("Put aside as no entries", "cps", {"{{instance}}": rate(f"{_AUDIT}_refused_total", "instance")}),
                Panel("Sealer", "short", {"{{job}}": 'min by (job) (mainstay_health{@, part="audit.Sealer"})'}),
            ],
        },
    ),
}


def document(name: str, dashboard: Dashboard) -> dict[str, Any]:
    """The dashboard in Grafana's form."""
    job = {
        "type": "query",
        "name": "job",
        "label": "Service",
        "datasource": _DATASOURCE,
        "query": {"qryType": 1, "query": f"label_values({dashboard.known_by}, job)", "refId": "job"},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".+",
        "current": {"text": "All", "value": "$__all"},
    }
    source = {"type": "datasource", "name": "datasource", "label": "Prometheus", "query": "prometheus"}
    return {
        "uid": f"mainstay-{name}",
        "title": f"Mainstay: {dashboard.title}",
        "tags": ["mainstay"],
        "timezone": "browser",
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "schemaVersion": _SCHEMA,
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [source, job]},
        "links": [
            {
                "type": "dashboards", "title": "Mainstay", "icon": "external link", "tooltip": "", "tags": ["mainstay"],
                "asDropdown": True, "targetBlank": False, "includeVars": True, "keepTime": True,
            }
        ],
        "panels": list(_panels(dashboard)),
    }  # fmt: skip


def _panels(dashboard: Dashboard) -> Iterator[dict[str, Any]]:
    number, top = 0, 0
    for heading, panels in dashboard.rows.items():
        number += 1
        place = {"h": 1, "w": _COLUMNS, "x": 0, "y": top}
        yield {"id": number, "type": "row", "title": heading, "collapsed": False, "gridPos": place, "panels": []}
        top += 1
        for index, panel in enumerate(panels):
            number += 1
            down, across = divmod(index, _COLUMNS // _WIDTH)
            place = {"h": _HEIGHT, "w": _WIDTH, "x": across * _WIDTH, "y": top + down * _HEIGHT}
            yield _panel(number, panel, place)
        top += -(-len(panels) // (_COLUMNS // _WIDTH)) * _HEIGHT


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    legend = {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []}
    drawn: dict[str, Any] = {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
    if panel.kind == "stat":
        calc = {"calcs": ["lastNotNull"], "values": False}
        drawn = {"reduceOptions": calc, "textMode": "value_and_name", "colorMode": "none", "graphMode": "none"}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        **({"description": panel.description} if panel.description else {}),
        "datasource": _DATASOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": drawn,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _DATASOURCE,
                "expr": expression(written),
                "legendFormat": legend_format,
                "exemplar": "_bucket" in written,
            }
            for index, (legend_format, written) in enumerate(panel.lines.items())
        ],
    }


def expression(written: str) -> str:
    """The expression as Grafana sends it, with the job that was chosen."""
    return written.replace("{@", "{" + SELECTED)


def texts() -> dict[Path, str]:
    """Every dashboard's file and what belongs there."""
    return {
        FOLDER / f"{name}.json": json.dumps(document(name, dashboard), indent=2) + "\n"
        for name, dashboard in DASHBOARDS.items()
    }


def main() -> int:
    """Write those that are not as they should be."""
    FOLDER.mkdir(exist_ok=True)
    for file, text in texts().items():
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
            print(f"wrote {file.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
