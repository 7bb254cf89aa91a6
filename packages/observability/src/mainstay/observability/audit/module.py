"""The module that puts the audit trail into an App."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Any

from mainstay.core import App, Module, spawn
from mainstay.database import Database, DatabaseModule
from mainstay.observability.audit.keys import keys_of
from mainstay.observability.audit.sealer import Sealer
from mainstay.observability.audit.settings import AuditSettings
from mainstay.observability.audit.tables import SCHEMA
from mainstay.observability.audit.trail import AuditTrail, Intake

_log = logging.getLogger("mainstay.observability.audit")


class AuditModule(Module[AuditSettings, AuditTrail]):
    """Writes audit entries wherever the App runs, and seals them where it serves."""

    def requires(self) -> Sequence[type[Module[Any, Any]]]:
        """The database that the entries are written to."""
        return (DatabaseModule,)

    @asynccontextmanager
    async def running(self, app: App) -> AsyncGenerator[Sequence[object], None]:
        """Yields the `Sealer` and the process's `Keys`."""
        database = app.get(Database)
        await database.ensure_schema(SCHEMA)
        keys = await asyncio.to_thread(keys_of, self.settings, database)
        sealer = Sealer(database, keys, self.settings, app.clock)
        if keys.signing is not None:
            app.serve("mainstay.audit.sealer", sealer.serve)
        intake = Intake(database, app.clock, keys.producer, self.settings.statement_seconds)
        saying = spawn(intake.say_for_ever(), name="mainstay.audit.statements")
        try:
            with ExitStack() as stack:
                for trail in self.parts:
                    stack.enter_context(trail._bound.to(intake))
                yield (sealer, keys)
        finally:
            saying.cancel()
            (ended,) = await asyncio.gather(saying, return_exceptions=True)
            if isinstance(ended, Exception):
                _log.error("stating what was written had stopped", exc_info=ended)
            await asyncio.shield(intake.settle())
