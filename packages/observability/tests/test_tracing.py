"""The spans of requests, by a real SDK with an exporter in memory."""

import asyncio
import logging

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, HTTPException
from opentelemetry import baggage, trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode

from mainstay.core import MainstayError, bind, current
from mainstay.core.testing import eventually
from mainstay.observability import ObservabilityMiddleware
from mainstay.observability.fastapi import instrument
from mainstay.observability.testing import captured_logs

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"
WHY = "cannot reach postgresql://app:hunter2@db/orders"  # bait


class Broken(MainstayError):
    code = "SYS_TRACING_TEST"
    status = 503
    title = "Broken"


@pytest.fixture
def provider(monkeypatch):
    """A real SDK, installed for this test only."""
    provider = TracerProvider()
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    yield provider
    provider.shutdown()


@pytest.fixture
def spans(provider):
    """What the SDK has exported."""
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter


def _client(asgi):
    return httpx.AsyncClient(transport=httpx.ASGITransport(asgi), base_url="http://shop")


def _of_requests(spans):
    return [span for span in spans.get_finished_spans() if span.kind is SpanKind.SERVER]


def _plain(handle):
    """A pure ASGI application, whose span the middleware makes."""

    async def app(scope, receive, send):
        text = await handle(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(text).encode()})

    return ObservabilityMiddleware(app)


async def test_a_child_span_is_what_headers_events_and_lines_name(spans):
    """Of the spans of a request the one that is active at that moment."""
    seen: dict[str, str] = {}

    async def handle(_scope):
        seen["request"] = str(current().traceparent)
        with trace.get_tracer("application").start_as_current_span("work"), bind(actor="ann"):
            seen["work"] = current().to_headers()["traceparent"]
            logging.getLogger("lib").warning("inside")
        seen["after"] = str(current().traceparent)

    with captured_logs() as lines:
        async with _client(_plain(handle)) as http:
            await http.get("/", headers={"traceparent": TRACEPARENT})
    work, request = spans.get_finished_spans()
    assert (work.name, f"{request.parent.span_id:016x}") == ("work", CALLER)
    ids = {name: tuple(value.split("-")[1:3]) for name, value in seen.items()}
    own, child = (TRACE, f"{request.context.span_id:016x}"), (TRACE, f"{work.context.span_id:016x}")
    assert ids == {"request": own, "work": child, "after": own}
    (line,) = [each for each in lines if each["event"] == "inside"]
    assert (line["trace_id"], line["span_id"]) == child


@pytest.mark.parametrize("framework", [True, False])
@pytest.mark.parametrize("raised", ["unhandled", "stated", "framework's"])
async def test_the_exception_reaches_the_span_although_it_is_answered(spans, framework, raised):
    """Once, without its secrets, and the span is an error; what the client causes is none."""
    api = FastAPI() if framework else None

    async def fail(_scope=None):
        if raised == "unhandled":
            raise RuntimeError(WHY)
        if raised == "stated":
            raise Broken(WHY)
        raise HTTPException(500, WHY)

    if api is None:
        asgi = _plain(fail)
    else:
        api.get("/")(fail)

        @api.get("/refused")
        async def refused():
            raise HTTPException(404)

        instrument(api)
        asgi = api
    async with _client(asgi) as http:
        answer = await http.get("/")
        if framework:
            await http.get("/refused")
    failed, *others = _of_requests(spans)
    assert answer.status_code == failed.attributes["http.response.status_code"] == (503 if raised == "stated" else 500)
    assert failed.status.status_code is StatusCode.ERROR
    (event,) = [each for each in failed.events if each.name == "exception"]
    assert "hunter2" not in str(dict(event.attributes))
    assert "cannot reach postgresql://app:" in event.attributes["exception.message"]
    assert "in fail" in event.attributes["exception.stacktrace"]
    kind = {"unhandled": "RuntimeError", "stated": "Broken"}.get(raised, "HTTPException")
    assert event.attributes["exception.type"].endswith(kind)
    assert framework or failed.attributes["error.type"] == event.attributes["exception.type"]  # FastAPI says the status
    assert all(each.status.status_code is StatusCode.UNSET and not each.events for each in others)


