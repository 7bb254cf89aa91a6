"""Every way to change history that the verifier must see, on both engines."""

import asyncio
from dataclasses import replace
from hashlib import sha256

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from mainstay.audit import (
    AuditModule,
    AuditTrail,
    Checkpoint,
    Entry,
    InvalidNote,
    Sealer,
    SigningKey,
    tables,
    verify,
)
from mainstay.audit._producer import STATEMENT, Producer, Statement
from mainstay.audit.merkle import Frontier, leaf_hash
from mainstay.audit.testing import KEY, settings
from mainstay.core import App, uuid7
from mainstay.database import Database, DatabaseModule, DatabaseSettings

ENTRIES = 300


async def fill(database_settings, count=ENTRIES, **values):
    """Write so many entries, and seal them with the statement that names them."""
    trail = AuditTrail()
    app = App(
        DatabaseModule.for_root(database_settings),
        AuditModule.for_root(settings(statement_seconds=0.01, batch_size=100, **values)),
        AuditModule.for_feature(trail),
    )
    async with app.running(serve=True):
        db = app.get(Database)
        before = await size(db)
        async with db.batch():
            for n in range(count):
                await trail.write("n", detail={"n": n})
        async with asyncio.timeout(20):
            while await size(db) < before + count + 1:  # noqa: ASYNC110  another task's commit
                await asyncio.sleep(0.01)


async def size(db):
    return (await db.read(sa.select(sa.func.count()).select_from(tables.log)))[0][0]


@pytest.fixture
async def db(database_settings):
    await fill(database_settings)
    async with App(DatabaseModule.for_root(database_settings)) as app:
        yield app.get(Database)


async def check(db, **options):
    return await verify(db, [KEY.verifier], **options)


def kinds(report):
    return [problem.kind for problem in report.problems]


async def leaf_of(db, leaf):
    return bytes((await db.read(sa.select(tables.log.c.data).where(tables.log.c.leaf == leaf)))[0].data)


async def set_leaf(db, leaf, **values):
    await db.write(sa.update(tables.log).where(tables.log.c.leaf == leaf).values(**values))


async def test_a_log_that_nobody_touched(db):
    """Nothing is wrong; everything is counted; the newest checkpoint is there to be remembered."""
    report = await check(db)
    assert report.problems == ()
    assert (report.entries, report.statements, report.producers, report.unstated) == (ENTRIES + 1, 1, 1, 0)
    assert Checkpoint.open(report.checkpoint, [KEY.verifier]).size == ENTRIES + 1
    assert (await check(db, remembered=report.checkpoint)).ok


async def test_changed_bytes(db):
    """One entry says something else: the root is another, and the report says between which entries to look."""
    data = await leaf_of(db, 150)
    await set_leaf(db, 150, data=data.replace(b'"outcome":"succeeded"', b'"outcome":"failed"'))
    report = await check(db)
    assert "changed" in kinds(report)
    assert any("100 to 199" in problem.detail for problem in report.problems)


async def test_bytes_that_mean_the_same(db):
    """Even a space more is a change: bytes are proved, not meanings."""
    await set_leaf(db, 7, data=await leaf_of(db, 7) + b" ")
    assert {"changed", "malformed"} <= set(kinds(await check(db)))


async def test_a_deleted_entry(db):
    """A hole in the log is named."""
    await db.write(sa.delete(tables.log).where(tables.log.c.leaf == 42))
    report = await check(db)
    assert "deleted" in kinds(report)
    assert "entry 42" in report.problems[0].detail


async def test_a_deleted_entry_with_the_rest_moved_up(db):
    """Closing the hole changes the root."""
    for leaf in range(43, ENTRIES + 1):
        await set_leaf(db, leaf - 1, data=await leaf_of(db, leaf))
    await db.write(sa.delete(tables.log).where(tables.log.c.leaf == ENTRIES))
    assert {"changed", "truncated"} <= set(kinds(await check(db)))


async def test_reordered_entries(db):
    """Two entries that changed places change the root."""
    one, two = await leaf_of(db, 10), await leaf_of(db, 11)
    await set_leaf(db, 10, data=two)
    await set_leaf(db, 11, data=one)
    assert "changed" in kinds(await check(db))


async def test_an_entry_filed_under_another_id(db):
    """The column is no part of the bytes, and is checked against them: receipts are found by it."""
    await set_leaf(db, 3, entry_id=uuid7())
    assert kinds(await check(db)) == ["changed"]


