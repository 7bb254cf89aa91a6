"""The lines of a request: one for itself, one more where it failed by our fault, in each layer that answers."""

import asyncio
import logging
import uuid
from concurrent.futures import Future
from typing import Any

import httpx
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request, Response, WebSocket
from fastapi.responses import StreamingResponse
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.openmetrics.exposition import generate_latest
from pydantic import ValidationError
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect

from mainstay.core import App, ConfigurationError, MainstayError, bind, current
from mainstay.observability import (
    ObservabilityMiddleware,
    ObservabilityModule,
    ObservabilitySettings,
    Probes,
    RequestSettings,
)
from mainstay.observability._red import Histograms, histograms
from mainstay.observability.fastapi import instrument
from mainstay.observability.fastapi_probes import probe_router
from mainstay.observability.testing import captured_logs, metric


class LedgerBroken(MainstayError):
    code = "SYS_LEDGER_BROKEN"
    status = 500
    title = "Ledger broken"


class SoldOut(MainstayError):
    code = "BIZ_LINE_SOLD_OUT"
    status = 409
    title = "Sold out"


class Mute(Exception):
    """Cannot say what it is."""

    def __str__(self):
        raise RuntimeError

    __repr__ = __str__


class Unlike(BaseException):
    """None of the exceptions that programs catch."""


def client(asgi, **options):
    return httpx.AsyncClient(transport=httpx.ASGITransport(asgi, **options), base_url="http://test")


def of(lines, logger):
    return [line for line in lines if line.get("logger") == logger]


def failures(lines):
    return [line for line in lines if line["level"] == "error"]


async def exchange(asgi, path="/", *received, headers=(), kind="http", method="GET", send=None, **scope):
    """What is sent to whom sends these messages, and then nothing more."""
    coming, sent = list(received) or [{"type": "http.request", "body": b"", "more_body": False}], []

    async def receive():
        return coming.pop(0) if coming else await asyncio.get_running_loop().create_future()

    async def keep(message):
        sent.append(message)

    whole = {
        "type": kind, "path": path, "headers": list(headers), "query_string": b"", "root_path": "", "scheme": "http",
        "server": ("test", 80), "client": ("10.0.0.9", 1), "http_version": "1.1", "subprotocols": [],
    }  # fmt: skip
    if kind == "http":
        whole["method"] = method
    await asgi({**whole, **scope}, receive, send or keep)
    return sent


def application():
    api = FastAPI()
    add_failures(api)
    add_binding(api)
    add_bodies(api)
    instrument(api)
    return api


def add_failures(api):
    """Each way to end in an error."""

    @api.get("/domain")
    async def domain():
        detail = "row 7"
        raise LedgerBroken(detail)

    @api.get("/http")
    async def http():
        raise HTTPException(500, "boom at 10.0.0.3")

    @api.get("/returned")
    async def returned():
        return Response(status_code=502)

    @api.get("/bug/{n}")
    async def bug(n: int):
        raise RuntimeError(n)

    @api.get("/sold-out")
    async def sold_out():
        raise SoldOut

    @api.get("/group")
    async def group():
        async def lost():
            raise LookupError

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(lost())

    @api.get("/mute")
    async def mute():
        raise Mute


def add_binding(api):
    """Dependencies that say who asks."""

    async def authenticated():
        with bind(actor="ann", tenant="acme"):
            yield

    def in_a_thread():
        with bind(actor="bob"):
            yield

    @api.get("/bound", dependencies=[Depends(authenticated)])
    async def bound(how: str = ""):
        if how == "bug":
            raise RuntimeError
        if how == "domain":
            raise LedgerBroken
        return "x"

    @api.get("/thread", dependencies=[Depends(in_a_thread)])
    async def thread():
        return current().actor


