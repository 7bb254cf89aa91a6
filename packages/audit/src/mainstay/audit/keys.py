"""Where the keys of a process come from."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from mainstay.audit.errors import InvalidNote
from mainstay.audit.note import SigningKey, VerifierKey
from mainstay.audit.settings import AuditSettings
from mainstay.core import ConfigurationError
from mainstay.database import Database

__all__ = ["Keys"]

_log = logging.getLogger("mainstay.audit")

_DEVELOPMENT = "mainstay-audit-development"


@dataclass(frozen=True, slots=True)
class Keys:
    """What this process signs with, and what it believes.

    Attributes:
        signing: for checkpoints; None in a process that was given only a producer's key.
        producer: for statements.
        trusted: whose checkpoints the sealer continues.
    """

    signing: SigningKey | None
    producer: SigningKey
    trusted: tuple[VerifierKey, ...]


def stated_keys(settings: AuditSettings, dialect: str) -> Keys | None:
    """The keys that the settings state; None where they state none, and one for development will do.

    Args:
        settings: of the audit trail.
        dialect: of the database; only on SQLite will a key for development do.

    Raises:
        ConfigurationError: a key or its file is unreadable, there are two, or none where one is needed.
    """
    if settings.signing_key is not None and settings.signing_key_file is not None:
        msg = (
            "AuditModule has two signing keys: set MAINSTAY_AUDIT_SIGNING_KEY or MAINSTAY_AUDIT_SIGNING_KEY_FILE, "
            "not both"
        )
        raise ConfigurationError(msg)
    try:
        signing = _signing(settings)
        text = settings.producer_key
        producer = None if text is None else SigningKey.parse(text.get_secret_value())
        former = tuple(VerifierKey.parse(text) for text in settings.former_keys)
    except (InvalidNote, OSError) as error:
        msg = f"AuditModule cannot read a key of its settings ({error}): look at MAINSTAY_AUDIT_…KEY…"
        raise ConfigurationError(msg) from error
    own = producer or signing
    if own is None:
        if dialect != "sqlite":
            msg = (
                "AuditModule has no key: set MAINSTAY_AUDIT_SIGNING_KEY for a process that seals, or "
                "MAINSTAY_AUDIT_PRODUCER_KEY for one that only writes; `mainstay audit key NAME` makes them"
            )
            raise ConfigurationError(msg)
        return None
    return Keys(signing, own, (*([signing.verifier] if signing else []), *former))


def _signing(settings: AuditSettings) -> SigningKey | None:
    if settings.signing_key is not None:
        return SigningKey.parse(settings.signing_key.get_secret_value())
    if settings.signing_key_file is not None:
        return SigningKey.parse(settings.signing_key_file.read_text())
    return None


def development_key_file(database: Database) -> Path:
    """Where the key for development is kept: beside the SQLite file."""
    return Path(f"{database.engine.url.database}.audit-key")


def development_keys(settings: AuditSettings, database: Database, *, keep: bool = True) -> Keys:
    """A key of a process that states none; kept beside the database, and made where there is none.

    Args:
        settings: the former keys.
        database: where the file lies.
        keep: write a key that had to be made; without, it is forgotten with the process.

    Raises:
        ConfigurationError: the file holds no key.
    """
    file = development_key_file(database)
    key = _development_key(file) if keep or file.exists() else SigningKey.generate(_DEVELOPMENT)
    return Keys(key, key, (key.verifier, *(VerifierKey.parse(text) for text in settings.former_keys)))


def _development_key(file: Path) -> SigningKey:
    if not file.exists():
        # Several processes may start at once: each writes a whole file, the first to link it wins.
        draft = file.with_name(f"{file.name}.{uuid4().hex}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(SigningKey.generate(_DEVELOPMENT).private_text() + "\n")
        with contextlib.suppress(FileExistsError):
            os.link(draft, file)
        draft.unlink()
    _log.warning(
        "the audit log is signed with a key for development, %s: whoever can change the database can use it too. "
        "Set MAINSTAY_AUDIT_SIGNING_KEY",
        file,
    )
    try:
        return SigningKey.parse(file.read_text())
    except InvalidNote as error:
        msg = f"{file} holds no signing key ({error}): remove it, or set MAINSTAY_AUDIT_SIGNING_KEY"
        raise ConfigurationError(msg) from error
