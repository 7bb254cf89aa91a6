"""Connecting, by a client that says why it could not.

Aiokafka writes the reason into its own log and answers with "unable to bootstrap", or tries again without a word. Here
each failed connection is an error that names what is wrong and which setting mends it, and the health knows it at once.
"""

# aiokafka ships no types.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Sequence
from typing import Any

from aiokafka.client import AIOKafkaClient, ConnectionGroup
from aiokafka.conn import AIOKafkaConnection, OAuthAuthenticator
from aiokafka.errors import (
    IllegalSaslStateError,
    KafkaConnectionError,
    KafkaError,
    SaslAuthenticationFailed,
    StaleMetadata,
    UnsupportedSaslMechanismError,
)
from aiokafka.protocol.metadata import MetadataRequest

from mainstay.events._kafka.seam import Contact
from mainstay.events._kafka.tokens import NoTokenError
from mainstay.events.settings import EventsSettings

_FAILED = (KafkaError, OSError, TimeoutError)

# What OpenSSL calls a certificate that is out of time, and one for another name or address.
_EXPIRED, _OTHER_NAMES = {9, 10}, {62, 64}
_AGAINST_THE_RULES = range(79, 95)  # of RFC 5280, on which Python insists from 3.13 on


class UnreachableError(KafkaConnectionError):  # type: ignore[misc]  # aiokafka ships no types
    """There is no connection to a broker; the message says why, and what to do."""

    def __str__(self) -> str:
        return str(self.args[0])


class _Bearer(OAuthAuthenticator):  # type: ignore[misc]  # aiokafka ships no types
    """A broker that refuses a token says so in its challenge and waits for an answer, which aiokafka never sends."""

    async def step(self, payload: bytes | None) -> Any:
        if payload:
            return b"\x01", True
        return await super().step(payload)


class _Connection(AIOKafkaConnection):  # type: ignore[misc]  # aiokafka ships no types
    def authenticator_oauth(self) -> _Bearer:
        return _Bearer(sasl_oauth_token_provider=self._sasl_oauth_token_provider)


class NamingClient(AIOKafkaClient):  # type: ignore[misc]  # aiokafka ships no types
    """Connects as aiokafka's client does, and says why it cannot."""

    _contact: Contact
    _sync_task: asyncio.Task[None] | None

    @classmethod
    def instead_of(cls, client: Any, contact: Contact) -> None:
        """Turn the client that a consumer, producer or admin client has made for itself into one of these."""
        client.__class__ = cls
        client._contact = contact

    async def bootstrap(self) -> None:
        """Learn the brokers from the first address that answers.

        Raises:
            UnreachableError: none does; for the reason that the last one gave.
        """
        self.cluster.update_metadata(await self._ask_first(self.hosts, MetadataRequest([])))
        if self._sync_task is None:
            self._sync_task = asyncio.create_task(self._md_synchronizer())

    async def _ask_first(self, hosts: Sequence[tuple[str, int, Any]], request: Any) -> Any:
        failure = UnreachableError("there is no address of a broker")
        for host, port, _ in hosts:
            try:
                connection = await self._open(host, port, on_close=None)
                try:
                    metadata: Any = await connection.send(request)
                finally:
                    connection.close()
            except UnreachableError as error:
                failure = error
            except _FAILED as error:
                failure = self._unreachable(error, host, port)
            else:
                if metadata.brokers:
                    return metadata
                # So answers one that is starting, or had stood still. Aiokafka fails in other ways without any broker.
                failure = UnreachableError(f"{host}:{port} knows of no broker that is ready")
                self._contact.lost(failure)
        raise failure

    async def _metadata_update(self, cluster_metadata: Any, topics: Any) -> bool:
        """Ask the brokers that are known, and where none of them answers the addresses of the settings again.

        Aiokafka asks those when it starts and never again: it would not find brokers that came back elsewhere.
        """
        if await super()._metadata_update(cluster_metadata, topics):
            return True
        asked = {(broker.host, broker.port) for broker in self.cluster.brokers()}
        others = [each for each in self.hosts if each[:2] not in asked]
        try:
            metadata = await self._ask_first(others, MetadataRequest(list(topics or ()) or None))
        except UnreachableError:
            return False
        cluster_metadata.update_metadata(metadata)
        return True

    async def _get_conn(self, node_id: Any, *, group: Any = ConnectionGroup.DEFAULT, no_hint: bool = False) -> Any:  # noqa: ARG002  aiokafka's own
        place = (node_id, group)
        async with self._get_conn_lock:
            connection = self._conns.get(place)
            if connection is not None and connection.connected():
                return connection
            self._conns.pop(place, None)
            try:
                broker = self.cluster.broker_metadata(node_id)
                if broker is None:
                    msg = f"broker {node_id} is not known"
                    raise StaleMetadata(msg)
                connection = await self._open(broker.host, broker.port, on_close=self._on_connection_closed)
            except _FAILED:
                self.force_metadata_update()  # the brokers may be others by now
                return None
            self._conns[place] = connection
            return connection

    async def _open(self, host: str, port: int, *, on_close: Any) -> _Connection:
        connection = _Connection(
            host,
            port,
            client_id=self._client_id,
            request_timeout_ms=self._request_timeout_ms,
            ssl_context=self._ssl_context,
            security_protocol=self._security_protocol,
            max_idle_ms=self._connections_max_idle_ms,
            on_close=on_close,
            sasl_mechanism=self._sasl_mechanism,
            sasl_plain_username=self._sasl_plain_username,
            sasl_plain_password=self._sasl_plain_password,
            sasl_oauth_token_provider=self._sasl_oauth_token_provider,
        )
        try:
            await connection.connect()
        except _FAILED as error:
            raise self._unreachable(error, host, port) from error
        self._contact.made()
        return connection

    def _unreachable(self, error: BaseException, host: str, port: int) -> UnreachableError:
        if isinstance(error, SaslAuthenticationFailed) and self._contact.tokens is not None:
            self._contact.tokens.refused()
        failure = UnreachableError(why(error, self._contact, f"{host}:{port}"))
        self._contact.lost(failure)
        return failure


