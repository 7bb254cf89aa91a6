"""Two PostgreSQL servers behind one address that moves, and a network that can lose what is sent."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Self

from mainstay_servers.install import find
from mainstay_servers.postgres import Postgres, execute_at, look_for
from mainstay_servers.process import free_port

_UNTIL_NOTHING_IS_WRITTEN = """
DO $$ BEGIN
  WHILE EXISTS (SELECT FROM pg_stat_activity WHERE backend_xid IS NOT NULL) LOOP
    PERFORM pg_sleep(0.01);
    PERFORM pg_stat_clear_snapshot();
  END LOOP;
END $$
"""


class Forwarder:
    """A TCP address on 127.0.0.1 whose connections lead to another port; runs in a thread of its own.

    `move` leads new connections elsewhere, as a DNS name does after a failover: those that are open stay where they
    are. `vanish` is a network that loses every packet of the connections that are open: nothing arrives, and no side
    is told.
    """

    def __init__(self, target: int) -> None:
        self.port = free_port()
        self._target = target
        self._links: list[_Link] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="forwarder", daemon=True)
        self._server: asyncio.Server | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._listen())
        return self

    def __exit__(self, *_details: object) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def move(self, target: int) -> None:
        """Lead new connections to another port; those that are open stay."""
        self._target = target

    def vanish(self) -> None:
        """Lose what is sent over the connections that are open now, in both directions, for ever."""
        self._do(self._each(_Link.lose))

    def cut(self) -> None:
        """End the connections that are open now."""
        self._do(self._each(_Link.cut))

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _listen(self) -> None:
        self._server = await self._loop.create_server(self._accept, "127.0.0.1", self.port)

    def _accept(self) -> "_Link":
        link = _Link(self._loop, self._target)
        self._links.append(link)
        return link

    async def _each(self, what: Callable[["_Link"], None]) -> None:
        for link in self._links:
            what(link)

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        await self._each(_Link.end)


class _Link(asyncio.Protocol):
    """One connection of a client, with the one that leads to the server."""

    def __init__(self, loop: asyncio.AbstractEventLoop, target: int) -> None:
        self._loop = loop
        self._target = target
        self._client: asyncio.Transport | None = None
        self._server: asyncio.Transport | None = None
        self._waiting = b""
        self._lost = False
        self._connecting: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101  as start_server makes them
        self._client = transport
        self._connecting = self._loop.create_task(self._connect())

    async def _connect(self) -> None:
        try:
            transport, _ = await self._loop.create_connection(lambda: _Back(self), "127.0.0.1", self._target)
        except OSError:
            self.end()
            return
        self._server = transport
        if self._client is None or self._client.is_closing():
            transport.abort()
        elif not self._lost:
            transport.write(self._waiting)

    def data_received(self, data: bytes) -> None:
        if self._lost:
            return
        if self._server is None:
            self._waiting += data
        else:
            self._server.write(data)

    def back(self, data: bytes) -> None:
        """Send the client what the server said."""
        if not self._lost and self._client is not None:
            self._client.write(data)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  asyncio's signature
        self.cut()

    def lose(self) -> None:
        """Forward nothing any more, not even that a side has ended."""
        self._lost = True

    def cut(self) -> None:
        """End both sides, unless what one says is lost on the other."""
        if not self._lost:
            self.end()

    def end(self) -> None:
        """End both sides."""
        for transport in (self._client, self._server):
            if transport is not None:
                transport.abort()


class _Back(asyncio.Protocol):
    def __init__(self, link: _Link) -> None:
        self._link = link

    def data_received(self, data: bytes) -> None:
        self._link.back(data)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  asyncio's signature
        self._link.cut()


class Standby(Postgres):
    """A streaming standby of the primary: it can be read, and becomes a primary by `promote`."""

    name = "standby"

    def __init__(self, primary: Postgres) -> None:
        super().__init__()
        self._primary = primary

    def prepare(self) -> None:
        """Copy the primary's data."""
        self.run_as_postgres()
        address = ("-h", "127.0.0.1", "-p", str(self._primary.port), "-U", "postgres")
        self.run_once(
            find("pg_basebackup", look_for), *address, "-D", "data", "-R", "-X", "stream", "-c", "fast", "--no-sync"
        )

    def promote(self) -> None:
        """Make it a primary; returns when it accepts writes."""
        self.run_once(find("pg_ctl", look_for), "promote", "-w", "-D", str(self.directory / "data"))


class Pair:
    """A primary and its synchronous standby behind one address.

    `promote` is what an operator or a cluster's manager does when the primary is lost: the standby becomes primary and
    the address leads to it. `demote` leaves the old primary running as a server that can only be read, which is what
    connections that never noticed still talk to.

    Attributes:
        primary, standby: the servers.
        address: the forwarder before them.
        url: the administrative database behind the address, for SQLAlchemy with asyncpg.
    """

    def __init__(self) -> None:
        self.primary = Postgres()
        self.standby = Standby(self.primary)
        self.address = Forwarder(self.primary.port)

    @property
    def url(self) -> str:
        """The address that moves."""
        return f"postgresql+asyncpg://postgres@127.0.0.1:{self.address.port}/postgres"

    def __enter__(self) -> Self:
        try:
            self.primary.start()
            self.standby.start()
            # What was committed is on both, or a promotion would lose it.
            execute_at(self.primary.url, "ALTER SYSTEM SET synchronous_standby_names = '*'")
            execute_at(self.primary.url, "SELECT pg_reload_conf()")
            self.address.__enter__()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_details: object) -> None:
        self.address.__exit__()
        self._remove()

    def _remove(self) -> None:
        self.standby.remove()
        self.primary.remove()

    def promote(self) -> None:
        """Kill the primary, promote the standby, and move the address."""
        self.primary.kill()
        self.standby.promote()
        self.address.move(self.standby.port)

    def demote(self, *, restart: bool) -> None:
        """Promote the standby while the old primary goes on, readable only; the address moves with `move`.

        Args:
            restart: whether the old primary is restarted as a standby, which ends its connections. Otherwise they stay
                open, and each refuses to write.
        """
        if restart:
            self.primary.stop()
            (self.primary.directory / "data" / "standby.signal").touch()
            self.primary.start()
        else:
            execute_at(self.primary.url, "ALTER SYSTEM SET default_transaction_read_only = on")
            execute_at(self.primary.url, "SELECT pg_reload_conf()")
            # A commit that is under way when its standby is promoted would wait for that standby for ever.
            execute_at(self.primary.url, _UNTIL_NOTHING_IS_WRITTEN)
        self.standby.promote()

    def move(self) -> None:
        """Let the address lead to the new primary, for new connections only."""
        self.address.move(self.standby.port)
