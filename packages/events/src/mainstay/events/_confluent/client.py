"""How librdkafka connects, and what it says when something goes wrong."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar

from confluent_kafka import KafkaError, KafkaException

from mainstay.core import ConfigurationError
from mainstay.events._confluent.threads import aside, post
from mainstay.events._kafka import tls
from mainstay.events._kafka.seam import REQUEST_SECONDS, Contact
from mainstay.events._kafka.tokens import Tokens
from mainstay.events.settings import EventsSettings

T = TypeVar("T")

CLOSE_SECONDS = 5.0
CHECK_SECONDS = 1.1
"""Librdkafka looks once a second for what has timed out, and gives what it sends then a tenth of a second."""
_SHORTEST_LEASE_SECONDS = 4.0
"""Enough for a batch to time out, to be found to have, and for the lease to have been renewed late."""


_REMEDIES = {
    KafkaError._AUTHENTICATION: ("kafka_mechanism", "kafka_username", "kafka_password", "kafka_token"),
    KafkaError._SSL: ("kafka_protocol", "kafka_ca_file", "kafka_certificate_file"),
    KafkaError._RESOLVE: ("kafka_servers",),
}


class KafkaFault(Exception):
    """An error of librdkafka or of the broker.

    Attributes:
        code: its number in `confluent_kafka.KafkaError`.
        remedied: it says what mends it.
        fatal: the client that had it is of no use any more.
    """

    def __init__(self, error: KafkaError, about: str = "", after: str = "") -> None:
        super().__init__(f"{about}{': ' if about else ''}{error.str()} ({error.name()}){after}")
        self.code = error.code()
        self.remedied = bool(after)
        self.fatal = error.fatal()


def fault_of(error: KafkaException, about: str = "") -> KafkaFault:
    """The error that librdkafka's exception is about."""
    return KafkaFault(error.args[0], about)


class Reasons:
    """What librdkafka says by itself, as its callback for errors: why there is no connection.

    Args:
        contact: is told, once there is none to any broker, or at once where that does not pass by itself.

    Attributes:
        why: the last that was said.
    """

    def __init__(self, contact: Contact) -> None:
        self._loop = asyncio.get_running_loop()
        self._contact = contact
        self.why: KafkaFault | None = None

    def __call__(self, error: KafkaError) -> None:
        """See the class; in the thread that asks for news."""
        if error.code() in _REMEDIES:
            fields = (self._contact.settings.variable(field) for field in _REMEDIES[error.code()])
            self.why = KafkaFault(error, after=f"; see {', '.join(fields)}")
            post(self._loop, self._contact.lost, self.why)
        elif error.code() == KafkaError._ALL_BROKERS_DOWN:
            post(self._loop, self._contact.lost, self.why or KafkaFault(error))
        elif self.why is None or self.why.code not in _REMEDIES:  # a single connection comes and goes
            self.why = KafkaFault(error)


def check_connection(settings: EventsSettings) -> None:
    """Look at what a connection needs of this machine, and at what this client cannot honour.

    Raises:
        ConfigurationError: see `tls.context_of`; or the lease is too short for this client.
    """
    tls.check_connection(settings)
    if settings.writes_database and settings.lease_seconds < _SHORTEST_LEASE_SECONDS:
        msg = (
            f"kafka_client 'confluent' cannot honour {settings.variable('lease_seconds')}={settings.lease_seconds:g}: "
            f"it looks only once a second for batches whose time is over; say {_SHORTEST_LEASE_SECONDS:g} or more, or "
            "use 'aiokafka'"
        )
        raise ConfigurationError(msg)


async def made(kind: Callable[[dict[str, Any]], T], options: dict[str, Any]) -> T:
    """Make a client, apart from the loop.

    Raises:
        KafkaFault: it cannot be made of these options.
    """
    try:
        return await aside(lambda: kind(options), "events.client")
    except KafkaException as error:
        raise fault_of(error) from error


# By Kafka's names, those of librdkafka.
_OPTIONS = {
    "every": {
        "connections.max.idle.ms": "connections.max.idle.ms",
        "metadata.max.age.ms": "topic.metadata.refresh.interval.ms",
        "retry.backoff.ms": "retry.backoff.ms",
    },
    "consumer": {
        "fetch.max.bytes": "fetch.max.bytes",
        "fetch.max.wait.ms": "fetch.wait.max.ms",
        "fetch.min.bytes": "fetch.min.bytes",
        "max.partition.fetch.bytes": "fetch.message.max.bytes",
    },
    "producer": {"compression.type": "compression.type"},
    "direct": {"batch.size": "batch.size", "linger.ms": "linger.ms"},
}


def connection(contact: Contact, *kinds: str, **ours: Any) -> dict[str, Any]:
    """The options by which a client connects, and those of `kafka_options` that its kind knows, above ours.

    Librdkafka reads certificates when a client is made, and asks for tokens from a thread of its own; in the loop's,
    a client must not be made, since it waits there for the first one.
    """
    settings = contact.settings
    options: dict[str, Any] = {
        "topic.metadata.refresh.interval.ms": 30_000,
        "reconnect.backoff.max.ms": 2000,
        **{name.replace("_", "."): value for name, value in ours.items()},
        "bootstrap.servers": settings.kafka_servers,
        "client.id": settings.source,
        "socket.timeout.ms": int(min(REQUEST_SECONDS, settings.send_seconds) * 1000),
        "socket.keepalive.enable": True,
        "security.protocol": settings.kafka_protocol,
        "log_level": 0,  # it would write to stderr; what there is to say comes by the callback for errors
    }
    if settings.kafka_protocol.endswith("SSL"):
        options |= _shown(settings)
    if settings.kafka_protocol.startswith("SASL"):
        options["sasl.mechanism"] = settings.kafka_mechanism
        if contact.tokens is not None:
            options["oauth_cb"] = _asking_for(contact.tokens)
        else:
            assert settings.kafka_password is not None  # noqa: S101  the settings have seen to it
            options["sasl.username"] = settings.kafka_username
            options["sasl.password"] = settings.kafka_password.get_secret_value()
    for kind in ("every", *kinds):
        for name, option in _OPTIONS[kind].items():
            if name in settings.kafka_options:
                options[option] = settings.kafka_options[name]
    return options


def _shown(settings: EventsSettings) -> dict[str, Any]:
    options: dict[str, Any] = {"ssl.ca.location": settings.kafka_ca_file or "probe"}
    if settings.kafka_certificate_file is not None:
        options["ssl.certificate.location"] = settings.kafka_certificate_file
        options["ssl.key.location"] = settings.kafka_key_file or settings.kafka_certificate_file
    if settings.kafka_key_password is not None:
        options["ssl.key.password"] = settings.kafka_key_password.get_secret_value()
    return options


def _asking_for(tokens: Tokens) -> Callable[[str], tuple[str, float]]:
    loop = asyncio.get_running_loop()

    def ask(_options: str) -> tuple[str, float]:
        token, seconds = asyncio.run_coroutine_threadsafe(tokens.current(), loop).result(REQUEST_SECONDS)
        return token, time.time() + seconds  # it wants the time of day

    return ask
