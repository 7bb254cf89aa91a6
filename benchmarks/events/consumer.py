"""A consumer of its own process, to be killed: notes who handled what, in the table that the benchmark reads."""

import asyncio
import json
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


class Beat(Event, type="bench.beat", key="name"):
    name: str


def service(*routers: EventRouter, url: str, **settings: Any) -> App:
    modules: list[Any] = [
        DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url))),
        EventsModule.for_root(EventsSettings(partitions=12, **settings)),
        EventsModule.for_feature(*routers),
    ]
    return App(*modules)


async def main(options: dict[str, Any]) -> None:
    router = EventRouter()
    holder: list[App] = []

    @router.on(Beat, group="beats", inbox="batch")
    async def handle(event: Beat) -> None:
        await holder[0].get(Database).write(NOTE, {"key": event.name, "pid": os.getpid()})

    app = service(router, **options)
    holder.append(app)
    async with app.running(serve=True):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
