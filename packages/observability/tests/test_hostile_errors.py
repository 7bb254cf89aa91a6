"""Errors that cannot be asked what they are: one answer, one line, and no exception of this package beside them."""

import asyncio
import gc
import logging
import weakref
from typing import Any

import pytest

from mainstay.core import MainstayError
from mainstay.observability import ObservabilityMiddleware
from mainstay.observability.testing import captured_logs


class Odd(MainstayError):
    """Whose objects can be given anything."""

    code = "SYS_ODD"
    status = 503
    title = "Odd"


class Closed(ExceptionGroup):
    """Does not show what is in it."""

    @property
    def exceptions(self):
        raise RuntimeError


class Gone(Exception):
    """As servers and frameworks say that the client went away."""


Gone.__name__ = "ClientDisconnect"


def deep(error, levels):
    for _ in range(levels):
        error = ExceptionGroup("inside", [error])
    return error


def odd(**given):
    error = Odd("odd")
    for name, value in given.items():
        setattr(error, name, value)
    return error


def in_a_circle():
    one, other = RuntimeError("one"), RuntimeError("other")
    one.__cause__, other.__cause__ = other, one
    return one


async def told_of(error, *, gone):
    """What was answered, and the lines, where a handler raises `error`, before or after the client has left."""
    sent = []

    async def receive():
        return {"type": "http.disconnect"} if gone else {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    async def handler(_scope, receive, _send):
        await receive()
        raise error

    scope = {"type": "http", "method": "GET", "path": "/", "root_path": "", "headers": [], "client": ("10.0.0.9", 1)}
    raised = None
    with captured_logs(logging.INFO) as lines:
        try:
            await ObservabilityMiddleware(handler)(scope, receive, send)
        except Exception as beside:  # noqa: BLE001  nor could pytest show it
            raised = type(beside).__name__
    assert raised is None
    failures = [line["event"] for line in lines if line["logger"] == "mainstay.observability"]
    return sent, failures, [line["event"] for line in lines if line["logger"] == "mainstay.access"]


@pytest.mark.parametrize("gone", [False, True], ids=["there", "gone"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: deep(ValueError("x"), 5000),
        in_a_circle,
        lambda: odd(title=object()),
        lambda: odd(status=99),
        lambda: odd(status="none"),
        lambda: odd(code=None),
        lambda: odd(public_message=b"x"),
        lambda: odd(retry_after_seconds="soon"),
    ],
    ids=["deep", "circle", "title", "status", "no number", "code", "message", "retry"],
)
async def test_what_cannot_be_asked_is_an_error_of_ours(make, gone):
    """Answered with a problem, which the client may not wait for, and logged once, beside the request's own line."""
    sent, failures, access = await told_of(make(), gone=gone)
    assert sent[0]["status"] in {500, 503}
    assert (b"content-type", b"application/problem+json") in sent[0]["headers"]
    assert failures == ["GET unmatched failed"]
    assert access == [f"GET unmatched {499 if gone else sent[0]['status']}"]


@pytest.mark.parametrize("gone", [False, True], ids=["there", "gone"])
async def test_a_group_that_does_not_show_what_is_in_it_is_an_error_of_ours(gone):
    """Python itself cannot write its traceback, so that of its lines only the request's own is sure."""
    sent, _, access = await told_of(Closed("closed", [ValueError("x")]), gone=gone)
    assert sent[0]["status"] == 500
    assert access == [f"GET unmatched {499 if gone else 500}"]


@pytest.mark.parametrize("levels", [0, 1, 5000])
async def test_a_client_that_has_left_is_no_failure_however_it_is_wrapped(levels):
    """Groups of groups of it say the same; one other error among them is a failure."""
    assert await told_of(deep(Gone(), levels), gone=True) == ([], [], ["GET unmatched 499"])
    mixed = ExceptionGroup("both", [deep(Gone(), levels), ValueError("x")])
    assert (await told_of(mixed, gone=True))[1] == ["GET unmatched failed"]


async def test_a_task_that_outlives_its_request_does_not_hold_it():
    """Such as one that keeps a connection: what came with the request that happened to start it is let go."""

    class Upload:
        """Something large."""

    held: list[weakref.ref[Upload]] = []
    tasks: list[asyncio.Task[bool]] = []

    async def handler(scope, _receive, send):
        scope["state"] = upload = Upload()
        held.append(weakref.ref(upload))
        tasks.append(asyncio.create_task(asyncio.Event().wait()))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async def nothing(_message: Any = None) -> Any:
        return {"type": "http.request"}

    scope: dict[str, Any] = {
        "type": "http",
        "method": "GET",
        "path": "/",
        "root_path": "",
        "headers": [],
        "client": None,
    }
    await ObservabilityMiddleware(handler)(scope, nothing, nothing)
    del scope
    gc.collect()
    assert not tasks[0].done()
    assert held[0]() is None
    tasks[0].cancel()
