"""A process that is nothing but an App's worker: signals, the end of the drain, and the end of the process itself.

A stop ends. The first signal begins the drain. When the drain, the stop of the modules and the end of the event loop
have not been done some seconds after the drain time, the process says what holds it and exits. A second signal kills it
at once, since the first one has put back the system's own action for both signals: a thread or a loop that blocks
cannot prevent that. Neither loses anything that a crash would not.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

_log = logging.getLogger("mainstay.core")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ENDING_SECONDS = 10.0  # after the drain time: for cancelled tasks, the modules' stops, and threads
_LAST_WORDS_SECONDS = 2.0
_LOOK_SECONDS = 0.5


class Stuck(Exception):
    """Tasks did not end, although they were cancelled."""


def run(main: Callable[[asyncio.Event], Coroutine[Any, Any, None]], drain_seconds: float) -> None:
    """Run `main(stopping)` in an event loop of its own; `stopping` is set by the first SIGTERM or SIGINT.

    Raises:
        Exception: the one that `main` raised.
    """
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        stopping = asyncio.Event()
        deadline = _Deadline(loop, drain_seconds + _ENDING_SECONDS)
        with _signals(loop, stopping, deadline, drain_seconds), deadline.running():
            try:
                runner.run(_watched(main, stopping, deadline))
            except Stuck:
                _exit()
            finally:
                runner.close()


async def _watched(
    main: Callable[[asyncio.Event], Coroutine[Any, Any, None]], stopping: asyncio.Event, deadline: _Deadline
) -> None:
    try:
        await main(stopping)
    finally:
        deadline.begin()


@contextmanager
def _signals(
    loop: asyncio.AbstractEventLoop, stopping: asyncio.Event, deadline: _Deadline, seconds: float
) -> Generator[None, None, None]:
    def stop(number: int, _frame: FrameType | None) -> None:
        deadline.begin()
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        loop.call_soon_threadsafe(begin, signal.Signals(number).name)

    def begin(name: str) -> None:
        _log.info("%s: draining for at most %g s; a second signal ends the process at once", name, seconds)
        stopping.set()

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Deadline:
    """The time by which the process has ended, watched by a thread: the loop may be what does not end."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._loop = loop
        self._seconds = seconds
        # A signal handler may put into it at any moment of the thread that it interrupts; no event or lock allows that.
        self._over: SimpleQueue[bool] = SimpleQueue()

    def begin(self) -> None:
        """Let the time run, if it does not yet."""
        self._over.put(False)

    @contextmanager
    def running(self) -> Generator[None, None, None]:
        """Watch until the block ends."""
        threading.Thread(target=self._watch, name="mainstay.core end of the process", daemon=True).start()
        try:
            yield
        finally:
            self._over.put(True)

    def _watch(self) -> None:
        over = self._over.get()
        end = time.monotonic() + self._seconds
        while not over:
            try:
                over = self._over.get(timeout=max(0.0, end - time.monotonic()))
            except Empty:
                break
        else:
            return
        _exit_soon()
        for holder in _holders(self._loop):
            _log.error("the process does not end: %s", holder)
        _exit()


def watch_the_end(loop: asyncio.AbstractEventLoop) -> None:
    """End the process if the end of the loop does not: in a server that is not ours, with tasks that do not end.

    A loop is at its end when all of its tasks have been cancelled. Elsewhere, such as in a test, it goes on, and
    nothing is done.
    """
    threading.Thread(target=_watch_loop, args=(loop,), name="mainstay.core end of the loop", daemon=True).start()


def _watch_loop(loop: asyncio.AbstractEventLoop) -> None:
    ending_since: float | None = None
    while not loop.is_closed():
        tasks = _tasks_of(loop)
        if not tasks or not all(task.cancelling() for task in tasks):
            ending_since = None
        elif ending_since is None:
            ending_since = time.monotonic()
        elif time.monotonic() - ending_since > _ENDING_SECONDS:
            _exit_soon()
            for holder in _holders(loop):
                _log.error("the process does not end: %s", holder)
            _exit()
        time.sleep(_LOOK_SECONDS)


def _tasks_of(loop: asyncio.AbstractEventLoop) -> list[asyncio.Task[Any]]:
    try:
        return list(asyncio.all_tasks(loop))
    except RuntimeError:  # the loop changes them at this moment
        return []


def _holders(loop: asyncio.AbstractEventLoop) -> list[str]:
    tasks = [f"task {task.get_name()}" for task in _tasks_of(loop)]
    frames = sys._current_frames()
    threads = [
        f"thread {thread.name} is at {frame.f_code.co_filename}:{frame.f_lineno}"
        for thread in threading.enumerate()
        if not thread.daemon and thread.ident is not None and (frame := frames.get(thread.ident)) is not None
    ]
    return [*tasks, *threads]


def _exit_soon() -> None:
    """End the process in a moment, also when writing the last lines of the log blocks."""
    timer = threading.Timer(_LAST_WORDS_SECONDS, os._exit, (1,))
    timer.daemon = True
    timer.start()


def _exit() -> None:
    """End the process without waiting for anything, with a status that makes its supervisor start it again."""
    _exit_soon()
    _log.critical("the process ends with status 1 although not everything in it has ended")
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
