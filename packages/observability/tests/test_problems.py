"""What a caller is told of an error: one form everywhere, and nothing of what it has sent."""

import asyncio
import json
import traceback
from datetime import date
from typing import Annotated, Any, Literal
from uuid import UUID

import httpx
import pytest
from fastapi import APIRouter, Body, Depends, FastAPI, Header, HTTPException, Query, Request, WebSocket
from pydantic import AnyUrl, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from mainstay.core import (
    AlreadyExists,
    ConfigurationError,
    FieldError,
    MainstayError,
    NotFound,
    Unavailable,
    already_exists,
    bind,
    not_found,
)
from mainstay.observability import ObservabilityMiddleware, Problem, ServiceProblem, problem_of
from mainstay.observability.fastapi import instrument
from mainstay.observability.testing import captured_logs

ORIGIN = "https://shop.example"
INTERNAL = "The request could not be completed."


class SoldOut(MainstayError):
    """There are no tickets left."""

    code = "BIZ_SOLD_OUT"
    status = 409
    title = "Sold out"
    public_message = "There are no tickets left."


class Broken(MainstayError):
    """The ledger does not balance."""

    code = "SYS_LEDGER_BROKEN"
    status = 500
    title = "Ledger broken"


class Busy(MainstayError):
    """A dependency wants to be left alone for a while."""

    code = "EXT_PAYMENTS_BUSY"
    status = 503
    title = "Payments busy"


class TooSimple(MainstayError, ValueError):
    """A secret that everybody has."""

    code = "VAL_TOO_SIMPLE"
    status = 422
    title = "Too simple"
    public_message = "Choose a longer one."


class Pin(BaseModel):
    """What is checked by validators of its own."""

    model_config = ConfigDict(extra="forbid")

    pin: str = "1234"
    both: str = "x"
    kind: Literal["debit", "credit"] = "debit"
    custom: str = ""
    asserted: str = ""
    told: str = ""

    @field_validator("pin")
    @classmethod
    def long(cls, pin: str) -> str:
        """Raise as most validators do, with what is wrong in the text."""
        if len(pin) > 4:
            msg = f"pin {pin!r} is too long"
            raise ValueError(msg)
        return pin

    @field_validator("custom")
    @classmethod
    def special(cls, value: str) -> str:
        """Raise pydantic's own error, under a name of pydantic's, too."""
        if value:
            raise PydanticCustomError(
                "int_parsing" if "int" in value else "pin_rule", "{value} is no good", {"value": value}
            )
        return value

    @field_validator("asserted")
    @classmethod
    def sure(cls, value: str) -> str:
        """Assert."""
        assert not value, f"{value} is not empty"
        return value

    @field_validator("told")
    @classmethod
    def said(cls, value: str) -> str:
        """Raise what the caller may see."""
        if value:
            raise TooSimple(value)
        return value

    @model_validator(mode="after")
    def agree(self) -> "Pin":
        """Raise for the whole."""
        if self.both == "hunter2":
            msg = f"{self.both} does not agree"
            raise ValueError(msg)
        return self


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    tricks: dict[str, int] = {}


class Order(BaseModel):
    """What says much of its input when it is wrong."""

    lines: list["Line"] = []
    prices: dict[str, int] = {}
    pet: Annotated[Cat | Dog, Field(discriminator="kind")] | None = None
    plain: int | Cat | None = None
    day: date | None = None
    site: AnyUrl | None = None
    number: UUID | None = None
    renamed: int = Field(0, validation_alias="asCalledOutside")
    amount: int = Field(1, ge=1, le=1000)


class Line(BaseModel):
    count: int


class Answer(BaseModel):
    """What an endpoint should have returned."""

    iban: str
    n: int


