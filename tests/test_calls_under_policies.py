"""Calls to other services with context, deadline and span, under a policy of the circuit breaker's package."""

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from mainstay.circuit_breaker import Retries
from mainstay.circuit_breaker.http import AsyncPolicyTransport
from mainstay.core import Retry, timeout
from mainstay.observability.outgoing import AsyncOutgoingTransport


async def test_each_attempt_has_a_span_and_says_what_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy's transport stands around the one that tells."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)

    async def stock(scope, receive, send):
        told.append({name.decode(): value.decode() for name, value in scope["headers"]})
        await send({"type": "http.response.start", "status": 503, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    told: list[dict[str, str]] = []
    outgoing = AsyncOutgoingTransport("stock", inner=httpx.ASGITransport(stock))
    transport = AsyncPolicyTransport(Retries(Retry(attempts=2, wait=lambda _state: 0.0)), outgoing)
    async with timeout(60), httpx.AsyncClient(transport=transport) as client:
        assert (await client.get("http://stock/")).status_code == 503
    attempts = exporter.get_finished_spans()
    assert [each["traceparent"].split("-")[2] for each in told] == [f"{each.context.span_id:016x}" for each in attempts]
    assert len(attempts) == 2
    assert 0 < float(told[1]["x-deadline-seconds"]) <= float(told[0]["x-deadline-seconds"]) <= 60
    provider.shutdown()
