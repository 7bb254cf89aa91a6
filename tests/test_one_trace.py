"""One trace through everything: to a handler in another process, and in every output of one request."""

import asyncio
import importlib.util
import json
import logging
import subprocess
import sys
import threading
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import REGISTRY
from pydantic import SecretStr

from mainstay.audit import AuditModule, AuditTrail
from mainstay.audit.testing import settings as audit_settings
from mainstay.audit.testing import written
from mainstay.circuit_breaker import CircuitBreaker, CircuitBreakerModule
from mainstay.core import App, Context, Retry, current
from mainstay.core.testing import eventually
from mainstay.database import Database, DatabaseModule, DatabaseSettings
from mainstay.events import DeadLetters, Event, EventRouter, EventsModule, EventsSettings, Metadata
from mainstay.observability import ObservabilityMiddleware, ObservabilityModule, ObservabilitySettings
from mainstay.observability.fastapi import instrument
from mainstay.observability.testing import captured_logs
from mainstay.workflow import RunStatus, WorkflowEngine, WorkflowModule, WorkflowRouter

SCRIPT = Path(__file__).with_name("trace_process.py")
WAIT = 120.0
TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE}-b7ad6b7169203331-01"


def _service() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trace_process", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["trace_process"] = module  # annotations are looked up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """The spans of this process, of a provider that is installed for this test only."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    yield exporter
    provider.shutdown()


