"""How a line is written: for a program, for Elasticsearch, for systemd's journal, for a person.

A line comes in two parts: what is its own (when, how grave, who, which trace), and the fields that a caller gave it,
which never take an own one's name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import structlog
from pydantic_core import to_json

from mainstay.observability._redaction import active

Fields = dict[Any, Any]
Format = Callable[[Fields, Fields], str]

OWN = frozenset(
    {
        "timestamp",
        "level",
        "service",
        "logger",
        "event",
        "correlation_id",
        "causation_id",
        "actor",
        "tenant",
        "trace_id",
        "span_id",
    }
)
_PERHAPS_OWN = OWN | {"exception", "stack", "code", "cut"}  # which a line has where there is reason to
_UNSAFE = re.compile(r"[\x7f-\x9f\u2028\u2029]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_CONTROL_IN_LINES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


def beside(own: Fields, fields: Fields) -> Fields:
    """A line's own fields and its caller's; one of these that has the name of an own one gets an underscore."""
    if _PERHAPS_OWN.isdisjoint(fields):
        return {**own, **fields}
    line = {**own, **{name: value for name, value in fields.items() if name not in OWN and name not in own}}
    for name, value in fields.items():
        if name in OWN or name in own:
            free = f"{name}_"
            while free in line:
                free += "_"
            line[free] = value
    return line


def as_json(line: Fields) -> str:
    """One line of JSON. What JSON does not know becomes its `repr`, never an error."""
    try:
        text = to_json(line, fallback=_last_resort, inf_nan_mode="strings").decode()
    except ValueError:  # half surrogates, which are no UTF-8
        text = "{" + ",".join(f"{json.dumps(str(name))}:{_alone(value)}" for name, value in line.items()) + "}"
    # JSON lets these stand, but some readers end a line at them, and a terminal obeys them.
    return text if text.isascii() else _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _last_resort(value: object) -> str:
    return active().last_resort(value)


def _alone(value: object) -> str:
    try:
        return to_json(value, fallback=_last_resort, inf_nan_mode="strings").decode()
    except ValueError:
        return json.dumps(value if isinstance(value, str) else _last_resort(value))


def plain_json(own: Fields, fields: Fields) -> str:
    """Format `json`: one object a line."""
    return as_json(beside(own, fields))


# As sd-daemon(3) has them, the levels of syslog.
_PRIORITY = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


def journal(own: Fields, fields: Fields) -> str:
    """Format `journal`: as `json`, behind the priority that systemd takes from the lines of a service."""
    return f"<{_PRIORITY.get(own['level'], 6)}>{as_json(beside(own, fields))}"


_ECS = "8.11.0"
_ECS_OWN = {
    "timestamp": "@timestamp",
    "level": "log.level",
    "service": "service.name",
    "logger": "log.logger",
    "actor": "user.id",
    "tenant": "organization.id",
    "trace_id": "trace.id",
    "span_id": "span.id",
    "exception": "error.stack_trace",
    "code": "error.code",
}


def ecs(own: Fields, fields: Fields) -> str:
    """Format `ecs`: by the Elastic Common Schema.

    A caller's fields are under `fields`, where their types meet no field of the schema. What is a line's own and has no
    place in the schema, such as the correlation id, is a label.
    """
    line: Fields = {}
    labels: Fields = {}
    for name, value in own.items():
        known = _ECS_OWN.get(name)
        if known is not None:
            line[known] = value
        elif name == "event":
            line["message"] = value if isinstance(value, str) else _alone(value)
        else:
            labels[name] = value
    line["ecs.version"] = _ECS
    if labels:
        line["labels"] = labels
    if fields:
        line["fields"] = fields
    return as_json(line)


class Console:
    """Format `console`: for a person at a terminal."""

    def __init__(self, *, colors: bool) -> None:
        # The renderer's own choice of traceback prints local variables where `rich` is installed.
        self._render = structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)

    def __call__(self, own: Fields, fields: Fields) -> str:
        """Write the line; the service is left out, since there is one."""
        line = beside({name: value for name, value in own.items() if name != "service"}, fields)
        shown = {_escaped(name): _shown(name, value) for name, value in line.items()}
        return self._render(None, own["level"], shown)


def _shown(name: object, value: object) -> object:
    """Without what moves a cursor or begins a line: a terminal would show what was never written."""
    if not isinstance(value, str):
        return value
    return _escaped(value, _CONTROL_IN_LINES if name in ("exception", "stack") else _CONTROL)


def _escaped(text: object, control: re.Pattern[str] = _CONTROL) -> str:
    return control.sub(lambda found: repr(found[0])[1:-1], str(text))
