"""What goes along with a call to another service, and what a called service makes of it; on a real server."""

import asyncio
import json
import threading
import time
from contextlib import asynccontextmanager

import httpx
import pytest
import uvicorn
from opentelemetry import baggage, context, trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from mainstay.core import DeadlineExceeded, bind, deadline_fired, outbound_headers, remaining_seconds, timeout
from mainstay.core.testing import eventually
from mainstay.observability import ObservabilityMiddleware
from mainstay.observability.outgoing import AsyncOutgoingTransport, OutgoingTransport

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
OURS = "127.0.0.1"
PRIVATE = {"x-actor", "x-tenant", "x-correlation-id", "x-causation-id", "traceparent", "x-deadline-seconds", "baggage"}


async def _echo(scope, receive, send):
    """Answers with the headers that it got; `/away` redirects to the same server by another name, `/503` is unwell."""
    headers = {name.decode(): value.decode() for name, value in scope["headers"]}
    answer, status = [], 200
    if scope["path"] == "/away":
        port = scope["server"][1]
        answer, status = [(b"location", f"http://localhost:{port}/".encode())], 302
    elif scope["path"] == "/503":
        status = 503
    await send({"type": "http.response.start", "status": status, "headers": answer})
    await send({"type": "http.response.body", "body": json.dumps(headers).encode()})


@asynccontextmanager
async def _served(asgi):
    """The address of a real server that ends with the block."""
    server = uvicorn.Server(uvicorn.Config(asgi, host="localhost", port=0, log_config=None, lifespan="off"))
    serving = asyncio.create_task(server.serve())

    async def listening():
        return server.started

    try:
        await eventually(listening)
        found = [each.getsockname() for listener in server.servers for each in listener.sockets]
        yield f"http://{OURS}:{next(each[1] for each in found if each[0] == OURS)}"
    finally:
        server.should_exit = True
        await serving


@pytest.fixture
async def address():
    async with _served(_echo) as found:
        yield found


@pytest.fixture
def spans(monkeypatch):
    """A real SDK, installed for this test only."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    yield exporter
    provider.shutdown()


async def _got(asynchronous, address, *hosts, path="/", **headers):
    """The headers that the server got, by either client."""
    if asynchronous:
        async with httpx.AsyncClient(transport=AsyncOutgoingTransport(*hosts), follow_redirects=True) as client:
            return (await client.get(f"{address}{path}", headers=headers)).json()

    def ask():
        with httpx.Client(transport=OutgoingTransport(*hosts), follow_redirects=True) as client:
            return client.get(f"{address}{path}", headers=headers).json()

    return await asyncio.to_thread(ask)


@pytest.mark.parametrize("asynchronous", [True, False])
async def test_a_service_of_ours_is_told_everything_and_a_stranger_nothing(address, asynchronous):
    """By the host, also of a request that is redirected: its headers are copied, and a hook's would follow."""
    told = bind(correlation_id="c-1", causation_id="e-1", actor="änn", tenant="acme", traceparent=TRACEPARENT)
    async with timeout(60):
        with told:
            got = await _got(asynchronous, address, OURS)
            away = await _got(asynchronous, address, OURS, path="/away")
            stranger = await _got(asynchronous, address, "stock", "*.0.0.2")
            own = await _got(asynchronous, address, OURS, **{"x-tenant": "other", "x-deadline-seconds": "9999"})
    assert {name: got[name] for name in PRIVATE & got.keys() - {"x-deadline-seconds"}} == {
        "x-correlation-id": "c-1",
        "x-causation-id": "e-1",
        "x-actor": "%C3%A4nn",
        "x-tenant": "acme",
        "traceparent": TRACEPARENT,
    }
    assert 0 < float(got["x-deadline-seconds"]) <= 60
    assert PRIVATE & away.keys() == PRIVATE & stranger.keys() == set()
    assert own["x-tenant"] == "other"  # was written on purpose
    assert float(own["x-deadline-seconds"]) <= 60  # is as of the moment


@pytest.mark.parametrize("host", ["http://stock", "stock:8080", "stock/path", "Stock", "*", "", "*stock", "a b"])
def test_what_is_no_host_is_refused(host):
    """An entry that matches nothing would be found when something is missing elsewhere."""
    with pytest.raises(ValueError, match="no host"):
        AsyncOutgoingTransport(host)
    with pytest.raises(ValueError, match="name the hosts"):
        OutgoingTransport()


@pytest.mark.parametrize(
    ("host", "ours"),
    [("stock", True), ("a.shop.svc", True), ("a.b.shop.svc", True), ("shop.svc", False), ("evilshop.svc", False),
     ("stock.evil.com", False), ("STOCK", True), ("[::1]", True)],
)  # fmt: skip
async def test_hosts_are_compared_whole(host, ours):
    """A host under a name is one after a dot."""
    seen = []

    async def handler(request):
        seen.append(request.headers)
        return httpx.Response(200)

    transport = AsyncOutgoingTransport("stock", "*.shop.svc", "::1", inner=httpx.MockTransport(handler))
    async with httpx.AsyncClient(transport=transport) as client:
        with bind(actor="ann"):
            await client.get(f"http://{host}:8080/")
    assert ("x-actor" in seen[0]) is ours


