"""Append-only on PostgreSQL: the roles that `grants.sql` describes suffice, and allow nothing more."""

import asyncio
from importlib.resources import files
from uuid import uuid4

import asyncpg
import pytest
import sqlalchemy as sa
from pydantic import SecretStr
from sqlalchemy.engine import make_url

from mainstay.audit import AuditModule, AuditTrail, SigningKey, tables, verify
from mainstay.audit.testing import KEY, settings
from mainstay.core import App
from mainstay.database import Database, DatabaseError, DatabaseModule, DatabaseSettings, upgrade
from mainstay.database.schema import SCHEMA as DATABASE


@pytest.fixture
async def roles(postgres):
    """A database whose audit tables are granted as the file says, and addresses for its two roles."""
    await upgrade(postgres, [DATABASE, tables.SCHEMA])
    url = make_url(postgres)
    tag = uuid4().hex[:8]
    app, sealer = f"app_{tag}", f"sealer_{tag}"
    grants = (files("mainstay.audit") / "grants.sql").read_text()
    grants = "\n".join(line for line in grants.splitlines() if not line.startswith("--"))
    grants = grants.replace("app_sealer", sealer).replace(" app,", f" {app},").replace(" app;", f" {app};")
    admin = await asyncpg.connect(url.set(drivername="postgresql").render_as_string(hide_password=False))
    try:
        for role in (app, sealer):
            await admin.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'bait'")
        await admin.execute(grants)
        yield tuple(
            url.set(username=role, password="bait").render_as_string(hide_password=False) for role in (app, sealer)
        )
        for role in (app, sealer):
            await admin.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
    finally:
        await admin.close()


async def test_trap_append_only_is_a_matter_of_grants(roles):
    """The service writes and cannot delete or change anything; the sealer seals and cannot touch what is sealed."""
    app_url, sealer_url = roles
    trail = AuditTrail()
    producer = SigningKey.generate("app")
    service = App(
        DatabaseModule.for_root(DatabaseSettings(url=app_url)),
        AuditModule.for_root(settings(signing_key=None, producer_key=SecretStr(producer.private_text()))),
        AuditModule.for_feature(trail),
    )
    sealing = App(DatabaseModule.for_root(DatabaseSettings(url=sealer_url)), AuditModule.for_root(settings()))
    async with service, sealing.running(serve=True):
        db, other = service.get(Database), sealing.get(Database)
        async with db.transaction():
            await trail.write("a")
        await trail.write("b", outcome="denied")
        async with asyncio.timeout(20):
            while len(await db.read(sa.select(tables.log.c.leaf))) < 2:  # noqa: ASYNC110  another process's commit
                await asyncio.sleep(0.01)
        await trail.write("c")
        await db.write(tables.INSERT_PENDING, {"entry_id": uuid4(), "recorded_at": 0, "data": b"no entry"})
        async with asyncio.timeout(20):
            while not await db.read(sa.select(tables.refused.c.id)):  # noqa: ASYNC110  another process's commit
                await asyncio.sleep(0.01)
        for forbidden in (
            sa.delete(tables.pending),
            sa.update(tables.pending).values(data=b"x"),
            sa.delete(tables.log),
            sa.update(tables.log).values(data=b"x"),
            sa.insert(tables.log).values(leaf=9, entry_id=uuid4(), data=b"x"),
            sa.delete(tables.checkpoints),
            sa.insert(tables.refused).values(entry_id="x", data=b"x"),
            sa.insert(tables.checkpoints).values(number=99, size=9, note="x"),
        ):
            with pytest.raises(DatabaseError, match="permission denied"):
                await db.write(forbidden)
        for forbidden in (
            sa.update(tables.pending).values(data=b"x"),
            sa.update(tables.log).values(data=b"x"),
            sa.delete(tables.log),
            sa.delete(tables.nodes),
            sa.delete(tables.checkpoints),
            sa.delete(tables.refused),
        ):
            with pytest.raises(DatabaseError, match="permission denied"):
                await other.write(forbidden)
        report = await verify(db, [KEY.verifier], producers=[producer.verifier])
        assert report.ok
        assert report.entries >= 2
