"""The documentation builds as a site; a link that leads nowhere and a wrong docstring fail it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCSTRING = '''

def put(first: int, last: int, *, size: int) -> None:
    """Put numbers.

    Args:
        first, last: the numbers, both
            included.
        size: how large each is.
    """
'''
FETCHED = re.compile(r"<(?:script|img|iframe|link[^>]*stylesheet)[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*>")


@pytest.fixture
def small(checkout: Path) -> Path:
    """A checkout in which core alone has modules to describe: most of a build's time goes into the reference."""
    for source in checkout.glob("packages/*/src"):
        if source.parent.name != "core":
            shutil.rmtree(source)
            source.mkdir()
    return checkout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the site is made of."""
    without = shutil.ignore_patterns(".venv*", "__pycache__", "build", "*.egg-info", "results")
    for name in ("alerts", "benchmarks", "dashboards", "deploy", "docs", "packages", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=without)
    for path in (*ROOT.glob("*.md"), ROOT / "compose.yaml", ROOT / "LICENSE"):
        shutil.copy(path, tmp_path)
    return tmp_path


def built(checkout: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a checkout."""
    command = [sys.executable, str(checkout / "tools" / "docs_site.py")]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=120, check=False)


def test_every_page_and_public_module_is_in_the_site(checkout: Path) -> None:
    """Nothing is fetched from elsewhere by a reader either.

    What looks like a link in code is none, and names that share a line of a docstring have an entry each.
    """
    add_function(checkout, DOCSTRING)
    with (checkout / "docs" / "core.md").open("a") as file:
        file.write("\n`handlers[name](event)`\n\n```text\nhandlers[name](event)\n```\n")
    done = built(checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    site = checkout / "build" / "site"
    for page in (checkout / "docs").rglob("*.md"):
        made = site / page.relative_to(checkout / "docs").with_suffix(".html")
        assert made.exists() or page.name == "README.md", page
    reference = (site / "reference" / "circuit_breaker.html").read_text()
    for name in ("CircuitBreaker", "KeyedBreaker", "simulate", "retry_after_seconds", "BulkheadFull"):
        assert name in reference
    assert (site / "core.html").read_text().count("handlers[name](event)") == 2
    text = re.sub(r"<[^>]*>|[^\w<>(),.]", "", (site / "reference" / "core.html").read_text())
    for name in ("first", "last"):
        assert f"{name}(int)thenumbers,bothincluded." in text
    for page in site.rglob("*.html"):
        assert FETCHED.findall(page.read_text()) == [], page
    for sheet in site.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//[^)]*", sheet.read_text()) == [], sheet


@pytest.mark.parametrize(
    ("page", "line", "finding"),
    [
        ("docs/core.md", "[x](nothing.md)", "core.md links to nothing.md"),
        ("docs/core.md", "[x](events.md#no-such-heading)", "anchor does not exist"),
        ("CONTRIBUTING.md", "[x](docs/nothing.md)", "CONTRIBUTING.md links to docs/nothing.md"),
        ("packages/core/README.md", "[x](nothing.md)", "packages/core/README.md links to nothing.md"),
    ],
)
def test_a_link_that_leads_nowhere_fails_it(small: Path, page: str, line: str, finding: str) -> None:
    """Page, heading, a page outside of `docs/`, or one that is in no site."""
    with (small / page).open("a") as file:
        file.write(f"\n{line}\n")
    done = built(small)
    assert done.returncode != 0
    assert finding in done.stdout + done.stderr


def test_a_wrong_docstring_fails_it(small: Path) -> None:
    """A link to a page that is not there, and an argument that the function does not have."""
    add_function(small, DOCSTRING.replace("Put numbers.", "See [x](nothing.md).").replace("size: how", "width: how"))
    done = built(small)
    assert done.returncode != 0
    assert "reference/core.html links to nothing.html" in done.stdout
    assert "'width' does not appear in the function signature" in done.stdout


def add_function(checkout: Path, function: str) -> None:
    """Add a function to a public module."""
    module = checkout / "packages" / "core" / "src" / "mainstay" / "core" / "testing.py"
    text = module.read_text().replace("__all__ = [", '__all__ = [\n    "put",', 1)
    module.write_text(text + function)