def add_bodies(api):
    """What is read and written, also after the answer and over a WebSocket."""

    @api.get("/afterwards")
    async def background(tasks: BackgroundTasks):
        async def later():
            raise RuntimeError

        tasks.add_task(later)

    @api.post("/echo/{n}")
    async def echo(n: int, request: Request):
        return Response(await request.body() * n)

    @api.get("/stream")
    async def stream():
        async def parts():
            yield b"one"
            msg = "half way"
            raise OSError(msg)

        return StreamingResponse(parts())

    @api.websocket("/ws/{room}")
    async def ws(socket: WebSocket, room: str):
        await socket.accept()
        with bind(actor=room):
            await socket.send_text(await socket.receive_text() + "é")
        await socket.close(4001 if room == "own" else 1000)


@pytest.mark.parametrize(
    ("path", "route", "status", "code"),
    [
        ("/domain", "/domain", 500, "SYS_LEDGER_BROKEN"),
        ("/http", "/http", 500, "SYS_INTERNAL"),
        ("/returned", "/returned", 502, None),
        ("/bug/7", "/bug/{n}", 500, "SYS_INTERNAL"),
        ("/group", "/group", 500, "SYS_INTERNAL"),
        ("/mute", "/mute", 500, "SYS_INTERNAL"),
    ],
)
async def test_a_5xx_is_logged_once_in_each_layer_that_answers(path, route, status, code):
    """With its id, its route and its code; the line of the request stands beside it, and is no second error."""
    async with client(application()) as http:
        with captured_logs() as lines:
            answer = await http.get(path, headers={"x-correlation-id": "c-5"})
    assert answer.status_code == status
    (line,) = failures(lines)
    assert (line["event"], line["correlation_id"]) == (f"GET {route} failed", "c-5")
    assert (line["route"], line["status"], line.get("code")) == (route, status, code)
    assert ("exc_info" in line) == (code is not None)
    (own,) = of(lines, "mainstay.access")
    assert (own["event"], own["level"]) == (f"GET {route} {status}", "warning")


@pytest.mark.parametrize("how", ["instrumented", "wrapped", "added first"])
async def test_a_500_has_its_id_wherever_the_middleware_stands(how):
    """Around the whole application, outermost in it, or inside of others: the header, and one line with the error."""
    api = FastAPI()

    @api.get("/bug")
    async def bug():
        raise RuntimeError

    async def dispatch(request, call_next):
        return await call_next(request)

    asgi: Any = api
    if how == "wrapped":
        asgi = ObservabilityMiddleware(api)
    elif how == "added first":
        api.add_middleware(ObservabilityMiddleware)
        api.add_middleware(BaseHTTPMiddleware, dispatch=dispatch)
    else:
        instrument(api)
    async with client(asgi, raise_app_exceptions=False) as http:
        with captured_logs() as lines:
            answer = await http.get("/bug", headers={"x-correlation-id": "c-500"})
    assert (answer.status_code, answer.headers["x-correlation-id"]) == (500, "c-500")
    (line,) = failures(lines)
    assert (line["event"], line["correlation_id"], line["exc_info"][0]) == ("GET /bug failed", "c-500", RuntimeError)
    assert [line["event"] for line in of(lines, "mainstay.access")] == ["GET /bug 500"]


async def test_what_the_caller_causes_is_no_error_of_ours():
    """A domain error below 500 has the line of its request only, in FastAPI and in a plain application."""

    async def plain(scope, receive, send):
        raise SoldOut

    for asgi, event in ((application(), "GET /sold-out 409"), (ObservabilityMiddleware(plain), "GET unmatched 409")):
        async with client(asgi) as http:
            with captured_logs() as lines:
                assert (await http.get("/sold-out")).status_code == 409
        own = [line for line in lines if not line["logger"].startswith("httpx")]
        assert [(line["event"], line["level"]) for line in own] == [(event, "info")]


