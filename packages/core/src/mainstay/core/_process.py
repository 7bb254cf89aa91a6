"""A process that is nothing but an App's worker: signals, the end of the drain, and the end of the process itself.

A stop ends. The first signal begins the drain. When the drain, the stop of the modules and the end of the event loop
have not been done some seconds after the drain time, the process says what holds it and exits. A second signal kills it
at once, since the first one has put back the system's own action for both signals: a thread or a loop that blocks
cannot prevent that. Neither loses anything that a crash would not.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import inf
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

from mainstay.core.errors import ConfigurationError

_log = logging.getLogger("mainstay.core")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ENDING_SECONDS = 10.0  # after the drain time: for cancelled tasks, the modules' stops, and threads
_LAST_WORDS_SECONDS = 2.0
_LOOK_SECONDS = 0.5


# Of container objects, before a collection. The interpreter's own number is for scripts: a worker makes as many in a
# millisecond, and most of them are gone before anybody would have to look at them.
_YOUNG = 50_000
_COLLECTIONS = gc.get_threshold()


class Stuck(Exception):
    """Tasks did not end, although they were cancelled."""


def spare_the_collector() -> None:
    """Keep the garbage collector from what stays as long as the process: modules, classes, the App.

    A full collection looks at all of that, a tenth of a second of every second of a busy worker. Thresholds that the
    service has set itself, and a collector that it has switched off, are left as they are.
    """
    if gc.isenabled():
        gc.collect()
        gc.freeze()
        if gc.get_threshold() == _COLLECTIONS:
            gc.set_threshold(_YOUNG, *_COLLECTIONS[1:])


def run(main: Callable[[asyncio.Event], Coroutine[Any, Any, None]], drain_seconds: float) -> None:
    """Run `main(stopping)` in an event loop of its own; `stopping` is set by the first SIGTERM or SIGINT.

    Raises:
        ConfigurationError: signals do not arrive here: this is not the main thread, or an event loop runs in it.
        Exception: the one that `main` raised.
    """
    if threading.current_thread() is not threading.main_thread() or _in_a_loop():
        msg = (
            "App.run() is for the main thread, outside of an event loop: inside of one, or in another thread, "
            "write `async with app.running(serve=True)`"
        )
        raise ConfigurationError(msg)
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        stopping = asyncio.Event()
        deadline = _Deadline(loop, drain_seconds)
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


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


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

    def __init__(self, loop: asyncio.AbstractEventLoop, drain_seconds: float) -> None:
        self._loop = loop
        self._drain_seconds = drain_seconds
        self._began = inf
        # A signal handler may put into it at any moment of the thread that it interrupts; no event or lock allows that.
        self._over: SimpleQueue[bool] = SimpleQueue()

    def begin(self) -> None:
        """Let the time run, if it does not yet."""
        self._began = min(self._began, time.monotonic())
        self._over.put(False)

    @contextmanager
    def running(self) -> Generator[None, None, None]:
        """Watch until the block ends."""
        threading.Thread(target=self._watch, name="mainstay.core end of the drain", daemon=True).start()
        try:
            yield
        finally:
            self._over.put(True)
            # Threads that are not the loop's are waited for later, by the interpreter.
            left = self._began + self._drain_seconds - time.monotonic()
            watch_the_end(max(0.0, left) if self._began < inf else 0.0)

    def _watch(self) -> None:
        over = self._over.get()
        end = time.monotonic() + self._drain_seconds + _ENDING_SECONDS
        while not over:
            try:
                over = self._over.get(timeout=max(0.0, end - time.monotonic()))
            except Empty:
                break
        else:
            return
        _end(self._loop)


@dataclass(slots=True)
class _Ending:
    """The end of a loop, or without one that of the process, which is waited for once it has begun.

    Attributes:
        since: when it was seen to have begun; None before.
        not_before: until when work that the App knows nothing of may take to end, too.
        stuck: whether the App left tasks that do not end; then a loop is at its end when all tasks have been cancelled.
    """

    loop: asyncio.AbstractEventLoop | None
    not_before: float
    stuck: bool = False
    since: float | None = None

    def has_begun(self) -> bool:
        if self.loop is None:
            return _interpreter_ends()
        tasks = _tasks_of(self.loop)
        return bool(tasks) and all(
            _waits_for_threads(task) or (self.stuck and bool(task.cancelling())) for task in tasks
        )

    def look(self, now: float) -> None:
        if not self.has_begun():
            self.since = None
            return
        self.since = now if self.since is None else self.since
        if now > max(self.since, self.not_before) + _ENDING_SECONDS:
            _end(self.loop)


def watch_the_end(seconds: float, loop: asyncio.AbstractEventLoop | None = None, *, stuck: bool = False) -> None:
    """End the process if its own end, or that of the loop in a server that is not ours, has begun and does not come.

    A loop is at its end when it waits for its threads, and the process when the interpreter waits for those that are
    left. Elsewhere, such as in a test, they go on, and nothing is done.

    Args:
        seconds: what is left of the drain time.
        loop: the one whose end is watched, too.
        stuck: the App left tasks in it that do not end, so that the loop, which cancels all tasks first, may not
            even come to wait for its threads.
    """
    endings = _endings()
    not_before = time.monotonic() + seconds
    endings[:] = [
        *(each for each in endings if each.loop not in (None, loop) and not _closed(each)),
        _Ending(None, not_before),
        *([] if loop is None else [_Ending(loop, not_before, stuck)]),
    ]


def _closed(ending: _Ending) -> bool:
    return ending.loop is not None and ending.loop.is_closed()


@cache
def _endings() -> list[_Ending]:
    """What is watched; the first call starts the one thread that does so."""
    endings: list[_Ending] = []
    threading.Thread(target=_watch_ends, args=(endings,), name="mainstay.core end of the process", daemon=True).start()
    return endings


def _watch_ends(endings: list[_Ending]) -> None:
    while True:
        for ending in [each for each in endings if not _closed(each)]:
            ending.look(time.monotonic())
        time.sleep(_LOOK_SECONDS)


def _waits_for_threads(task: asyncio.Task[Any]) -> bool:
    return getattr(task.get_coro(), "__name__", None) == "shutdown_default_executor"


def _interpreter_ends() -> bool:
    """Whether the main thread's code has run to its end, and Python waits for other threads."""
    main = threading.main_thread()
    frame = sys._current_frames().get(main.ident or 0)
    while frame is not None and frame.f_back is not None:
        frame = frame.f_back
    return not main.is_alive() or (frame is not None and frame.f_code.co_filename == threading.__file__)


def _end(loop: asyncio.AbstractEventLoop | None) -> None:
    _exit_soon()
    for holder in _holders(loop):
        _log.error("the process does not end: %s", holder)
    _exit()


def _tasks_of(loop: asyncio.AbstractEventLoop) -> list[asyncio.Task[Any]]:
    try:
        return list(asyncio.all_tasks(loop))
    except RuntimeError:  # the loop changes them at this moment
        return []


def _holders(loop: asyncio.AbstractEventLoop | None) -> list[str]:
    tasks = [] if loop is None else [f"task {task.get_name()}" for task in _tasks_of(loop)]
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