async def test_an_error_after_the_answer_and_an_answer_that_breaks_off_are_told_too(spans):
    """The span is still there then, and the exception that the server gets is in it."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": scope["path"] == "/broken"})
        raise RuntimeError(scope["path"])

    async with _client(ObservabilityMiddleware(app)) as http:
        for path in ("/late", "/broken"):
            with pytest.raises(RuntimeError):
                await http.get(path)
    for span, path in zip(spans.get_finished_spans(), ("/late", "/broken"), strict=True):
        assert [each.attributes["exception.message"] for each in span.events] == [path]
        assert span.status.status_code is StatusCode.ERROR


async def test_an_answer_of_500_without_an_exception_is_an_error(spans):
    """What the application answers by itself."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 502, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with _client(ObservabilityMiddleware(app)) as http:
        await http.get("/")
    (span,) = spans.get_finished_spans()
    assert (span.status.status_code, span.attributes["error.type"], span.events) == (StatusCode.ERROR, "502", ())


@pytest.mark.parametrize("kind", [SpanKind.INTERNAL, SpanKind.SERVER])
@pytest.mark.parametrize("framework", [True, False])
async def test_a_span_around_the_server_suppresses_none_and_is_no_parent(spans, framework, kind):
    """Each request is a trace of its own, or continues its caller's; on a real server, under a span that stays."""
    api = FastAPI() if framework else _plain(lambda _scope: asyncio.sleep(0))
    if framework:
        api.get("/")(lambda: None)
        instrument(api)
    server = uvicorn.Server(uvicorn.Config(api, host="127.0.0.1", port=0, log_config=None, lifespan="off"))

    async def listening():
        return server.started

    with trace.get_tracer("main").start_as_current_span("main", kind=kind) as around:
        serving = asyncio.create_task(server.serve())
        try:
            await eventually(listening)
            port = server.servers[0].sockets[0].getsockname()[1]
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
                await http.get("/", headers={"traceparent": TRACEPARENT})
                if kind is SpanKind.INTERNAL:
                    await http.get("/")
        finally:
            server.should_exit = True
            await serving
        first, *others = _of_requests(spans)
    assert (f"{first.context.trace_id:032x}", f"{first.parent.span_id:016x}") == (TRACE, CALLER)
    assert [each.parent for each in others] == [None] * (kind is SpanKind.INTERNAL)
    assert around.get_span_context().trace_id not in {each.context.trace_id for each in (first, *others)}


async def test_what_a_framework_did_not_sample_is_not_made_again(monkeypatch):
    """Its decision is the request's; the ids travel on, and say so."""
    provider, exporter = TracerProvider(sampler=ALWAYS_OFF), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    api, begun = FastAPI(), []

    @api.get("/")
    async def handle():
        return current().traceparent

    original = provider.get_tracer

    def get_tracer(name, *args, **named):
        begun.append(name)
        return original(name, *args, **named)

    monkeypatch.setattr(provider, "get_tracer", get_tracer)
    instrument(api)
    async with _client(api) as http:
        for sent in ({"traceparent": TRACEPARENT}, {}):
            told = (await http.get("/", headers=sent)).json()
            assert int(told[-2:], 16) & 1 == 0
            assert not sent or told.split("-")[1] == TRACE
    assert "mainstay.observability" not in begun
    assert exporter.get_finished_spans() == ()


@pytest.mark.parametrize("trusted", [True, False])
async def test_state_goes_along_and_baggage_only_from_services_of_ours(spans, trusted):
    """A stranger may name a trace, and nothing that code believes."""
    seen: dict[str, object] = {}

    async def app(scope, receive, send):
        seen.update(baggage.get_all(), state=current().tracestate)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    headers = [("traceparent", TRACEPARENT), ("tracestate", "vendor=1"), ("baggage", "plan=gold"), ("baggage", "b=2")]
    async with _client(ObservabilityMiddleware(app, trusted=trusted)) as http:
        await http.get("/", headers=headers)
    assert seen == {"state": "vendor=1"} | ({"plan": "gold", "b": "2"} if trusted else {})
    assert baggage.get_all() == {}


class Silent(Exception):
    def __str__(self) -> str:
        raise RuntimeError


async def test_an_exception_without_text_costs_its_text_alone(spans):
    """It is an object of users: the request is answered, and the span says what it was."""

    async def fail(_scope):
        raise Silent

    async with _client(_plain(fail)) as http:
        assert (await http.get("/")).status_code == 500
    (span,) = spans.get_finished_spans()
    assert span.events[0].attributes["exception.type"].endswith("Silent")
    assert span.status.status_code is StatusCode.ERROR