def login_application(name: str = "in") -> FastAPI:
    """An application to be mounted, which knows nothing of ours."""
    inner = FastAPI()

    @inner.post("/login")
    async def login(form: dict[str, int]) -> None: ...

    @inner.get("/sold-out")
    async def sold_out() -> None:
        raise SoldOut(name)

    @inner.get("/bug")
    async def bug() -> None:
        msg = "hunter2"
        raise RuntimeError(msg)

    return inner


async def a_header(x_number: Annotated[int, Header()] = 0) -> None:
    """A dependency of a router that is included."""


def application(**changes: Any) -> FastAPI:
    api = FastAPI(**changes)

    @api.get("/raise/{name}")
    async def raise_(name: str) -> None:
        raise made(name)

    @api.post("/pin")
    async def pin(form: Pin) -> None: ...

    orders = APIRouter(prefix="/orders")

    @orders.post("/{number}")
    async def order(number: int, order: Annotated[Order, Body(embed=True)], n: Annotated[int, Query()] = 0) -> None: ...

    api.include_router(orders, prefix="/v1", dependencies=[Depends(a_header)])

    @api.get("/response", response_model=Answer)
    async def response() -> Any:
        return {"iban": "DE89370400440532013000", "n": "x", "DE89370400440532013001": 1}

    @api.websocket("/ws/{name}")
    async def ws(socket: WebSocket, name: str, n: Annotated[int, Query()] = 0) -> None:
        if name.startswith("late"):
            await socket.accept()
        raise made(name.removeprefix("late-"))

    return api


def group_of(*errors: Exception) -> ExceptionGroup[Exception]:
    return ExceptionGroup("tasks", errors)


RAISED: dict[str, Any] = {
    "sold-out": lambda: SoldOut("shard 7 at 10.0.0.3"),
    "broken": lambda: Broken("row 7"),
    "busy": lambda: Busy("10.0.0.3", retry_after_seconds=1.2),
    "not-found": lambda: not_found("order", "hunter2"),
    "exists": lambda: already_exists("order", "hunter2"),
    "text": lambda: HTTPException(404, "no such order"),
    "limited": lambda: HTTPException(429, headers={"Retry-After": "7", "content-type": "text/plain", "x-tea": "yes"}),
    "dated": lambda: HTTPException(503, "x", headers={"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT"}),
    "split": lambda: HTTPException(400, "x", headers={"x-a": "b\r\nc: d", "x-b": "\u2603", "x c": "d", "x-c": "d"}),
    "detail": lambda: HTTPException(409, {"seats": [1, 2], "on": date(2026, 1, 2)}),
    "cycle": lambda: HTTPException(409, cycle()),
    "http-500": lambda: HTTPException(500, "boom at 10.0.0.3"),
    "http-503": lambda: HTTPException(503, {"host": "10.0.0.3"}),
    "teapot": lambda: HTTPException(418),
    "bug": lambda: RuntimeError("hunter2"),
    "group": lambda: group_of(SoldOut("a"), group_of(SoldOut("b"))),
    "busy-group": lambda: group_of(Busy(retry_after_seconds=1), Busy(retry_after_seconds=5), Busy()),
    "http-group": lambda: group_of(HTTPException(404, "one")),
    "mixed-group": lambda: group_of(SoldOut(), Broken()),
    "half-group": lambda: group_of(SoldOut(), RuntimeError("hunter2")),
    "service": lambda: of_service(403, "AUTH_FORBIDDEN"),
    "service-late": lambda: of_service(504, "EXT_DEADLINE"),
    "service-limits": lambda: of_service(429, "RATE_LIMITED", 3.0),
    "mute": lambda: Mute("hunter2"),
}  # fmt: skip


def made(name: str) -> Exception:
    """A new one of the errors that tests raise by name."""
    error: Exception = RAISED[name]()
    return error


def cycle() -> dict[str, object]:
    made: dict[str, object] = {}
    made["again"] = made
    return made


def of_service(status: int, code: str, seconds: float | None = None) -> ServiceProblem:
    error = ServiceProblem("payments", retry_after_seconds=seconds)
    error.status, error.code, error.title = status, code, "Theirs"
    return error


