"""Hints: "there is something new", from one process to the others, so that they look before it is their time to.

A hint is no message. Looking now and then is what finds everything, and a hint only makes that sooner; so it may be
lost, come twice or come from long ago, and its receiver always asks the database. Within the process it is a call.
Between processes on PostgreSQL it is NOTIFY. On SQLite there is nothing of the kind, and others find out by looking.

A transaction that notifies takes a lock at its commit that the whole cluster has once, so a NOTIFY beside every write
would put all commits of all services into one queue. Hints are therefore sent after the commit that they are about, by
a connection of their own, those of `_GAP_SECONDS` in one statement, and each only once.

A pooler in transaction mode gives its client another server for every transaction, and LISTEN belongs to one server. So
the connection goes by the setting `direct_url` where there is one. Where it meets a pooler nothing is heard or sent.
"""

# asyncpg ships no types.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from contextlib import asynccontextmanager, contextmanager
from typing import cast

import asyncpg

from mainstay.core import Drain
from mainstay.database import _metrics
from mainstay.database._engine import Address, Bounds, postgres_connection
from mainstay.database._translation import DRIVER_ERRORS

Heard = Callable[[str], None]

_log = logging.getLogger("mainstay.database")

CHANNEL_RULE = re.compile(r"[a-z_][a-z0-9_]{0,62}")
MOST_BYTES = 1_000
_MESSAGE_BYTES = 7_000  # PostgreSQL takes less than 8,000
_MOST_WAITING = 5_000  # of a channel, while they cannot be sent: then one says that there is much
_GAP_SECONDS = 0.01
_PING_SECONDS = 15.0  # how soon a connection that is silently dead is noticed
_PATIENCE_SECONDS = 5.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 10.0
_SEND = "SELECT pg_notify(channel, payload) FROM unnest($1::text[], $2::text[]) AS hint (channel, payload)"


class Hints:
    """Who listens in this process, and what is to be told to others.

    Attributes:
        heard: whether hints of other processes arrive at the moment.
    """

    def __init__(self) -> None:
        self.heard = False
        self.waiting: dict[str, dict[str, None]] | None = None
        self.changed: Callable[[], None] = _nothing
        self._listeners: dict[str, list[Heard]] = {}

    @property
    def channels(self) -> list[str]:
        """Those that somebody in this process listens to."""
        return list(self._listeners)

    def tell(self, channel: str, payload: str) -> None:
        """Tell the listeners of this process now, and those of others soon."""
        self.hear(channel, payload)
        if self.waiting is None:
            return
        waiting = self.waiting.setdefault(channel, {})
        waiting[payload] = None
        if len(waiting) > _MOST_WAITING:
            self.waiting[channel] = {"": None}
        self.changed()

    def hear(self, channel: str, payload: str) -> None:
        """Call those who listen; what one of them raises is logged."""
        for heard in tuple(self._listeners.get(channel, ())):
            try:
                heard(payload)
            except Exception:  # noqa: BLE001  a hint is no reason for its sender to fail
                _log.exception("a listener to %s failed", channel)

    @contextmanager
    def listening(self, channel: str, heard: Heard) -> Generator[None, None, None]:
        """Call `heard` with the payload of every hint while the block runs."""
        listeners = self._listeners.setdefault(channel, [])
        listeners.append(heard)
        self.changed()
        try:
            yield
        finally:
            listeners.remove(heard)
            if not listeners and self._listeners.get(channel) is listeners:
                del self._listeners[channel]
                self.changed()


