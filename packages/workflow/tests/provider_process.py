"""A flaky provider with a ledger of its own: `python provider_process.py DIRECTORY`.

It knows idempotency keys: what was done for a key is not done again, and what was undone is done no more. Requests are
lines of JSON, one a connection. How it fails is chosen by the key and how often it was asked for that, so it does not
depend on who is quick: it errs before it does anything, does it and never answers, does it and hangs up, or rejects.
"""

import asyncio
import json
import random
import sqlite3
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

_TABLES = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = OFF;
CREATE TABLE effects (number INTEGER PRIMARY KEY, key TEXT UNIQUE, kind TEXT, cents INTEGER, at REAL);
CREATE TABLE undone (key TEXT PRIMARY KEY, at REAL);
CREATE TABLE late (key TEXT);
"""
ERRS, SILENT, HANGS_UP, REJECTS = 0.06, 0.10, 0.14, 0.18


class Provider:
    """What it has done, and what it was asked."""

    def __init__(self, directory: Path) -> None:
        self._ledger = sqlite3.connect(directory / "provider.db", isolation_level=None)
        self._ledger.executescript(_TABLES)
        self._asked: Counter[str] = Counter()
        self._confirmed: set[str] = set()
        self._progress = 0
        self._repeats = 0

    def _do(self, key: str, kind: str, cents: int) -> int | None:
        """The number of the effect of this key; None where it was undone before it came."""
        found = self._ledger.execute("SELECT number FROM effects WHERE key = ?", [key]).fetchone()
        if found is None:
            if self._ledger.execute("SELECT 1 FROM undone WHERE key = ?", [key]).fetchone():
                self._ledger.execute("INSERT INTO late VALUES (?)", [key])
                return None
            row = [key, kind, cents, time.time()]
            self._ledger.execute("INSERT INTO effects (key, kind, cents, at) VALUES (?, ?, ?, ?)", row)
            self._progress += 1
            return self._do(key, kind, cents)
        return int(found[0])

    def _undo(self, key: str) -> None:
        done = self._ledger.execute("INSERT OR IGNORE INTO undone VALUES (?, ?)", [key, time.time()])
        self._progress += done.rowcount

    def answer(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """What is answered to a request; None is no answer, and an empty one hangs up."""
        what, key = request["what"], request.get("key", "")
        if what == "stats":
            return {"progress": self._progress, "repeats": self._repeats, "asked": self._asked.total()}
        if what == "find":
            found = self._ledger.execute("SELECT number FROM effects WHERE key = ?", [key]).fetchone()
            return {"number": None if found is None else found[0]}
        ask = f"{what} {key}"
        self._asked[ask] += 1
        self._repeats += ask in self._confirmed
        fate = random.Random(f"{ask} {self._asked[ask]}").random()  # noqa: S311  the same in every run, on purpose
        if fate < ERRS:
            return {"error": "it is a bad day"}
        if HANGS_UP <= fate < REJECTS:
            return {"rejected": 0.02}
        if request.get("declined"):
            return {"declined": True}
        number: int | None = None
        if what == "undo":
            self._undo(key)
        else:
            number = self._do(key, request["kind"], request["cents"])
        if fate < SILENT:
            return None
        if fate < HANGS_UP:
            return {}
        self._confirmed.add(ask)
        return {"number": number}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request."""
        try:
            line = await reader.readline()
            if not line.endswith(b"\n"):
                return  # who asked is dead
            answer = self.answer(json.loads(line))
            if answer is None:
                await reader.read()  # until the other side has had enough
            elif answer:
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


async def main(directory: Path) -> None:
    """Serve until killed; the file `port` says where."""
    provider = Provider(directory)
    server = await asyncio.start_server(provider.serve, "127.0.0.1", 0, backlog=1_000)
    (directory / "port.new").write_text(str(server.sockets[0].getsockname()[1]))
    (directory / "port.new").rename(directory / "port")
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
