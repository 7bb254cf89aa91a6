"""Worker processes that are forked from one which has imported what they need: Python's own start takes far longer."""

import multiprocessing
import multiprocessing.context
import os
import runpy
import sys
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "mainstay.workflow",
        "sqlalchemy.dialects.sqlite.aiosqlite",
        "sqlalchemy.dialects.postgresql.asyncpg",
        "packages.workflow.tests.forked",
    ]
)


class Script(multiprocessing.context.ForkServerProcess):
    """`python SCRIPT ARGUMENTS…` in a process of its own; what it says as errors goes to the end of a file."""

    def __init__(self, script: Path, *arguments: str | Path, errors: Path) -> None:
        super().__init__(target=_run, args=(script, tuple(map(str, arguments)), errors), daemon=True)
        self.start()

    @property
    def pid(self) -> int:
        """Its number: it was started when it was made."""
        pid = super().pid
        assert pid is not None
        return pid

    def send_signal(self, number: int) -> None:
        """Send it a signal; one that has ended gets none."""
        if self.is_alive():
            os.kill(self.pid, number)

    def wait(self, seconds: float | None = None) -> int | None:
        """Wait for its end; return its exit status, None where it has not ended in time."""
        self.join(seconds)
        return self.exitcode


def _run(script: Path, arguments: tuple[str, ...], errors: Path) -> None:
    with errors.open("ab") as log:
        os.dup2(log.fileno(), 2)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")