class Mute(MainstayError):
    """An error whose own code fails."""

    def __getattribute__(self, name: str) -> Any:
        if name in {"public_message", "status", "retry_after_seconds"}:
            raise KeyError(name)
        return super().__getattribute__(name)


def client(api: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test")


def checked(answer: httpx.Response) -> dict[str, Any]:
    """The body of an answer that is a problem in every respect."""
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert problem["status"] == answer.status_code
    assert problem["type"] == f"urn:problem-type:{problem['code']}"
    assert problem["correlation_id"] == answer.headers["x-correlation-id"]
    assert problem["instance"] == f"urn:correlation:{problem['correlation_id']}"
    assert isinstance(problem["title"], str)
    assert isinstance(problem["detail"], str)
    for told in problem.get("errors", ()):
        assert set(told) == {"location", "message", "type"}
    return problem


@pytest.mark.parametrize(
    ("name", "status", "code", "detail"),
    [
        ("sold-out", 409, "BIZ_SOLD_OUT", "There are no tickets left."),
        ("broken", 500, "SYS_LEDGER_BROKEN", INTERNAL),
        ("busy", 503, "EXT_PAYMENTS_BUSY", INTERNAL),
        ("not-found", 404, "RES_NOT_FOUND", "There is no such order."),
        ("exists", 409, "RES_ALREADY_EXISTS", "This order exists already."),
        ("text", 404, "RES_NOT_FOUND", "no such order"),
        ("detail", 409, "RES_CONFLICT", "The request is not valid."),
        ("cycle", 409, "RES_CONFLICT", "The request is not valid."),
        ("http-500", 500, "SYS_INTERNAL", INTERNAL),
        ("http-503", 503, "SYS_UNAVAILABLE", INTERNAL),
        ("teapot", 418, "VAL_REQUEST", "I'm a Teapot"),
        ("bug", 500, "SYS_INTERNAL", INTERNAL),
        ("group", 409, "BIZ_SOLD_OUT", "There are no tickets left."),
        ("busy-group", 503, "EXT_PAYMENTS_BUSY", INTERNAL),
        ("http-group", 404, "RES_NOT_FOUND", "one"),
        ("mixed-group", 500, "SYS_INTERNAL", INTERNAL),
        ("half-group", 500, "SYS_INTERNAL", INTERNAL),
        ("service", 502, "EXT_SERVICE", ServiceProblem.public_message),
        ("service-late", 504, "EXT_SERVICE", ServiceProblem.public_message),
        ("service-limits", 503, "EXT_SERVICE", ServiceProblem.public_message),
        ("mute", 500, "SYS_INTERNAL", INTERNAL),
    ],
)
@pytest.mark.parametrize("mounted", [False, True], ids=["plain", "mounted"])
async def test_every_error_is_a_problem(name: str, status: int, code: str, detail: str, *, mounted: bool) -> None:
    """Code, status and public message arrive, of a group the one that all in it agree on; nothing internal does."""
    api = application()
    if mounted:
        outer = FastAPI()
        outer.mount("/in", api)
        instrument(outer)
    else:
        instrument(api)
    async with client(outer if mounted else api) as http:
        answer = await http.get(f"{'/in' if mounted else ''}/raise/{name}")
    problem = checked(answer)
    assert (answer.status_code, problem["code"], problem["detail"]) == (status, code, detail)
    assert "10.0.0.3" not in answer.text
    assert "hunter2" not in answer.text


async def test_what_an_http_exception_says_below_500_arrives() -> None:
    """A detail that is no text is kept beside the sentence, headers too; what cannot be sent is left out."""
    api = application()
    instrument(api)
    async with client(api) as http:
        assert (await http.get("/raise/detail")).json()["details"] == {"seats": [1, 2], "on": "2026-01-02"}
        assert "details" not in (await http.get("/raise/cycle")).json()
        assert "details" not in (await http.get("/raise/http-503")).json()
        limited = await http.get("/raise/limited")
        assert checked(limited)["retry_after_seconds"] == 7.0
        assert limited.headers.get_list("retry-after") == ["7"]
        assert limited.headers["x-tea"] == "yes"
        assert (await http.get("/raise/dated")).headers["retry-after"] == "Fri, 31 Dec 1999 23:59:59 GMT"
        split = await http.get("/raise/split")
        assert {name for name in split.headers if name.startswith("x-")} == {"x-c", "x-correlation-id"}
        for name, seconds in [("busy", "2"), ("busy-group", "5"), ("service-limits", "3")]:
            assert (await http.get(f"/raise/{name}")).headers["retry-after"] == seconds
        for path, status, code in [("/nope", 404, "RES_NOT_FOUND"), ("/pin", 405, "VAL_METHOD")]:
            answer = await http.get(path)
            assert (answer.status_code, checked(answer)["code"]) == (status, code)
        assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("body", "location", "message", "kind"),
    [
        ({"pin": "hunter2"}, ["body", "pin"], "Input is not valid", "value_error"),
        ({"both": "hunter2"}, ["body"], "Input is not valid", "value_error"),
        ({"custom": "hunter2"}, ["body", "custom"], "Input is not valid", "pin_rule"),
        (
            {"custom": "hunter2 int"}, ["body", "custom"],
            "Input should be a valid integer, unable to parse string as an integer", "int_parsing",
        ),
        ({"asserted": "hunter2"}, ["body", "asserted"], "Input is not valid", "assertion_error"),
        ({"told": "hunter2"}, ["body", "told"], "Choose a longer one.", "VAL_TOO_SIMPLE"),
        ({"kind": "hunter2"}, ["body", "kind"], "Input should be 'debit' or 'credit'", "literal_error"),
        ({"hunter2": 1}, ["body", "*"], "Extra inputs are not permitted", "extra_forbidden"),
    ],
)  # fmt: skip
async def test_what_a_validator_says_is_not_repeated(body: Any, location: Any, message: str, kind: str) -> None:
    """Its text may quote the input; only an error of ours has a message that is meant for the caller."""
    api = application()
    instrument(api)
    async with client(api) as http:
        answer = await http.post("/pin", json=body)
    problem = checked(answer)
    assert (problem["status"], problem["code"]) == (422, "VAL_REQUEST")
    assert problem["errors"] == [{"location": location, "message": message, "type": kind}]
    assert "hunter2" not in answer.text


