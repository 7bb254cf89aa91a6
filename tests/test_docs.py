"""Every Python block of the documentation runs as it stands.

The blocks of one page are one program, in their order, run by an interpreter of their own in an empty directory. Line
numbers are the page's, so a traceback points into the page. Comments in the page, invisible when it is shown, say what
is special:

- `<!-- file: orders.py -->` before a block: it is a file of that name beside the program, not a part of it
- `<!-- needs: postgres as MAINSTAY_DATABASE_URL -->` anywhere: a real server (`kafka`, `postgres`, `redis_url`), whose
  address the program finds in that variable; the page is skipped, and counted, where the server is missing
- `<!-- not run: reason -->` before a block: a fragment
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("*.md"),
        *(path for group in ("packages", "examples") for path in (ROOT / group).glob("*/README.md")),
    ]
)
_NEEDS = re.compile(r"<!-- needs: (\w+) as (\w+) -->")
_MARK = re.compile(r"<!-- (file|not run): (.+?) -->")
_FENCE = re.compile(r"^( *)```(\w*)")


@dataclass
class Page:
    """What a page asks for: one program, files beside it, servers by the variable that names them."""

    program: str = ""
    files: dict[str, str] = field(default_factory=dict)
    needs: dict[str, str] = field(default_factory=dict)


def read(text: str) -> Page:
    """Take the Python blocks out of a page."""
    page = Page(needs={variable: server for server, variable in _NEEDS.findall(text)})
    lines: list[str] = []
    inside: str | None = None  # the language of the open block
    mark: tuple[str, str] | None = None
    indent = 0
    for line in text.splitlines():
        kept = ""
        if fence := _FENCE.match(line):
            if inside is None:
                inside, indent = fence[2] or "text", len(fence[1])
            else:
                inside, mark = None, None
        elif inside is None:
            if found := _MARK.search(line):
                mark = (found[1], found[2])
            elif line.strip():
                mark = None
        elif inside == "python":
            code = line[indent:]
            if mark is None:
                kept = code
            elif mark[0] == "file":
                page.files[mark[1]] = f"{page.files.get(mark[1], '')}{code}\n"
        lines.append(kept)
    page.program = "\n".join(lines) + "\n" if any(lines) else ""
    return page


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_page_runs(path: Path, tmp_path: Path, request: pytest.FixtureRequest):
    """The blocks of the page, as one program, end without an error."""
    page = read(path.read_text())
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAINSTAY_")}
    for variable, server in page.needs.items():
        environment[variable] = request.getfixturevalue(server)
    for name, text in page.files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    program = tmp_path / f"{path.stem}_page.py"
    program.write_text(page.program)
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{path.relative_to(ROOT)}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_blocks_keep_the_line_numbers_of_their_page():
    """A program has as many lines as its page up to the block, other languages are left out, and marks are honoured."""
    page = read(
        "# Title\n```python\nx = 1\n```\n```bash\nmake\n```\n<!-- file: a.py -->\n\n```python\nimport b\n```\n"
        "<!-- not run: a fragment -->\n```python\n...\n```\n1. list\n   ```python\n   y = x\n   ```\n"
        "<!-- needs: kafka as KAFKA -->\n"
    )
    assert [(number, line) for number, line in enumerate(page.program.splitlines(), 1) if line] == [
        (3, "x = 1"),
        (19, "y = x"),
    ]
    assert page.files == {"a.py": "import b\n"}
    assert page.needs == {"KAFKA": "kafka"}
