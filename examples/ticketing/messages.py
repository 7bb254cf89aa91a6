"""What the office tells the world. All events of a purchase share its key, and so keep their order."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from mainstay.events import Event


class Tickets(BaseModel):
    """So many tickets of an item, at one price."""

    model_config = ConfigDict(frozen=True)

    item: str
    quantity: int
    price_cents: int


class TicketsHeld(Event, type="tickets.held", version="1.0", key="order_id"):
    order_id: str
    tickets: tuple[Tickets, ...]


class PaymentCaptured(Event, type="payment.captured", version="1.0", key="order_id"):
    order_id: str
    customer_id: str
    amount_cents: int


class PaymentRefunded(Event, type="payment.refunded", version="1.0", key="order_id"):
    order_id: str
    customer_id: str
    amount_cents: int


class PurchaseCompleted(Event, type="purchase.completed", version="1.0", key="order_id"):
    order_id: str
    customer_id: str
    amount_cents: int
    tickets: tuple[Tickets, ...]


class PurchaseCancelled(Event, type="purchase.cancelled", version="1.0", key="order_id"):
    order_id: str
    customer_id: str
    reason: str
