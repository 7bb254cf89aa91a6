"""WebSockets that end before they began: what the client is told, and what the lines say of it."""

import asyncio
import contextvars
import logging
from typing import Any

import pytest
from fastapi import FastAPI, HTTPException, WebSocket

from mainstay.observability import ObservabilityMiddleware
from mainstay.observability.fastapi import instrument
from mainstay.observability.testing import captured_logs, metric

apart = contextvars.Context().run  # as in a task of the server's own
DENIAL: dict[str, Any] = {"websocket.http.response": {}}


def application():
    api = FastAPI()

    @api.websocket("/ends/{how}")
    async def ends(socket: WebSocket, how: str):
        if how == "error":
            raise RuntimeError(how)
        if how == "refused":
            raise HTTPException(403, how)
        if how == "accepted":
            await socket.accept()
            raise RuntimeError(how)

    instrument(api)
    return api


async def opened(asgi, path, *, denial=True):
    """What a server is sent for a WebSocket, what it has to answer for, the lines, and what it says itself."""
    sent: list[Any] = []
    raised = None

    async def receive():
        return {"type": "websocket.connect"} if not sent else await asyncio.get_running_loop().create_future()

    async def send(message):
        sent.append(message)
        if message["type"] == "websocket.accept":
            apart(lambda: logging.getLogger("uvicorn.error").info("connection open"))
        elif message["type"] == "websocket.http.response.body":
            apart(lambda: logging.getLogger("uvicorn.error").info("connection rejected (%d %s)", 403, "Forbidden"))

    scope: dict[str, Any] = {
        "type": "websocket", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": [],
        "root_path": "", "scheme": "ws", "server": ("test", 80), "client": ("10.0.0.9", 1), "subprotocols": [],
        "extensions": DENIAL if denial else {},
    }  # fmt: skip
    with captured_logs(logging.INFO) as lines:
        try:
            await asgi(scope, receive, send)
        except RuntimeError as error:
            raised = error
            logging.getLogger("uvicorn.error").exception("Exception in ASGI application")
        else:
            if not any(message["type"] in {"websocket.accept", "websocket.close"} for message in sent):
                # As it does with the library `websockets`, also of one that was refused by an answer.
                logging.getLogger("uvicorn.error").error("ASGI callable returned without completing handshake.")
    return sent, raised, [(line["logger"].rpartition(".")[2], line["level"], line["event"]) for line in lines]


@pytest.mark.parametrize("how", ["error", "nothing"])
async def test_one_that_was_never_answered_is_refused_with_a_problem(how):
    """With the status that the client gets in every line and metric, and the id in the answer, as of a request."""
    counted = {"route": "/ends/{how}", "status": "500"}
    before = metric("mainstay_websockets_total", **counted)
    sent, raised, lines = await opened(application(), f"/ends/{how}")
    assert raised is None
    start, body = sent
    assert (start["type"], start["status"]) == ("websocket.http.response.start", 500)
    assert {b"x-correlation-id", b"content-type"} <= {name for name, _ in start["headers"]}
    assert b"SYS_INTERNAL" in body["body"]
    assert lines == [
        ("observability", "error", "websocket /ends/{how} failed"),
        ("access", "warning", "websocket /ends/{how} 500"),
    ]
    assert metric("mainstay_websockets_total", **counted) == before + 1


@pytest.mark.parametrize("how", ["error", "nothing"])
async def test_a_server_that_can_say_no_more_answers_itself(how):
    """It says 500 of an error that it gets and of no answer at all; a close would be a 403, the client's fault."""
    sent, raised, lines = await opened(application(), f"/ends/{how}", denial=False)
    assert sent == []
    assert (raised is None) is (how == "nothing")
    assert lines == [
        ("observability", "error", "websocket /ends/{how} failed"),
        ("access", "warning", "websocket /ends/{how} 500"),
    ]


async def test_a_refusal_is_no_error_of_ours():
    """A stranger's 403 is one line, also where the server takes it for an error."""
    sent, raised, lines = await opened(application(), "/ends/refused")
    assert raised is None
    assert sent[0]["status"] == 403
    assert lines == [("access", "info", "websocket /ends/{how} 403")]


async def test_an_error_after_it_was_accepted_is_for_the_server_to_break_off():
    """And has its two lines, of which none is the server's."""
    sent, raised, lines = await opened(application(), "/ends/accepted")
    assert [message["type"] for message in sent] == ["websocket.accept"]
    assert str(raised) == "accepted"
    assert lines == [
        ("observability", "error", "websocket /ends/{how} failed"),
        ("access", "warning", "websocket /ends/{how} 1011"),
    ]


async def test_a_client_that_left_before_is_not_refused():
    """No client is there to be told, and it is no failure."""
    sent: list[Any] = []

    async def receive():
        return {"type": "websocket.disconnect", "code": 1006}

    async def send(message):
        sent.append(message)

    async def waits(_scope, receive, _send):
        await receive()

    scope: dict[str, Any] = {"type": "websocket", "path": "/", "headers": [], "client": None, "extensions": DENIAL}
    with captured_logs(logging.INFO) as lines:
        await ObservabilityMiddleware(waits)(scope, receive, send)
    assert sent == []
    assert [line["event"] for line in lines] == ["websocket unmatched 1006"]
