"""How others log a line, and what others do around a request. Runs in the peers' environment."""

import logging
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import structlog
from asgi_correlation_id import CorrelationIdMiddleware
from fastapi import FastAPI
from prometheus_fastapi_instrumentator import Instrumentator

from benchmarks.observability.requests import cost_of_middleware
from benchmarks.peer import serve

NULL = os.open(os.devnull, os.O_WRONLY)


def native(calls: int) -> float:
    """Measure structlog as its documentation configures it for speed."""
    structlog.reset_defaults()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(serializer=orjson.dumps),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.BytesLoggerFactory(os.fdopen(os.dup(NULL), "wb")),
        cache_logger_on_first_use=True,
    )
    log = structlog.get_logger()
    structlog.contextvars.bind_contextvars(correlation_id="c" * 36, actor="ann", tenant="acme")
    log.info("warm")
    started = time.process_time()
    for _ in range(calls):
        log.info("order paid", order_id="o-17", amount=3)
    return (time.process_time() - started) / calls * 1e6


def stdlib(calls: int) -> float:
    """Measure a stdlib logger through structlog's ProcessorFormatter, with the same processors."""
    handler = logging.StreamHandler(os.fdopen(os.dup(NULL), "w"))
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.contextvars.merge_contextvars,
                structlog.stdlib.add_log_level,
                structlog.stdlib.ExtraAdder(),
                structlog.processors.TimeStamper(fmt="iso", utc=True),
            ],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(serializer=lambda *args, **kw: orjson.dumps(*args, **kw).decode()),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    structlog.contextvars.bind_contextvars(correlation_id="c" * 36, actor="ann", tenant="acme")
    log = logging.getLogger("library")
    started = time.process_time()
    for _ in range(calls):
        log.info("order %s paid", "o-17", extra={"amount": 3})
    return (time.process_time() - started) / calls * 1e6


def _instrumented(api: Any) -> Callable[..., Awaitable[None]]:
    Instrumentator().instrument(api)
    api.add_middleware(CorrelationIdMiddleware)
    return api  # type: ignore[no-any-return]  # an ASGI application


async def middleware(calls: int) -> float:
    """Measure what the two add to a request."""
    return await cost_of_middleware(FastAPI, _instrumented, calls)


if __name__ == "__main__":
    serve({"native": native, "stdlib": stdlib, "middleware": middleware})
