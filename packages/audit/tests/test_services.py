"""Audited functions are given services like handlers and steps."""

from mainstay.audit import AuditTrail
from mainstay.audit.testing import recorded, written
from mainstay.core import given
from mainstay.database import Database


async def test_an_audited_function_is_given_the_services_of_its_app() -> None:
    """By class; a caller may pass its own, and a resource is still told by the other parameters."""
    trail = AuditTrail()
    seen: list[object] = []

    @trail.record("book.lent", resource=lambda loan: f"loan/{loan}")
    async def lend(loan: int, *, db: Database = given(Database)) -> int:
        seen.append(db)
        return loan

    async with recorded(trail) as database:
        assert await lend(1) == 1
        assert await lend(2, db=database) == 2
        assert seen == [database, database]
        assert [entry.resource for entry in await written(database)] == ["loan/1", "loan/2"]