async def test_the_line_of_a_request_says_all_of_it():
    """Template, status, seconds, bytes in both directions, client, and who asked for whom."""
    with captured_logs() as lines:
        chunks = [
            {"type": "http.request", "body": b"1234", "more_body": True}, {"type": "http.request", "body": b"5"}
        ]  # fmt: skip
        await exchange(application(), "/echo/3", *chunks, method="POST", headers=[(b"x-correlation-id", b"c-1")])
        async with client(application()) as http:
            await http.get("/bound")
    first, second = of(lines, "mainstay.access")
    assert first.pop("duration_seconds") >= 0
    assert first == {
        "event": "POST /echo/{n} 200", "level": "info", "logger": "mainstay.access", "method": "POST",
        "route": "/echo/{n}", "status": 200, "request_bytes": 5, "response_bytes": 15, "client": "10.0.0.9",
        "correlation_id": "c-1",
    }  # fmt: skip
    assert (second["actor"], second["tenant"]) == ("ann", "acme")


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("how", ["", "bug", "domain"])
async def test_what_a_dependency_bound_is_in_the_lines_outside(how, wrapped):
    """It is undone when the error has left it, or in a task that a middleware made, and the lines say it still."""
    api = application()
    if wrapped:

        async def dispatch(request, call_next):
            return await call_next(request)

        inner, api = api, FastAPI()
        api.add_middleware(BaseHTTPMiddleware, dispatch=dispatch)
        api.mount("", inner)
        instrument(api)
    async with client(api) as http:
        with captured_logs() as lines:
            answer = await http.get("/bound", params={"how": how})
    assert answer.status_code == (500 if how else 200)
    told = [*failures(lines), *of(lines, "mainstay.access")]
    assert len(told) == (2 if how else 1)
    assert [(line["actor"], line["tenant"]) for line in told] == [("ann", "acme")] * len(told)
    assert current().actor is None


async def test_a_dependency_that_is_a_plain_generator_fails_no_request():
    """It begins and ends in two threads; what it binds is in the line, though never in the handler."""
    async with client(application()) as http:
        with captured_logs() as lines:
            answer = await http.get("/thread")
    assert (answer.status_code, answer.json()) == (200, None)
    assert failures(lines) == []
    assert [line["actor"] for line in of(lines, "mainstay.access")] == ["bob"]


async def test_who_asks_is_the_one_who_was_authenticated():
    """Neither the gateway that passed the request on, nor what the handler does in another name for a while."""
    api = FastAPI()

    async def authenticated():
        with bind(actor="ann"):
            yield

    @api.get("/x", dependencies=[Depends(authenticated)])
    async def x(how: str):
        with bind(actor="batch"):
            if how == "inside":
                raise RuntimeError
        if how == "outside":
            raise RuntimeError

    instrument(api, trusted=True)
    found = []
    async with client(api) as http:
        for how in ("", "outside", "inside"):
            with captured_logs() as lines:
                await http.get("/x", params={"how": how}, headers={"x-actor": "gateway"})
            found.append([line["actor"] for line in lines if line["logger"].startswith("mainstay")])
    assert found == [["ann"], ["ann", "ann"], ["batch", "batch"]]


async def test_a_handler_can_say_who_asks():
    """For a dependency that is no coroutine, and an application without a router: in the facts of the request."""

    async def app(scope, receive, send):
        facts = scope["mainstay.observability"]
        facts.actor, facts.route = "ann", "/own/{route}"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    with captured_logs() as lines:
        await exchange(ObservabilityMiddleware(app), "/own/7")
    assert [(line["event"], line["actor"]) for line in lines] == [("GET /own/{route} 200", "ann")]


async def test_an_answer_that_breaks_off_is_a_failure():
    """By an exception, or by an application that returns too early: 500 in the metrics, one line, and no second."""

    async def early(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})

    labels = {"method": "GET", "route": "unmatched", "status": "500"}
    before = metric("mainstay_http_requests_total", **labels)
    with captured_logs() as lines:
        await exchange(ObservabilityMiddleware(early))
    assert [(line["event"], line["level"]) for line in lines] == [
        ("GET unmatched failed", "error"), ("GET unmatched 500", "warning")
    ]  # fmt: skip
    assert metric("mainstay_http_requests_total", **labels) == before + 1
    with captured_logs() as lines, pytest.raises(OSError, match="half way"):
        await exchange(application(), "/stream")
    assert [line["event"] for line in lines] == ["GET /stream failed", "GET /stream 500"]


