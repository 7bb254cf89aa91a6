"""One trace from a request in one process to the handler of its event in another, on the log and through Kafka."""

import importlib.util
import json
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from mainstay.observability import ObservabilityMiddleware

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
