"""The way between the event loop and the thread that calls librdkafka."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from mainstay.core import spawn

_log = logging.getLogger("mainstay.events")

T = TypeVar("T")

_LOOK_SECONDS = 0.01


def post(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *arguments: object) -> None:
    """Call something in a loop from another thread; where the loop has ended nothing is called."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(callback, *arguments)


def settle(waiting: asyncio.Future[T], outcome: Callable[[], T]) -> None:
    """Give a future its result or its exception, unless the one who waited has gone."""
    if waiting.done():
        return
    try:
        waiting.set_result(outcome())
    except Exception as error:  # noqa: BLE001  it belongs to the one who waits
        waiting.set_exception(error)


async def answer(of: concurrent.futures.Future[T]) -> T:
    """Wait for a future of another thread. A cancellation leaves it alone: librdkafka will set it all the same."""
    loop = asyncio.get_running_loop()
    waiting: asyncio.Future[T] = loop.create_future()
    of.add_done_callback(lambda done: post(loop, settle, waiting, done.result))
    return await waiting


async def aside(work: Callable[[], T], name: str) -> T:
    """Do something that blocks, in a thread of its own that ends with it."""
    done: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001  it belongs to the one who waits
            done.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await answer(done)


class _Call(Generic[T]):
    """A call for the thread, its result for the loop.

    Attributes:
        within: it may be served while another one waits.
    """

    def __init__(self, work: Callable[[], T], landing: Callable[[T], None] | None, *, within: bool) -> None:
        self.within = within
        self._loop = asyncio.get_running_loop()
        self._work = work
        self._landing = landing
        self.waiting: asyncio.Future[T] = self._loop.create_future()

    def __call__(self) -> None:
        try:
            result = self._work()
        except BaseException as error:  # noqa: BLE001  the thread goes on; it belongs to the one who waits
            post(self._loop, self._failed, error)
        else:
            post(self._loop, self._landed, result)

    def _failed(self, error: BaseException) -> None:
        if not self.waiting.done():
            self.waiting.set_exception(error)

    def _landed(self, result: T) -> None:
        if self._landing is not None:
            self._landing(result)
        if not self.waiting.done():
            self.waiting.set_result(result)


class Caller:
    """The one thread that calls a consumer, from its making to its end.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._calls: SimpleQueue[_Call[Any] | None] = SimpleQueue()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
        post(self._loop, settle, self._ended, lambda: None)

    @property
    def wanted(self) -> bool:
        """Whether a call waits for the one that runs."""
        return not self._calls.empty()

    async def run(
        self, work: Callable[[], T], landing: Callable[[T], None] | None = None, *, within: bool = False
    ) -> T:
        """Have the thread call something.

        Args:
            work: what it calls.
            landing: is given the result in the loop, also where the one who waits for it has gone.
            within: also while `while_waiting_for` waits. The consumer must allow it in its callbacks.
        """
        call = _Call(work, landing, within=within)
        self._calls.put(call)
        return await call.waiting

    def settle(self, waiting: asyncio.Future[None], error: Exception | None) -> None:
        """From the thread: end a wait in the loop, with an error if there is one."""

        def outcome() -> None:
            if error is not None:
                raise error

        post(self._loop, settle, waiting, outcome)

    def while_waiting_for(self, work: Callable[[], Coroutine[Any, Any, None]], seconds: float) -> bool:
        """From within a call: have the loop do something, and serve some calls until it has; whether it did in time."""
        done = threading.Event()

        def begin() -> None:
            task = spawn(work(), name=f"{self._thread.name}.moved")
            task.add_done_callback(ended)

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and task.exception() is not None:
                _log.error("partitions could not be given up or taken as they should be", exc_info=task.exception())
            done.set()

        post(self._loop, begin)
        until = time.monotonic() + seconds
        later: list[_Call[Any] | None] = []
        while not done.is_set() and time.monotonic() < until:
            with suppress(Empty):
                call = self._calls.get(timeout=_LOOK_SECONDS)
                if call is not None and call.within:
                    call()
                else:
                    later.append(call)
        for call in later:
            self._calls.put(call)
        return done.is_set()

    async def end(self, seconds: float) -> bool:
        """Have the thread end, after the calls that wait; whether it did in time."""
        self._calls.put(None)
        await asyncio.wait((self._ended,), timeout=seconds)
        return self._ended.done()