async def test_a_truncated_tail(db):
    """Fewer entries than the newest checkpoint says."""
    await db.write(sa.delete(tables.log).where(tables.log.c.leaf >= 250))
    assert "truncated" in kinds(await check(db))


async def test_a_tail_truncated_with_its_checkpoints(db):
    """Within the database nothing is left to tell; the remembered checkpoint does."""
    remembered = (await check(db)).checkpoint
    await db.write(sa.delete(tables.checkpoints).where(tables.checkpoints.c.size > 100))
    await db.write(sa.delete(tables.log).where(tables.log.c.leaf >= 100))
    await db.write(sa.delete(tables.nodes))
    assert (await check(db)).ok
    assert kinds(await check(db, remembered=remembered)) == ["truncated"]


async def test_everything_removed(db):
    """An empty database is a truncated log to whoever remembers."""
    remembered = (await check(db)).checkpoint
    for table in (tables.checkpoints, tables.log, tables.nodes):
        await db.write(sa.delete(table))
    report = await check(db)
    assert (report.ok, report.entries, report.checkpoint) == (True, 0, None)
    assert kinds(await check(db, remembered=remembered)) == ["truncated"]


async def rewrite(db, key):
    """Write a whole other log of the same length, and sign it with `key`."""
    tree = Frontier()
    await db.write(sa.delete(tables.nodes))
    for leaf in range(ENTRIES + 1):
        entry = Entry(uuid7(), "never.happened", "succeeded", "2026-01-01T00:00:00.000000Z", "p", leaf + 1)
        await set_leaf(db, leaf, entry_id=entry.id, data=entry.to_bytes())
        for node in tree.append(leaf_hash(entry.to_bytes())):
            await db.write(sa.insert(tables.nodes), {"level": node.level, "position": node.position, "hash": node.hash})
    checkpoint = Checkpoint(key.verifier.name, tree.size, tree.root(), "2026-01-01T00:00:00Z")
    await db.write(sa.delete(tables.checkpoints))
    note = key.sign(checkpoint.to_text())
    await db.write(sa.insert(tables.checkpoints), {"number": 1, "size": tree.size, "note": note})


async def test_a_tree_rewritten_with_the_real_key(db):
    """Whoever has the key can sign another history; only the remembered checkpoint shows it."""
    remembered = (await check(db)).checkpoint
    await rewrite(db, KEY)
    assert (await check(db)).ok
    assert kinds(await check(db, remembered=remembered)) == ["rewritten"]


async def test_a_tree_rewritten_with_another_key(db):
    """A key of the same name is another key."""
    await rewrite(db, SigningKey.generate(KEY.verifier.name))
    assert "forged" in kinds(await check(db))


async def test_forged_checkpoints(db):
    """A changed size, a changed root, no signature, and one of an older, smaller log again."""
    rows = await db.read(sa.select(tables.checkpoints).order_by(tables.checkpoints.c.number))
    first, last = rows[0], rows[-1]
    for number, note in enumerate(
        [last.note.replace("\n301\n", "\n299\n"), last.note.replace("time 2", "time 3"), "nothing\n", first.note],
        last.number + 1,
    ):
        await db.write(sa.insert(tables.checkpoints), {"number": number, "size": 301, "note": note})
    report = await check(db)
    assert kinds(report) == ["forged"] * 4
    assert report.checkpoints == len(rows) + 1


async def test_a_forged_remembered_checkpoint(db):
    """What the verifier remembers is checked as well."""
    assert kinds(await check(db, remembered="1\n2\n\n— x y\n")) == ["forged"]


async def test_entries_that_no_checkpoint_covers(db):
    """Rows put into the log past its end, or before its beginning, are unsigned."""
    row = {"leaf": ENTRIES + 1, "entry_id": uuid7(), "data": b"{}"}
    await db.write(sa.insert(tables.log), row)
    assert kinds(await check(db)) == ["unsigned"]
    await db.write(sa.update(tables.log).where(tables.log.c.leaf == ENTRIES + 1).values(leaf=-1))
    assert kinds(await check(db)) == ["unsigned"]
    await db.write(sa.delete(tables.checkpoints))
    assert "unsigned" in kinds(await check(db))


async def test_a_changed_node(db):
    """Proofs are made of the stored nodes: a wrong one is found before somebody gets a wrong proof."""
    await db.write(sa.update(tables.nodes).values(hash=b"0" * 32))
    assert kinds(await check(db)) == ["changed"]
    await db.write(sa.delete(tables.nodes))
    assert kinds(await check(db)) == ["changed"]


