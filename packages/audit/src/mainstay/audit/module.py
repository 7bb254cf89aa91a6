"""The module that puts the audit trail into an App."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Any, ClassVar

from mainstay.audit import _metrics
from mainstay.audit.keys import Keys, development_keys, stated_keys
from mainstay.audit.sealer import Sealer
from mainstay.audit.settings import AuditSettings
from mainstay.audit.tables import SCHEMA, pending
from mainstay.audit.trail import AuditTrail, Intake
from mainstay.core import App, Module
from mainstay.database import Database, DatabaseModule

__all__ = ["AuditModule"]


class AuditModule(Module[AuditSettings, AuditTrail]):
    """Writes audit entries wherever the App runs, and seals them where it serves."""

    name: ClassVar[str] = "audit"

    def yields(self) -> Sequence[type]:
        """The sealer, and the keys of this process."""
        return (Sealer, Keys)

    def functions(self) -> Sequence[Callable[..., Any]]:
        """The functions that are audited."""
        return [function for trail in self.parts for function in trail.functions]

    def requires(self) -> Sequence[type[Module[Any, Any]]]:
        """The database that the entries are written to."""
        return (DatabaseModule,)

    def check(self) -> None:
        """Refuse keys that cannot be read, two where one is needed, and none where the database is no SQLite.

        Raises:
            ConfigurationError: names the variable to set.
        """
        self._stated_keys()

    def _stated_keys(self) -> Keys | None:
        dialect = next(module.settings.dialect for module in self.modules if isinstance(module, DatabaseModule))
        return stated_keys(self.settings, dialect)

    async def inspect(self, app: App) -> Sequence[str]:
        """A missing right to write entries."""
        return await app.get(Database).missing_rights([pending], ("SELECT", "INSERT"))

    @asynccontextmanager
    async def running(self, app: App) -> AsyncGenerator[Sequence[object], None]:
        """Yields the `Sealer` and the process's `Keys`."""
        database = app.get(Database)
        await database.ensure_schema(SCHEMA)
        keys = self._stated_keys()
        if keys is None:
            keys = await asyncio.to_thread(development_keys, self.settings, database, keep=not self.looking)
        sealer = Sealer(database, keys, self.settings, app.clock)
        if keys.signing is not None:
            app.serve("sealer", sealer.serve)
        intake = Intake(database, app, keys.producer, self.settings.statement_seconds)
        app.background("statements", intake.state)
        app.background("lag", sealer.look)
        try:
            with ExitStack() as stack:
                stack.enter_context(_metrics.LAG.of(sealer.known_lag_seconds))
                for trail in self.parts:
                    stack.enter_context(trail.binding.to(intake))
                yield (sealer, keys)
        finally:
            await asyncio.shield(intake.settle())
