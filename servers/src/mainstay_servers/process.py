"""The life of one server process: start, stop, kill, pause, resume, restart, on one port and one data directory.

All calls block (milliseconds, for Kafka seconds): an async test that goes on meanwhile uses `asyncio.to_thread`.
"""

import atexit
import contextlib
import functools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from mainstay_servers import guardian

# Below the range from which the kernel takes ports for outgoing connections: while a server is down, no other may
# be given its port, or it could not come back on it.
_PORTS = range(20_000, 32_000)


class ServerError(Exception):
    """A server that is installed did not do what it was asked; carries the end of its log."""


class _Guardian:
    """The parent's end of the pipe to `guardian`, started with the first server of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-I", guardian.__file__],
            stdin=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        atexit.register(self._close)

    def tell(self, line: str) -> None:
        pipe = self._process.stdin
        assert pipe is not None  # noqa: S101 - asked for above
        with self._lock:
            pipe.write(line + "\n")
            pipe.flush()

    def _close(self) -> None:
        with contextlib.suppress(OSError):
            self._process.communicate(timeout=guardian.GRACE_SECONDS + 5)


_guardian = functools.cache(_Guardian)


def free_port() -> int:
    """Return a free port of 127.0.0.1."""
    for port in random.sample(_PORTS, 200):
        with socket.socket() as probe, contextlib.suppress(OSError):
            # Refuses ports in TIME_WAIT too, which a server without SO_REUSEADDR could not bind.
            probe.bind(("127.0.0.1", port))
            return port
    msg = "no free port found between 20000 and 32000 on 127.0.0.1"
    raise ServerError(msg)


def _gone(pid: int) -> bool:
    """Whether the process has ended; a zombie that init has yet to reap holds no port and no file."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def descendants(pid: int) -> list[int]:
    """Return the processes below `pid`, parents first; empty where there is no /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            # The command may hold spaces and brackets; what follows the last bracket does not.
            fields = entry.read_text(errors="replace").rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found: list[int] = []
    queue = [pid]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


class Server:
    """One server on 127.0.0.1. Its port and its data stay the same over `stop`, `kill` and `restart`.

    `with Kafka() as kafka:` starts it and removes it with its data at the end. Raises `MissingServer` where the
    program is not installed and cannot be, `ServerError` where it does not come up.
    """

    name: ClassVar[str]
    stop_signal: ClassVar[int] = signal.SIGTERM
    start_seconds: ClassVar[float] = 60.0

    def __init__(self) -> None:
        self.port = free_port()
        self._directory: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._account: str | None = None  # the account to run as; None is the present one

    # ------------------------------------------------------------------------------------------------ for subclasses
    def command(self) -> Sequence[str]:
        """Return the program and its arguments."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Lay out the data directory; runs once, before the first start."""

    def ready(self) -> bool:
        """Say whether the server answers."""
        return self.listening()

    # ------------------------------------------------------------------------------------------------------ for tests
    @property
    def directory(self) -> Path:
        """The temporary directory with the data and the log."""
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix=f"mainstay-{self.name}-"))
            _guardian().tell(f"+dir {self._directory}")
            if self._account is not None:
                shutil.chown(self._directory, self._account)
        return self._directory

    @property
    def pid(self) -> int:
        """The running server's process id."""
        return self._running().pid

    @property
    def running(self) -> bool:
        """Whether there is a process, paused or not."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start and wait until it answers; on the same port and data when it ran before."""
        if self.running:
            return
        first = self._directory is None
        if first:
            try:
                self.prepare()
            except BaseException:
                self.remove()
                raise
        with (self.directory / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                user=self._account,
                group=self._account,
                extra_groups=None if self._account is None else [],
            )
        _guardian().tell(f"+group {self._process.pid} {int(self.stop_signal)}")
        try:
            self.wait_until(self._answers, "answer")
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Ask it to stop, and kill it if it has not within 15 seconds."""
        if self._process is None:
            return
        if self.running:
            self.resume()
            self._process.send_signal(self.stop_signal)
            try:
                self._process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                self.kill()
        self._forget()

    def kill(self) -> None:
        """SIGKILL the server and all its processes at once, as a power cut would end them."""
        if self._process is None:
            return
        everyone = descendants(self._process.pid)
        for pid in [self._process.pid, *everyone]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self.wait_until(lambda: all(map(_gone, everyone)), "die")
        self._forget()

    def pause(self) -> None:
        """SIGSTOP the server and all its processes: connections stay open and nothing answers."""
        for pid in [self.pid, *descendants(self.pid)]:
            os.kill(pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused server go on; nothing happens to one that runs."""
        for pid in [self.pid, *descendants(self.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def restart(self) -> None:
        """Stop, then start on the same port and data."""
        self.stop()
        self.start()

    def remove(self) -> None:
        """Stop, and delete the data."""
        self.stop()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            _guardian().tell(f"-dir {self._directory}")
            self._directory = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    # ------------------------------------------------------------------------------------------------------- internal
    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None:
            msg = f"{self.name} is not running; call start() first"
            raise ServerError(msg)
        if self._process.poll() is not None:
            code = self._process.returncode
            msg = f"{self.name} ended by itself with status {code}; the end of its log:\n{self.log()}"
            raise ServerError(msg)
        return self._process

    def _answers(self) -> bool:
        self._running()  # one that has ended says so at once, not after the last second of waiting
        return self.ready()

    def _forget(self) -> None:
        if self._process is not None:
            _guardian().tell(f"-group {self._process.pid}")
            self._process = None

    def run_once(self, *command: str) -> str:
        """Run a preparing command in the directory, as the server's user; return what it printed."""
        done = subprocess.run(
            command,
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            user=self._account,
            group=self._account,
            extra_groups=None if self._account is None else [],
        )
        if done.returncode != 0:
            msg = f"{self.name}: `{' '.join(command)}` failed with status {done.returncode}:\n{done.stdout}"
            raise ServerError(msg)
        return done.stdout

    def listening(self, port: int | None = None) -> bool:
        """Say whether something accepts connections on a port, the server's own unless another is named."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port or self.port), 1):
            return True
        return False

    def log(self) -> str:
        """Return the last 40 lines of the server's log."""
        path = self.directory / "server.log"
        text = path.read_text(errors="replace") if path.exists() else "(none)"
        return "\n".join(text.splitlines()[-40:])

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Poll `condition` until it holds, for at most `start_seconds`."""
        end = time.monotonic() + self.start_seconds
        while not condition():
            if time.monotonic() > end:
                msg = f"{self.name} did not {what} within {self.start_seconds:g} s; its log ends:\n{self.log()}"
                raise ServerError(msg)
            time.sleep(0.02)
