import pytest

from mainstay.audit.tables import SCHEMA
from mainstay.database import DatabaseSettings, upgrade
from mainstay.database.schema import SCHEMA as DATABASE


@pytest.fixture(params=["sqlite", "postgres"])
async def url(request, tmp_path):
    """A fresh database on each engine, with its tables."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'audit.db'}"
    address = request.getfixturevalue("postgres")
    await upgrade(address, [DATABASE, SCHEMA])
    return address


@pytest.fixture
def database_settings(url):
    return DatabaseSettings(url=url)