async def test_an_application_that_does_not_answer_is_answered_for():
    """It is our mistake, and no client that went away."""

    async def silent(scope, receive, send):
        pass

    async with client(ObservabilityMiddleware(silent)) as http:
        with captured_logs() as lines:
            answer = await http.get("/")
    assert (answer.status_code, answer.json()["code"]) == (500, "SYS_INTERNAL")
    assert [line["status"] for line in failures(lines)] == [500]


async def test_what_fails_after_the_answer_is_told():
    """The client has its answer, and the request is no failure; the background task is one, and the server's matter."""
    with captured_logs() as lines, pytest.raises(RuntimeError):
        await exchange(application(), "/afterwards")
    assert [(line["event"], line["level"]) for line in lines] == [
        ("GET /afterwards 200", "info"), ("GET /afterwards failed after its answer", "error")
    ]  # fmt: skip


async def test_the_line_does_not_wait_for_what_runs_in_the_background():
    """A request is over when it is answered; a process that ends during the rest has told of it."""
    api, ended = FastAPI(), asyncio.Event()

    @api.get("/x")
    async def x(tasks: BackgroundTasks):
        tasks.add_task(ended.wait)

    instrument(api)
    told = asyncio.Event()

    async def send(message):
        if message["type"] == "http.response.body":
            asyncio.get_running_loop().call_soon(told.set)

    with captured_logs() as lines:
        task = asyncio.create_task(exchange(api, "/x", send=send))
        await told.wait()
        assert [line["event"] for line in lines] == ["GET /x 200"]
        assert not task.done()
        ended.set()
        await task
    assert len(lines) == 1


@pytest.mark.parametrize("wrong", [Unlike, KeyboardInterrupt, SystemExit])
async def test_what_is_no_exception_goes_on_and_is_told(wrong):
    """It is not ours to end; a caller of a process that goes on has an answer."""

    async def app(scope, receive, send):
        raise wrong

    sent = []

    async def send(message):
        sent.append(message)

    with captured_logs() as lines:
        try:
            await exchange(ObservabilityMiddleware(app), send=send)
        except wrong:
            pass
        else:
            raise AssertionError
    assert [line["event"] for line in lines] == ["GET unmatched failed", "GET unmatched 500"]
    assert [message["type"] for message in sent] == (
        ["http.response.start", "http.response.body"] if wrong is Unlike else []
    )


async def test_a_stray_cancellation_is_a_failure_like_any_other():
    """Work that was cancelled inside is no request to stop; the client gets its 500."""

    async def app(scope, receive, send):
        work: Future[None] = Future()
        work.cancel()
        await asyncio.wrap_future(work)

    async with client(ObservabilityMiddleware(app)) as http:
        with captured_logs() as lines:
            assert (await http.get("/")).status_code == 500
    assert [line["event"] for line in failures(lines)] == ["GET unmatched failed"]


@pytest.mark.parametrize("moment", ["before", "reading", "starting", "writing", "waiting"])
async def test_a_client_may_leave_at_any_moment(moment):
    """It is no error, in each way that says so; before an answer it is counted as 499, and there is one line."""

    class ClientDisconnected(OSError):
        """As uvicorn has it."""

    async def app(scope, receive, send):
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        if moment == "waiting":
            raise (
                ExceptionGroup("", [ClientDisconnect()]) if (await receive())["type"] == "http.disconnect" else OSError
            )
        if moment == "reading" and (await receive())["type"] == "http.disconnect":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})

    async def send(message):
        if moment == "starting" or message["type"] == "http.response.body":
            raise ClientDisconnected

    left, body = {"type": "http.disconnect"}, {"type": "http.request", "body": b"", "more_body": True}
    with captured_logs() as lines:
        coming = [left] if moment == "before" else [body, left]
        await exchange(ObservabilityMiddleware(app), "/", *coming, send=send)
    (line,) = lines
    # What was to be sent is what was answered: the server has taken it, and who got it is not known.
    assert (line["status"], line["level"]) == (200 if moment in ("writing", "starting") else 499, "info")