@pytest.mark.parametrize("asynchronous", [True, False])
async def test_nothing_is_sent_after_the_deadline(address, asynchronous):
    """It says so: nothing has happened on the other side."""
    limit = timeout(3600)
    async with limit as deadline:
        deadline.at = deadline.clock.monotonic() - 1
        with pytest.raises(DeadlineExceeded) as refused:
            await _got(asynchronous, address, OURS)
        assert refused.value.no_effect
        assert outbound_headers()["x-deadline-seconds"] == "0.000"


@pytest.mark.parametrize("asynchronous", [True, False])
async def test_each_call_is_a_span_which_the_called_service_continues(spans, address, asynchronous):
    """Its parent is the span around it; baggage goes to services of ours."""
    token = context.attach(baggage.set_baggage("plan", "gold"))
    try:
        with trace.get_tracer("application").start_as_current_span("work") as work:
            got = await _got(asynchronous, address, OURS)
            stranger = await _got(asynchronous, address, "stock")
            unwell = await _got(asynchronous, address, OURS, path="/503")
    finally:
        context.detach(token)
    first, second, third, _ = spans.get_finished_spans()
    assert got["traceparent"].split("-")[1:3] == [f"{first.context.trace_id:032x}", f"{first.context.span_id:016x}"]
    assert got["baggage"] == "plan=gold"
    assert PRIVATE & stranger.keys() == set()
    assert unwell["traceparent"].split("-")[2] == f"{third.context.span_id:016x}"
    assert [each.parent for each in (first, second, third)] == [work.get_span_context()] * 3
    assert {(each.kind, each.name) for each in (first, second, third)} == {(SpanKind.CLIENT, "GET")}
    assert first.attributes == {
        "http.request.method": "GET",
        "server.address": OURS,
        "server.port": int(address.rpartition(":")[2]),
        "url.scheme": "http",
        "http.response.status_code": 200,
    }
    assert [each.status.status_code for each in (first, third)] == [StatusCode.UNSET, StatusCode.ERROR]


async def test_a_call_that_fails_has_its_exception_in_its_span(spans):
    """No server listens there."""
    async with httpx.AsyncClient(transport=AsyncOutgoingTransport("stock")) as client:
        with pytest.raises(httpx.ConnectError):
            await client.get("http://127.0.0.1:1/")
    (span,) = spans.get_finished_spans()
    assert span.attributes["error.type"] == "httpx.ConnectError"
    assert (span.status.status_code, len(span.events)) == (StatusCode.ERROR, 1)


async def _answered(middleware, value):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(middleware), base_url="http://stock") as client:
        return await client.get("/", headers={} if value is None else {"x-deadline-seconds": value})


def _remaining(seen):
    async def app(scope, receive, send):
        seen.append(remaining_seconds())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return app


@pytest.mark.parametrize(
    ("value", "trusted", "heeded"),
    [("30", True, True), ("30.5", True, True), ("30", False, False), (None, True, False), ("-1", True, False),
     ("inf", True, False), ("nan", True, False), ("1e3", True, False), ("٣", True, False), ("9" * 400, True, False)],
)  # fmt: skip
async def test_a_callers_deadline_is_heeded_where_callers_are_trusted(value, trusted, heeded):
    """What is malformed, or from a stranger, is none."""
    seen: list[float | None] = []
    middleware = ObservabilityMiddleware(_remaining(seen), trusted=trusted)
    encoded = None if value is None else value.encode()
    assert (await _answered(middleware, encoded)).status_code == 200
    assert (seen[0] is not None and 0 < seen[0] <= 30.5) if heeded else seen == [None]


async def test_a_request_that_comes_too_late_is_answered_and_not_begun():
    """With the problem of a deadline."""
    seen: list[float | None] = []
    answer = await _answered(ObservabilityMiddleware(_remaining(seen), trusted=True), "0.000")
    assert (answer.status_code, answer.json()["code"], seen) == (504, "EXT_DEADLINE", [])


async def test_work_that_takes_longer_than_its_caller_waits_ends_as_a_deadline():
    """A failure to every policy inside, and a problem for who still listens."""
    fired = []

    async def app(scope, receive, send):
        try:
            await asyncio.sleep(3600)
        finally:
            fired.append(deadline_fired())

    answer = await _answered(ObservabilityMiddleware(app, trusted=True), "0.05")
    assert (answer.status_code, answer.json()["code"], fired) == (504, "EXT_DEADLINE", [True])


async def test_what_goes_on_after_the_answer_has_no_deadline():
    """Its caller has what it waited for."""
    over, seen = threading.Event(), []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        seen.append(remaining_seconds())
        late = time.monotonic() + 0.2  # the deadline began before
        await eventually(lambda: time.monotonic() > late)
        over.set()

    assert (await _answered(ObservabilityMiddleware(app, trusted=True), "0.2")).status_code == 200
    assert (over.is_set(), seen) == (True, [None])
