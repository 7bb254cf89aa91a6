"""Where finished lines go: whole lines, in order, and never at the cost of who writes them.

A reader of a pipe that stands still (a log agent, a terminal with Ctrl-S) stops its writer, and with it the
event loop. A queue and a thread for every line would prevent that, and lose what is queued when the process is killed,
which are the lines that say why. So a line is written at once, by a write that the system refuses instead of waiting
(`RWF_NOWAIT`; where there is none, after asking whether there is room). Only what is refused waits in a queue, and a
thread lives as long as the queue is not empty. Beyond a bound lines are lost, counted, and told of once there is room.
So are those for which a disk has none; what it took of one of them is closed, or the next line would be no line either.

Nothing waits while it holds the lock, and a signal handler may log in the middle of another line. A child of a fork has
a lock of its own, and neither the thread nor the lines that its parent will write.

A stream without a file (`io.StringIO`) is written to as it is.
"""

from __future__ import annotations

import atexit
import codecs
import io
import os
import select
import stat
import sys
import threading
import time
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar, TextIO
from weakref import WeakSet

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

_NOWAIT = 8  # RWF_NOWAIT, which the os module does not name
_ATOMIC = 4096  # a pipe that is writable has room for this many bytes
_HELD_BYTES = 8 * 1024 * 1024
_LOOK_SECONDS = 0.005
_FLUSH_SECONDS = 2.0
_WAIT_MILLISECONDS = 1000


class _Counts(Collector):
    """Lines that are not what was logged.

    Not counters of prometheus-client: a line is counted also in a signal handler, and in the child of a fork, where the
    lock of such a counter may be held for ever.
    """

    multiprocess_mode: ClassVar[str] = "livesum"

    def __init__(self) -> None:
        self.renew()
        self._lost: dict[str, int] = {"queue_full": 0, "stream_broken": 0, "sampled_out": 0, "unmade": 0}
        self._changed: dict[str, int] = {"cut": 0, "escaped": 0, "unmade": 0}

    def renew(self) -> None:
        self._lock = threading.RLock()

    def lose(self, why: str, lines: int = 1) -> None:
        with self._lock:
            self._lost[why] += lines

    def change(self, how: str) -> None:
        with self._lock:
            self._changed[how] += 1

    def describe(self) -> Iterable[Metric]:
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        lost = CounterMetricFamily(
            "mainstay_log_lines_lost", "Lines that were not written, by why.", labels=("reason",)
        )
        for why, count in self._lost.items():
            lost.add_metric((why,), count)
        yield lost
        changed = CounterMetricFamily(
            "mainstay_log_lines_changed", "Lines that were not written as they were logged, by why.", labels=("reason",)
        )
        for how, count in self._changed.items():
            changed.add_metric((how,), count)
        yield changed


COUNTS = _Counts()
REGISTRY.register(COUNTS)


