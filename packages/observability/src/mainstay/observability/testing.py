"""For tests of code that uses Mainstay: what it logged, and what it counted."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import structlog
from prometheus_client import REGISTRY

from mainstay.observability._formats import beside
from mainstay.observability._logging import EventDict, event_of, line_of, suspended

__all__ = ["captured_logs", "metric"]


class _Catcher(logging.Handler):
    def __init__(self, lines: list[dict[str, Any]]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(_line(record.levelname.lower(), record.name, event_of(record)))


def _line(level: str, logger: str | None, event: EventDict) -> dict[str, Any]:
    error = {"exc_info": event.pop("exc_info")} if "exc_info" in event else {}
    own, fields = line_of(level, logger, event)
    del own["timestamp"]  # no test can know it
    return {**beside(own, fields), **error}


@contextmanager
def captured_logs(level: int = logging.DEBUG) -> Generator[list[dict[str, Any]], None, None]:
    """Collect log lines as dictionaries, of structlog's loggers and of stdlib's alike.

    They come with the context and without secrets.
    Each has `event` and `level`, a stdlib line also `logger`. Nothing is printed meanwhile by structlog. `exc_info`
    stays as it was passed.
    """
    lines: list[dict[str, Any]] = []

    def keep(_logger: object, method: str, event: Any) -> Any:
        lines.append(_line(method, None, event))
        raise structlog.DropEvent

    before = structlog.get_config() if structlog.is_configured() else None
    root = logging.getLogger()
    catcher, root_level = _Catcher(lines), root.level
    structlog.configure(
        processors=[keep],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=False,
    )
    root.addHandler(catcher)
    root.setLevel(level)
    try:
        with suspended():
            yield lines
    finally:
        root.removeHandler(catcher)
        root.setLevel(root_level)
        if before is None:
            structlog.reset_defaults()
        else:
            structlog.configure(**before)


def metric(name: str, **labels: str) -> float:
    """The current value of a sample; 0 where there is none.

    `metric("mainstay_http_requests_total", method="GET", route="/orders/{id}", status="200")`. Metrics belong to the
    process and only grow: compare a value before with one after.
    """
    return REGISTRY.get_sample_value(name, labels) or 0.0
