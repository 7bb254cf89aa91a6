"""The documentation as a site in `build/site`: `python tools/docs_site.py` builds it, and fails on a broken link.

The pages are those of `docs/`, with CONTRIBUTING and the measurements beside them, and a reference of every public
module, which is made of its docstrings. No list of pages is written by hand, so none can be forgotten.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from api import public_modules
from site_links import broken

ROOT = Path(__file__).resolve().parent.parent
# Pages that live elsewhere in the repository, by the name that they have in the site.
BESIDE = {"contributing.md": "CONTRIBUTING.md", "measurements.md": "benchmarks/README.md"}
# Pages that are read elsewhere only, and whose links must hold all the same.
ELSEWHERE = ("README.md", "packages/*/README.md")
STYLE = """\
/* Lines of code are up to 120 characters long. */
.md-grid { max-width: 86rem; }
.md-typeset pre > code { font-size: 0.6rem; }
/* A long name wraps, and stays whole where it is what a table's row is about. */
.md-typeset :not(pre) > code { overflow-wrap: anywhere; }
.md-typeset td:first-child code { overflow-wrap: normal; word-break: normal; }
/* Markdown has no table without a head. */
.md-typeset thead:not(:has(th:not(:empty))) { display: none; }
"""
FIRST = ("index.md", "first-service.md", "architecture.md")
# Code comes first, so that what looks like a link in it stays as it is.
_LINK = re.compile(
    r"^ *```.*?^ *```|`[^`\n]+`|(?<!!)\[([^\]]*)\]\((?!https?://|#|mailto:)([^)#]+)(#[^)]*)?\)",
    re.DOTALL | re.MULTILINE,
)
_NUMBER = re.compile(r"^(ADR |RFC )?\d+[:.] ")
Nav = list[dict[str, object]]


def stage(root: Path, pages: Path) -> Nav:
    """Lay the pages out below `pages`, with links that hold there; returns the site's navigation."""
    shutil.rmtree(pages, ignore_errors=True)
    shutil.copytree(root / "docs", pages)
    for name, source in BESIDE.items():
        (pages / name).write_text((root / source).read_text())
    (pages / "site.css").write_text(STYLE)
    for page in pages.rglob("*.md"):
        relinked = partial(_relinked, root, pages, page)
        page.write_text(_LINK.sub(relinked, page.read_text()))
    for page in (path for pattern in ELSEWHERE for path in root.glob(pattern)):
        for link in _LINK.finditer(page.read_text()):
            if link[2]:
                _target(root, page, link[2])
    packages = sorted(path.parent.name for path in root.glob("packages/*/pyproject.toml"))
    reference = [_reference(pages, package) for package in packages]
    alone = sorted(path.name for path in (root / "docs").glob("*.md"))
    others = [name for name in alone if name not in FIRST and name.removesuffix(".md") not in packages]
    return [
        {"Guide": [{_title(pages / name): name} for name in (*FIRST, *others)]},
        {"Runbooks": _directory(pages, "runbooks")},
        {"Packages": [{package: f"{package}.md"} for package in packages]},
        {"Reference": reference},
        {"RFCs": _directory(pages, "rfcs")},
        {"Decisions": _directory(pages, "adr")},
        {"Project": [{_title(pages / name): name} for name in BESIDE]},
    ]


def _relinked(root: Path, pages: Path, page: Path, link: re.Match[str]) -> str:
    """The same link from the page's place in the site; the bare text where it leads to a file that is no page."""
    text, to, anchor = link.groups()
    if not to:
        return link[0]
    name = str(page.relative_to(pages))
    source = root / BESIDE[name] if name in BESIDE else root / "docs" / name
    target = _target(root, source, to)
    beside = {(root / path).resolve(): Path(name) for name, path in BESIDE.items()}
    if target in beside:
        found = pages / beside[target]
    elif target.is_relative_to(root / "docs"):
        found = pages / target.relative_to(root / "docs")
    else:
        return text
    up = "../" * (len(page.relative_to(pages).parts) - 1)
    return f"[{text}]({up}{found.relative_to(pages)}{anchor or ''})"


