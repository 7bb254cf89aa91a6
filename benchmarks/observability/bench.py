"""Log lines, and what happens around a request."""

import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import structlog
from fastapi import FastAPI

from benchmarks.observability.probes import slowest_answer
from benchmarks.observability.requests import cost_of_middleware
from benchmarks.rows import Peers, Row, compare
from mainstay.core import bind
from mainstay.observability import ObservabilitySettings
from mainstay.observability._logging import configured
from mainstay.observability.fastapi import instrument
from mainstay_servers import Postgres


async def rows(quick: bool) -> AsyncIterator[Row]:  # noqa: FBT001  the runner's contract
    rounds = 3 if quick else 9
    calls = 5_000 if quick else 30_000
    with Peers("observability") as peers:
        yield await compare(
            "log line, structlog",
            "µs/line",
            lambda: _lines(calls, structlog_line),
            peer=("structlog with orjson", peers("native", calls)),
            rounds=rounds,
        )
        yield await compare(
            "log line, stdlib logging",
            "µs/line",
            lambda: _lines(calls, stdlib_line),
            peer=("structlog ProcessorFormatter", peers("stdlib", calls)),
            rounds=rounds,
        )
        yield await compare(
            "log line below the level, structlog",
            "µs/line",
            lambda: _lines(calls, debug_line),
            rounds=rounds,
        )
        yield await compare(
            "middleware: context, correlation id, metrics",
            "µs/request",
            lambda: cost_of_middleware(FastAPI, _instrumented, calls // 10),
            peer=("instrumentator and correlation-id", peers("middleware", calls // 10)),
            rounds=rounds,
        )
    with Postgres() as server:
        yield await compare(
            "slowest probe, 1,000 a second while the database hangs",
            "ms",
            lambda: slowest_answer(server, 1.0 if quick else 5.0),
            rounds=rounds,
        )


# Log lines


def structlog_line() -> Callable[[], Any]:
    log = structlog.get_logger()
    return lambda: log.info("order paid", order_id="o-17", amount=3)


def stdlib_line() -> Callable[[], Any]:
    log = logging.getLogger("library")
    return lambda: log.info("order %s paid", "o-17", extra={"amount": 3})


def debug_line() -> Callable[[], Any]:
    log = structlog.get_logger()
    return lambda: log.debug("order paid", order_id="o-17", amount=3)


def _lines(calls: int, make: Callable[[], Callable[[], Any]]) -> float:
    with (
        Path(os.devnull).open("w") as stream,
        configured(ObservabilitySettings(service_name="orders"), stream),
        bind(correlation_id="c" * 36, actor="ann", tenant="acme"),
    ):
        line = make()
        line()
        started = time.process_time()
        for _ in range(calls):
            line()
        return (time.process_time() - started) / calls * 1e6


def _instrumented(api: Any) -> Any:
    instrument(api)
    return api