async def test_trap_an_entry_deleted_before_it_was_sealed(database_settings):
    """Its producer's signed statement names it, and it is nowhere: noticed although the tree is perfect."""
    trail = AuditTrail()
    app = App(
        DatabaseModule.for_root(database_settings),
        AuditModule.for_root(settings()),
        AuditModule.for_feature(trail),
    )
    async with app:
        for n in range(5):
            await trail.write("n", detail={"n": n})
        db = app.get(Database)
        insider = sa.delete(tables.pending).where(
            tables.pending.c.seq.in_(sa.select(tables.pending.c.seq).order_by(tables.pending.c.seq).limit(1).offset(2))
        )
        await db.write(insider)
    await fill(database_settings, 1)
    async with App(DatabaseModule.for_root(database_settings)) as app:
        report = await check(app.get(Database))
    assert kinds(report) == ["unsealed"]
    assert "number 3" in report.problems[0].detail


def statement(sequence, first, last, producer="p", **values):
    """A statement about numbers of which none was committed."""
    missing = dict.fromkeys(range(first, last + 1), b"m" * 32)
    chosen = {"final": False, "missing": missing, "late": frozenset(), "digest": sha256().digest(), **values}
    return Statement(producer, sequence, first, last, **chosen)


async def sign_in(db, statement, key=KEY, **values):
    """Append a statement to the pending entries, as a producer would."""
    entry = Entry(
        statement.entry_id, STATEMENT, "succeeded", "2026-01-01T00:00:00.000000Z", statement.producer, 0,
        detail={"note": key.sign(statement.to_text())},
    )  # fmt: skip
    entry = replace(entry, **values)
    await db.write(tables.INSERT_PENDING, {"entry_id": entry.id, "recorded_at": 0, "data": entry.to_bytes()})


async def test_statements_that_are_missing_forged_or_contradict_each_other(database_settings, db):
    """They are numbered and signed; one that is left out, made up or said twice differently is found."""
    await sign_in(db, statement(2, 4, 6))
    await sign_in(db, statement(1, 1, 3, "q"))
    await sign_in(db, statement(1, 1, 3, "s"))
    await fill(database_settings, 1)
    await sign_in(db, statement(1, 1, 4, "q"))
    await sign_in(db, statement(1, 1, 3, "s"))  # again, as after an answer that was cut off: no contradiction
    await sign_in(db, statement(1, 1, 3, "r"), SigningKey.generate("insider"))
    await fill(database_settings, 1)
    report = await check(db)
    assert sorted(kinds(report)) == ["forged", "forged", "unsealed"]
    assert any("statement 1 of producer p" in problem.detail for problem in report.problems)
    assert any("q says two things" in problem.detail for problem in report.problems)


async def test_a_copied_entry(database_settings, db):
    """The same number twice: somebody inserted an entry again."""
    data = await leaf_of(db, 5)
    await db.write(tables.INSERT_PENDING, {"entry_id": Entry.from_bytes(data).id, "recorded_at": 0, "data": data})
    await fill(database_settings, 1)
    assert kinds(await check(db)) == ["copied"]


async def test_an_entry_that_waits_is_not_missing(database_settings, db):
    """A statement that was sealed before the entries it names: they are found among the pending."""
    entry = Entry(uuid7(), "n", "succeeded", "2026-01-01T00:00:00.000000Z", "p", 1)
    digest = sha256(leaf_hash(entry.to_bytes())).digest()
    await sign_in(db, statement(1, 1, 1, missing={}, digest=digest))
    await fill(database_settings, 1)
    assert "unsealed" in kinds(await check(db))
    await db.write(tables.INSERT_PENDING, {"entry_id": entry.id, "recorded_at": 0, "data": entry.to_bytes()})
    report = await check(db)
    assert report.ok
    assert report.pending >= 1


async def test_many_missing_entries_are_summed_up(database_settings, db):
    """The report stays readable."""
    await sign_in(db, statement(1, 1, 500, missing={}))
    await fill(database_settings, 1)
    report = await check(db)
    assert len(report.problems) == 21
    assert "480 more" in report.problems[-1].detail


async def test_a_replaced_key(database_settings, db):
    """The sealer continues a log of its former key when it is told to, and both keys verify it."""
    new = SigningKey.generate("new")
    values = {"signing_key": SecretStr(new.private_text()), "former_keys": (KEY.verifier.text,)}
    await fill(database_settings, 1, **values)
    assert (await verify(db, [KEY.verifier, new.verifier])).ok
    assert "forged" in kinds(await verify(db, [new.verifier]))


