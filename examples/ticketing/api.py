"""The HTTP API: takes purchases, says how they are doing. It sells nothing itself; that is the worker's business."""

from __future__ import annotations

from typing import Annotated

from fastapi import FastAPI, Query, Request
from sqlalchemy import func, select

from mainstay.database import Database
from mainstay.observability.fastapi import instrument
from mainstay.workflow import RunConflict
from ticketing.catalogue import Catalogue
from ticketing.main import app
from ticketing.purchases import MAX_BYTES, OrderTaken, Problem, parse_purchase
from ticketing.saga import Order, sell
from ticketing.tables import purchases

api = FastAPI(title="Ticket office", lifespan=app.lifespan)
instrument(api, app)


@api.post("/purchases", status_code=202)
async def buy(request: Request, line: Annotated[int, Query(ge=1)] = 1) -> dict[str, str]:
    """Accept one line of a purchases file: its JSON is the body, its number in the file is `line`.

    Durable with the answer. The same line again is the same purchase; another one under the same order id is refused.
    """
    known = app.get(Catalogue)
    purchase = parse_purchase(await _body(request), line=line, items=known.items, customers=known.customers)
    try:
        run = await sell.start(Order(line=line, purchase=purchase), id=run_id(purchase.order_id))
    except RunConflict:
        message = f"order {purchase.order_id!r} was taken already, with another content or from another line"
        raise OrderTaken([Problem(line, "order_id", message)]) from None
    return {"order_id": purchase.order_id, "run_id": run.id}


@api.get("/purchases/{order_id}")
async def purchase_status(order_id: str) -> dict[str, str | None]:
    """How a purchase is doing; 404 where there is none."""
    run = sell.handle(run_id(order_id))
    status = await run.status()
    mine = select(purchases.c.state, purchases.c.reason).where(purchases.c.order_id == order_id)
    state, reason = "accepted", None
    for row in await app.get(Database).read(mine):
        state, reason = row.state, row.reason
    return {"order_id": order_id, "run_id": run.id, "status": status.value, "state": state, "reason": reason}


@api.get("/purchases")
async def summary() -> dict[str, int]:
    """How many purchases are in each state."""
    counted = select(purchases.c.state, func.count().label("number")).group_by(purchases.c.state)
    return {row.state: row.number for row in await app.get(Database).read(counted)}


def run_id(order_id: str) -> str:
    return f"purchase-{order_id}"


async def _body(request: Request) -> bytes:
    """The body, but not much more than a purchase may have."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BYTES:
            break
    return bytes(data)
