"""What the audit trail raises.

AuditError                 SYS_AUDIT             base
├── InvalidEntry           VAL_AUDIT_ENTRY       an entry with something in it that cannot be stored exactly
├── InvalidNote            VAL_AUDIT_NOTE        a checkpoint or key that is malformed, or signed by an unknown key
├── InvalidReceipt         VAL_AUDIT_RECEIPT     a receipt that does not prove what it says
├── NotSealed              RES_AUDIT_NOT_SEALED  the entry is not, or not yet, in the log
└── TamperedLog            SYS_AUDIT_TAMPERED    the log is not the one that was signed
"""

from __future__ import annotations

from mainstay.core import MainstayError

__all__ = ["AuditError", "InvalidEntry", "InvalidNote", "InvalidReceipt", "NotSealed", "TamperedLog"]


class AuditError(MainstayError):
    """Base of the audit trail's errors."""

    code = "SYS_AUDIT"
    status = 500
    title = "Audit trail failed"


class InvalidEntry(AuditError, ValueError):
    """An entry holds something that cannot be stored exactly; nothing was written."""

    code = "VAL_AUDIT_ENTRY"
    status = 422
    title = "Invalid audit entry"
    no_effect = True


class InvalidNote(AuditError, ValueError):
    """A signed note or a key is malformed, or signed by an unknown key."""

    code = "VAL_AUDIT_NOTE"
    status = 422
    title = "Invalid signed note"
    no_effect = True


class InvalidReceipt(AuditError, ValueError):
    """A receipt does not prove that its entry is in the log."""

    code = "VAL_AUDIT_RECEIPT"
    status = 422
    title = "Invalid receipt"
    no_effect = True


class NotSealed(AuditError, LookupError):
    """No such entry in the log: it does not exist, or waits for the sealer."""

    code = "RES_AUDIT_NOT_SEALED"
    status = 404
    title = "Entry not in the log"
    no_effect = True


class TamperedLog(AuditError):
    """What is stored does not lead to the root that was signed: it was changed. Nothing more is signed."""

    code = "SYS_AUDIT_TAMPERED"
    status = 500
    title = "Log changed after it was signed"
    no_effect = True
