"""An audit log that is written with what it reports, sealed into a Merkle tree that proves it unchanged."""

from mainstay.audit.entry import Entry, Outcome
from mainstay.audit.errors import (
    AuditError,
    InvalidEntry,
    InvalidNote,
    InvalidReceipt,
    NotSealed,
    TamperedLog,
)
from mainstay.audit.keys import Keys
from mainstay.audit.merkle import consistent, included
from mainstay.audit.module import AuditModule
from mainstay.audit.note import Checkpoint, SigningKey, VerifierKey
from mainstay.audit.receipt import Receipt, prove, prove_consistency
from mainstay.audit.sealer import Sealer
from mainstay.audit.settings import AuditSettings
from mainstay.audit.trail import AuditTrail
from mainstay.audit.verifier import Problem, Report, verify

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
