"""Mistakes in the configuration of the audit trail are errors of `App(…)`: nothing is started here."""

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import SecretStr

from mainstay.audit import AuditModule, AuditSettings, AuditTrail, SigningKey
from mainstay.core import App, ConfigurationError, given
from mainstay.database import DatabaseModule, DatabaseSettings

POSTGRES = DatabaseSettings(url=SecretStr("postgresql+asyncpg://app@127.0.0.1/app"))
KEY = SigningKey.generate("a-log")
SECRET = SecretStr(KEY.private_text())


class Ledger:
    """A service that no module yields."""


def audited() -> AuditTrail:
    trail = AuditTrail()

    @trail.record("order.cancelled", resource="order/1")
    async def cancel(*, ledger: Ledger = given(Ledger)) -> None: ...

    return trail


def app(database: DatabaseSettings | None = None, *parts: AuditTrail, **settings: object) -> App:
    audit = AuditModule.for_root(AuditSettings.model_validate(settings))
    return App(DatabaseModule.for_root(database), audit, AuditModule.for_feature(*parts))


MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: App(AuditModule.for_root()), "AuditModule requires DatabaseModule: add DatabaseModule"),
    (lambda: app(POSTGRES), "has no key: set MAINSTAY_AUDIT_SIGNING_KEY for a process that seals"),
    (lambda: app(signing_key="nonsense"), "cannot read a key of its settings .*: look at MAINSTAY_AUDIT_"),
    (lambda: app(producer_key="nonsense"), "cannot read a key of its settings"),
    (lambda: app(former_keys=["nonsense"]), "cannot read a key of its settings"),
    (lambda: app(signing_key_file="/nowhere/key"), r"cannot read a key of its settings \(.*No such file.*/nowhere/key"),
    (lambda: app(signing_key=SECRET, signing_key_file="key"), "two signing keys: .*, not both"),
    (lambda: app(None, audited()), "cancel: no module of this App yields the Ledger"),
]


@pytest.mark.parametrize(("build", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_a_mistake_is_named_when_the_app_is_constructed(build: Callable[[], object], message: str) -> None:
    """With the variable to set; and never with a key in the message."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        build()
    assert KEY.private_text() not in str(caught.value)


def test_a_key_in_a_file_is_read(tmp_path: Path) -> None:
    """And so is one for a process that only writes, on a server."""
    (tmp_path / "key").write_text(KEY.private_text() + "\n")
    app(POSTGRES, signing_key_file=tmp_path / "key", former_keys=[KEY.verifier.text])
    app(POSTGRES, producer_key=SECRET)