async def test_an_error_of_ours_that_looks_like_the_servers_is_an_error():
    """Only the server knows whether the client went away: an OSError of a database is none of that."""

    async def app(scope, receive, send):
        await receive()
        raise ConnectionResetError

    with captured_logs() as lines:
        await exchange(ObservabilityMiddleware(app))
        await exchange(ObservabilityMiddleware(app), "/", {"type": "http.disconnect"})
    assert [line["event"] for line in failures(lines)] == ["GET unmatched failed"] * 2


async def test_a_websocket_has_a_line():
    """With its close code, its bytes and who was there; one that no route takes has the status of its refusal."""
    api, room = application(), "own"
    connect, text = {"type": "websocket.connect"}, {"type": "websocket.receive", "text": "é"}
    labels = {"route": "/ws/{room}", "status": "4xxx"}
    before = metric("mainstay_websockets_total", **labels)
    timed = metric("mainstay_websocket_seconds_count", route="/ws/{room}")
    with captured_logs() as lines:
        await exchange(api, f"/ws/{room}", connect, text, kind="websocket")
        await exchange(api, "/nowhere", connect, kind="websocket")
    first, second = lines
    assert first.pop("duration_seconds") >= 0
    assert first.pop("correlation_id")
    assert first == {
        "event": "websocket /ws/{room} 4001", "level": "info", "logger": "mainstay.access", "method": "websocket",
        "route": "/ws/{room}", "close_code": 4001, "request_bytes": 2, "response_bytes": 4, "client": "10.0.0.9",
        "actor": "own",
    }  # fmt: skip
    assert (second["event"], second["level"]) == ("websocket unmatched 403", "info")
    assert metric("mainstay_websockets_total", **labels) == before + 1
    assert metric("mainstay_websocket_seconds_count", route="/ws/{room}") == timed + 1
    assert metric("mainstay_websockets_open") == 0


async def test_excluded_routes_and_probes_have_no_line():
    """By their template; an error there is told all the same."""
    settings = RequestSettings(excluded=frozenset({"/internal/{name}"}))
    app = App(ObservabilityModule.for_root(ObservabilitySettings(service_name="orders", requests=settings)))
    api = FastAPI()

    @api.get("/internal/{name}")
    async def internal(name: str):
        if name == "bug":
            raise RuntimeError

    instrument(api, app)
    labels = {"method": "GET", "route": "/internal/{name}", "status": "200"}
    async with app, client(api) as http:
        with captured_logs() as lines:
            for path in ("/internal/x", "/internal/bug", "/health/live", "/health/ready"):
                await http.get(path)
    told = [line for line in lines if line["logger"] in ("mainstay.access", "mainstay.observability")]
    assert [line["event"] for line in told] == ["GET /internal/{name} failed"]
    assert metric("mainstay_http_requests_total", **labels) == 0


async def test_a_probe_that_says_no_is_no_failure():
    """Wherever it is answered: the platform asks every second, and is told what it needs to know."""
    app = App(ObservabilityModule.for_root(ObservabilitySettings(service_name="orders")))
    api, inner = FastAPI(), FastAPI()
    api.mount("/own", Probes(app))
    api.include_router(probe_router(app), prefix="/router")
    instrument(inner, app)
    api.mount("/inner", inner)
    instrument(api)
    async with client(api) as http:
        with captured_logs() as lines:
            for path in ("/own", "/router"):
                assert (await http.get(f"{path}/health/ready")).status_code == 503
            async with app:
                assert (await http.get("/inner/health/ready")).status_code == 200
    assert [line for line in lines if line["logger"] in ("mainstay.access", "mainstay.observability")] == []


