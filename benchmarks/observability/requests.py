"""What a middleware adds to a request: the same application with and without it, by turns. Used on both sides.

Nothing waits for anything here, so it is the processor's time that is counted: other processes do not disturb it.
"""

import time
from collections.abc import Awaitable, Callable
from typing import Any

Asgi = Callable[..., Awaitable[None]]


def _application(make: Callable[[], Any]) -> Any:
    api = make()

    @api.get("/orders/{order_id}")
    async def order(order_id: str) -> dict[str, str]:
        return {"order": order_id}

    return api


async def cost_of_middleware(make: Callable[[], Any], instrument: Callable[[Any], Asgi], calls: int) -> float:
    """Return the microseconds that `instrument` adds to a request of a one-route application."""
    bare, dressed = _application(make), instrument(_application(make))
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def run(asgi: Asgi, count: int) -> float:
        started = time.process_time()
        for _ in range(count):
            scope = {
                "type": "http",
                "asgi": {"version": "3.0"},
                "http_version": "1.1",
                "method": "GET",
                "scheme": "http",
                "path": "/orders/17",
                "raw_path": b"/orders/17",
                "query_string": b"",
                "root_path": "",
                "headers": [(b"host", b"test"), (b"accept", b"*/*"), (b"user-agent", b"benchmark")],
                "client": ("127.0.0.1", 1),
                "server": ("127.0.0.1", 80),
            }
            await asgi(scope, receive, send)
        return (time.process_time() - started) / count * 1e6

    await run(bare, 50)
    await run(dressed, 50)
    added = []
    for _ in range(5):
        without = await run(bare, calls // 5)
        added.append(await run(dressed, calls // 5) - without)
    assert set(statuses) == {200}
    return sorted(added)[2]
