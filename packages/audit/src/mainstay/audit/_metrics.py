"""What the audit trail counts."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from mainstay.audit.entry import OUTCOMES

ENTRIES = Counter("mainstay_audit_entries", "Entries that were committed by this process.", ["outcome"])
LOST = Counter("mainstay_audit_lost", "Entries of failures that could not be written.")
SEALED = Counter("mainstay_audit_sealed", "Entries that this process sealed.")
REFUSED = Counter("mainstay_audit_refused", "Pending rows that this process put aside, because they are no entries.")
SIZE = Gauge(
    "mainstay_audit_log_entries", "Entries in the log, as this process last sealed it.", multiprocess_mode="livemax"
)
LAG = Gauge(
    "mainstay_audit_lag_seconds", "Age of the oldest entry that waits for its seal.", multiprocess_mode="livemax"
)

_children = {outcome: ENTRIES.labels(outcome) for outcome in OUTCOMES}
entries = _children.__getitem__
