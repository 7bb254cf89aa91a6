"""The topics of a group that can be read: those that are there at once, the others as soon as they are."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from mainstay.core import spawn
from mainstay.events._kafka.seam import LOOK_SECONDS, Contact
from mainstay.events._kafka.topics import Topics

_log = logging.getLogger("mainstay.events")

_FIRST_SECONDS = 1.0


@asynccontextmanager
async def watched(
    group: str,
    topics: Topics,
    names: Sequence[str],
    absent: dict[str, str],
    contact: Contact,
    *,
    subscribe: Callable[[list[str]], Awaitable[None]],
    ask: Callable[[], Awaitable[object]],
) -> AsyncGenerator[None, None]:
    """Within the block a group subscribes to its topics as soon as they are there, and contact is kept.

    Args:
        group: its name.
        topics: looks for them.
        names: of those that are wanted.
        absent: has those that cannot be read and why, from here on.
        contact: is told how it went.
        subscribe: reads these topics from now on.
        ask: asks the cluster for anything: a broker that is away is found by that.
    """
    looking = _watch(topics, names, absent, contact, subscribe=subscribe, ask=ask)
    watching = spawn(looking, name=f"events.{group}.watch")
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.wait((watching,))


async def _watch(
    topics: Topics,
    names: Sequence[str],
    absent: dict[str, str],
    contact: Contact,
    *,
    subscribe: Callable[[list[str]], Awaitable[None]],
    ask: Callable[[], Awaitable[object]],
) -> None:
    there: set[str] = set()
    looking: dict[str, asyncio.Task[bool]] = {}
    try:
        while True:
            for name in names:
                if name not in there and name not in looking:
                    looking[name] = spawn(_is_there(topics, name, absent), name="events.topics")
            if looking:  # one of which nothing is heard for long does not hold up the others
                await asyncio.wait(looking.values(), timeout=_FIRST_SECONDS)
            new = {name for name, task in looking.items() if task.done() and task.result()}
            looking = {name: task for name, task in looking.items() if not task.done()}
            if new:
                try:
                    await subscribe(sorted(there | new))
                except Exception as error:  # noqa: BLE001  it is tried again: without the watch nothing is read
                    contact.lost(error)
                else:
                    there |= new
            await asyncio.sleep(LOOK_SECONDS if there else _FIRST_SECONDS)
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    await ask()
            except Exception as error:  # noqa: BLE001  as above
                contact.lost(error)
            else:
                contact.made()
    finally:
        for task in looking.values():
            task.cancel()
        if looking:
            await asyncio.wait(looking.values())


async def _is_there(topics: Topics, name: str, absent: dict[str, str]) -> bool:
    try:
        await topics.ensure(name)
    except Exception as error:  # noqa: BLE001  any error makes this topic wait, and no other
        if name not in absent:
            _log.warning("topic %s cannot be read: %s: %s", name, type(error).__name__, error)
        absent[name] = f"topic {name}: {type(error).__name__}: {error}"
        return False
    absent.pop(name, None)
    return True
