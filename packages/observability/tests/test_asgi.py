"""What happens around every request: context, metrics under templates, errors that carry the id, and probes."""

import asyncio
import json
import logging
from contextvars import copy_context

import httpx
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, HTTPException, Request, WebSocket
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic import BaseModel, SecretStr
from starlette.middleware.base import BaseHTTPMiddleware

from mainstay.core import App, ConfigurationError, MainstayError, bind, current
from mainstay.observability import ObservabilityMiddleware, ObservabilityModule, ObservabilitySettings
from mainstay.observability._facts import route_template
from mainstay.observability.fastapi import instrument
from mainstay.observability.testing import captured_logs, metric

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class SoldOut(MainstayError):
    code = "BIZ_SOLD_OUT"
    status = 409
    title = "Sold out"
    public_message = "There are no tickets left."


class Closed(MainstayError):
    code = "EXT_PAYMENTS_OPEN"
    status = 503
    title = "Payments open"
    no_effect = True
    retry_after_seconds = 1.2


class Login(BaseModel):
    user: str
    password: SecretStr
    age: int


async def who():
    with bind(actor="ann"):
        yield


def who_in_a_thread():
    bind(actor="nobody sees this").__enter__()


def application(app=None, **options):
    api = FastAPI()
    orders = APIRouter(prefix="/orders")
    v1 = APIRouter(prefix="/v1")

    @orders.get("/{order_id}")
    async def order(order_id: int):
        return {"order": order_id, "seen": current().to_dict()}

    v1.include_router(orders)
    api.include_router(v1, prefix="/api")

    @api.get("/me", dependencies=[Depends(who)])
    async def me():
        return {"actor": current().actor}

    @api.get("/thread", dependencies=[Depends(who_in_a_thread)])
    async def thread():
        return {"actor": current().actor}

    @api.get("/sync")
    def sync():
        return {"correlation": current().correlation_id}

    @api.get("/sold-out")
    async def sold_out():
        detail = "internal: shard 7 at 10.0.0.3"
        raise SoldOut(detail)

    @api.get("/closed")
    async def closed():
        raise Closed

    @api.get("/bug")
    async def bug():
        msg = "hunter2"
        raise RuntimeError(msg)

    @api.get("/teapot")
    async def teapot():
        raise HTTPException(418, {"not": "text"}, headers={"x-tea": "yes"})

    @api.get("/gone")
    async def gone():
        raise HTTPException(404, "no such order")

    @api.post("/login")
    async def login(form: Login):
        return form.user

    @api.get("/files/{path:path}")
    async def files(path: str):
        return path

    sub = FastAPI()

    @sub.get("/in/{item}")
    async def inside(item: str):
        return item

    api.mount("/tenants/{tenant}", sub)
    instrument(api, app, **options)
    return api


async def nobody():
    """A receiving end that nothing comes from."""
    return await asyncio.get_running_loop().create_future()


async def nowhere(message):
    """A sending end that must not be used."""
    raise AssertionError(message)


def client(api, **options):
    return httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test", **options)


async def test_the_context_comes_from_the_headers_as_far_as_strangers_go():
    """A correlation id and a trace are taken over; an actor and a tenant are not, unless the caller is trusted."""
    headers = {
        "x-correlation-id": "c-7", "traceparent": TRACEPARENT, "x-actor": "root", "x-tenant": "t", "x-causation-id":
        "e",
    }  # fmt: skip
    async with client(application()) as http:
        answer = await http.get("/api/v1/orders/3", headers=headers)
    assert answer.json()["seen"] == {"correlation_id": "c-7", "traceparent": TRACEPARENT}
    assert answer.headers["x-correlation-id"] == "c-7"
    async with client(application(trusted=True)) as http:
        answer = await http.get("/api/v1/orders/3", headers=headers)
    assert answer.json()["seen"]["actor"] == "root"


@pytest.mark.parametrize("sent", [{}, {"x-correlation-id": "a b\x7f"}, {"x-correlation-id": "x" * 129}])
async def test_a_missing_or_unsafe_correlation_id_is_replaced(sent):
    """Every answer has an id; what a stranger must not write into logs is not repeated. A thread sees it too."""
    async with client(application()) as http:
        answer = await http.get("/sync", headers=sent)
    made = answer.headers["x-correlation-id"]
    assert len(made) == 36
    assert answer.json()["correlation"] == made


