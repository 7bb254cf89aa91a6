"""Redis."""

import contextlib
import socket
from collections.abc import Sequence
from urllib.parse import unquote, urlsplit

from mainstay_servers.install import find
from mainstay_servers.process import Server, ServerError


class Redis(Server):
    """A Redis that keeps its data over a restart. `url` names the database of the tests, number 15."""

    name = "redis"

    @property
    def url(self) -> str:
        """The address, with the database number."""
        return f"redis://127.0.0.1:{self.port}/15"

    def prepare(self) -> None:
        """Make sure that the program is there."""
        find("redis-server")

    def command(self) -> Sequence[str]:
        """Return the command of the server."""
        place = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.directory)]
        return [find("redis-server"), *place, "--save", "", "--appendonly", "yes"]

    def ready(self) -> bool:
        """Say whether it has loaded its data."""
        with contextlib.suppress(OSError, ServerError):
            _command(self.url, "PING")
            return True
        return False


def _command(url: str, *words: str) -> None:
    """Send commands in Redis's inline form and read one line each: no client library is needed for that."""
    parts = urlsplit(url)
    lines = [" ".join(words)]
    if parts.path.strip("/"):
        lines.insert(0, f"SELECT {parts.path.strip('/')}")
    if parts.password:
        user = f"{unquote(parts.username)} " if parts.username else ""
        lines.insert(0, f"AUTH {user}{unquote(parts.password)}")
    with socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 6379), 5) as connection:
        answers = connection.makefile("rb")
        for line in lines:
            connection.sendall(line.encode() + b"\r\n")
            answer = answers.readline()
            if not answer.startswith(b"+"):
                msg = f"Redis answered {answer.decode(errors='replace').strip()!r} to {line.split()[0]}"
                raise ServerError(msg)


def flush(url: str) -> None:
    """Empty the database that `url` names, and no other of that server."""
    _command(url, "FLUSHDB")
