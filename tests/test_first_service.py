"""`docs/first-service.md` holds: its files make a service that passes its tests, migrates, runs and survives a kill.

Comments in the page say what a block is: `<!-- file: path -->` a file, `<!-- run -->` commands that succeed, and
`<!-- serve -->` a server that runs from there to the end.
"""

import asyncio
import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from mainstay.core.testing import eventually
from mainstay_servers.process import free_port

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "first-service.md"
_BLOCK = re.compile(r"<!-- (file: (?P<file>\S+)|run|serve) -->\n```\w*\n(?P<text>.*?)```", re.DOTALL)


class Reader:
    """A reader of the page, in an empty directory of their own."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.port = free_port()
        without = {name: value for name, value in os.environ.items() if not name.startswith("MAINSTAY_")}
        self.environment = without | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            # Kept from run to run: what it says of the libraries takes 12 s of processor each time.
            "MYPY_CACHE_DIR": str(ROOT / "build" / "mypy" / "first-service"),
        }
        self.server: subprocess.Popen[bytes] | None = None
        self.begun: list[str] = []

    def run(self, line: str) -> str:
        """Run a command of the page, and return what it printed."""
        done = subprocess.run(
            ["/bin/sh", "-c", line],
            cwd=self.place,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def begin(self, line: str) -> None:
        """Start the server of the page."""
        self.begun = line.split()
        with (self.place / "server.log").open("ab") as log:
            self.server = subprocess.Popen(
                self.begun, cwd=self.place, env=self.environment, stdout=log, stderr=subprocess.STDOUT
            )

    async def serve(self, line: str) -> None:
        """Start the server and wait until it answers."""
        await asyncio.to_thread(self.begin, line)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}") as http:

            async def answers() -> bool:
                assert self.server is not None
                assert self.server.poll() is None, (self.place / "server.log").read_text()
                try:
                    return (await http.get("/readers/eve/loans")).status_code == httpx.codes.OK
                except httpx.TransportError:
                    return False

            await eventually(answers, seconds=60)

    def kill(self) -> None:
        """End the server as a power cut would."""
        if self.server is not None:
            self.server.send_signal(signal.SIGKILL)
            self.server.wait()
            self.server = None


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    """One who does what the page says."""
    reader = Reader(tmp_path)
    yield reader
    reader.kill()


async def test_the_page_makes_a_service_that_survives_a_kill(reader: Reader) -> None:
    """Every file and command in the page's order, type checkers included."""
    (reader.place / "loans").mkdir()
    (reader.place / "tests").mkdir()
    (reader.place / "loans" / "__init__.py").touch()
    printed: list[str] = []
    blocks = list(_BLOCK.finditer(PAGE.read_text()))
    assert len(blocks) > 10
    for block in blocks:
        text = block["text"].replace("8000", str(reader.port)).replace("localhost", "127.0.0.1")
        if block["file"] is not None:
            (reader.place / block["file"]).write_text(text)
        elif block[1] == "serve":
            await reader.serve(text.strip())
        else:
            printed += [await asyncio.to_thread(reader.run, line) for line in text.splitlines()]
    output = "\n".join(printed)
    assert "2 passed" in output
    assert "nothing was found" in output
    reader.run("mypy --strict loans tests")

    reader.kill()
    await reader.serve(" ".join(reader.begun))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{reader.port}") as http:

        async def is_lent() -> bool:
            return bool((await http.get("/readers/ann/loans")).json() == ["Moby Dick"])

        await eventually(is_lent, seconds=60)
    with contextlib.closing(sqlite3.connect(reader.place / "mainstay.db")) as database:
        (copies,) = database.execute("SELECT copies FROM loans_books").fetchone()
    assert copies == 1  # of two, however often the App was started