async def test_trap_values_bound_in_dependencies():
    """What an async dependency binds reaches the handler; what a sync one binds in its thread does not."""
    async with client(application()) as http:
        assert (await http.get("/me")).json() == {"actor": "ann"}
        answer = await http.get("/thread")
        assert answer.json() == {"actor": None}
        assert "x-correlation-id" in answer.headers


async def test_trap_a_middleware_that_runs_the_application_in_a_task():
    """Inside of `BaseHTTPMiddleware` the context is still there, and outside of it the id still comes out."""
    api = FastAPI()

    @api.get("/x")
    async def x():
        return current().correlation_id

    async def dispatch(request, call_next):
        return await call_next(request)

    api.add_middleware(BaseHTTPMiddleware, dispatch=dispatch)
    instrument(api)
    async with client(api) as http:
        answer = await http.get("/x", headers={"x-correlation-id": "through"})
    assert (answer.json(), answer.headers["x-correlation-id"]) == ("through", "through")


async def test_an_unhandled_error_carries_the_id_everywhere_and_its_message_nowhere():
    """The log line, the header and the body of a 500 have the correlation id; the answer tells nothing of the error."""
    async with client(application()) as http:
        with captured_logs() as lines:
            answer = await http.get("/bug", headers={"x-correlation-id": "c-500"})
    assert answer.status_code == 500
    assert answer.headers["x-correlation-id"] == "c-500"
    assert answer.json() == {
        "type": "urn:problem-type:SYS_INTERNAL", "title": "Internal error", "status": 500, "code": "SYS_INTERNAL",
        "detail": "The request could not be completed.", "instance": "urn:correlation:c-500", "correlation_id": "c-500",
    }  # fmt: skip
    (line,) = [line for line in lines if line["level"] == "error"]
    assert (line["event"], line["correlation_id"]) == ("GET /bug failed", "c-500")


async def test_domain_errors_become_answers():
    """Code, public message and status by family; the internal detail stays inside; `Retry-After` in whole seconds."""
    async with client(application()) as http:
        answer = await http.get("/sold-out")
        assert answer.status_code == 409
        assert answer.json()["code"] == "BIZ_SOLD_OUT"
        assert answer.json()["detail"] == "There are no tickets left."
        assert answer.json()["correlation_id"] == answer.headers["x-correlation-id"]
        assert "shard" not in answer.text
        answer = await http.get("/closed")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")


async def test_http_errors_have_the_same_body():
    """What FastAPI raises by itself, and what handlers raise as HTTPException, look like every other error."""
    async with client(application()) as http:
        for path, status, code in [
            ("/nope", 404, "RES_NOT_FOUND"), ("/gone", 404, "RES_NOT_FOUND"), ("/teapot", 418, "VAL_REQUEST"),
        ]:  # fmt: skip
            answer = await http.get(path)
            assert (answer.status_code, answer.json()["code"]) == (status, code)
            assert answer.json()["correlation_id"] == answer.headers["x-correlation-id"]
        assert (await http.get("/gone")).json()["detail"] == "no such order"
        assert (await http.get("/teapot")).headers["x-tea"] == "yes"
        assert (await http.post("/gone")).json()["code"] == "VAL_METHOD"


async def test_trap_an_invalid_request_is_not_echoed():
    """The 422 names the wrong field and repeats neither it nor the password beside it."""
    async with client(application()) as http:
        answer = await http.post("/login", json={"user": "ann", "password": "hunter2", "age": "hunter3"})
        broken = await http.post("/login", content=b'{"password": hunter2')
    assert answer.status_code == 422
    assert answer.json()["errors"] == [
        {
            "location": ["body", "age"],
            "message": "Input should be a valid integer, unable to parse string as an integer",
            "type": "int_parsing",
        }
    ]
    assert "hunter" not in answer.text + broken.text


@pytest.mark.parametrize(
    ("path", "template"),
    [
        ("/api/v1/orders/3", "/api/v1/orders/{order_id}"),
        ("/files/a/b/c", "/files/{path}"),
        ("/tenants/acme/in/7", "/tenants/{tenant}/in/{item}"),
        ("/sync", "/sync"),
        ("/nope/at/all", "unmatched"),
        ("/tenants/acme/nope", "unmatched"),
    ],
)
async def test_trap_routes_are_templates_with_their_prefixes(path, template):
    """Prefixes of included routers and of mounts belong to the label, values never do."""
    async with client(application()) as http:
        status = "404" if template == "unmatched" else "200"
        labels = {"method": "GET", "route": template, "status": status}
        before = metric("mainstay_http_requests_total", **labels)
        timed = metric("mainstay_http_request_seconds_count", method="GET", route=template)
        await http.get(path)
        assert metric("mainstay_http_requests_total", **labels) == before + 1
        assert metric("mainstay_http_request_seconds_count", method="GET", route=template) == timed + 1