async def test_probes_have_a_line_where_it_is_asked_for():
    """With the status that the platform saw."""
    settings = RequestSettings(access_probes=True)
    app = App(ObservabilityModule.for_root(ObservabilitySettings(service_name="orders", requests=settings)))
    api = FastAPI()
    instrument(api, app)
    async with app, client(api) as http:
        with captured_logs() as lines:
            await http.get("/health/live")
    assert [line["event"] for line in of(lines, "mainstay.access")] == ["GET /health/live 200"]


@pytest.mark.parametrize(
    ("root", "path", "found"),
    [
        ("", "/health/live", True),
        ("/api", "/health/live", True),
        ("/api", "/api/health/live", True),
        ("/api", "/api/api/health/live", True),
        ("/api/", "/api//health/live", True),
        ("/tenants/a%2fb", "/tenants/a%2fb/health/live", True),
        ("", "/api/health/live", False),
        ("/api", "/apihealth/live", False),
        ("/api", "/other/health/live", False),
        ("/health", "/health/health/live", True),
    ],
)
async def test_probes_are_found_under_any_root_path(root, path, found):
    """As the server puts it before the path, a framework names it beside, or a proxy leaves it there; no other path."""
    app = App(ObservabilityModule.for_root(ObservabilitySettings(service_name="orders")))

    async def inner(scope, receive, send):
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with app:
        sent = await exchange(ObservabilityMiddleware(inner, app=app), path, root_path=root)
    assert sent[0]["status"] == (200 if found else 404)


async def test_sizes_are_measured_and_lead_to_the_trace():
    """By template; the exemplar names the trace of a request that is kept, and of no other."""
    api = application()
    labels = {"method": "POST", "route": "/echo/{n}"}
    names = ("request_bytes", "response_bytes")
    before = [metric(f"mainstay_http_{name}_sum", **labels) for name in names]
    body, trace = {"type": "http.request", "body": b"1234"}, "0af7651916cd43dd8448eb211c80319c"
    with captured_logs():
        for n, flags in ((2, b"01"), (0, b"00"), (0, None)):
            parent = b"00-%s-b7ad6b7169203331-%s" % (trace.encode(), flags) if flags else b""
            await exchange(api, f"/echo/{n}", body, method="POST", headers=[(b"traceparent", parent)])
    after = [metric(f"mainstay_http_{name}_sum", **labels) for name in names]
    assert [new - old for new, old in zip(after, before, strict=True)] == [12, 8]
    shown = generate_latest(REGISTRY).decode().splitlines()
    ours = [line for line in shown if line.startswith("mainstay_http_request_seconds_bucket") and "/echo/{n}" in line]
    assert [line.partition(" # ")[2].partition("}")[0] for line in ours if " # " in line] == [f'{{trace_id="{trace}"']


def test_buckets_are_settings_of_the_process():
    """Two sets of them in one process are refused, and so are bounds that are none."""
    own = RequestSettings(seconds_buckets=(0.1, 1), bytes_buckets=(10,))
    registry = CollectorRegistry()
    Histograms(own, registry).of("GET", "/").seconds.observe(0.5)
    shown = [line for line in generate_latest(registry).decode().splitlines() if "seconds_bucket" in line]
    assert [line.partition('le="')[2] for line in shown] == [
        '0.1",method="GET",route="/"} 0.0',
        '1.0",method="GET",route="/"} 1.0',
        '+Inf",method="GET",route="/"} 1.0',
    ]
    app = App(ObservabilityModule.for_root(ObservabilitySettings(service_name="orders", requests=own)))
    histograms(RequestSettings()).of("GET", "/used").seconds.observe(1)
    with pytest.raises(ConfigurationError, match="other buckets"):
        ObservabilityMiddleware(FastAPI(), app=app)
    for wrong in ((), (0,), (2, 1), (1, 1), (float("inf"),), (float("nan"),)):
        with pytest.raises(ValidationError, match="seconds_buckets"):
            RequestSettings(seconds_buckets=wrong)


