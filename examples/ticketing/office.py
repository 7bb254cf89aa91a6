"""The office's own module, written by the convention of every other: settings, what it requires, and one running part.

Steps and handlers are plain functions. The services that they need, the database and the provider above all, are
keyword parameters with a default of `given(…)`, which the App fills.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path
from typing import ClassVar, Never

from pydantic import Field
from pydantic_settings import SettingsConfigDict
from sqlalchemy import insert, select

from mainstay.core import App, Module, Settings
from mainstay.database import Database, DatabaseModule
from ticketing.catalogue import Catalogue, Item, read_catalogue
from ticketing.payments import PaymentProvider
from ticketing.tables import SCHEMA, customers, items, sales, tickets


class OfficeSettings(Settings):
    """Read from `TICKETING_…`.

    Attributes:
        provider_url: where the payment provider listens.
        purchases: the file whose items go on sale when nothing is yet; None where another process sees to it.
    """

    model_config = SettingsConfigDict(env_prefix="TICKETING_")

    provider_url: str = Field(default="http://127.0.0.1:8001", pattern="^https?://")
    purchases: Path | None = None


class OfficeModule(Module[OfficeSettings, Never]):
    """The ticket office of an App."""

    name: ClassVar[str] = "ticketing"

    def yields(self) -> Sequence[type]:
        """The payment provider's client, and what is on sale."""
        return (PaymentProvider, Catalogue)

    def requires(self) -> Sequence[type[DatabaseModule]]:
        """The office keeps everything in the database."""
        return (DatabaseModule,)

    @asynccontextmanager
    async def running(self, app: App) -> AsyncGenerator[Sequence[object], None]:
        """Put the tickets on sale if none is; connect to the provider."""
        database = app.get(Database)
        await database.ensure_schema(SCHEMA)
        if self.settings.purchases is not None:
            await put_on_sale(database, read_catalogue(self.settings.purchases))
        catalogue = await on_sale(database)
        async with PaymentProvider.connected(self.settings.provider_url) as provider:
            yield (provider, catalogue)


async def on_sale(database: Database) -> Catalogue:
    """What is on sale, and who may buy."""
    offer = await database.read(select(items.c.item, items.c.title, items.c.stock))
    known = await database.read(select(customers.c.customer_id))
    return Catalogue(
        {row.item: Item(row.item, row.title, row.stock) for row in offer}, frozenset(row[0] for row in known)
    )


async def put_on_sale(database: Database, catalogue: Catalogue) -> None:
    """Open the shop with a row for each ticket there is; nothing, if something is on sale already."""
    async with database.transaction() as session:
        if await session.scalar(select(items.c.item).limit(1)) is not None:
            return
        offer = catalogue.items.values()
        for table, rows in (
            (items, [{"item": i.item, "title": i.title, "stock": i.stock, "free": i.stock} for i in offer]),
            (sales, [{"item": i.item} for i in offer]),
            (customers, [{"customer_id": customer} for customer in sorted(catalogue.customers)]),
        ):
            if rows:
                await session.execute(insert(table), rows)
        serials = ((i.item, serial) for i in offer for serial in range(1, i.stock + 1))
        each = ({"item": item, "serial": serial, "state": "free"} for item, serial in serials)
        while part := list(islice(each, 10_000)):  # there may be more than fit into memory at once
            await session.execute(insert(tickets), part)
