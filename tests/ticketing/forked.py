"""The worker's restarts, forked from a process that has imported its libraries: a start of Python takes far longer."""

import multiprocessing
import multiprocessing.context
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from ticketing.processes import OfficeProcess

_FORKS = multiprocessing.get_context("forkserver")
# Libraries only: what of the office's own modules reads the environment must find that of the worker.
_FORKS.set_forkserver_preload(
    [
        "pytest",
        "mainstay.audit",
        "mainstay.circuit_breaker",
        "mainstay.circuit_breaker.http",
        "mainstay.database",
        "mainstay.database.schema",
        "mainstay.events",
        "mainstay.observability",
        "mainstay.workflow",
        "sqlalchemy.dialects.sqlite.aiosqlite",
        "sqlalchemy.dialects.postgresql.asyncpg",
        "aiokafka",
        "httpx",
        "typer",
    ]
)


class Restarted(multiprocessing.context.ForkServerProcess):
    """`python -m ticketing ARGUMENTS…` as an `OfficeProcess` handles it; its input ends with its starter."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        theirs, ours = _FORKS.Pipe(duplex=False)
        super().__init__(target=_run, args=(arguments, environment, log, theirs), daemon=True)
        self.start()
        theirs.close()
        self.stdin = ours  # not before the start, which would give it to the other process, too

    def poll(self) -> int | None:
        """Its exit status; None while it runs."""
        return self.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal; one that has ended gets none."""
        if self.pid is not None and self.is_alive():
            os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; return its exit status."""
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(self.name, timeout or 0.0)
        return self.exitcode


def _run(arguments: list[str], environment: dict[str, str], log: Path, given: Connection) -> None:
    os.setsid()
    os.dup2(given.fileno(), 0)
    given.close()
    with log.open("ab") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["ticketing", *arguments]
    runpy.run_module("ticketing", run_name="__main__", alter_sys=True)


@contextmanager
def restarts_forked() -> Iterator[None]:
    """Start each process by its command the first time, and a worker that was killed by a fork from then on."""
    by_command = OfficeProcess.start
    begun: set[OfficeProcess] = set()

    def start(process: OfficeProcess) -> None:
        if process.name != "worker" or process not in begun:
            begun.add(process)
            by_command(process)
            return
        arguments = process._command[process._command.index("ticketing") + 1 :]
        restarted = Restarted(arguments, process._environment, process.log)
        process._process = restarted  # type: ignore[assignment]  # as far as it is asked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OfficeProcess, "start", start)
        yield
