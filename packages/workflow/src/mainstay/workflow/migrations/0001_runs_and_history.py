"""Runs, their history, signals, values and asks."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_NOW = {
    "sqlite": "(round((julianday('now') - 2440587.5) * 86400.0, 3))",
    "postgresql": "(extract(epoch from clock_timestamp())::double precision)",
}


def upgrade() -> None:
    """Create the tables."""
    now = sa.text(_NOW[op.get_context().dialect.name])
    op.create_table(
        "mainstay_workflow_runs",
        sa.Column("id", sa.String(200), primary_key=True),
        sa.Column("workflow", sa.String(100), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("status", sa.String(24), nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("worker", sa.String(100)),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("progress", sa.Integer, nullable=False),
        sa.Column("deaths", sa.Integer, nullable=False, server_default="0"),
        sa.Column("company", sa.Integer, nullable=False, server_default="0"),
        sa.Column("wake_at", sa.Double, nullable=False),
        sa.Column("cancel_requested", sa.Boolean, nullable=False),
        sa.Column("news", sa.Integer, nullable=False, server_default="0"),
        sa.Column("deadline", sa.Double),
        sa.Column("parent", sa.String(200)),
        sa.Column("parent_generation", sa.Integer),
        sa.Column("generation", sa.Integer, nullable=False, server_default="1"),
        sa.Column("input", sa.Text, nullable=False),
        sa.Column("first_input", sa.Text),
        sa.Column("output", sa.Text),
        sa.Column("failure", sa.Text),
        sa.Column("note", sa.Text),
        sa.Column("context", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False, server_default=now),
        sa.Column("ended_at", sa.Double),
    )
    for name, columns, condition in (
        ("queue", ["wake_at"], "status = 'queued'"),
        ("suspects", ["company"], "status = 'queued' and deaths >= 2"),
        ("worker", ["worker"], "status = 'running'"),
        ("ended", ["status", "ended_at", "id"], "ended_at is not null"),
        ("parent", ["parent"], "parent is not null"),
    ):
        op.create_index(
            f"mainstay_workflow_runs_{name}",
            "mainstay_workflow_runs",
            columns,
            postgresql_where=sa.text(condition),
            sqlite_where=sa.text(condition),
        )
    op.create_index("mainstay_workflow_runs_listed", "mainstay_workflow_runs", ["status", "created_at"])
    _create_history_and_signals(now)
    _create_values(now)
    _create_asks(now)


def _create_asks(now: sa.TextClause) -> None:
    op.create_table(
        "mainstay_workflow_asks",
        sa.Column("run_id", sa.String(200), primary_key=True),
        sa.Column("id", sa.String(200), primary_key=True),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("place", sa.String(300), nullable=False),
        sa.Column("question", sa.Text, nullable=False),
        sa.Column("open", sa.Boolean, nullable=False),
        sa.Column("asked_at", sa.Double, nullable=False, server_default=now),
        sa.Column("due_at", sa.Double),
        sa.Column("escalated_at", sa.Double),
    )
    op.create_index(
        "mainstay_workflow_asks_open",
        "mainstay_workflow_asks",
        ["asked_at"],
        postgresql_where=sa.text("open"),
        sqlite_where=sa.text("open"),
    )


def _create_values(now: sa.TextClause) -> None:
    op.create_table(
        "mainstay_workflow_values",
        sa.Column("run_id", sa.String(200), primary_key=True),
        sa.Column("name", sa.String(100), primary_key=True),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("set_by", sa.String(300), nullable=False),
        sa.Column("at", sa.Double, nullable=False, server_default=now),
    )


def _create_history_and_signals(now: sa.TextClause) -> None:
    op.create_table(
        "mainstay_workflow_history",
        sa.Column("run_id", sa.String(200), primary_key=True),
        sa.Column("seq", sa.Integer, primary_key=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("step", sa.String(300), nullable=False),
        sa.Column("position", sa.Integer),
        sa.Column("body", sa.Text),
        sa.Column("info", sa.Text),
        sa.Column("at", sa.Double, nullable=False, server_default=now),
    )
    op.create_table(
        "mainstay_workflow_signals",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("run_id", sa.String(200), nullable=False),
        sa.Column("id", sa.String(200), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("received_by", sa.String(300)),
        sa.Column("at", sa.Double, nullable=False, server_default=now),
        sa.UniqueConstraint("run_id", "id", name="mainstay_workflow_signals_once"),
        sqlite_autoincrement=True,
    )
    op.create_index(
        "mainstay_workflow_signals_unclaimed",
        "mainstay_workflow_signals",
        ["at"],
        postgresql_where=sa.text("received_by is null"),
        sqlite_where=sa.text("received_by is null"),
    )
