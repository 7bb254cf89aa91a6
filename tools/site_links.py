"""The links of a built site that lead nowhere, those of docstrings included, which the generator does not look at."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    """The anchors of a page, and where its links lead."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value or "")
            elif name in {"href", "src"} and value:
                self.links.add(value)


def broken(site: Path) -> list[str]:
    """Return each broken link with its page; links to other sites are not looked at."""
    # The page for what is not found is served under every path: its links begin at the site's root.
    pages = {path: _Page(path.read_text()) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}
    findings: list[str] = []
    for path, page in pages.items():
        for link in sorted(page.links):
            to = urlsplit(link)
            if to.scheme or to.netloc:
                continue
            target = (path.parent / unquote(to.path)).resolve() if to.path else path
            target = target / "index.html" if target.is_dir() else target
            lost = not target.exists()
            if target in pages and to.fragment:
                lost = unquote(to.fragment) not in pages[target].anchors
            if lost:
                findings.append(f"{path.relative_to(site)} links to {link}, which is not there")
    return findings