async def test_trap_an_invented_method_is_one_label():
    """Any verb is accepted by the protocol, none becomes a label of its own."""
    async with client(application()) as http:
        labels = {"method": "other", "route": "unmatched", "status": "404"}
        before = metric("mainstay_http_requests_total", **labels)
        for verb in ("HACK", "HACK2"):
            await http.request(verb, "/nope")
        assert metric("mainstay_http_requests_total", **labels) == before + 2


def test_a_route_whose_value_was_converted():
    """Where the path cannot be taken apart, the route's own template is the label: bounded, if less exact."""
    route = type("Route", (), {"path_format": "/{n}"})()
    scope = {"route": route, "path": "/x/007", "path_params": {"n": 7}}
    assert route_template(scope) == "/x/{n}" or route_template(scope) == "/{n}"


async def test_an_error_after_the_answer_began_breaks_the_connection():
    """Half an answer cannot become a 500: the error goes on to the server, after it was logged and counted."""

    async def half(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"X-Correlation-Id", b"old")]})
        msg = "half way"
        raise OSError(msg)

    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"x-correlation-id", b"new")]}
    with pytest.raises(OSError, match="half way"):
        await ObservabilityMiddleware(half)(scope, nobody, send)
    assert sent[0]["headers"] == [(b"x-correlation-id", b"new")]
    assert len(sent) == 1


async def test_a_domain_error_outside_of_any_framework_is_answered_too():
    """Pure ASGI applications get the same bodies."""

    async def app(scope, receive, send):
        raise Closed

    sent = []

    async def send(message):
        sent.append(message)

    await ObservabilityMiddleware(app)({"type": "http", "method": "GET", "path": "/", "headers": []}, nobody, send)
    assert sent[0]["status"] == 503
    assert (b"retry-after", b"2") in sent[0]["headers"]
    assert json.loads(sent[1]["body"])["code"] == "EXT_PAYMENTS_OPEN"


async def test_a_client_that_goes_away_is_counted_apart():
    """A cancelled request is no answer: it is counted as 499 and the cancellation goes on."""
    entered = asyncio.Event()

    async def slow(scope, receive, send):
        entered.set()
        await asyncio.Event().wait()

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    labels = {"method": "GET", "route": "unmatched", "status": "499"}
    before, running = metric("mainstay_http_requests_total", **labels), metric("mainstay_http_requests_in_progress")
    task = asyncio.ensure_future(ObservabilityMiddleware(slow)(scope, nobody, nowhere))
    await entered.wait()
    assert metric("mainstay_http_requests_in_progress") == running + 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert metric("mainstay_http_requests_total", **labels) == before + 1
    assert metric("mainstay_http_requests_in_progress") == running


async def test_websockets_have_the_context_and_lifespans_pass():
    """A socket's handler sees the correlation id; other scopes are none of our business."""
    seen = []

    async def app(scope, receive, send):
        seen.append((scope["type"], current().correlation_id))

    middleware = ObservabilityMiddleware(app)
    await middleware({"type": "websocket", "headers": [(b"x-correlation-id", b"ws")]}, nobody, nowhere)
    await middleware({"type": "lifespan"}, nobody, nowhere)
    assert seen == [("websocket", "ws"), ("lifespan", None)]


async def test_probes_are_served_before_everything_else_while_the_app_runs():
    """Probes and metrics answer without the application being asked; without a running App they are its own."""
    app = App(ObservabilityModule.for_root(ObservabilitySettings(service_name="orders", metrics_public=True)))
    asked = []

    async def inner(scope, receive, send):
        asked.append(scope["path"])
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    api = ObservabilityMiddleware(inner, app=app)
    async with client(api) as http:
        assert (await http.get("/health/live")).status_code == 401
        async with app:
            assert (await http.get("/health/live")).json() == {"status": "ok"}
            assert (await http.get("/health/ready")).json() == {"status": "ok"}
            assert "mainstay_http_requests_total" in (await http.get("/metrics")).text
            head = await http.head("/metrics")
            assert (head.status_code, head.content) == (200, b"")
            # Details are for the port of its own; writing is for nobody.
            assert (await http.get("/health")).status_code == 401
            assert (await http.get("/health/other")).status_code == 401
            assert (await http.post("/metrics")).status_code == 401
    assert asked == ["/health/live", "/health", "/health/other", "/metrics"]


