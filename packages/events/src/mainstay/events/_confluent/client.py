"""How librdkafka connects, and what it says when something goes wrong."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any

from confluent_kafka import KafkaError, KafkaException

from mainstay.core import ConfigurationError
from mainstay.events._confluent.threads import post
from mainstay.events._kafka.seam import REQUEST_SECONDS, Contact
from mainstay.events.settings import EventsSettings

CLOSE_SECONDS = 5.0
CHECK_SECONDS = 1.1
"""Librdkafka looks once a second for what has timed out, and gives what it sends then a tenth of a second."""
_SHORTEST_LEASE_SECONDS = 4.0
"""Enough for a batch to time out, to be found to have, and for the lease to have been renewed late."""


class KafkaFault(Exception):
    """An error of librdkafka or of the broker.

    Attributes:
        code: its number in `confluent_kafka.KafkaError`.
        fatal: the client that had it is of no use any more.
    """

    def __init__(self, error: KafkaError, about: str = "") -> None:
        super().__init__(f"{about}{': ' if about else ''}{error.str()} ({error.name()})")
        self.code = error.code()
        self.fatal = error.fatal()


def fault_of(error: KafkaException, about: str = "") -> KafkaFault:
    """The error that librdkafka's exception is about."""
    return KafkaFault(error.args[0], about)


def reporting(contact: Contact) -> Callable[[KafkaError], None]:
    """Tell what librdkafka says by itself: why it has no connection, once it has none to any broker."""
    loop = asyncio.get_running_loop()
    why: KafkaFault | None = None

    def heard(error: KafkaError) -> None:
        nonlocal why
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            post(loop, contact.lost, why or KafkaFault(error))
        else:  # a single connection comes and goes
            why = KafkaFault(error)

    return heard


def check_connection(settings: EventsSettings) -> None:
    """Look at what a connection needs of this machine, and at what this client cannot honour.

    Raises:
        ConfigurationError: the file of certificates is missing, or is none; the lease is too short for it.
    """
    try:
        if settings.kafka_ca_file is not None:
            ssl.create_default_context(cafile=settings.kafka_ca_file)
    except (OSError, ssl.SSLError) as error:
        msg = (
            f"{settings.variable('kafka_ca_file')}={settings.kafka_ca_file} is no file of certificates in PEM form: "
            f"{type(error).__name__}: {error}"
        )
        raise ConfigurationError(msg) from error
    if settings.writes_database and settings.lease_seconds < _SHORTEST_LEASE_SECONDS:
        msg = (
            f"kafka_client 'confluent' cannot honour {settings.variable('lease_seconds')}={settings.lease_seconds:g}: "
            f"it looks only once a second for batches whose time is over; say {_SHORTEST_LEASE_SECONDS:g} or more, or "
            "use 'aiokafka'"
        )
        raise ConfigurationError(msg)


def connection(settings: EventsSettings) -> dict[str, Any]:
    """The options by which a client connects."""
    options: dict[str, Any] = {
        "bootstrap.servers": settings.kafka_servers,
        "client.id": settings.source,
        "socket.timeout.ms": int(min(REQUEST_SECONDS, settings.send_seconds) * 1000),
        "socket.keepalive.enable": True,
        "reconnect.backoff.max.ms": 2000,
        "topic.metadata.refresh.interval.ms": 30_000,
        "log_level": 0,  # it would write to stderr; what there is to say comes by the callback for errors
    }
    if settings.kafka_protocol != "PLAINTEXT":
        options["security.protocol"] = settings.kafka_protocol
    if settings.kafka_protocol in {"SSL", "SASL_SSL"}:
        options["ssl.ca.location"] = settings.kafka_ca_file or "probe"
    if settings.kafka_protocol.startswith("SASL"):
        assert settings.kafka_password is not None  # noqa: S101  the settings have seen to it
        options["sasl.mechanism"] = settings.kafka_mechanism
        options["sasl.username"] = settings.kafka_username
        options["sasl.password"] = settings.kafka_password.get_secret_value()
    return options