def _as_json_does(error: UnicodeError) -> tuple[str, int]:
    """Error handler: what an encoding lacks, as JSON writes it, so that a line of JSON stays one."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{lacking[at : at + 2].hex()}" for at in range(0, len(lacking), 2)), error.end


codecs.register_error("mainstay.json", _as_json_does)


class Sink:
    """Writes lines to a stream.

    Args:
        stream: of text; the file below it is what is written to, where it has one.
        tell: makes the line that says how many lines were lost.
    """

    def __init__(self, stream: TextIO, tell: Callable[[int], str]) -> None:
        self._stream = stream
        self._tell = tell
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        file = _file_of(stream)
        self._to_file = file is not None
        self._file = -1 if file is None else file
        self._write = self._plainly
        if self._to_file:
            kind = os.fstat(self._file).st_mode
            waits = stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind) or os.isatty(self._file)
            if waits:
                self._write = self._unless_it_waits if hasattr(os, "pwritev") else self._if_there_is_room
        self.after_fork()
        _sinks.add(self)

    def after_fork(self) -> None:
        """Begin anew, in a child: its parent has the thread, and writes what waits."""
        # A signal's handler, or a `__del__` that the collector calls, writes its line in the middle of another one's.
        self._lock = threading.RLock()
        self._waiting: deque[bytes] = deque()
        self._held = 0
        self._untold = 0
        self._torn = False  # the file ends in the middle of a line that will never be whole
        self._behind = False
        self._asked_for = False  # a thread that catches up was started,
        self._catching_up = False  # and is there

    def msg(self, line: str) -> None:
        """Write `line`, now or as soon as the reader reads."""
        if not self._to_file:
            self._to_stream(line)
            return
        try:
            data = f"{line}\n".encode(self._encoding)
        except UnicodeError:
            data = f"{line}\n".encode(self._encoding, "mainstay.json")
            COUNTS.change("escaped")
        with self._lock:
            if self._behind:
                # Behind a thread, or behind the line that this one interrupts, or one whose writer was interrupted for
                # good before it had settled: then the thread finds what there is.
                self._wait_with(data)
                self._settle()
                return
            lost = self._untold
            if lost or self._torn:
                data = self._mended(data)
            # Until this is settled others wait behind it, or their lines could come into the middle of a divided one.
            self._behind = True
            rest = b""
            try:
                if self._stream.closed:
                    COUNTS.lose("stream_broken")
                else:
                    rest = data[self._write(data) :]
                    self._untold -= lost
            except (OSError, ValueError):
                # The other end is gone, or the disk is full: no reason for the service to fail.
                COUNTS.lose("stream_broken")
                self._untold += 1
            finally:
                if rest:
                    self._waiting.appendleft(rest)
                    self._held += len(rest)
                self._settle()

    debug = info = warning = warn = error = critical = fatal = failure = exception = log = err = msg

    def flush(self, seconds: float = _FLUSH_SECONDS) -> bool:
        """Wait until nothing waits any more, and return whether that is so."""
        end = time.monotonic() + seconds
        with self._lock:
            if self._behind:
                self._settle()
        while self._behind and time.monotonic() < end:
            time.sleep(_LOOK_SECONDS)
        return not self._behind

    def _to_stream(self, line: str) -> None:
        with self._lock:
            try:
                try:
                    self._stream.write(line + "\n")
                except UnicodeEncodeError:
                    self._stream.write(line.encode(self._encoding, "mainstay.json").decode(self._encoding) + "\n")
                    COUNTS.change("escaped")
                self._stream.flush()
            except (AttributeError, OSError, ValueError, RuntimeError):
                # No stream at all (`sys.stderr` of a daemon may be None), a closed one, or one that was just being
                # written to by whom this interrupts.
                COUNTS.lose("stream_broken")

    # Ways to write to the file without waiting: each returns how many bytes it took.

    def _plainly(self, data: bytes) -> int:
        written = os.write(self._file, data)
        while written < len(data):  # a disk that is nearly full
            self._torn = True
            written += os.write(self._file, data[written:])
        self._torn = False
        return written

    def _unless_it_waits(self, data: bytes) -> int:
        try:
            return os.pwritev(self._file, [data], -1, _NOWAIT)
        except BlockingIOError:
            return 0
        except BrokenPipeError:
            raise
        except (OSError, ValueError, OverflowError):
            self._write = self._if_there_is_room
            return self._if_there_is_room(data)

    def _if_there_is_room(self, data: bytes) -> int:
        written = 0
        while written < len(data):
            if not _has_room(self._file, 0):
                break
            try:
                written += os.write(self._file, data[written : written + _ATOMIC])
            except BlockingIOError:
                break
        return written

    def _mended(self, data: bytes) -> bytes:
        """`data` behind what ends a torn line, and behind a line about those that were lost."""
        told = f"{self._tell(self._untold)}\n".encode(self._encoding, "mainstay.json") if self._untold else b""
        return (b"\n" if self._torn else b"") + told + data

    # The queue, and the thread that empties it

    def _wait_with(self, data: bytes) -> None:
        if self._held + len(data) > _HELD_BYTES:
            COUNTS.lose("queue_full")
            self._untold += 1
        else:
            self._waiting.append(data)
            self._held += len(data)

    def _settle(self) -> None:
        if self._asked_for:
            return
        if not self._waiting:
            self._behind = False
            return
        _flush_in_forked_process()
        try:
            # Not `threading.Thread`, which takes locks that what is interrupted here may hold.
            start_new_thread(self._catch_up, ())
            self._asked_for = True
        except RuntimeError:  # the interpreter is ending
            COUNTS.lose("queue_full", len(self._waiting))
            self._waiting.clear()
            self._held = 0
            self._behind = False

    def _catch_up(self) -> None:
        with self._lock:
            if self._catching_up:  # who asked was interrupted before he had noted it, and asked again
                return
            self._catching_up = self._behind = self._asked_for = True
        while True:
            with self._lock:
                if not self._waiting and self._untold:
                    data = f"{self._told()}\n".encode(self._encoding, "mainstay.json")
                elif self._waiting:
                    data = self._waiting.popleft()
                    self._held -= len(data)
                else:
                    self._catching_up = self._behind = self._asked_for = False
                    return
            try:
                self._patiently(data)
            except (OSError, ValueError):
                COUNTS.lose("stream_broken")

    def _told(self) -> str:
        lost, self._untold = self._untold, 0
        return self._tell(lost)

    def _patiently(self, data: bytes) -> None:
        written = 0
        while written < len(data):
            if self._stream.closed:
                msg = "the stream is closed"
                raise ValueError(msg)
            if _has_room(self._file, _WAIT_MILLISECONDS):
                try:
                    written += os.write(self._file, data[written : written + _ATOMIC])
                except BlockingIOError:
                    time.sleep(_LOOK_SECONDS)


_sinks: WeakSet[Sink] = WeakSet()


def _file_of(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (AttributeError, OSError, ValueError, io.UnsupportedOperation):
        return None


def _has_room(file: int, milliseconds: int) -> bool:
    asked = select.poll()
    asked.register(file, select.POLLOUT)
    return bool(asked.poll(milliseconds))


def _renew_in_child() -> None:
    COUNTS.renew()
    for sink in list(_sinks):
        sink.after_fork()


_children_flushed: set[int] = set()  # processes


def _flush_in_forked_process() -> None:
    """See to it that a process which `multiprocessing` has forked writes what waits: it ends without `atexit`."""
    processes = sys.modules.get("multiprocessing.process")
    if processes is None or processes.parent_process() is None or os.getpid() in _children_flushed:
        return
    _children_flushed.add(os.getpid())
    from multiprocessing.util import Finalize  # noqa: PLC0415  loaded already, by the parent

    Finalize(None, _flush_all, exitpriority=0)


def _flush_all() -> None:
    end = time.monotonic() + _FLUSH_SECONDS
    for sink in list(_sinks):
        sink.flush(max(0.0, end - time.monotonic()))


atexit.register(_flush_all)
if sys.platform != "win32":
    os.register_at_fork(after_in_child=_renew_in_child)