async def test_keys_are_checked(db):
    """A private key, or nonsense, is no verifier key."""
    for wrong in (KEY.private_text(), "nonsense"):
        with pytest.raises(InvalidNote):
            await verify(db, [wrong])


async def test_verifying_while_the_sealer_works(database_settings, db):
    """Entries and checkpoints that come while the verifier reads are no problem."""
    going = asyncio.ensure_future(fill(database_settings, 500))
    reports = []
    while not going.done():
        reports.append(await check(db))
        await asyncio.sleep(0)
    await going
    assert all(report.ok for report in reports), [report.problems for report in reports if not report.ok]
    assert (await check(db)).entries == ENTRIES + 503


def leaf(number):
    return leaf_hash(b"%d" % number)


def produced(count, *, but=()):
    """A producer that issued so many numbers, of which all were committed but those."""
    producer = Producer()
    for number in range(1, count + 1):
        assert producer.next == number
        producer.issue(leaf(number))
        if number not in but:
            producer.committed(number, leaf(number))
    return producer


def test_statements_of_a_producer():
    """Holes are named, late commits are told later, and what was not acknowledged is said again unchanged."""
    assert Producer().statement() is None
    producer = produced(9, but=(3, 4, 6, 7, 8, 9))
    first = producer.statement()
    assert first is not None
    assert (first.sequence, first.first, first.last, first.final) == (1, 1, 9, False)
    assert first.missing == {number: leaf(number) for number in (3, 4, 6, 7, 8, 9)}
    assert first.agrees(leaf(number) for number in (1, 2, 5))
    producer.committed(4, leaf(4))
    assert producer.statement() == first
    producer.said()
    second = producer.statement()
    assert second is not None
    assert (second.sequence, second.first, second.last, second.missing) == (2, 10, 9, {})
    assert (second.late, list(second.committed())) == ({4}, [4])
    assert second.agrees([leaf(4)])
    producer.said()
    assert producer.statement() is None
    last = producer.statement(final=True)
    assert last is not None
    assert (last.sequence, last.final, list(last.committed())) == (3, True, [])
    producer.said()
    assert producer.statement(final=True) is None
    for said in (first, second, last):
        assert Statement.from_text(said.to_text()) == said
    assert "late 4\n" in second.to_text()
    for wrong in (
        "",
        first.to_text() + "x",
        first.to_text().replace("\n3 ", "\n03 "),
        first.to_text().replace("1 9", "1"),
        second.to_text().replace("late 4", "late 4-999999999999"),
        replace(last, last=10**12).to_text(),
    ):
        with pytest.raises(InvalidNote):
            Statement.from_text(wrong)


def test_a_statement_that_would_not_fit_is_cut():
    """However much was rolled back or committed late, each fits into an entry; together they say it all, and end."""
    producer = produced(20_000, but=range(1, 10_000, 2))
    statements = []

    def say(*, final):
        while (said := producer.statement(final=final)) is not None:
            entry = Entry(said.entry_id, STATEMENT, "succeeded", "2026-01-01T00:00:00.000000Z", said.producer, 0)
            assert len(replace(entry, detail={"note": KEY.sign(said.to_text())}).to_bytes()) < 60_000
            assert Statement.from_text(said.to_text()) == said
            assert said.agrees(leaf(number) for number in said.committed())
            statements.append(said)
            producer.said()

    say(final=False)
    assert len(statements) >= 10
    for number in range(1, 5_000, 2):
        producer.committed(number, leaf(number))
    say(final=True)
    named = [number for said in statements for number in said.committed()]
    assert sorted(named) == [number for number in range(1, 20_001) if number not in range(5_001, 10_000, 2)]
    assert [number for said in statements for number in said.missing] == list(range(1, 10_000, 2))
    assert [said.sequence for said in statements if said.final] == [len(statements)]


async def test_checkpoints_removed_with_nothing_else(db):
    """Whoever remembers a checkpoint sees that it, and all others, are gone, although every entry is there."""
    remembered = (await check(db)).checkpoint
    await db.write(sa.delete(tables.checkpoints))
    assert kinds(await check(db, remembered=remembered)) == ["truncated"]


