"""Everything about the audit trail that can be set."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from mainstay.core import Settings

__all__ = ["AuditSettings"]


class AuditSettings(Settings):
    """The audit trail; read from `MAINSTAY_AUDIT_…` where not passed.

    Attributes:
        signing_key: signs checkpoints, one line as `mainstay audit key NAME` prints it; only sealers need it. On
            SQLite, where none is given, one for development is made beside the database, with a warning.
        signing_key_file: a file that holds it instead.
        producer_key: signs what a process says of the entries it has written, so that one deleted before it was sealed
            is missed; where it is None, `signing_key` does. Give a key of their own to processes that do not seal.
        former_keys: verifier keys that signed this log before `signing_key` replaced them.
        batch_size: how many entries the sealer seals in one commit.
        poll_seconds: how long it waits when there was nothing to seal.
        lease_seconds: how long another sealer waits for one that died.
        idle_checkpoint_seconds: a checkpoint is signed so often even when nothing happens, so that silence is noticed.
        statement_seconds: how often a process that has written entries says so.
        lag_seconds: an entry that waits longer than this for its seal makes the health `degraded`.
    """

    model_config = SettingsConfigDict(env_prefix="MAINSTAY_AUDIT_")

    signing_key: SecretStr | None = None
    signing_key_file: Path | None = None
    producer_key: SecretStr | None = None
    former_keys: tuple[str, ...] = ()
    batch_size: int = Field(default=1000, ge=1, le=10_000)
    poll_seconds: float = Field(default=0.5, gt=0)
    lease_seconds: float = Field(default=10.0, gt=0)
    idle_checkpoint_seconds: float = Field(default=60.0, gt=0)
    statement_seconds: float = Field(default=10.0, gt=0)
    lag_seconds: float = Field(default=60.0, gt=0)