def why(error: BaseException, contact: Contact, broker: str) -> str:
    """The reason why there is no connection to a broker, and the setting that mends it."""
    settings = contact.settings
    cause = error.__cause__ if isinstance(error, KafkaConnectionError) and error.__cause__ is not None else error
    match cause:
        case NoTokenError():
            return str(cause)
        case SaslAuthenticationFailed() | UnsupportedSaslMechanismError() | IllegalSaslStateError():
            return _account(cause, contact, broker)
        case ssl.SSLError():
            return _certificate(cause, settings, broker)
        case socket.gaierror():
            return f"{broker} is no address that is known: correct {settings.variable('kafka_servers')}"
        case ConnectionRefusedError():
            return f"nothing listens at {broker}: start it, or correct {settings.variable('kafka_servers')}"
        case TimeoutError():
            return f"{broker} does not answer: it is away, or {settings.variable('kafka_servers')} names another"
        case asyncio.IncompleteReadError() | KafkaConnectionError() | ConnectionResetError():
            return (
                f"{broker} closes the connection instead of answering; where it is up, it expects another "
                f"{settings.variable('kafka_protocol')} than {settings.kafka_protocol}"
            )
        case _:
            return f"{broker}: {type(cause).__name__}: {cause}"


def _account(error: BaseException, contact: Contact, broker: str) -> str:
    settings = contact.settings
    if isinstance(error, IllegalSaslStateError):
        return (
            f"{broker} asks for no account: set {settings.variable('kafka_protocol')} to "
            f"{settings.kafka_protocol.removeprefix('SASL_')}, or correct {settings.variable('kafka_servers')}"
        )
    if isinstance(error, UnsupportedSaslMechanismError):
        return f"{broker} offers no {settings.kafka_mechanism}: correct {settings.variable('kafka_mechanism')}"
    if contact.tokens is not None:
        return f"{broker} does not take the token of {contact.tokens.name}"
    return (
        f"{broker} refuses the account {settings.kafka_username} with this password ({settings.kafka_mechanism}): "
        f"correct {settings.variable('kafka_username')} or {settings.variable('kafka_password')}"
    )


def _certificate(error: ssl.SSLError, settings: EventsSettings, broker: str) -> str:
    reason = error.reason or ""
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in _EXPIRED:
            return f"the certificate of {broker} is out of date ({error.verify_message}): it has to be renewed there"
        if error.verify_code in _OTHER_NAMES:
            return (
                f"the certificate of {broker} is for another name ({error.verify_message}): write one of its names in "
                f"{settings.variable('kafka_servers')}, and let the brokers advertise it"
            )
        if error.verify_code in _AGAINST_THE_RULES:
            return (
                f"the certificate of {broker}, or its authority's, is not as RFC 5280 has it, on which Python insists "
                f"from 3.13 on ({error.verify_message}): it has to be made anew"
            )
        trusted = settings.kafka_ca_file or "which the system trusts"
        return (
            f"the certificate of {broker} is signed by none of the authorities {trusted} ({error.verify_message}): "
            f"correct {settings.variable('kafka_ca_file')}"
        )
    if "ALERT" in reason and ("CERTIFICATE" in reason or "UNKNOWN_CA" in reason):
        if settings.kafka_certificate_file is None:
            return f"{broker} wants a certificate of this service: set {settings.variable('kafka_certificate_file')}"
        return (
            f"{broker} does not take the certificate in {settings.kafka_certificate_file} ({reason}): renew it, or "
            f"correct {settings.variable('kafka_certificate_file')}"
        )
    return f"{broker} and this service do not agree on TLS ({reason}): correct {settings.variable('kafka_protocol')}"