def _told_by_a_worker(expected: set[str]) -> dict[str, Any]:
    """Run the service in a process of its own until it has printed all of these, by name."""
    found: dict[str, Any] = {}
    with subprocess.Popen([sys.executable, SCRIPT], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        too_long = threading.Timer(WAIT, worker.kill)
        too_long.start()
        try:
            while expected - found.keys():  # an empty line, which is no JSON, is the worker's end
                line = json.loads(worker.stdout.readline())
                found[line.get("name", "handled")] = line
        finally:
            too_long.cancel()
            worker.terminate()
    return found


@pytest.mark.parametrize("transport", ["sql", "kafka"])
async def test_a_request_and_the_handler_elsewhere_are_one_trace(
    transport: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    exporter: InMemorySpanExporter,
) -> None:
    """The caller's trace, the request, what it published and the handler: each the parent of the next."""
    topic = f"trace-{uuid.uuid4().hex[:8]}"
    settings = {
        "TRACE_GROUP": topic,
        "MAINSTAY_EVENTS_TRANSPORT": transport,
        "MAINSTAY_EVENTS_TOPICS": json.dumps({"trace.placed": topic}),
        "MAINSTAY_DATABASE_URL": f"sqlite+aiosqlite:///{tmp_path}/trace.db",
    }
    if transport == "kafka":
        settings["MAINSTAY_EVENTS_KAFKA_SERVERS"] = request.getfixturevalue("kafka")
        settings["MAINSTAY_EVENTS_SOURCE"] = "trace"
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    service = _service()

    async def place(_scope: Any, _receive: Any, send: Any) -> None:
        await service.events.publish(service.OrderPlaced(order_id="a"))
        await send({"type": "http.response.start", "status": 202, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with service.service():
        web = httpx.ASGITransport(ObservabilityMiddleware(place))
        async with httpx.AsyncClient(transport=web, base_url="http://shop") as http:
            assert (await http.post("/orders", headers={"traceparent": TRACEPARENT})).status_code == 202
    spans = {span.name.partition(" ")[0]: json.loads(service.line_of(span)) for span in exporter.get_finished_spans()}
    asked, sent = spans["POST"], spans["send"]
    assert (asked["trace"], asked["parent"]) == (TRACE, "b7ad6b7169203331")
    assert (sent["trace"], sent["parent"], sent["kind"]) == (TRACE, asked["span"], "PRODUCER")

    expected = {"handled", f"process {topic}"} | ({f"send {topic}"} if transport == "kafka" else set())
    found = _told_by_a_worker(expected)
    handled = found[f"process {topic}"]
    assert (handled["trace"], handled["parent"], handled["kind"]) == (TRACE, sent["span"], "CONSUMER")
    assert handled["links"] == [sent["span"]]
    assert handled["attributes"]["messaging.message.id"] == sent["attributes"]["messaging.message.id"]
    assert handled["attributes"]["messaging.system"] == transport
    assert found["handled"]["traceparent"].split("-")[1:3] == [TRACE, handled["span"]]
    if transport == "kafka":
        relayed = found[f"send {topic}"]
        assert (relayed["kind"], relayed["links"]) == ("CLIENT", [sent["span"]])
        assert relayed["parent"] is None
        assert relayed["trace"] != TRACE
        assert relayed["attributes"]["messaging.batch.message_count"] == 1
        assert handled["attributes"]["messaging.kafka.offset"] == 0


class Ordered(Event, type="one.ordered", version="1.0", key="order"):
    """A customer has ordered."""

    order: str


def _trace_of(traceparent: str | None) -> str | None:
    return traceparent and traceparent.split("-")[1]


@asynccontextmanager
async def _served(asgi: Any) -> AsyncGenerator[httpx.AsyncClient]:
    """A client of a real server, which serves on this loop and ends with the block."""
    server = uvicorn.Server(uvicorn.Config(asgi, host="127.0.0.1", port=0, log_config=None))
    serving = asyncio.create_task(server.serve())

    async def listening() -> bool:
        assert not serving.done(), "the server ended by itself"
        return server.started

    try:
        await eventually(listening, seconds=WAIT)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=WAIT) as http:
            yield http
    finally:
        server.should_exit = True
        await serving


class Shop:
    """A service that does all that a request can lead to, and fails; and what each of its parts was told."""

    def __init__(self, directory: Path) -> None:
        self.told: dict[str, Context] = {}
        self.stock: httpx.AsyncClient
        events, flows, self.trail = EventRouter(), WorkflowRouter(), AuditTrail()
        breaker = CircuitBreaker(f"stock-{uuid.uuid4().hex[:8]}")

        @events.on(Ordered, group="one-trace", retry=Retry(attempts=1), on_failure="dead-letter")
        async def refuse(event: Ordered, meta: Metadata) -> None:
            self.told["event"] = Context(meta.correlation_id, traceparent=meta.traceparent)
            self.told["handler"] = current()
            raise RuntimeError(event.order)

        @flows.step(harmless=True)
        async def wrap(order: str) -> str:
            self.told["step"] = current()
            return order

        @flows.workflow(name="one-trace-pack")
        async def pack(order: str) -> str:
            return await wrap(order)

        @breaker
        async def in_stock(order: str) -> None:
            headers = current().to_headers()
            self.told["call"] = Context.from_headers(headers)
            (await self.stock.get(f"/stock/{order}", headers=headers)).raise_for_status()

        self.app = App(
            ObservabilityModule.for_root(ObservabilitySettings(service_name="shop", http_port=None)),
            DatabaseModule.for_root(DatabaseSettings(url=SecretStr(f"sqlite+aiosqlite:///{directory}/shop.db"))),
            EventsModule.for_root(EventsSettings(transport="sql")),
            EventsModule.for_feature(events),
            CircuitBreakerModule.for_root(),
            CircuitBreakerModule.for_feature(breaker),
            WorkflowModule.for_root(),
            WorkflowModule.for_feature(flows),
            AuditModule.for_root(audit_settings()),
            AuditModule.for_feature(self.trail),
        )
        self.api = FastAPI(lifespan=self.app.lifespan(serve=True))

        @self.api.post("/one-trace/{order}")
        async def place(order: str) -> None:
            await events.publish(Ordered(order=order))
            await pack.start(order, id=order)
            await in_stock(order)
            await self.trail.write("one-trace.ordered", resource=f"order/{order}")
            raise RuntimeError(order)

        instrument(self.api, self.app)

    def neighbour(self) -> FastAPI:
        """The service that is called: of another process, as far as contexts go."""
        api = FastAPI()

        @api.get("/stock/{order}")
        async def stock(order: str) -> str:
            self.told["called service"] = current()
            return order

        instrument(api)
        return api

    async def outcome(self, order: str) -> None:
        """Wait for what goes on after the answer, and note what each of it is kept with."""
        letters, engine = self.app.get(DeadLetters), self.app.get(WorkflowEngine)

        async def over() -> bool:
            done = await engine.status(order) is RunStatus.COMPLETED
            return done and bool(await letters.list("one-trace"))

        await eventually(over, seconds=WAIT)
        (letter,) = await letters.list("one-trace")
        kept = {name: value.decode() for name, value in letter.headers if value is not None}
        self.told["dead letter"] = Context(letter.correlation_id, traceparent=kept.get("ce_traceparent"))
        self.told["record"] = Context.from_dict((await engine.run(order)).context)
        (entry,) = await written(self.app.get(Database), "one-trace.ordered")
        self.told["audit entry"] = Context(entry.correlation_id)


def _exemplars(route: str) -> list[str]:
    """The traces that the time of a route leads to."""
    (seconds,) = [each for each in REGISTRY.collect() if each.name == "mainstay_http_request_seconds"]
    samples = [each for each in seconds.samples if each.labels["route"] == route]
    assert samples, "the request was not counted"
    return [each.exemplar.labels["trace_id"] for each in samples if each.exemplar is not None]


@pytest.mark.parametrize("sdk", [False, True], ids=["received trace", "own spans"])
async def test_one_request_has_the_same_ids_in_every_output(
    sdk: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """In header, problem, lines, metrics, event, record, call, entry, dead letter; with an SDK in its spans, too."""
    exporter = request.getfixturevalue("exporter") if sdk else None
    correlation, order = f"one-{uuid.uuid4().hex}", f"o-{uuid.uuid4().hex[:8]}"
    sent = {"x-correlation-id": correlation, "traceparent": f"00-{(trace := uuid.uuid4().hex)}-b7ad6b7169203331-01"}
    shop = Shop(tmp_path)
    async with _served(shop.neighbour()) as shop.stock, _served(shop.api) as http:
        with captured_logs(logging.INFO) as lines:
            answer = await http.post(f"/one-trace/{order}", headers=sent)
            await shop.outcome(order)

    assert answer.status_code == 500
    assert answer.headers["x-correlation-id"] == correlation
    assert answer.json()["correlation_id"] == correlation
    assert order not in answer.text

    untraced = {"audit entry"}  # has no field for it: what it is part of is its correlation id
    expected = {"event", "handler", "step", "call", "called service", "dead letter", "record", "audit entry"}
    assert {name: (each.correlation_id, _trace_of(each.traceparent)) for name, each in shop.told.items()} == {
        name: (correlation, None if name in untraced else trace) for name in expected
    }

    of_requests = [each for each in lines if each.get("logger") in {"mainstay.access", "mainstay.observability"}]
    told = [(each["event"], each.get("correlation_id"), each.get("trace_id")) for each in of_requests]
    assert told == [
        (event, correlation, trace)
        for event in (
            "GET /stock/{order} 200", "POST /one-trace/{order} failed", "POST /one-trace/{order} 500",
        )
    ]  # fmt: skip
    failures = [each for each in lines if each["level"] == "error"]
    assert [(each["logger"], each.get("correlation_id"), each.get("trace_id")) for each in failures] == [
        ("mainstay.observability", correlation, trace),
        ("mainstay.events", correlation, trace),  # of the handler that gave its event up
    ]
    assert trace in _exemplars("/one-trace/{order}")

    if exporter is not None:
        spans = [span for span in exporter.get_finished_spans() if span.context.trace_id == int(trace, 16)]
        assert {f"{span.kind.name} {span.name.partition(' ')[0]}" for span in spans} >= {
            "SERVER POST", "SERVER GET", "PRODUCER send", "CONSUMER process",
        }  # fmt: skip
        (asked,) = [span for span in spans if span.name == "POST /one-trace/{order}"]
        assert asked.attributes["mainstay.correlation_id"] == correlation
        assert asked.parent.span_id == int("b7ad6b7169203331", 16)
        assert asked.status.status_code.name == "ERROR"