@pytest.mark.parametrize(
    ("order", "location", "message"),
    [
        ({"lines": [{"count": 1}, {"count": "hunter2"}]}, ["lines", 1, "count"], "Input should be a valid integer"),
        ({"lines": [{}]}, ["lines", 0, "count"], "Field required"),
        ({"prices": {"hunter2": "x"}}, ["prices", "*"], "Input should be a valid integer"),
        ({"pet": {"kind": "hunter2"}}, ["pet"], "The tag names none of the expected kinds"),
        ({"pet": {"kind": "cat", "lives": "hunter2"}}, ["pet", "cat", "lives"], "Input should be a valid integer"),
        ({"pet": {"kind": "dog", "tricks": {"hunter2": "x"}}}, ["pet", "dog", "tricks", "*"], "Input should be"),
        ({"plain": "hunter2"}, ["plain", "int"], "Input should be a valid integer"),
        ({"plain": {"kind": "cat"}}, ["plain", "Cat", "lives"], "Field required"),
        ({"day": "hunter2"}, ["day"], "Input should be a valid date"),
        ({"site": "hunter2"}, ["site"], "Input should be a valid URL"),
        ({"number": "hunter2"}, ["number"], "Input should be a valid UUID"),
        ({"asCalledOutside": "hunter2"}, ["asCalledOutside"], "Input should be a valid integer"),
        ({"amount": 0}, ["amount"], "Input should be greater than or equal to 1"),
        (7, [], "Input should be a valid dictionary or object to extract fields from"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("mounted", [False, True], ids=["plain", "mounted"])
async def test_a_location_has_the_names_of_the_model_and_none_of_the_input(
    order: Any, location: Any, message: str, *, mounted: bool
) -> None:
    """Through lists, unions, tags and aliases a caller sees where; a key that it has chosen itself is `*`."""
    api = application()
    if mounted:
        outer = Starlette(routes=[Mount("/in", app=CORSMiddleware(api))])
        instrument(outer)
    else:
        instrument(api)
    async with client(outer if mounted else api) as http:
        answer = await http.post(f"{'/in' if mounted else ''}/v1/orders/1", json={"order": order})
    told = checked(answer)["errors"]
    assert ["body", "order", *location] in [each["location"] for each in told]
    assert any(each["message"].startswith(message) for each in told)
    assert "hunter2" not in answer.text


async def test_parameters_and_broken_bodies_are_not_repeated_either() -> None:
    """The names of parameters are the application's, those of a dependency of an included router, too."""
    api = application()
    instrument(api)
    async with client(api) as http:
        answer = await http.post(
            "/v1/orders/hunter2?n=hunter3", json={"order": {}}, headers={"x-number": "hunter4"}
        )  # fmt: skip
        places = [each["location"] for each in checked(answer)["errors"]]
        assert sorted(places) == [["header", "x-number"], ["path", "number"], ["query", "n"]]
        broken = await http.post("/pin", content=b'{"pin": hunter2', headers={"content-type": "application/json"})
        (told,) = checked(broken)["errors"]
        assert (told["location"], told["message"]) == (["body", 8], "Input should be valid JSON")
    assert "hunter" not in answer.text + broken.text


async def test_so_many_mistakes_are_told_and_no_more() -> None:
    """An answer is no larger for a body that is all wrong."""
    api = application()
    instrument(api)
    async with client(api) as http:
        answer = await http.post("/v1/orders/1", json={"order": {"lines": [{}] * 5000}})
    problem = checked(answer)
    assert len(problem["errors"]) == 100
    assert problem["detail"] == "The request is not valid. Of its 5000 mistakes 100 are listed."


async def test_a_response_that_is_not_its_model_keeps_its_content() -> None:
    """Neither the answer nor the log line holds what the endpoint returned; the line says where it was wrong."""
    api = application()
    instrument(api)
    async with client(api) as http:
        with captured_logs() as lines:
            answer = await http.get("/response")
    assert checked(answer)["code"] == "SYS_INTERNAL"
    (line,) = [line for line in lines if line["level"] == "error"]
    text = "".join(traceback.format_exception(line["exc_info"][1]))
    assert "response.n: Input should be a valid integer" in text
    assert "in serialize_response" in text
    assert "DE89" not in text + answer.text


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("around", [False, True], ids=["alone", "inside of another"])
@pytest.mark.parametrize("name", ["bug", "group", "sold-out", "http-500"])
async def test_inside_of_cors_where_there_is_cors(order: str, name: str, *, around: bool) -> None:
    """A page of another origin can read every problem, however its application has arranged its middlewares."""
    api = application()

    async def dispatch(request: Request, call_next: Any) -> Any:
        return await call_next(request)

    if order == "after":
        instrument(api)
    api.add_middleware(CORSMiddleware, allow_origins=[ORIGIN], allow_credentials=True)
    if around:
        api.add_middleware(BaseHTTPMiddleware, dispatch=dispatch)
    if order == "before":
        instrument(api)
    async with client(api) as http:
        answer = await http.get(f"/raise/{name}", headers={"origin": ORIGIN})
        assert checked(answer)
        assert answer.headers.get_list("access-control-allow-origin") == [ORIGIN]
        stranger = await http.get(f"/raise/{name}", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in stranger.headers


async def test_cors_of_what_is_mounted_and_of_what_it_is_mounted_in() -> None:
    """A mounted application's problems are inside of the CORS of both, and outside of it none of them is."""
    inner, outer = login_application(), FastAPI()
    outer.add_middleware(CORSMiddleware, allow_origins=[ORIGIN])
    outer.mount("/in", inner)
    other = login_application()
    other.add_middleware(CORSMiddleware, allow_origins=["https://other.example"])
    outer.mount("/other", other)
    instrument(outer)
    async with client(outer) as http:
        answer = await http.get("/in/bug", headers={"origin": ORIGIN})
        assert (checked(answer)["code"], answer.headers["access-control-allow-origin"]) == ("SYS_INTERNAL", ORIGIN)
        answer = await http.get("/other/bug", headers={"origin": "https://other.example"})
        assert answer.headers["access-control-allow-origin"] == "https://other.example"


async def test_middlewares_of_the_application_see_the_error() -> None:
    """One that rolls back on an error still does, and one that knows an error better answers it itself."""
    api, seen = application(), []

    class RollsBack:
        def __init__(self, asgi: Any) -> None:
            self.asgi = asgi

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            try:
                await self.asgi(scope, receive, send)
            except RuntimeError as error:
                seen.append(str(error))
                raise

    async def dispatch(request: Request, call_next: Any) -> Any:
        try:
            return await call_next(request)
        except RuntimeError:
            if "known" in request.headers:
                return PlainTextResponse("known", 418)
            raise

    api.add_middleware(RollsBack)
    api.add_middleware(BaseHTTPMiddleware, dispatch=dispatch)
    instrument(api)
    async with client(api) as http:
        assert checked(await http.get("/raise/bug"))["code"] == "SYS_INTERNAL"
        assert (await http.get("/raise/bug", headers={"known": "1"})).text == "known"
    assert seen == ["hunter2", "hunter2"]


async def test_mounted_applications_tell_no_more() -> None:
    """Their own 422, which repeats the input, and their own 500 of bare text are problems; logged once, outermost."""
    outer, deep = FastAPI(), login_application()
    middle = FastAPI()
    middle.mount("/deep", deep)
    instrument(outer)
    outer.mount("/v2", login_application())  # after `instrument`, as where each file adds its part
    outer.mount("/middle", middle)
    bare = Starlette(routes=[Route("/bug", RAISED["bug"])])
    outer.mount("/bare", bare)
    async with client(outer) as http:
        for prefix in ("/v2", "/middle/deep"):
            answer = await http.post(f"{prefix}/login", json={"password": "hunter2"})
            assert checked(answer)["errors"][0]["location"] == ["body", "*"]
            assert "hunter2" not in answer.text
            assert checked(await http.get(f"{prefix}/sold-out"))["code"] == "BIZ_SOLD_OUT"
            with captured_logs() as lines:
                assert checked(await http.get(f"{prefix}/bug"))["code"] == "SYS_INTERNAL"
            assert [line["level"] for line in lines].count("error") == 1
        assert checked(await http.get("/v2/nope"))["code"] == "RES_NOT_FOUND"
        assert checked(await http.get("/bare/bug"))["code"] == "SYS_INTERNAL"
        assert checked(await http.get("/bare/nope"))["code"] == "RES_NOT_FOUND"


async def test_an_application_that_has_answered_before_is_taken_over_too() -> None:
    """A mounted application that was used by itself has its handlers made anew."""
    inner, outer = login_application(), FastAPI()
    async with client(inner) as http:
        assert (await http.get("/nope")).json() == {"detail": "Not Found"}
    outer.mount("/in", inner)
    instrument(outer)
    async with client(outer) as http:
        assert checked(await http.get("/in/nope"))["code"] == "RES_NOT_FOUND"


async def test_handlers_of_the_application_stay() -> None:
    """A handler for an own error, for a status or in place of FastAPI's is not replaced, whenever it was added."""
    api = application()

    def saying(text: str) -> Any:
        return lambda _request, _error: PlainTextResponse(text, 418)

    api.add_exception_handler(SoldOut, saying("sold out"))
    api.add_exception_handler(404, saying("nothing"))
    instrument(api)
    api.add_exception_handler(HTTPException, saying("http"))
    async with client(api) as http:
        assert (await http.get("/raise/sold-out")).text == "sold out"
        assert (await http.get("/nope")).text == "nothing"
        assert (await http.get("/raise/teapot")).text == "http"
        assert checked(await http.get("/raise/broken"))["code"] == "SYS_LEDGER_BROKEN"


async def test_a_handler_for_everything_is_refused_however_late_it_comes() -> None:
    """One that is added after `instrument` is found when the application starts."""
    api = application()
    instrument(api)
    api.add_exception_handler(Exception, lambda _request, _error: PlainTextResponse("x"))
    async with client(api) as http:
        with pytest.raises(ConfigurationError, match="would never be called"):
            await http.get("/nope")


async def test_a_redirect_and_an_empty_answer_are_no_problems() -> None:
    """An HTTPException below 400 is FastAPI's own business."""
    api = FastAPI()

    @api.get("/{status}")
    async def status(status: int) -> None:
        raise HTTPException(status, headers={"location": "/x"})

    instrument(api)
    async with client(api) as http:
        for number in (204, 304, 307):
            answer = await http.get(f"/{number}")
            assert (answer.status_code, answer.headers["location"]) == (number, "/x")


async def socket(api: Any, path: str, *, denial: bool = False, query: bytes = b"") -> list[dict[str, Any]]:
    """What the server gets to send, of a WebSocket that says nothing."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "websocket", "path": path, "raw_path": path.encode(), "query_string": query, "headers": [],
        "scheme": "ws", "root_path": "", "subprotocols": [], "client": ("c", 1), "server": ("s", 80),
        "extensions": {"websocket.http.response": {}} if denial else {},
    }  # fmt: skip
    await asyncio.wait_for(api(scope, receive, send), 30)
    return sent


@pytest.mark.parametrize(
    ("name", "code", "reason"),
    [
        ("sold-out", 1008, "BIZ_SOLD_OUT"), ("broken", 1011, "SYS_LEDGER_BROKEN"), ("busy", 1013, "EXT_PAYMENTS_BUSY"),
        ("text", 1008, "RES_NOT_FOUND"), ("http-500", 1011, "SYS_INTERNAL"),
    ],
)  # fmt: skip
async def test_a_websocket_ends_with_the_code_of_its_problem(name: str, code: int, reason: str) -> None:
    """Before it is accepted and afterwards; where the server can deny it with an answer, with the whole problem."""
    api = application()
    instrument(api)
    closed = {"type": "websocket.close", "code": code, "reason": reason}
    assert await socket(api, f"/ws/{name}") == [closed]
    assert (await socket(api, f"/ws/late-{name}", denial=True))[1:] == [closed]
    start, body = await socket(api, f"/ws/{name}", denial=True)
    problem = json.loads(body["body"])
    assert (start["type"], start["status"]) == ("websocket.http.response.start", problem["status"])
    assert (b"content-type", b"application/problem+json") in start["headers"]
    assert problem["code"] == reason


async def test_a_websocket_repeats_nothing_of_a_query_that_is_wrong() -> None:
    """FastAPI's own reason holds the query, and may be longer than a reason can be."""
    api = application()
    instrument(api)
    outer = FastAPI()
    outer.mount("/in", application())
    instrument(outer)
    for each, path in [(api, "/ws/x"), (outer, "/in/ws/x")]:
        (closed,) = await socket(each, path, query=b"n=hunter2")
        assert closed == {"type": "websocket.close", "code": 1008, "reason": "VAL_REQUEST"}
        denied = await socket(each, path, query=b"n=hunter2", denial=True)
        assert json.loads(denied[1]["body"])["errors"][0]["location"] == ["query", "n"]
        assert "hunter2" not in str(denied)


async def test_a_plain_asgi_application_has_the_same_problems() -> None:
    """The builder knows the exceptions of Starlette there, too, and a Starlette application is instrumented alike."""

    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        raise made(scope["path"].removeprefix("/raise/"))

    plain, starlette = ObservabilityMiddleware(asgi), Starlette(routes=[Route("/raise/{name}", raising)])
    instrument(starlette)
    for api in (plain, starlette):
        async with client(api) as http:
            for name in ("sold-out", "text", "bug", "group"):
                problem = checked(await http.get(f"/raise/{name}"))
                assert problem["code"] == problem_of(made(name)).code
        async with client(starlette) as http:
            assert checked(await http.get("/nope"))["code"] == "RES_NOT_FOUND"


async def raising(request: Request) -> None:
    raise made(request.path_params["name"])


def test_a_problem_is_made_of_an_error_and_the_context() -> None:
    """The builder needs no request; what is wrong field by field comes out of the error."""
    error = NotFound("shard 7")
    error.errors = (FieldError(("body", 3), "is missing", "missing"),)
    with bind(correlation_id="a/b@c"):
        assert problem_of(error) == Problem(
            code="RES_NOT_FOUND", status=404, title="Not found", detail="This does not exist.", correlation_id="a/b@c",
            errors=error.errors,
        )  # fmt: skip
        assert problem_of(error).to_dict()["instance"] == "urn:correlation:a%2Fb%40c"
    assert "instance" not in problem_of(error).to_dict()
    assert problem_of(KeyboardInterrupt()).code == "SYS_INTERNAL"
    assert isinstance(already_exists("order", 7), AlreadyExists)
    assert str(not_found("order", 7)) == "there is no order 7"


@pytest.mark.parametrize(
    ("seconds", "header"),
    [(0.0, b"0"), (0.2, b"1"), (-3.0, b"0"), (1e300, b"31536000"), (float("inf"), None), (float("nan"), None)],
)
def test_a_time_to_come_back_is_one_that_can_be_waited(seconds: float, header: bytes | None) -> None:
    """In the header in whole seconds, rounded up; in the body as it is, within a year."""
    problem = problem_of(Unavailable(retry_after_seconds=seconds))
    assert dict(problem.all_headers(b"")).get(b"retry-after") == header
    assert json.loads(problem.body()).get("retry_after_seconds", None) == (
        None if header is None else min(max(seconds, 0.0), 31_536_000.0)
    )


async def test_openapi_shows_the_problem() -> None:
    """In place of FastAPI's 422 and where an operation says nothing; what the application says itself stays."""
    api = application()

    @api.post("/own", responses={404: {"description": "none"}, 409: {"model": Answer}, 418: {"$ref": "#/x"}})
    async def own(form: Pin) -> None: ...

    inner = login_application()
    api.mount("/in", inner)
    instrument(api)
    schema = api.openapi()
    shown = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/MainstayProblem"}}}
    responses = schema["paths"]["/own"]["post"]["responses"]
    assert responses["404"] == {"description": "none", "content": shown}
    assert responses["422"]["content"] == responses["default"]["content"] == shown
    assert responses["409"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Answer"}
    assert responses["418"] == {"$ref": "#/x", "description": "Client Error"} or "content" not in responses["418"]
    assert "ValidationError" not in json.dumps(schema)
    assert schema == api.openapi()
    async with client(api) as http:
        assert (await http.get("/openapi.json")).json() == json.loads(json.dumps(schema))
        assert "HTTPValidationError" not in (await http.get("/in/openapi.json")).text