def _target(root: Path, source: Path, to: str) -> Path:
    """The file or directory of the checkout that a link leads to."""
    target = (source.parent / to).resolve()
    if not target.exists():
        msg = f"{source.relative_to(root)} links to {to}, which is not there"
        raise SystemExit(msg)
    return target


def _reference(pages: Path, package: str) -> dict[str, object]:
    """Write a page for the public modules of a package; the package itself comes first."""
    modules = [name for name, _ in public_modules(package)]
    lines = [f"# Reference of {package}", ""]
    for module in modules:
        lines += [f"## {module}", "", f"::: {module}", ""]
    place = pages / "reference" / f"{package}.md"
    place.parent.mkdir(exist_ok=True)
    place.write_text("\n".join(lines))
    return {package: f"reference/{package}.md"}


def _directory(pages: Path, name: str) -> Nav:
    found = sorted((pages / name).glob("*.md"), key=lambda path: (path.name != "README.md", path.name))
    found = [path for path in found if not path.name.endswith("-template.md")]
    return [{_numbered(path): str(path.relative_to(pages))} for path in found]


def _numbered(page: Path) -> str:
    """The title of a page with the number of its file's name, which not every title repeats."""
    title = _NUMBER.sub("", _title(page))
    return f"{page.name[:4]} {title}" if page.name[0].isdigit() else title


def _title(page: Path) -> str:
    return next(line for line in page.read_text().splitlines() if line.startswith("# ")).removeprefix("# ")


def configuration(nav: Nav, pages: Path, site: Path) -> str:
    """The site generator's configuration; its form is YAML, of which JSON is a part."""
    paths = sorted(str(path) for path in ROOT.glob("packages/*/src"))
    return json.dumps(
        {
            "site_name": "Mainstay",
            "docs_dir": pages.name,
            "site_dir": site.name,
            "use_directory_urls": False,
            "nav": nav,
            "theme": {
                "name": "material",
                "font": False,  # nothing is fetched from elsewhere, neither while building nor while reading
                "features": ["navigation.tabs", "navigation.top", "content.code.copy", "toc.follow"],
            },
            "markdown_extensions": ["admonition", "attr_list", "tables", "pymdownx.highlight", "pymdownx.superfences"],
            "extra_css": ["site.css"],
            "plugins": [
                "search",
                {
                    "mkdocstrings": {
                        "handlers": {
                            "python": {
                                "paths": paths,
                                "options": {
                                    "show_root_heading": False,
                                    "show_root_toc_entry": False,
                                    "show_source": False,
                                    "heading_level": 3,
                                    "members_order": "source",
                                    "docstring_style": "google",
                                    "extensions": [f"{Path(__file__).with_name('shared_entries.py')}:SharedEntries"],
                                    "docstring_options": {"warn_missing_types": False},
                                    "docstring_section_style": "list",
                                    "separate_signature": True,
                                    "show_signature_annotations": True,
                                    "line_length": 80,
                                },
                            }
                        }
                    }
                },
            ],
        },
        indent=1,
    )


def build(root: Path, place: Path) -> int:
    """Build the site below `place`; the exit status, which is not 0 after any finding."""
    pages, site = place / "pages", place / "site"
    nav = stage(root, pages)
    (place / "mkdocs.yml").write_text(configuration(nav, pages, site))
    command: Sequence[str] = (str(Path(sys.executable).parent / "zensical"), "build", "--strict", "--clean")
    done = subprocess.run(
        [*command, "--config-file", str(place / "mkdocs.yml")],
        check=False,
        cwd=place,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    print(done.stdout, end="")
    if done.returncode:
        return done.returncode
    findings = broken(site)
    print("".join(f"{finding}\n" for finding in findings), end="")
    # The generator prints what is wrong with a docstring, an argument that there is not, and goes on.
    return 1 if findings or "griffe: " in done.stdout else 0


if __name__ == "__main__":
    sys.exit(build(ROOT, ROOT / "build"))