async def test_checkpoints_out_of_sequence(db):
    """One that is missing, one that was copied far ahead, where the sealer could never follow, and one before all."""
    last = (await db.read(sa.select(tables.checkpoints).order_by(tables.checkpoints.c.number.desc())))[0]
    await db.write(sa.insert(tables.checkpoints), {"number": 2**63 - 1, "size": last.size, "note": last.note})
    assert kinds(await check(db)) == ["deleted"]
    await db.write(sa.update(tables.checkpoints).where(tables.checkpoints.c.number == 2**63 - 1).values(number=-1))
    assert kinds(await check(db)) == ["forged"]
    await db.write(sa.delete(tables.checkpoints).where(tables.checkpoints.c.number.in_([-1, 1])))
    assert kinds(await check(db)) == ["deleted"]


@pytest.mark.parametrize(("level", "position"), [(8, 1), (8, -1), (9, 0), (0, 0), (16, 0), (-1, 0), (64, 0)])
async def test_nodes_beyond_the_tree(db, level, position):
    """One that lies in wait for the next batch, or that no log has, is found."""
    await db.write(sa.insert(tables.nodes), {"level": level, "position": position, "hash": b"0" * 32})
    report = await check(db)
    assert not report.ok
    assert set(kinds(report)) == {"forged"}


async def test_trap_07_an_idle_checkpoint_that_is_missed_is_noticed(db):
    """With a limit, silence is a problem: the newest checkpoint has its moment in it, signed, and it must be young."""
    report = await check(db, max_age_seconds=3600)
    assert report.ok
    assert report.age_seconds is not None
    assert report.age_seconds < 3600
    number = (await db.read(sa.select(sa.func.max(tables.checkpoints.c.number))))[0][0]
    newest = Checkpoint.open(report.checkpoint, [KEY.verifier])
    note = KEY.sign(replace(newest, time="2020-01-01T00:00:00Z").to_text())
    await db.write(sa.update(tables.checkpoints).where(tables.checkpoints.c.number == number).values(note=note))
    assert (await check(db)).ok
    for wrong in (float("nan"), -1.0):
        with pytest.raises(ValueError, match="a number of seconds"):
            await check(db, max_age_seconds=wrong)
    stale = await check(db, max_age_seconds=3600)
    assert kinds(stale) == ["stale"]
    note = KEY.sign(replace(newest, time="long ago").to_text())
    await db.write(sa.update(tables.checkpoints).where(tables.checkpoints.c.number == number).values(note=note))
    assert (await check(db)).age_seconds is None
    assert kinds(await check(db, max_age_seconds=3600)) == ["stale"]


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        ("UPDATE mainstay_audit_log SET data = 'text' WHERE leaf = 3", "changed"),
        ("UPDATE mainstay_audit_log SET entry_id = 'no id' WHERE leaf = 3", "changed"),
        ("INSERT INTO mainstay_audit_log VALUES ('text', 'no id', x'00')", "unsigned"),
        ("INSERT INTO mainstay_audit_log VALUES (x'00', 'no id', x'00')", "unsigned"),
        ("INSERT INTO mainstay_audit_log VALUES (1.5, 'no id', x'00')", "deleted"),
        ("UPDATE mainstay_audit_checkpoints SET note = CAST(note AS BLOB) WHERE number = 1", "forged"),
        ("INSERT INTO mainstay_audit_checkpoints VALUES ('text', 5, 'note')", "deleted"),
        ("UPDATE mainstay_audit_nodes SET hash = 'text'", "changed"),
        ("INSERT INTO mainstay_audit_nodes VALUES ('text', x'00', 5)", "forged"),
    ],
)
async def test_values_of_other_types_are_changes(tmp_path, damage, kind):
    """SQLite keeps anything in any column; the verifier says what is wrong instead of failing, the sealer goes on."""
    database_settings = DatabaseSettings(url=f"sqlite+aiosqlite:///{tmp_path / 'audit.db'}")
    await fill(database_settings)
    async with App(DatabaseModule.for_root(database_settings)) as app:
        db = app.get(Database)
        await db.write(
            sa.insert(tables.pending), {"entry_id": uuid7(), "recorded_at": 0, "data": b"turned into a text below"}
        )
        async with db.transaction() as session:
            await session.execute(sa.text(damage))
            await session.execute(sa.text("UPDATE mainstay_audit_pending SET data = 'text', recorded_at = 'text'"))
        report = await check(db)
    assert kind in kinds(report)
    app = App(DatabaseModule.for_root(database_settings), AuditModule.for_root(settings()))
    async with app.running(serve=True), asyncio.timeout(10):
        while (await app.get(Sealer).health()).status == "ok":  # noqa: ASYNC110  another task's doing
            await asyncio.sleep(0.01)
