"""What the database package counts."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

_commits = Counter("mainstay_database_commits", "Commits that succeeded.", ["by"])
COMMITS_BY_RECORDER = _commits.labels("recorder")
COMMITS_BY_TRANSACTION = _commits.labels("transaction")
ROWS = Counter("mainstay_database_rows", "Rows that the recorder has made durable.")
BATCH_ROWS = Histogram(
    "mainstay_database_batch_rows",
    "Rows that shared one commit of the recorder.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048),
)
WAIT_SECONDS = Histogram(
    "mainstay_database_wait_seconds",
    "Seconds from handing the oldest write of a batch to the recorder until it was durable.",
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
POOL_IN_USE = Gauge(
    "mainstay_database_pool_in_use", "Connections in use by units of work and reads.", multiprocess_mode="livesum"
)
POOL_WAITING = Gauge(
    "mainstay_database_pool_waiting",
    "Units of work and reads that wait for a connection.",
    multiprocess_mode="livesum",
)
POOL_LIMIT = Gauge(
    "mainstay_database_pool_limit", "Connections that the pool makes at most.", multiprocess_mode="livesum"
)
LEASES_HELD = Gauge("mainstay_database_leases_held", "Leases that this process renews.", multiprocess_mode="livesum")
LEASES_LOST = Counter("mainstay_database_leases_lost", "Leases that another owner took over.")
HEARS = Gauge(
    "mainstay_database_hears_hints", "Whether hints of other processes are heard, 0 or 1.", multiprocess_mode="livemin"
)
