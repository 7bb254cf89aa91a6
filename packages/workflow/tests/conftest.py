"""What the tests of this package share: a fresh database of each kind."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from mainstay.database import upgrade
from mainstay.database.schema import SCHEMA as DATABASE
from mainstay.workflow.tables import SCHEMA


def loaded_anew(script: Path) -> ModuleType:
    """The module that worker processes run, loaded anew, since its router binds to one App at a time."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["sqlite", "postgres"])
def url(request):
    """The URL of a fresh database of each kind. SQLite's `:memory:` is a file, too, only never synced."""
    return request.getfixturevalue("postgres") if request.param == "postgres" else "sqlite+aiosqlite:///:memory:"


@pytest.fixture
def there(request):
    """The module that the worker processes of this test module run."""
    return loaded_anew(request.module.SCRIPT)


@pytest.fixture(params=["file", "postgres"])
async def shared(request, tmp_path):
    """The URL of a database that many processes share."""
    if request.param == "file":
        return f"sqlite+aiosqlite:///{tmp_path / 'test.db'}"
    url = request.getfixturevalue("postgres")
    await upgrade(url, [DATABASE, SCHEMA])
    return url
