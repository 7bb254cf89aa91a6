"""The small HTTP server of a process that has no other: probes and metrics of a worker.

It answers GET and HEAD on the paths of the settings and closes the connection. It runs on the event loop on purpose:
that it answers at all is what liveness means.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from http import HTTPStatus

from mainstay.core import ConfigurationError
from mainstay.observability.health import Answer, HealthWatch

_log = logging.getLogger("mainstay.observability")

_SECONDS = 5.0  # for a whole request: a caller that sends nothing must not keep a connection
_HEAD_BYTES = 8192


@asynccontextmanager
async def serving(watch: HealthWatch, host: str, port: int, *, free_instead: bool = False) -> AsyncGenerator[int, None]:
    """Serve until the block ends; yields the port that it listens on.

    Args:
        watch: has the answers.
        host: the address to listen on.
        port: of TCP; 0 for any that is free.
        free_instead: whether any free port will do where this one is taken.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """
    connections: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(_exchange(watch, reader, writer))
        connections.add(task)
        task.add_done_callback(connections.discard)

    async def listen(port: int) -> asyncio.Server:
        return await asyncio.start_server(accept, host, port, limit=_HEAD_BYTES)

    try:
        try:
            server = await listen(port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not free_instead:
                raise
            _log.warning("port %d is taken, so probes and metrics get any free one; http_port names one for good", port)
            server = await listen(0)
    except OSError as error:
        msg = (
            f"ObservabilityModule cannot listen on {host}:{port} ({error.strerror or error}): "
            "set MAINSTAY_OBSERVABILITY_HTTP_PORT or pass ObservabilitySettings(http_port=…)"
        )
        raise ConfigurationError(msg) from error
    bound: int = server.sockets[0].getsockname()[1]
    _log.info("probes and metrics on http://%s:%d", host, bound)
    try:
        yield bound
    finally:
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


async def _exchange(watch: HealthWatch, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        async with asyncio.timeout(_SECONDS):
            try:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                answer, method = _plain(HTTPStatus.BAD_REQUEST), "GET"
            else:
                answer, method = await _answer(watch, head)
            writer.write(_response(answer, with_body=method != "HEAD"))
            await writer.drain()
    except (OSError, TimeoutError):
        pass  # the caller went away, or took too long
    except Exception:  # noqa: BLE001  nobody awaits this task; what goes wrong is logged
        _log.exception("a probe could not be answered")
    finally:
        writer.close()


async def _answer(watch: HealthWatch, head: str) -> tuple[Answer, str]:
    request, *lines = head.split("\r\n")
    words = request.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):  # noqa: PLR2004  method, target, version
        return _plain(HTTPStatus.BAD_REQUEST), "GET"
    method, target, _ = words
    if method not in ("GET", "HEAD"):
        return _plain(HTTPStatus.METHOD_NOT_ALLOWED), method
    accept = next((line[7:].strip() for line in lines if line[:7].lower() == "accept:"), "")
    found = await watch.answer(target.partition("?")[0], accept, private=True)
    return found or _plain(HTTPStatus.NOT_FOUND), method


def _plain(status: HTTPStatus) -> Answer:
    return Answer(status, "text/plain; charset=utf-8", f"{status.phrase}\n".encode())


def _response(answer: Answer, *, with_body: bool) -> bytes:
    head = (
        f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}\r\ncontent-type: {answer.content_type}\r\n"
        f"content-length: {len(answer.body)}\r\ncache-control: no-store\r\nconnection: close\r\n\r\n"
    ).encode("latin-1")
    return head + answer.body if with_body else head
