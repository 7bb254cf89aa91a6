"""A service of its own process through which many events pass; prints its peak memory in MiB, a line a mark."""

import asyncio
import json
import resource
import sys
from typing import Any

from pydantic import SecretStr

from benchmarks.events.bench import Paid, events
from mainstay.core import App
from mainstay.database import DatabaseModule, DatabaseSettings
from mainstay.events import EventPublisher, EventRouter, EventsModule, EventsSettings

BATCH = 1_000
AHEAD = 5
"""So many batches are published and not handled: what grows with a backlog is no leak."""


def service(url: str | None, settings: dict[str, Any], router: EventRouter) -> App:
    modules: list[Any] = [
        EventsModule.for_root(EventsSettings(partitions=4, **settings)),
        EventsModule.for_feature(router),
    ]
    if url is not None:
        modules.insert(0, DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url))))
    return App(*modules)


async def main(marks: list[int], url: str | None, settings: dict[str, Any]) -> None:
    router = EventRouter()
    load = events(BATCH)
    handled = 0
    moved = asyncio.Event()

    @router.on(Paid, group="flat")
    async def handle(_event: Paid) -> None:
        nonlocal handled
        handled += 1
        if not handled % BATCH:
            moved.set()

    async with service(url, settings, router).running(serve=True) as app:
        publisher = app.get(EventPublisher)
        published = 0
        for mark in marks:
            while published < mark:
                await publisher.publish_batch(load)
                published += BATCH
                while published - handled > AHEAD * BATCH:
                    moved.clear()
                    await moved.wait()
            while handled < mark:
                moved.clear()
                await moved.wait()
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, flush=True)


if __name__ == "__main__":
    first, last, url, settings = json.loads(sys.argv[1])
    asyncio.run(main([first, last], url, settings))
