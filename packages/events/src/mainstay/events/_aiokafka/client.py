"""What every client of the cluster needs: how to connect, and how to come to an end."""

# aiokafka ships no types.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from aiokafka.abc import AbstractTokenProvider
from aiokafka.client import AIOKafkaClient

from mainstay.events._kafka.seam import REQUEST_SECONDS, Contact
from mainstay.events._kafka.tls import context_of
from mainstay.events._kafka.tokens import Tokens

_log = logging.getLogger("mainstay.events")

CLOSE_SECONDS = 5.0
_ROUNDS = 5  # what is cancelled may wait for a task of its own first


# By Kafka's names, those of aiokafka.
_OPTIONS = {
    "every": {
        "connections.max.idle.ms": "connections_max_idle_ms",
        "metadata.max.age.ms": "metadata_max_age_ms",
        "retry.backoff.ms": "retry_backoff_ms",
    },
    "consumer": {
        "fetch.max.bytes": "fetch_max_bytes",
        "fetch.max.wait.ms": "fetch_max_wait_ms",
        "fetch.min.bytes": "fetch_min_bytes",
        "max.partition.fetch.bytes": "max_partition_fetch_bytes",
    },
    "producer": {"compression.type": "compression_type"},
    "direct": {"batch.size": "max_batch_size", "linger.ms": "linger_ms"},
}


def connection(contact: Contact, *kinds: str, **ours: Any) -> dict[str, Any]:
    """The options by which a client connects, and those of `kafka_options` that its kind knows, above ours.

    Certificates are read anew each time: they are replaced while a service runs.

    Raises:
        ConfigurationError: a file of certificates or keys cannot be used any more.
    """
    settings = contact.settings
    options: dict[str, Any] = ours | {
        "bootstrap_servers": settings.kafka_servers,
        "client_id": settings.source,
        "request_timeout_ms": int(min(REQUEST_SECONDS, settings.send_seconds) * 1000),
        "security_protocol": settings.kafka_protocol,
    }
    if settings.kafka_protocol.endswith("SSL"):
        options["ssl_context"] = context_of(settings)
    if settings.kafka_protocol.startswith("SASL"):
        options["sasl_mechanism"] = settings.kafka_mechanism
        if contact.tokens is not None:
            options["sasl_oauth_token_provider"] = _TokenProvider(contact.tokens)
        else:
            assert settings.kafka_password is not None  # noqa: S101  the settings have seen to it
            options["sasl_plain_username"] = settings.kafka_username
            options["sasl_plain_password"] = settings.kafka_password.get_secret_value()
    for kind in ("every", *kinds):
        for name, option in _OPTIONS[kind].items():
            if name in settings.kafka_options:
                value = settings.kafka_options[name]
                options[option] = None if value == "none" else value
    return options


class _TokenProvider(AbstractTokenProvider):  # type: ignore[misc]  # aiokafka ships no types
    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def token(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]  as their docs want it
        token, _ = await self._tokens.current()
        return token


async def ended(what: str, stop: Coroutine[Any, Any, None], owner: Any) -> None:
    """Stop a consumer, a producer or an admin client within seconds, with all its tasks.

    Aiokafka's own stop waits for a broker that is away. Given up half-way it leaves tasks that go on asking for ever.

    Args:
        what: names it in the log.
        stop: what it does to stop.
        owner: the consumer, producer or admin client.
    """
    (client,) = (part for part in vars(owner).values() if isinstance(part, AIOKafkaClient))
    task = asyncio.ensure_future(stop)
    try:
        done, _ = await asyncio.wait((task,), timeout=CLOSE_SECONDS)
        if not done:
            _log.warning("%s did not stop within %g s and is abandoned", what, CLOSE_SECONDS)
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait((task,), timeout=CLOSE_SECONDS)
        # Also after a stop that went well: a connection that was being made meanwhile is open by now.
        with suppress(Exception):
            await asyncio.wait_for(client.close(), CLOSE_SECONDS)
        await _end_tasks(owner)
        if task.done() and not task.cancelled() and task.exception() is not None:
            _log.info("%s ended with %r", what, task.exception())


async def _end_tasks(owner: Any) -> None:
    """Cancel what is left of the tasks of all parts of an owner: they keep no list of them."""
    parts = {id(part) for part in (owner, *vars(owner).values()) if part is not None}
    for _ in range(_ROUNDS):
        tasks = [task for task in asyncio.all_tasks() if id(_self_of(task)) in parts]
        if not tasks:
            break
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=1.0)


def _self_of(task: asyncio.Task[Any]) -> object:
    """The object whose method a task runs, None for anything else."""
    coroutine = task.get_coro()
    return inspect.getcoroutinelocals(coroutine).get("self") if inspect.iscoroutine(coroutine) else None
