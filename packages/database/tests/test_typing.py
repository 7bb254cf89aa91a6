"""What application code reads type-checks, whatever number of columns it has."""

import subprocess
import sys
from pathlib import Path

_CODE = """
import sqlalchemy as sa
from mainstay.database import Database

orders = sa.table("orders", sa.column("id", sa.Integer), sa.column("total", sa.Integer))


async def first(db: Database) -> int:
    ((order, total),) = await db.read(sa.select(orders.c.id, orders.c.total))
    rows = await db.read(sa.select(orders.c.id, orders.c.total))
    return int(order) + int(total) + int(rows[0][1]) + int(rows[0].total)
"""


def test_rows_of_several_columns_type_check(tmp_path: Path):
    """A row is taken apart and indexed, not only asked for by name."""
    file = tmp_path / "application.py"
    file.write_text(_CODE)
    root = Path(__file__).parents[3]
    command = [sys.executable, "-m", "mypy", "--config-file", str(root / "pyproject.toml"), str(file)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
