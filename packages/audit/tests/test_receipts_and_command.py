"""Receipts without a database, consistency for witnesses, the command, and where keys come from."""

import asyncio
import json
import logging
import os
import subprocess
import sys
from uuid import uuid4

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from mainstay.audit import (
    AuditModule,
    AuditSettings,
    AuditTrail,
    Checkpoint,
    InvalidNote,
    InvalidReceipt,
    Keys,
    NotSealed,
    Receipt,
    SigningKey,
    TamperedLog,
    consistent,
    prove,
    prove_consistency,
    tables,
)
from mainstay.audit.receipt import size_in
from mainstay.audit.testing import KEY, settings, written
from mainstay.cli import main
from mainstay.core import App, ConfigurationError, bind
from mainstay.database import Database, DatabaseModule, DatabaseSettings
from mainstay.database.testing import schema_differences


@pytest.fixture
async def db(database_settings):
    """A log of 700 entries, sealed by 99."""
    trail = AuditTrail()
    app = App(
        DatabaseModule.for_root(database_settings),
        AuditModule.for_root(settings(batch_size=99)),
        AuditModule.for_feature(trail),
    )
    async with app.running(serve=True):
        db = app.get(Database)
        with bind(actor="ann"):
            async with db.batch():
                for n in range(700):
                    await trail.write("n", resource=f"n/{n}", detail={"n": n})
        async with asyncio.timeout(20):
            while await db.read(sa.select(tables.pending.c.seq).limit(1)):  # noqa: ASYNC110  another task's commit
                await asyncio.sleep(0.01)
    async with App(DatabaseModule.for_root(database_settings)) as app:
        yield app.get(Database)


async def test_a_receipt_proves_its_entry_without_a_database(db):
    """For entries everywhere in the log; a receipt that was changed in any part proves nothing."""
    entries = await written(db, "n")
    for n in (0, 1, 255, 256, 511, 512, 640, 699):
        receipt = Receipt.from_text((await prove(db, entries[n].id)).to_text())
        assert receipt.verify([KEY.verifier]) == entries[n]
    fields = json.loads(receipt.to_text())
    for part, value in [
        ("entry", fields["entry"].replace('"n":699', '"n":698')),
        ("entry", fields["entry"] + " "),
        ("index", 5),
        ("proof", fields["proof"][:-1]),
        ("checkpoint", fields["checkpoint"].replace("\n700\n", "\n701\n")),
    ]:
        with pytest.raises(InvalidReceipt):
            Receipt.from_text(json.dumps({**fields, part: value})).verify([KEY.verifier])
    with pytest.raises(InvalidReceipt):
        receipt.verify([SigningKey.generate("other").verifier])
    for wrong in ("", "[]", "{}", json.dumps({**fields, "format": "x"}), json.dumps({**fields, "proof": 3})):
        with pytest.raises(InvalidReceipt, match="no receipt"):
            Receipt.from_text(wrong)


async def test_there_is_no_receipt_for_what_is_not_sealed(db):
    """It is said whether to wait or to look elsewhere; a log with a hole gives no proof at all."""
    with pytest.raises(NotSealed, match="waits for the sealer"):
        await prove(db, uuid4())
    entries = await written(db, "n")
    await db.write(sa.delete(tables.log).where(tables.log.c.leaf == 698))
    with pytest.raises(TamperedLog, match="lacks entry 698"):
        await prove(db, entries[699].id)
    await db.write(sa.delete(tables.nodes).where(tables.nodes.c.position == 1))
    with pytest.raises(TamperedLog, match="lacks node of level 8"):
        await prove(db, entries[0].id)


async def test_consistency_between_any_two_checkpoints(db):
    """A witness who kept an old checkpoint sees that the new one continues it."""
    rows = await db.read(sa.select(tables.checkpoints.c.note).order_by(tables.checkpoints.c.number))
    checkpoints = [Checkpoint.open(row.note, [KEY.verifier]) for row in rows]
    assert len(checkpoints) >= 8
    for old in checkpoints:
        new = checkpoints[-1]
        proof = await prove_consistency(db, old.size, new.size)
        assert consistent(old.size, new.size, proof, old.root, new.root)