@pytest.fixture
def spans(monkeypatch):
    """A real SDK, installed for this test only."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    yield exporter
    provider.shutdown()


async def test_with_an_sdk_a_request_is_one_span(spans):
    """It continues the caller's trace, is named by the template, and its ids are in the logs and in the context.

    FastAPI makes that span itself in newer versions: then there is no second one. Newer ones make one for the handler,
    too, which is what is active in it.
    """
    api = application()

    @api.get("/traced/{n}")
    async def traced(n: int):
        logging.getLogger("lib").warning("inside")
        return current().traceparent

    async with client(api) as http:
        with captured_logs() as lines:
            answer = await http.get("/traced/1", headers={"traceparent": TRACEPARENT})
    (span,) = [span for span in spans.get_finished_spans() if span.kind is trace.SpanKind.SERVER]
    assert span.name == "GET /traced/{n}"
    assert f"{span.context.trace_id:032x}" == TRACEPARENT.split("-")[1]
    assert f"{span.parent.span_id:016x}" == TRACEPARENT.split("-")[2]
    inner = [each for each in spans.get_finished_spans() if each.parent == span.context]
    within = {each.context.span_id for each in (span, *inner)}
    assert int(answer.json().split("-")[2], 16) in within
    line = next(line for line in lines if line["event"] == "inside")
    assert line["trace_id"] == f"{span.context.trace_id:032x}"


async def test_with_an_sdk_an_application_without_spans_of_its_own_gets_them(spans):
    """Pure ASGI: the span has route, status and correlation id, and an unhandled error marks it."""

    async def app(scope, receive, send):
        scope["route"] = type("Route", (), {"path": "/things/{n}"})()
        scope["path_params"] = {"n": "1"}
        if scope["path"] == "/things/1":
            await send({"type": "http.response.start", "status": 201, "headers": []})
            await send({"type": "http.response.body", "body": str(current().traceparent).encode()})
        else:
            raise RuntimeError

    async with client(ObservabilityMiddleware(app)) as http:
        answer = await http.get("/things/1", headers={"traceparent": TRACEPARENT, "x-correlation-id": "c"})
        await http.get("/")
    ok, failed = spans.get_finished_spans()
    assert ok.name == "GET /things/{n}"
    assert answer.text.split("-")[2] == f"{ok.context.span_id:016x}"
    assert ok.attributes["http.response.status_code"] == 201
    assert ok.attributes["mainstay.correlation_id"] == "c"
    assert failed.status.status_code is trace.StatusCode.ERROR


async def test_without_an_sdk_no_span_is_made(monkeypatch):
    """The API alone is never asked for a span: that costs microseconds and records nothing."""

    def refuse(*_args, **_named):
        raise AssertionError

    monkeypatch.setattr(trace, "get_tracer", refuse)
    async with client(application()) as http:
        assert (await http.get("/sync")).status_code == 200


@pytest.mark.parametrize("status", [101, 204, 205, 304])
async def test_a_status_without_a_body_is_answered_without_one(status):
    """`HTTPException(304)` is an answer, not an error: a body would break the connection on a real server."""
    api = application()

    @api.get("/bodiless")
    async def bodiless():
        raise HTTPException(status, headers={"etag": "x"})

    messages = await exchange(api, "/bodiless")
    assert messages[0]["status"] == status
    assert (b"etag", b"x") in messages[0]["headers"]
    assert all(not message["body"] for message in messages[1:])
    assert not any(name == b"content-length" and value != b"0" for name, value in messages[0]["headers"])


async def exchange(api, path, *received, method="GET", kind="http", headers=()):
    """What the application sends when it is asked by these messages, and then hears nothing more."""
    coming = list(received) or [{"type": "http.request", "body": b"", "more_body": False}]
    sent = []

    async def receive():
        return coming.pop(0) if coming else await nobody()

    async def send(message):
        sent.append(message)

    scope = {
        "type": kind, "method": method, "path": path, "headers": list(headers), "query_string": b"", "root_path": "",
        "scheme": "http", "server": ("test", 80), "client": ("test", 1), "http_version": "1.1", "subprotocols": [],
    }  # fmt: skip
    await api(scope, receive, send)
    return sent


@pytest.mark.parametrize("path", ["/raw", "/login"])
async def test_an_upload_that_breaks_off_is_a_caller_that_went_away(path):
    """It is counted as 499, whether the handler reads the body or FastAPI does, and is no error in the log."""
    api = application()

    @api.post("/raw")
    async def raw(request: Request):
        return len(await request.body())

    labels = {"method": "POST", "route": path}
    before = {
        status: metric("mainstay_http_requests_total", status=status, **labels) for status in ("499", "500", "400")
    }
    begun = {"type": "http.request", "body": b"{", "more_body": True}
    with captured_logs(logging.WARNING) as lines:
        await exchange(api, path, begun, {"type": "http.disconnect"}, method="POST")
    after = {status: metric("mainstay_http_requests_total", status=status, **labels) for status in before}
    assert after == {**before, "499": before["499"] + 1}
    assert lines == []


async def test_an_error_after_the_caller_went_away_is_still_an_error():
    """Only what says that the caller left is quiet; a bug is logged, and the request is counted as 499 all the same."""

    async def app(scope, receive, send):
        await receive()
        msg = "a bug"
        raise RuntimeError(msg)

    labels = {"method": "GET", "route": "unmatched", "status": "499"}
    before = metric("mainstay_http_requests_total", **labels)
    with captured_logs() as lines:
        await exchange(ObservabilityMiddleware(app), "/", {"type": "http.disconnect"})
    assert [(line["level"], line["event"]) for line in lines] == [
        ("error", "GET unmatched failed"), ("info", "GET unmatched 499")
    ]  # fmt: skip
    assert metric("mainstay_http_requests_total", **labels) == before + 1


async def test_an_instrumented_application_inside_of_another_adds_nothing():
    """The id inside is the id outside, an error is answered and logged with it, and the request is counted once."""
    inner, outer = FastAPI(), FastAPI()

    @inner.get("/who")
    async def who():
        return current().correlation_id

    @inner.get("/sold-out")
    async def sold_out():
        raise SoldOut

    instrument(inner)
    outer.mount("/inner", inner)
    instrument(outer)
    labels = {"method": "GET", "route": "/inner/who", "status": "200"}
    before = metric("mainstay_http_requests_total", **labels)
    async with client(outer) as http:
        answer = await http.get("/inner/who")
        assert answer.json() == answer.headers["x-correlation-id"]
        assert answer.headers.get_list("x-correlation-id") == [answer.json()]
        answer = await http.get("/inner/sold-out")
        assert answer.json()["correlation_id"] == answer.headers["x-correlation-id"]
    assert metric("mainstay_http_requests_total", **labels) == before + 1


async def test_an_error_in_a_websocket_is_logged_in_its_context():
    """The line has the id of the socket, and the error goes on to the server; a peer that leaves is no error."""
    api = application()

    @api.websocket("/ws")
    async def ws(socket: WebSocket):
        await socket.accept()
        await socket.receive_text()
        msg = "broke"
        raise RuntimeError(msg)

    connect, text = {"type": "websocket.connect"}, {"type": "websocket.receive", "text": "x"}
    left = {"type": "websocket.disconnect", "code": 1001}
    with captured_logs() as lines:
        with pytest.raises(RuntimeError, match="broke"):
            await exchange(api, "/ws", connect, text, kind="websocket", headers=[(b"x-correlation-id", b"ws-1")])
        await exchange(api, "/ws", connect, left, kind="websocket")
    assert [(line["event"], line["correlation_id"]) for line in lines[:2]] == [
        ("websocket /ws failed", "ws-1"), ("websocket /ws 1011", "ws-1")
    ]  # fmt: skip
    assert [line["event"] for line in lines[2:]] == ["websocket /ws 1001"]


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text;version=x.y",
        "application/openmetrics-text;version",
        ";;;=,=",
        "text/plain;version=9.x",
    ],
)
async def test_a_strange_accept_gets_the_metrics_all_the_same(accept):
    """What a scraper says about versions may be nonsense; the metrics are not withheld for it."""
    app = App(ObservabilityModule.for_root(ObservabilitySettings(service_name="orders", metrics_public=True)))
    async with app, client(application(app=app)) as http:
        answer = await http.get("/metrics", headers={"accept": accept})
    assert answer.status_code == 200
    assert "mainstay_http_requests" in answer.text


async def test_what_runs_after_the_answer_is_not_in_its_time():
    """A background task ends later than the answer, and nobody waited for it."""
    api, hour = application(), 3600.0
    clock = [0.0]

    @api.get("/background")
    async def background(tasks: BackgroundTasks):
        clock[0] += 1.0

        async def later():
            clock[0] += hour

        tasks.add_task(later)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mainstay.observability._facts.perf_counter", lambda: clock[0])
        async with client(api) as http:
            await http.get("/background")
    assert clock[0] == hour + 1
    assert metric("mainstay_http_request_seconds_sum", method="GET", route="/background") == 1.0


@pytest.mark.parametrize("seconds", [float("inf"), float("nan")])
async def test_never_is_no_retry_after(seconds):
    """An error whose time to come back is no number is answered without the header, not with another error."""
    api = application()

    @api.get("/never")
    async def never():
        raise Closed(retry_after_seconds=seconds)

    async with client(api) as http:
        answer = await http.get("/never")
    assert (answer.status_code, "retry-after" in answer.headers) == (503, False)


@pytest.mark.parametrize("what", [Exception, 500])
def test_a_handler_that_would_never_be_called_is_refused(what):
    """Unhandled errors are ours to answer; a handler of the application's own for them is a mistake to be seen."""
    api = FastAPI()
    api.add_exception_handler(what, lambda _request, _error: None)  # type: ignore[arg-type]  # any class or status is tried
    with pytest.raises(ConfigurationError, match="would never be called"):
        instrument(api)


