"""An audit log that is written with what it reports, sealed into a Merkle tree, and proves that nobody changed it."""

from mainstay.observability.audit.entry import Entry, Outcome
from mainstay.observability.audit.errors import (
    AuditError,
    InvalidEntry,
    InvalidNote,
    InvalidReceipt,
    NotSealed,
    TamperedLog,
)
from mainstay.observability.audit.keys import Keys
from mainstay.observability.audit.merkle import consistent, included
from mainstay.observability.audit.module import AuditModule
from mainstay.observability.audit.note import Checkpoint, SigningKey, VerifierKey
from mainstay.observability.audit.receipt import Receipt, prove, prove_consistency
from mainstay.observability.audit.sealer import Sealer
from mainstay.observability.audit.settings import AuditSettings
from mainstay.observability.audit.trail import AuditTrail
from mainstay.observability.audit.verifier import Problem, Report, verify

__all__ = [
    "AuditError",
    "AuditModule",
    "AuditSettings",
    "AuditTrail",
    "Checkpoint",
    "Entry",
    "InvalidEntry",
    "InvalidNote",
    "InvalidReceipt",
    "Keys",
    "NotSealed",
    "Outcome",
    "Problem",
    "Receipt",
    "Report",
    "Sealer",
    "SigningKey",
    "TamperedLog",
    "VerifierKey",
    "consistent",
    "included",
    "prove",
    "prove_consistency",
    "verify",
]
