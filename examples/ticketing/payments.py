"""The office's side of the payment provider's API."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, Self
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ConfigDict

from mainstay.circuit_breaker import BreakerConfig, Bulkhead, CircuitBreaker, Pipeline, Timeout
from mainstay.core import FullJitter, MainstayError, Retry

# A provider that is overloaded for a second or two is given that second. While the circuit is open the steps of the
# sagas wait, durably, for as long as the rejection says.
circuit = CircuitBreaker(
    "payments",
    BreakerConfig(
        window_calls=20,
        minimum_calls=6,
        failure_ratio=0.5,
        break_seconds=0.4,
        max_break_seconds=2.0,
        probes=2,
        ramp_seconds=0.5,
        ramp_start=0.5,
    ),
)
policies = Pipeline(
    "payments",
    Timeout(6.0),
    Retry(attempts=3, wait=FullJitter(initial_seconds=0.05, max_seconds=0.5)),
    circuit,
    Bulkhead(12, queue=1000, max_wait_seconds=5.0),
    Timeout(0.8),
)


class Declined(MainstayError):
    """The provider will not charge this customer; no money has moved."""

    code = "BIZ_DECLINED"
    status = 409
    title = "Charge declined"
    no_effect = True


class ProviderFailed(MainstayError):
    """No answer, or none that helps. Whether money has moved is unknown; asking again with the same key is safe."""

    code = "EXT_PROVIDER"
    status = 502
    title = "Payment provider failed"
    retryable = True


class Charged(BaseModel):
    """A charge that was made."""

    model_config = ConfigDict(frozen=True)

    key: str
    amount_cents: int


class Settled(BaseModel):
    """What had been charged under a key, and is refunded now: both 0 where nothing had been."""

    model_config = ConfigDict(frozen=True)

    key: str
    charged_cents: int
    refunded_cents: int


class PaymentProvider:
    """Calls to the provider, each under the policies of `payments`."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    @classmethod
    @asynccontextmanager
    async def connected(cls, url: str) -> AsyncGenerator[Self, None]:
        """A provider with a pool of connections, closed at the end."""
        async with httpx.AsyncClient(base_url=url, timeout=None) as client:  # noqa: S113  the pipeline limits time
            yield cls(client)

    async def charge(self, key: str, order_id: str, amount_cents: int) -> Charged:
        """Charge once for a key, however often this is called.

        Raises:
            Declined: no money moved, and none will under this key.
            ProviderFailed: the outcome is unknown.
        """
        body = {"order_id": order_id, "amount_cents": amount_cents}
        answer = await self._post("/charges", body, {"Idempotency-Key": key})
        return Charged(key=key, amount_cents=answer["amount_cents"])

    async def refund(self, key: str, order_id: str) -> Settled:
        """Give back what was charged under the key, and spend the key; at once or never, however often this is called.

        Raises:
            ProviderFailed: the outcome is unknown.
        """
        return Settled.model_validate(
            await self._post(f"/charges/{quote(key, safe='')}/refund", {"order_id": order_id})
        )

    @policies
    async def _post(self, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> dict[str, Any]:
        try:
            response = await self._client.post(path, json=body, headers=headers)
        except httpx.HTTPError as error:
            msg = f"{path}: {type(error).__name__} {error}"
            raise ProviderFailed(msg) from error
        if response.status_code in {httpx.codes.PAYMENT_REQUIRED, httpx.codes.CONFLICT}:
            raise Declined(response.json()["error"])
        if response.status_code not in {httpx.codes.OK, httpx.codes.CREATED}:
            msg = f"{path}: {response.status_code} {response.text[:200]}"
            raise ProviderFailed(msg, retryable=response.is_server_error)
        answer: dict[str, Any] = response.json()
        return answer