@pytest.mark.parametrize(
    ("mount", "paths"),
    [
        ("/int/{tenant:int}", ["/int/7", "/int/007", "/int/0007"]),
        (
            "/uuid/{tenant:uuid}",
            [f"/uuid/{'ABCDEFAB' if up else 'abcdefab'}-1234-1234-1234-abcdefabcdef" for up in (0, 1)],
        ),
        ("/path/{rest:path}/end", ["/path/a/b/end", "/path/a/c/end", "/path//end"]),
        ("/both/{a}/{b:int}", ["/both/7/007", "/both/7/0007"]),
        ("/7/{n:int}", ["/7/007", "/7/0007"]),
    ],
)
async def test_trap_12_no_value_in_a_mount_becomes_a_label(mount, paths):
    """Whatever a stranger writes where a mount has a parameter, the requests are counted under one template."""
    api, inner = FastAPI(), FastAPI()

    @inner.get("/items/{item}")
    async def item(item: str):
        return item

    api.mount(mount, inner)
    instrument(api)
    labels = {"method": "GET", "route": "/items/{item}", "status": "200"}
    before = metric("mainstay_http_requests_total", **labels)
    async with client(api) as http:
        for path in paths:
            assert (await http.get(f"{path}/items/5")).status_code == 200
    assert metric("mainstay_http_requests_total", **labels) == before + len(paths)


