"""The documentation builds as a site, and a link that leads nowhere fails it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the site is made of."""
    without = shutil.ignore_patterns(".venv*", "__pycache__", "build", "*.egg-info", "results")
    for name in ("docs", "packages", "benchmarks", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=without)
    for path in (*ROOT.glob("*.md"), ROOT / "compose.yaml"):
        shutil.copy(path, tmp_path)
    return tmp_path


def built(checkout: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a checkout."""
    command = [sys.executable, str(checkout / "tools" / "docs_site.py")]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=120, check=False)


def test_every_page_and_public_module_is_in_the_site(checkout: Path) -> None:
    """Nothing is fetched from elsewhere by a reader either."""
    done = built(checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    site = checkout / "build" / "site"
    for page in (checkout / "docs").rglob("*.md"):
        made = site / page.relative_to(checkout / "docs").with_suffix(".html")
        assert made.exists() or page.name == "README.md", page
    reference = (site / "reference" / "circuit_breaker.html").read_text()
    for name in ("CircuitBreaker", "KeyedBreaker", "simulate", "retry_after_seconds", "BulkheadFull"):
        assert name in reference
    for page in site.rglob("*.html"):
        loaded = [part for part in page.read_text().split('src="')[1:] if part.startswith(("http", "//"))]
        assert loaded == [], page


@pytest.mark.parametrize(
    ("page", "line", "finding"),
    [
        ("docs/core.md", "[x](nothing.md)", "core.md links to nothing.md"),
        ("docs/core.md", "[x](events.md#no-such-heading)", "anchor does not exist"),
        ("CONTRIBUTING.md", "[x](docs/nothing.md)", "CONTRIBUTING.md links to docs/nothing.md"),
    ],
)
def test_a_link_that_leads_nowhere_fails_it(checkout: Path, page: str, line: str, finding: str) -> None:
    """Page, heading, or a page outside of `docs/`."""
    with (checkout / page).open("a") as file:
        file.write(f"\n{line}\n")
    done = built(checkout)
    assert done.returncode != 0
    assert finding in done.stdout + done.stderr