class Messenger:
    """The connection by which hints of a process go to others, and theirs come in.

    There is none before something is to be heard or sent. That it cannot be had is no failure: it is said in the log,
    and tried again.

    Args:
        hints: of this process.
        address: a server of PostgreSQL, better not by way of a pooler.
        limits: what bounds its statements.
    """

    def __init__(self, hints: Hints, address: Address, limits: Bounds) -> None:
        self._hints = hints
        self._address = address
        self._bounds = limits.of_connection()
        self._told = False
        hints.waiting = {}

    async def work(self, drain: Drain) -> None:
        """Send and listen until the drain begins; then send what is left."""
        self._hints.changed = drain.wake
        pause = _FIRST_PAUSE_SECONDS
        while not drain.begun:
            if not (self._hints.channels or self._hints.waiting):
                await drain.pause(float("inf"), wakeable=True)
                continue
            try:
                async with self._connection(drain) as connection:
                    if await _is_pooled(connection):
                        break
                    pause = _FIRST_PAUSE_SECONDS
                    await self._serve(connection, drain)
            except (*DRIVER_ERRORS, ValueError) as error:
                self._say(error)
                await drain.pause(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        if not drain.begun:
            _log.warning(
                "hints between processes do not pass the pooler before %s, so what others do is noticed by polling "
                "alone: set MAINSTAY_DATABASE_DIRECT_URL to the server itself",
                self._address.shown,
            )
            self._hints.waiting = None
            await drain.wait()

    def _say(self, error: BaseException) -> None:
        if not self._told:  # one line for an outage
            what = "hints between processes are not heard or sent, and until they are again there is polling: %s: %s"
            _log.warning(what, type(error).__name__, error)
        self._told = True

    @asynccontextmanager
    async def _connection(self, drain: Drain) -> AsyncGenerator[asyncpg.Connection, None]:
        self._made_at = time.monotonic()
        # As behind a pooler, which refuses the settings of a session: whether there is one is asked of the connection.
        connection = await postgres_connection(self._address, pooled=True, timeout_seconds=_PATIENCE_SECONDS)

        def ended(_connection: object) -> None:
            drain.wake()

        connection.add_termination_listener(ended)
        try:
            yield connection
        finally:
            self._hears(False)
            # At once: its listeners are not to be taken back one by one, nor a server waited for that hangs.
            connection.terminate()

    def _hears(self, heard: bool) -> None:  # noqa: FBT001  it is what is set
        self._hints.heard = heard
        _metrics.HEARS.set(heard)

    async def _serve(self, connection: asyncpg.Connection, drain: Drain) -> None:
        mine: int = connection.get_server_pid()
        async with asyncio.timeout(_PATIENCE_SECONDS):
            await connection.execute("; ".join(f"SET {key} = {value}" for key, value in self._bounds.items()))

        def received(_connection: object, sender: int, channel: str, message: object) -> None:
            if sender != mine:  # this process was told already
                for payload in _unpacked(str(message)):
                    self._hints.hear(channel, payload)

        listened: set[str] = set()
        ping_at = time.monotonic() + _PING_SECONDS
        while True:
            if connection.is_closed() or self._made_at < self._address.left_at:
                msg = "the server has closed the connection, or may not write any more"
                raise OSError(msg)
            async with asyncio.timeout(_PATIENCE_SECONDS):
                listened = await self._listen(connection, received, listened)
                sent = await self._send(connection)
                if time.monotonic() >= ping_at:
                    await connection.execute("SELECT 1")
                    ping_at = time.monotonic() + _PING_SECONDS
            if drain.begun:
                return
            if sent:
                await drain.pause(_GAP_SECONDS)
            if not self._hints.waiting:
                await drain.pause(_PING_SECONDS, wakeable=True)

    async def _listen(
        self, connection: asyncpg.Connection, received: Callable[..., None], listened: set[str]
    ) -> set[str]:
        """Listen to what somebody listens to; those channels."""
        wanted = set(self._hints.channels)
        for channel in listened - wanted:
            await connection.remove_listener(channel, received)
        for channel in wanted - listened:
            await connection.add_listener(channel, received)
        if not self._hints.heard:
            if self._told:
                _log.info("hints between processes are heard and sent again")
            self._told = False
            self._hears(True)
        for channel in wanted - listened:
            self._hints.hear(channel, "")  # what came before it was listened to was missed
        return wanted

    async def _send(self, connection: asyncpg.Connection) -> bool:
        waiting = self._hints.waiting
        if not waiting:
            return False
        self._hints.waiting = {}
        messages = [(channel, text) for channel, payloads in waiting.items() for text in _packed(payloads)]
        await connection.execute(_SEND, [channel for channel, _ in messages], [text for _, text in messages])
        return True


async def _is_pooled(connection: asyncpg.Connection) -> bool:
    """Whether a pooler answers: it invents the process id by which its client could cancel a query."""
    return bool(await connection.fetchval("SELECT pg_backend_pid()") != connection.get_server_pid())


def _packed(payloads: Iterable[str]) -> list[str]:
    """Messages, each a JSON array of payloads and short enough for PostgreSQL."""
    messages: list[list[str]] = [[]]
    size = 0
    for payload in payloads:
        text = json.dumps(payload, ensure_ascii=False)
        size += len(text.encode()) + 1
        if size > _MESSAGE_BYTES:
            messages.append([])
            size = len(text.encode()) + 1
        messages[-1].append(text)
    return [f"[{','.join(message)}]" for message in messages if message]


def _unpacked(message: str) -> list[str]:
    """The payloads of a message; what another program has sent is one as it is."""
    try:
        payloads = json.loads(message)
    except ValueError:
        return [message]
    if not isinstance(payloads, list):
        return [message]
    texts = [each for each in cast("list[object]", payloads) if isinstance(each, str)]
    return texts if len(texts) == len(cast("list[object]", payloads)) else [message]


def _nothing() -> None: ...
