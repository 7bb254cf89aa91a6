"""The first start on a new file, which several processes may make at the same moment."""

import sqlite3
import threading
from contextlib import closing

from pydantic import SecretStr

from mainstay.core import App
from mainstay.database import Database, DatabaseModule, DatabaseSettings


async def test_a_start_waits_while_another_process_makes_the_file(tmp_path):
    """No process may even read while a first one switches the file to WAL; the second one waits, and starts."""
    path = tmp_path / "new.db"
    # An exclusive lock in the mode that a new file has, as the switch to WAL takes it; SQLite does not wait for it.
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("CREATE TABLE t (x)")
        other.execute("BEGIN EXCLUSIVE")
        release = threading.Timer(0.3, other.rollback)
        release.start()
        try:
            async with App(DatabaseModule.for_root(DatabaseSettings(url=SecretStr(f"sqlite:///{path}")))) as app:
                assert (await app.get(Database).health()).status == "ok"
        finally:
            release.join()