async def run(capsys, *arguments):
    """The command in a thread of its own, as it has its own event loop: exit status, output, errors."""
    status = await asyncio.to_thread(main, ["audit", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


async def test_the_command(db, url, capsys, tmp_path, monkeypatch):
    """Export, prove, verify with memory, and a log that was changed since."""
    file, memory = tmp_path / "receipt.json", tmp_path / "memory"
    key = KEY.verifier.text
    status, out, _ = await run(capsys, "export", "--url", url, "--first", "690")
    entries = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [entry["detail"]["n"] for entry in entries] == list(range(690, 700))
    status, out, _ = await run(capsys, "export", "--url", url, "--first", "690", "--json")
    assert (status, json.loads(out)) == (0, entries)
    status, out, _ = await run(capsys, "prove", entries[0]["id"], "--url", url)
    file.write_text(out)
    assert status == 0
    status, out, _ = await run(capsys, "verify", "--receipt", str(file), "--key", key)
    assert (status, out.split(" at ")[0]) == (0, "proved: n n/690 succeeded")
    status, out, _ = await run(
        capsys, "verify", "--receipt", str(file), "--key", SigningKey.generate("x").verifier.text
    )
    assert (status, out[:11]) == (1, "NOT PROVED:")
    status, _, err = await run(capsys, "verify", "--receipt", str(file))
    assert (status, "--key" in err) == (2, True)
    status, _, err = await run(capsys, "verify", "--receipt", str(file), "--key", "nonsense")
    assert (status, "verifier key" in err) == (2, True)

    os.mkfifo(tmp_path / "pipe")
    status, _, err = await run(capsys, "verify", "--url", url, "--key", key, "--remember", str(tmp_path / "pipe"))
    assert (status, "pipe is no regular file" in err) == (2, True)
    check = ("verify", "--url", url, "--remember", str(memory))
    status, out, _ = await run(capsys, *check, "--key", key)
    assert status == 0
    assert "sealed entries: 700" in out
    assert "the log is intact" in out
    assert size_in(memory.read_text()) == 700
    monkeypatch.setenv("MAINSTAY_AUDIT_SIGNING_KEY", KEY.private_text())
    status, out, _ = await run(capsys, *check)
    assert status == 0
    assert "700 remembered" in out
    await db.write(sa.delete(tables.log).where(tables.log.c.leaf >= 600))
    await db.write(sa.delete(tables.checkpoints).where(tables.checkpoints.c.size > 600))
    status, out, _ = await run(capsys, *check)
    assert status == 1
    assert "PROBLEM truncated" in out
    assert size_in(memory.read_text()) == 700


async def test_errors_of_the_command(capsys, tmp_path, monkeypatch):
    """A missing key, a wrong address and a wrong name are one line on standard error, and status 2."""
    monkeypatch.chdir(tmp_path)
    url = f"sqlite+aiosqlite:///{tmp_path / 'empty.db'}"
    status, _, err = await run(capsys, "verify", "--url", url)
    assert (status, "there is no database" in err, (tmp_path / "empty.db").exists()) == (2, True, False)
    async with App(DatabaseModule.for_root(DatabaseSettings(url=url))) as app:
        await app.get(Database).ensure_schema(tables.SCHEMA)
    status, _, err = await run(capsys, "verify", "--url", url)
    assert (status, "--key" in err) == (2, True)
    status, out, _ = await run(capsys, "export", "--url", url)
    assert (status, out) == (0, "")
    status, out, err = await run(capsys, "verify", "--url", url, "--key", KEY.verifier.text)
    assert "intact" not in out
    assert (status, "right database?" in err, (tmp_path / "mainstay-audit.checkpoint").exists()) == (2, True, False)
    status, _, err = await run(capsys, "key", "a b")
    assert (status, err.startswith("mainstay: ")) == (2, True)
    status, _, _ = await run(capsys, "prove", str(uuid4()), "--url", url)
    assert status == 2


def test_the_command_makes_keys():
    """The installed script prints a private key and its public half."""
    script = "from mainstay.cli import main; raise SystemExit(main(['audit', 'key', 'orders']))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    private, comment = out.splitlines()
    assert comment.endswith(SigningKey.parse(private).verifier.text)


def app(database, **values):
    return App(DatabaseModule.for_root(database), AuditModule.for_root(AuditSettings(**values)))


async def test_a_key_for_development(tmp_path, caplog, capsys):
    """On SQLite one is made beside the file, once, readable by its owner only, with a warning; `verify` finds it."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'dev.db'}"
    names = set()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            async with app(DatabaseSettings(url=url)) as running:
                keys = running.get(Keys)
                assert keys.signing is keys.producer
                names.add(keys.signing.verifier.text)
    assert len(names) == 1
    assert "MAINSTAY_AUDIT_SIGNING_KEY" in caplog.text
    file = tmp_path / "dev.db.audit-key"
    assert file.stat().st_mode & 0o777 == 0o600
    trail = AuditTrail()
    sealing = App(
        DatabaseModule.for_root(DatabaseSettings(url=url)), AuditModule.for_root(), AuditModule.for_feature(trail)
    )
    async with sealing.running(serve=True):
        await trail.write("a")
    status, out, _ = await run(capsys, "verify", "--url", url, "--remember", str(tmp_path / "m"))
    assert (status, "intact" in out) == (0, True)
    assert [path.name for path in tmp_path.glob("*audit-key*")] == ["dev.db.audit-key"]
    file.write_text("broken")
    with pytest.raises(ConfigurationError, match="remove it"):
        await app(DatabaseSettings(url=url)).__aenter__()


async def test_keys_from_a_file_and_keys_that_are_none(tmp_path, database_settings, url):
    """A file works like the variable; a broken key and a missing file name the setting and never the key."""
    file = tmp_path / "key"
    file.write_text(KEY.private_text() + "\n")
    async with app(database_settings, signing_key_file=file) as running:
        assert running.get(Keys).signing.verifier.text == KEY.verifier.text
    broken = KEY.private_text()[:-5]
    for values in (
        {"signing_key": SecretStr(broken)},
        {"signing_key_file": tmp_path / "none"},
        {"former_keys": ("x",)},
        {"producer_key": SecretStr(broken)},
    ):
        with pytest.raises(ConfigurationError, match="MAINSTAY_AUDIT") as caught:
            await app(database_settings, **values).__aenter__()
        assert broken[-20:] not in str(caught.value)
    if url.startswith("postgresql"):
        with pytest.raises(ConfigurationError, match="MAINSTAY_AUDIT_SIGNING_KEY"):
            await app(database_settings).__aenter__()


async def test_the_migration_makes_the_tables_of_the_code(database_settings):
    """Columns, types, keys and indexes by the migration are those that the code uses, on both engines."""
    async with App(DatabaseModule.for_root(database_settings)) as running:
        db = running.get(Database)
        await db.ensure_schema(tables.SCHEMA)
        assert await schema_differences(db, tables.SCHEMA) == []


async def test_a_hostile_receipt_is_refused(db):
    """Whatever a stranger hands in, it is an invalid receipt and never another error."""
    entry = (await written(db, "n"))[5]
    fields = json.loads((await prove(db, entry.id)).to_text())
    note = fields["checkpoint"]
    for part, value in [
        ("index", float("inf")),
        ("index", fields["index"] + 0.9),
        ("index", str(fields["index"])),
        ("index", True),
        ("checkpoint", None),
        ("checkpoint", note.replace("time 2", "time \ud8002")),
        ("checkpoint", note[:-3] + "é\n"),
        ("checkpoint", note.replace("\n700\n", "\n" + "9" * 5000 + "\n")),
        ("entry", "\ud800"),
    ]:
        with pytest.raises(InvalidReceipt):
            Receipt.from_text(json.dumps({**fields, part: value})).verify([KEY.verifier])
    for wrong in ("[" * 100_000, '{"a":' * 100_000, "1e999", "Infinity"):
        with pytest.raises(InvalidReceipt):
            Receipt.from_text(wrong)


async def test_no_receipt_from_a_newest_checkpoint_that_is_none(db):
    """What stands where the newest checkpoint belongs is looked at before anything is made of it."""
    entry = (await written(db, "n"))[5]
    number = (await db.read(sa.select(sa.func.max(tables.checkpoints.c.number))))[0][0]
    newest = sa.update(tables.checkpoints).where(tables.checkpoints.c.number == number)
    await db.write(newest.values(note="x"))
    with pytest.raises(InvalidNote, match="no checkpoint"):
        await prove(db, entry.id)
    await db.write(newest.values(note="x\n3\n"))
    with pytest.raises(TamperedLog, match="outside"):
        await prove(db, entry.id)
    await db.write(newest.values(number=number + 1))
    with pytest.raises(TamperedLog, match="number"):
        await prove(db, entry.id)


async def test_the_command_with_a_memory_that_is_none(db, url, capsys, tmp_path):
    """An empty file is no checkpoint: a problem, no traceback, and it is not replaced."""
    memory = tmp_path / "memory"
    memory.touch()
    check = ("verify", "--url", url, "--remember", str(memory), "--key", KEY.verifier.text)
    status, out, _ = await run(capsys, *check)
    assert (status, memory.read_text()) == (1, "")
    assert "PROBLEM forged: the remembered checkpoint" in out
    memory.unlink()
    status, out, _ = await run(capsys, *check, "--max-age", "3600")
    assert (status, " s old; nothing remembered" in out) == (0, True)
    for wrong in ("nan", "-1", "inf"):
        status, _, err = await run(capsys, *check, "--max-age", wrong)
        assert (status, "is no number of seconds" in err) == (2, True)
    status, out, _ = await run(capsys, *check, "--max-age", "0")
    assert (status, "PROBLEM stale" in out) == (1, True)


async def test_the_command_prints_nothing_that_moves_the_cursor(database_settings, capsys, tmp_path):
    """Names in entries are others' words: line ends and escape sequences are spelled, not obeyed."""
    trail = AuditTrail()
    app = App(
        DatabaseModule.for_root(database_settings), AuditModule.for_root(settings()), AuditModule.for_feature(trail)
    )
    async with app.running(serve=True):
        db = app.get(Database)
        await trail.write("order\n.read", resource="é\x1b[2Jorder/7")
        async with asyncio.timeout(20):
            while not await db.read(sa.select(tables.log.c.leaf)):  # noqa: ASYNC110  another task's commit
                await asyncio.sleep(0.01)
        receipt = await prove(db, (await written(db))[0].id)
    file = tmp_path / "receipt.json"
    file.write_text(receipt.to_text())
    status, out, _ = await run(capsys, "verify", "--receipt", str(file), "--key", KEY.verifier.text)
    assert status == 0
    assert out.startswith("proved: order\\n.read é\\x1b[2Jorder/7 succeeded")
