"""What every client of the cluster needs: how to connect, and how to come to an end."""

# aiokafka ships no types.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from mainstay.core import ConfigurationError
from mainstay.events._kafka.seam import REQUEST_SECONDS
from mainstay.events.settings import EventsSettings

_log = logging.getLogger("mainstay.events")

CLOSE_SECONDS = 5.0


def check_connection(settings: EventsSettings) -> None:
    """Look at what a connection needs of this machine.

    Raises:
        ConfigurationError: the file of certificates is missing, or is none.
    """
    try:
        connection(settings)
    except (OSError, ssl.SSLError) as error:
        msg = (
            f"{settings.variable('kafka_ca_file')}={settings.kafka_ca_file} is no file of certificates in PEM form: "
            f"{type(error).__name__}: {error}"
        )
        raise ConfigurationError(msg) from error


def connection(settings: EventsSettings) -> dict[str, Any]:
    """The options by which a client connects."""
    options: dict[str, Any] = {
        "bootstrap_servers": settings.kafka_servers,
        "client_id": settings.source,
        "request_timeout_ms": int(min(REQUEST_SECONDS, settings.send_seconds) * 1000),
    }
    if settings.kafka_protocol != "PLAINTEXT":
        options["security_protocol"] = settings.kafka_protocol
    if settings.kafka_protocol in {"SSL", "SASL_SSL"}:
        options["ssl_context"] = ssl.create_default_context(cafile=settings.kafka_ca_file)
    if settings.kafka_protocol.startswith("SASL"):
        assert settings.kafka_password is not None  # noqa: S101  the settings have seen to it
        options["sasl_mechanism"] = settings.kafka_mechanism
        options["sasl_plain_username"] = settings.kafka_username
        options["sasl_plain_password"] = settings.kafka_password.get_secret_value()
    return options


async def ended(what: str, stop: Coroutine[Any, Any, None], client: Any) -> None:
    """Stop a client within seconds: aiokafka's own stop waits for a broker that is away."""
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
        if task.done() and not task.cancelled() and task.exception() is not None:
            _log.info("%s ended with %r", what, task.exception())