async def test_a_handler_of_lines_that_raises_fails_no_request(capsys):
    """The application has it; its fault is told where faults of handlers are, and the client has its answer."""

    class Broken(logging.Handler):
        def handle(self, record):
            raise RuntimeError

    broken, logger = Broken(), logging.getLogger("mainstay")
    logger.addHandler(broken)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        async with client(application()) as http:
            assert (await http.get("/bug/7")).status_code == 500
    finally:
        logger.removeHandler(broken)
        logger.setLevel(level)
    assert capsys.readouterr().err.count("a line could not be logged (RuntimeError)") == 2


@pytest.mark.parametrize(
    "headers",
    [
        [(b"x-correlation-id", b"a\r\nb\x1b[31m"), (b"x-actor", b"\x00"), (b"traceparent", b"\xff" * 55)],
        [(b"x-correlation-id", b"x" * 1_000_000), (b"x-actor", b"%41" * 400_000), (b"x-tenant", b"%" * 1_000_000)],
        [(b"traceparent", b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-zz"), (b"tracestate", b"a=" * 100_000)],
    ],
)
async def test_hostile_headers_are_not_looked_at(headers):
    """What is too long, or no text, is as if it were not there."""
    seen = []

    async def app(scope, receive, send):
        seen.append(current().to_dict())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    with captured_logs() as lines:
        await exchange(ObservabilityMiddleware(app, trusted=True), headers=headers)
    assert list(seen[0]) == ["correlation_id"]
    assert str(uuid.UUID(seen[0]["correlation_id"])) == seen[0]["correlation_id"]
    assert len(lines) == 1


@pytest.mark.parametrize("path", ["/übung/会社", "/\udcff", "/%00\n\x1b[31m", "/" + "x" * 100_000])
@pytest.mark.parametrize("method", ["GET", "HACK", "\n", "x" * 10_000])
async def test_hostile_paths_and_methods_are_no_label_and_no_line(path, method):
    """Of a request that no route answers nothing is repeated."""
    with captured_logs() as lines:
        await exchange(application(), path, method=method)
    (line,) = lines
    assert (line["route"], line["method"]) == ("unmatched", "GET" if method == "GET" else "other")


async def test_what_asgi_may_say_besides_goes_through():
    """Pushes, early hints, files and trailers are the server's business; a file is the end of an answer."""
    others: list[dict[str, Any]] = [
        {"type": "http.response.push", "path": "/style.css", "headers": []},
        {"type": "http.response.start", "status": 200, "headers": (), "trailers": True},
        {"type": "http.response.pathsend", "path": "/etc/hostname"},
        {"type": "http.response.trailers", "headers": []},
    ]

    async def app(scope, receive, send):
        for message in others:
            await send(message)

    with captured_logs() as lines:
        sent = await exchange(ObservabilityMiddleware(app))
        for kind in ("lifespan", "unknown"):
            assert await exchange(ObservabilityMiddleware(app), kind=kind) == others
    assert [message["type"] for message in sent] == [message["type"] for message in others]
    assert others[1]["headers"] == ()  # the application's own message is as it was
    assert [line["event"] for line in lines] == ["GET unmatched 200"]


async def test_answers_that_are_wrong_are_for_the_server_to_refuse():
    """A second beginning, a status that is none, a route that cannot be asked: nothing of ours raises."""

    class Route:
        @property
        def path(self):
            raise RuntimeError

    async def app(scope, receive, send):
        scope["route"] = Route()
        await send({"type": "http.response.start", "status": 9_999_999})
        await send({"type": "http.response.start", "headers": []})
        await send({"type": "http.response.body", "body": None})

    labels = {"method": "GET", "route": "unmatched", "status": "other"}
    before = metric("mainstay_http_requests_total", **labels)
    sent = await exchange(ObservabilityMiddleware(app))
    assert [message.get("status") for message in sent] == [9_999_999, None, None]
    assert metric("mainstay_http_requests_total", **labels) == before + 1
