"""A problem that a called service answers with is the same exception again, and its body is believed no further."""

import asyncio
import gzip
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel

from mainstay.core import FieldError, MainstayError, NotFound, already_exists, not_found
from mainstay.observability import ServiceProblem, problem_of
from mainstay.observability.fastapi import instrument
from mainstay.observability.problems import async_problem_hook, problem_hook

PROBLEM = "application/problem+json"


class Declined(MainstayError):
    """The provider will not charge this customer."""

    code = "BIZ_DECLINED"
    status = 402
    title = "Declined"
    no_effect = True


class Particular(MainstayError):
    """An error with parameters of its own."""

    code = "BIZ_PARTICULAR"
    status = 409
    title = "Particular"

    def __init__(self, account: str) -> None:
        super().__init__(account)


class Form(BaseModel):
    """What is asked for."""

    count: int


def payments() -> FastAPI:
    """A service that answers with problems."""
    api = FastAPI()

    @api.get("/declined")
    async def declined() -> None:
        raise Declined(retry_after_seconds=1.5, public_message="The card has had enough.")

    @api.get("/not-found")
    async def missing() -> None:
        error = not_found("charge", 7)
        raise error

    @api.get("/exists")
    async def exists() -> None:
        error = already_exists("charge", 7)
        raise error

    @api.get("/bug")
    async def bug() -> None:
        msg = "a bug"
        raise RuntimeError(msg)

    @api.post("/form")
    async def form(form: Form) -> None: ...

    instrument(api)
    return api


async def test_a_problem_is_the_same_exception_again() -> None:
    """The class that has the code and was named, with the message for people, and how long to wait."""
    hook = async_problem_hook(Declined, NotFound)
    transport = httpx.ASGITransport(payments())
    async with httpx.AsyncClient(
        transport=transport, base_url="http://payments", event_hooks={"response": [hook]}
    ) as http:
        with pytest.raises(Declined) as declined:
            await http.get("/declined")
        assert declined.value.public_message == "The card has had enough."
        assert (declined.value.retry_after_seconds, declined.value.no_effect) == (1.5, True)
        assert str(declined.value) == "GET payments answered 402 BIZ_DECLINED: The card has had enough."
        with pytest.raises(NotFound, match="There is no such charge"):
            await http.get("/not-found")
        with pytest.raises(ServiceProblem) as exists:
            await http.get("/exists")
        assert (exists.value.code, exists.value.status, exists.value.title) == (
            "RES_ALREADY_EXISTS", 409, "Exists already",
        )  # fmt: skip
        assert not exists.value.retryable
        with pytest.raises(ServiceProblem) as bug:
            await http.get("/bug", headers={"x-correlation-id": "c-7"})
        assert (bug.value.code, bug.value.correlation_id, bug.value.no_effect) == ("SYS_INTERNAL", "c-7", False)
        with pytest.raises(ServiceProblem) as invalid:
            await http.post("/form", json={})
        assert invalid.value.errors == (FieldError(("body", "count"), "Field required", "missing"),)


async def test_a_problem_that_is_not_handled_is_not_told_as_ones_own() -> None:
    """A callee that finds its caller unknown, or too fast, says so to this service, and not to who called this one."""
    for status, told in [(401, 502), (404, 502), (422, 502), (500, 502), (429, 503), (503, 503), (504, 504)]:
        with pytest.raises(ServiceProblem) as error:
            problem_hook()(answer(b'{"code": "AUTH_REQUIRED", "detail": "secret", "retry_after_seconds": 3}', status))
        problem = problem_of(error.value)
        assert (problem.code, problem.status, problem.retry_after_seconds) == ("EXT_SERVICE", told, 3.0)
        assert "secret" not in problem.detail
        assert error.value.retryable == (status in {429, 503, 504})


def answer(body: bytes, status: int = 409, **headers: str) -> httpx.Response:
    return httpx.Response(
        status,
        content=body,
        headers={"content-type": PROBLEM, **{name.replace("_", "-"): value for name, value in headers.items()}},
        request=httpx.Request("GET", "http://payments/x?token=secret"),
    )


def bomb() -> bytes:
    return gzip.compress(b'{"code": "BIZ_DECLINED", "detail": "' + b"x" * 50_000_000 + b'"}')


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b'"BIZ_DECLINED"', b"{", b"\xff", b"[" * 60_000, b'{"a":' * 10_000, b"9" * 5_000,
        b'{"code": 7}', b'{"code": ["BIZ_DECLINED"]}', b'{"code": "biz_declined"}', b'{"code": "BIZ_DECLINED\\n"}',
        b'{"code": "BIZ_' + b"X" * 500 + b'"}', b'{"code": "' + b"x" * 70_000 + b'"}',
    ],
    ids=lambda body: body[:16].decode("latin-1"),
)  # fmt: skip
def test_a_body_that_is_no_problem_is_told_by_its_status(body: bytes) -> None:
    """Of any kind: it raises what says the status, and nothing else."""
    with pytest.raises(ServiceProblem) as error:
        problem_hook(Declined)(answer(body, 503, retry_after="7"))
    assert (error.value.status, error.value.code, error.value.title) == (503, "EXT_SERVICE", ServiceProblem.title)
    assert error.value.retry_after_seconds == 7.0
    assert str(error.value) == "GET payments answered 503 without a code"


