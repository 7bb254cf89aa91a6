"""A process that is frozen in the middle of its work."""

import asyncio
import os
import signal
import sqlite3
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, closing
from pathlib import Path


@asynccontextmanager
async def frozen(pid: int, url: str) -> AsyncGenerator[None]:
    """Stop a process with SIGSTOP for the length of the block, but not while it has SQLite's lock on `url`.

    SQLite has one lock and no server: a process that is frozen with it holds up all others for as long, and a test of
    what the others do would depend on the moment. The test itself may have the lock, so it goes on meanwhile.
    """
    try:
        await asyncio.to_thread(_stop, pid)
        while await asyncio.to_thread(_is_locked, url):
            os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(0.001)  # some time it is past that transaction
            await asyncio.to_thread(_stop, pid)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _stop(pid: int) -> None:
    """Return when every thread has stopped: until then one may still take the lock."""
    os.kill(pid, signal.SIGSTOP)
    while any(_state(task) not in "TtZX" for task in Path(f"/proc/{pid}/task").iterdir()):
        time.sleep(0.001)


def _state(task: Path) -> str:
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # it has ended
        return "X"


def _is_locked(url: str) -> bool:
    if not url.startswith("sqlite"):
        return False
    with closing(sqlite3.connect(url.partition("///")[2], timeout=1.0, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return True
        connection.execute("ROLLBACK")
    return False
