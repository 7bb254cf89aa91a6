"""The office's processes as the demo sees them: started, killed without warning, started again, stopped in order."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGTERM

import httpx


class ProcessFailed(Exception):
    """A process ended by itself, or did not come up; the message has the last lines it wrote."""


class OfficeProcess:
    """One process of the office, `python -m ticketing NAME …`; what it writes goes to a file.

    Args:
        name: api, worker or provider.
        arguments: what follows the name on the command line.
        environment: added to this process's own.
        log: the file, to which every start appends.
    """

    def __init__(self, name: str, *arguments: str, environment: dict[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        self._command = [sys.executable, "-m", "ticketing", "--attached", name, *arguments]
        # Bytecode is kept whatever this machine's habit is: a worker that was killed is to be back soon.
        python = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONDONTWRITEBYTECODE": ""}
        self._environment = os.environ | python | environment
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; returns at once."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(  # a session of its own: Ctrl-C is the demo's to handle
                self._command,
                env=self._environment,
                stdin=subprocess.PIPE,  # ends with this process, however that ends, and with it the other
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def check(self) -> None:
        """Raises ProcessFailed if it has ended by itself."""
        if self._process is None or (status := self._process.poll()) is None:
            return
        msg = f"the {self.name} ended with status {status}; {self.last_lines()}"
        raise ProcessFailed(msg)

    def last_lines(self) -> str:
        """What it wrote last, for an error: the log itself may be gone by then."""
        lines = self.log.read_text(errors="replace").splitlines()[-15:]
        return "\n".join(["its last lines:", *lines]) if lines else "it wrote nothing"

    def kill(self) -> None:
        """SIGKILL: no handler runs, nothing is flushed, no connection is closed."""
        assert self._process is not None
        self.end()

    async def stop(self, seconds: float = 20.0) -> int | None:
        """SIGTERM, and the exit status; None where it had to be killed after all."""
        if self._process is None:
            return None
        self._process.send_signal(SIGTERM)
        try:
            return await asyncio.to_thread(self._process.wait, seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.end()

    def end(self) -> None:
        """Whatever it is doing, it does not outlive this call."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()


async def until_up(process: OfficeProcess, url: str, seconds: float = 30.0) -> None:
    """Wait until `url` answers with 200.

    Raises:
        ProcessFailed: the process ended, or the time did.
    """
    end = time.monotonic() + seconds
    async with httpx.AsyncClient(timeout=2.0) as client:
        while time.monotonic() < end:
            process.check()
            try:
                if (await client.get(url)).is_success:
                    return
            except httpx.HTTPError:
                pass  # not yet
            await asyncio.sleep(0.03)
    msg = f"the {process.name} did not answer at {url} within {seconds:g} s; {process.last_lines()}"
    raise ProcessFailed(msg)


def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