@pytest.mark.parametrize(
    ("member", "value", "read"),
    [
        ("detail", "two\nlines \x1b[31m", "two lines  [31m"), ("detail", 7, ""), ("detail", "x" * 5000, "x" * 1000),
        ("detail", "\ud800", ""), ("title", {"x": 1}, ServiceProblem.title), ("title", "a" * 500, "a" * 128),
        ("correlation_id", "a b\n", None), ("correlation_id", 7, None), ("correlation_id", "c-7", "c-7"),
        ("retry_after_seconds", -1, None), ("retry_after_seconds", "soon", None), ("retry_after_seconds", True, None),
        ("retry_after_seconds", 10**300, 31_536_000.0), ("retry_after_seconds", 0.5, 0.5),
        ("status", 200, 409), ("status", "x", 409),
        ("errors", {"x": 1}, ()), ("errors", [1, {"location": 2}, {}], ()),
        ("errors", [{"location": ["body", 1, {}, "x\n"], "message": None}], (FieldError(("body", 1, "x"), "", ""),)),
    ],
)  # fmt: skip
def test_a_member_is_believed_within_its_limits(member: str, value: Any, read: Any) -> None:
    """Of another type or too long it is left out or cut; control characters do not get into a log."""
    with pytest.raises(ServiceProblem) as error:
        problem_hook()(answer(json.dumps({"code": "BIZ_X", member: value}).encode()))
    assert getattr(error.value, member) == read
    assert error.value.code == "BIZ_X"


def test_infinity_is_no_time_to_wait() -> None:
    """Python reads it from JSON, which does not have it."""
    for text in ("Infinity", "NaN", "1e999"):
        with pytest.raises(ServiceProblem) as error:
            problem_hook()(answer(f'{{"retry_after_seconds": {text}}}'.encode()))
        assert error.value.retry_after_seconds is None


@pytest.mark.parametrize(
    "response",
    [
        answer(b"{}", 200), answer(b"{}", 304), answer(b"{}", content_type="application/json"),
        answer(b"{}", content_type="text/html; x=application/problem+json"),
    ],
    ids=["200", "304", "json", "html"],
)  # fmt: skip
def test_every_other_response_passes(response: httpx.Response) -> None:
    """An answer that is no problem is the caller's, who may raise for its status."""
    problem_hook(Declined)(response)
    assert response.content == b"{}"


async def test_no_more_is_read_than_a_problem_may_have() -> None:
    """A body that does not end is left after 64 KiB, one that was compressed is not unpacked any further."""
    endless = b"HTTP/1.1 409 x\r\ncontent-type: application/problem+json\r\ntransfer-encoding: chunked\r\n\r\n"
    packed = bomb()
    head = endless.replace(b"transfer-encoding: chunked", b"content-encoding: gzip\r\ncontent-length: %d")
    small = gzip.compress(b'{"code": "BIZ_DECLINED", "detail": "in a parcel"}')

    async def without_end(writer: asyncio.StreamWriter) -> None:
        writer.write(endless)
        while True:
            writer.write(b"1000\r\n" + b" " * 4096 + b"\r\n")
            await writer.drain()

    async def at_once(writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(head % len(data) + data)
        await writer.drain()

    async def broken_off(writer: asyncio.StreamWriter) -> None:
        writer.write(head % 1000 + b"x")
        await writer.drain()

    for answering, kind in [
        (without_end, ServiceProblem),
        (lambda writer: at_once(writer, packed), ServiceProblem),
        (lambda writer: at_once(writer, b"no gzip"), ServiceProblem),
        (broken_off, ServiceProblem),
        (lambda writer: at_once(writer, small), Declined),
    ]:
        async with server(answering) as url:
            async with httpx.AsyncClient(event_hooks={"response": [async_problem_hook(Declined)]}) as http:
                with pytest.raises(kind, match="answered 409"):
                    await asyncio.wait_for(http.get(url), 60)
            with httpx.Client(event_hooks={"response": [problem_hook(Declined)]}) as client, pytest.raises(kind):
                await asyncio.wait_for(asyncio.to_thread(client.get, url), 60)


@asynccontextmanager
async def server(answering: Callable[[asyncio.StreamWriter], Any]) -> AsyncGenerator[str]:
    """A server that answers each connection as it is told, and closes it."""
    tasks = set[asyncio.Task[None]]()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await reader.readuntil(b"\r\n\r\n")
            await answering(writer)
        except OSError:
            pass
        finally:
            tasks.discard(task)
            writer.close()

    listening = await asyncio.start_server(talk, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/"
    finally:
        listening.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def test_what_cannot_be_made_of_a_problem_is_refused_when_it_is_named() -> None:
    """A class with parameters of its own, and two for one code."""
    with pytest.raises(TypeError, match="Particular takes parameters of its own"):
        problem_hook(Particular)
    also = type("Also", (Declined,), {})
    with pytest.raises(TypeError, match="Also and Declined have the same code, BIZ_DECLINED"):
        async_problem_hook(Declined, also)
    problem_hook(Declined, Declined)
