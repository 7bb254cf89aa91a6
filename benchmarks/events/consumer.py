"""A consumer of its own process, to be killed: notes who handled what, in the table that the benchmark reads."""

import asyncio
import os
import sys
from typing import Any

import sqlalchemy as sa
from pydantic import SecretStr

from mainstay.core import App
from mainstay.database import Database, DatabaseModule, DatabaseSettings
from mainstay.events import Event, EventRouter, EventsModule, EventsSettings

HANDLED = sa.Table(
    "handled",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("key", sa.Text),
    sa.Column("pid", sa.Integer),
)
NOTE = sa.insert(HANDLED)
LEASE_SECONDS = 4.0


class Beat(Event, type="bench.beat", key="name"):
    name: str


def service(url: str, *routers: EventRouter) -> App:
    modules: list[Any] = [
        DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url))),
        EventsModule.for_root(EventsSettings(partitions=12, lease_seconds=LEASE_SECONDS)),
        EventsModule.for_feature(*routers),
    ]
    return App(*modules)


async def main(url: str) -> None:
    router = EventRouter()
    holder: list[App] = []

    @router.on(Beat, group="beats", inbox="batch")
    async def handle(event: Beat) -> None:
        await holder[0].get(Database).write(NOTE, {"key": event.name, "pid": os.getpid()})

    app = service(url, router)
    holder.append(app)
    async with app.running(serve=True):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
