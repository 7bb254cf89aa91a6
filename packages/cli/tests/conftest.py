import sys

import pytest


@pytest.fixture
def service(tmp_path, monkeypatch):
    """Write `service.py` into an empty current directory; the module is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.delenv("MAINSTAY_APP", raising=False)

    def write(text: str) -> str:
        (tmp_path / "service.py").write_text(text)
        sys.modules.pop("service", None)
        return "service:app"

    yield write
    sys.modules.pop("service", None)