async def test_trap_11_an_executor_needs_the_context_to_be_carried():
    """`asyncio.to_thread` carries it by itself; `run_in_executor` does not, and needs `copy_context().run`."""
    loop = asyncio.get_running_loop()

    def log():
        logging.getLogger("lib").warning("from a thread")
        return current().correlation_id

    with captured_logs() as lines, bind(correlation_id="c-1"):
        assert await loop.run_in_executor(None, log) is None
        assert await loop.run_in_executor(None, copy_context().run, log) == "c-1"
        assert await asyncio.to_thread(log) == "c-1"
    assert [line.get("correlation_id") for line in lines] == [None, "c-1", "c-1"]


async def test_trap_11_a_bind_across_a_yield_belongs_to_whoever_iterates():
    """Held across a yield it is seen by the caller and cannot be undone by another task; inside of a step, neither."""

    async def held():
        with bind(actor="the generator"):
            yield 1
            yield 2

    async def inside():
        for n in (1, 2):
            with bind(actor="the generator"):
                seen = current().actor
            yield n, seen

    wrong = held()
    await anext(wrong)
    assert current().actor == "the generator"  # in the caller, who bound nothing
    with pytest.raises(ValueError, match="different Context"):
        await asyncio.create_task(wrong.aclose())
    with bind(actor=None):
        async for _, seen in inside():
            assert (seen, current().actor) == ("the generator", None)


async def test_trap_11_nothing_of_a_request_is_left_when_its_answer_is_streamed():
    """The middleware's context and span are around the whole answer, not held by the generator that makes it."""
    seen = []

    async def body():
        for _ in range(2):
            seen.append(current().correlation_id)
            yield b"x"

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        async for part in body():
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    await exchange(ObservabilityMiddleware(app), "/", headers=[(b"x-correlation-id", b"c-1")])
    assert seen == ["c-1", "c-1"]
    assert current().correlation_id is None
