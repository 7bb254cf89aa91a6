"""The office's own module in this process: what it puts on sale, and counters that no event falls past."""

import pytest
from pydantic import SecretStr
from sqlalchemy import delete, func, select

from mainstay.core import App
from mainstay.database import Database, DatabaseModule, DatabaseSettings
from ticketing import projections
from ticketing.catalogue import Catalogue, Item
from ticketing.demo import DEFAULT_PURCHASES
from ticketing.messages import PaymentCaptured, Tickets, TicketsHeld
from ticketing.office import OfficeModule, OfficeSettings, put_on_sale
from ticketing.tables import customers, handled, sales, tickets


@pytest.fixture(params=["sqlite", "postgres"])
async def database(request, tmp_path):
    """The database of an office that has opened with the default purchases."""
    url = f"sqlite+aiosqlite:///{tmp_path}/office.db"
    if request.param == "postgres":
        url = request.getfixturevalue("postgres")
        from mainstay.database.schema import installed, upgrade
        from ticketing.tables import SCHEMA

        await upgrade(url, [*installed(), SCHEMA])
    app = App(
        DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url))),
        OfficeModule.for_root(OfficeSettings(purchases=DEFAULT_PURCHASES)),
    )
    async with app:
        yield app.get(Database)


async def test_an_event_that_finds_no_row_to_count_on_fails(database):
    """An item or a customer whose counter is gone is an error, and the event does not count as handled."""
    held = TicketsHeld(order_id="1", tickets=(Tickets(item="MUSEUM", quantity=2, price_cents=725),))
    paid = PaymentCaptured(order_id="1", customer_id="ada", amount_cents=1450)
    await projections.count_held(held, db=database)
    await projections.count_paid(paid, db=database)
    assert [row.held for row in await database.read(select(sales.c.held).where(sales.c.item == "MUSEUM"))] == [2]
    async with database.transaction() as session:
        await session.execute(delete(sales).where(sales.c.item == "MUSEUM"))
        await session.execute(delete(customers).where(customers.c.customer_id == "ada"))
    with pytest.raises(LookupError, match="MUSEUM"):
        await projections.count_held(held, db=database)
    with pytest.raises(LookupError, match="ada"):
        await projections.count_paid(paid, db=database)
    assert [row[0] for row in await database.read(select(func.count()).select_from(handled))] == [2]


async def test_an_item_may_have_any_number_of_tickets(tmp_path):
    """They are printed in parts, each ticket once and none too few."""
    url = f"sqlite+aiosqlite:///{tmp_path}/office.db"
    catalogue = Catalogue({"A": Item("A", "t", 25_000), "B": Item("B", "t", 1)}, frozenset({"ada"}))
    app = App(DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url))), OfficeModule.for_root(OfficeSettings()))
    async with app:
        await put_on_sale(app.get(Database), catalogue)
        counted = select(tickets.c.item, func.count(), func.min(tickets.c.serial), func.max(tickets.c.serial))
        rows = await app.get(Database).read(counted.group_by(tickets.c.item).order_by(tickets.c.item))
    assert [tuple(row) for row in rows] == [("A", 25_000, 1, 25_000), ("B", 1, 1, 1)]
