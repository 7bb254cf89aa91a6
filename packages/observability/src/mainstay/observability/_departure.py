"""The time between SIGTERM and the moment at which a web server stops taking connections.

A server such as uvicorn closes its sockets first and ends the lifespan afterwards, so an App that learns of the end
from its lifespan cannot tell a load balancer any more, which goes on sending requests to a closed port. So the signal
is taken before the server gets it: the process answers "not ready" at once, and the server is told some seconds later.
A second signal goes to the server at once, and Ctrl-C does so always.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

_log = logging.getLogger("mainstay.observability")


@contextmanager
def announced(seconds: float, leave: Callable[[], None]) -> Generator[None, None, None]:
    """Call `leave` on SIGTERM, and let the server have the signal `seconds` later.

    Nothing is done outside of the main thread, where signals do not arrive, and where no server handles the signal by
    `signal.signal`.
    """
    server = signal.getsignal(signal.SIGTERM) if threading.current_thread() is threading.main_thread() else None
    if seconds <= 0 or server is None or not callable(server):
        yield
        return
    loop = asyncio.get_running_loop()
    timers: list[asyncio.TimerHandle] = []
    leaving = handed_on = False

    def told(number: int, frame: FrameType | None) -> None:
        nonlocal leaving
        if leaving:
            hand_on(number, frame)
            return
        leaving = True
        loop.call_soon_threadsafe(begin, number)

    def hand_on(number: int, frame: FrameType | None) -> None:
        nonlocal handed_on
        handed_on = True
        server(number, frame)

    def begin(number: int) -> None:
        leave()
        _log.info("SIGTERM: not ready from now on, and taking requests for another %g s", seconds)
        timers.append(loop.call_later(seconds, hand_on, number, None))

    signal.signal(signal.SIGTERM, told)
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
        if signal.getsignal(signal.SIGTERM) is told:
            signal.signal(signal.SIGTERM, server)
        if leaving and not handed_on:  # the App was stopped meanwhile: the signal is not lost with it
            server(signal.SIGTERM, None)
