"""The files by which brokers and this service show each other who they are, for whichever client connects."""

from __future__ import annotations

import ssl
from pathlib import Path

from mainstay.core import ConfigurationError
from mainstay.events.settings import EventsSettings

_CERTIFICATE = b"-----BEGIN CERTIFICATE-----"
_KEY = b"PRIVATE KEY-----"


class _NoPasswordError(Exception):
    pass


def check_connection(settings: EventsSettings) -> None:
    """Look at what a connection needs of this machine.

    Raises:
        ConfigurationError: see `context_of`.
    """
    if settings.kafka_protocol.endswith("SSL"):
        context_of(settings)


def context_of(settings: EventsSettings) -> ssl.SSLContext:
    """What a connection by TLS trusts and shows.

    Raises:
        ConfigurationError: a file is missing, cannot be read, or holds something else; the message names its setting.
    """
    for field in ("kafka_ca_file", "kafka_certificate_file"):
        _look_into(settings, field, _CERTIFICATE, "certificate")
    _look_into(settings, _key_field(settings), _KEY, "private key")
    context = ssl.create_default_context()
    if settings.kafka_ca_file is not None:
        context = _trusting(settings, settings.kafka_ca_file)
    if settings.kafka_certificate_file is not None:
        _show(context, settings, settings.kafka_certificate_file)
    return context


def _key_field(settings: EventsSettings) -> str:
    return "kafka_certificate_file" if settings.kafka_key_file is None else "kafka_key_file"


def _look_into(settings: EventsSettings, field: str, beginning: bytes, kind: str) -> None:
    """Read a file by ourselves: the errors of `ssl` do not say which one they mean."""
    path: str | None = getattr(settings, field)
    if path is None:
        return
    try:
        holds = beginning in Path(path).read_bytes()
    except OSError as error:
        msg = f"{settings.variable(field)}={path} cannot be read: {error.strerror or type(error).__name__}"
        raise ConfigurationError(msg) from error
    if not holds:
        msg = f"{settings.variable(field)}={path} holds no {kind} in PEM form (-----BEGIN …-----)"
        raise ConfigurationError(msg)


def _trusting(settings: EventsSettings, path: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=path)
    except ssl.SSLError as error:
        msg = f"{settings.variable('kafka_ca_file')}={path} holds a broken certificate: {_reason(error)}"
        raise ConfigurationError(msg) from error


def _show(context: ssl.SSLContext, settings: EventsSettings, path: str) -> None:
    key = f"{settings.variable(_key_field(settings))}={settings.kafka_key_file or path}"
    password = settings.kafka_key_password
    needed = False

    def asked_for_password() -> str:  # in place of the terminal, which would be asked without
        nonlocal needed
        needed = True
        if password is None:
            raise _NoPasswordError
        return password.get_secret_value()

    try:
        context.load_cert_chain(path, settings.kafka_key_file, asked_for_password)
    except _NoPasswordError as error:
        msg = f"{key} holds a private key with a password: set {settings.variable('kafka_key_password')}"
        raise ConfigurationError(msg) from error
    except (ssl.SSLError, ValueError) as error:
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            msg = f"{key} holds a private key that does not belong to the certificate in {path}"
        elif needed:
            msg = f"{settings.variable('kafka_key_password')} is not the password of the private key in {key}"
        else:
            msg = f"{settings.variable('kafka_certificate_file')}={path} and its key cannot be used: {_reason(error)}"
        raise ConfigurationError(msg) from error
    if password is not None and not needed:
        msg = f"{key} holds a private key without a password: leave out {settings.variable('kafka_key_password')}"
        raise ConfigurationError(msg)


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or type(error).__name__)
