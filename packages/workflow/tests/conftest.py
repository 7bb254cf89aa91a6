"""What the tests of this package share: a fresh database of each kind."""

import pytest


@pytest.fixture(params=["memory", "file", "postgres"])
def url(request, tmp_path):
    """The URL of a fresh database: in memory, in a file, and on PostgreSQL."""
    if request.param == "postgres":
        return request.getfixturevalue("postgres")
    return f"sqlite+aiosqlite:///{':memory:' if request.param == 'memory' else tmp_path / 'test.db'}"
