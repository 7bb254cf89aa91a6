"""The errors of all packages beside each other."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools" / "errors_page.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """The tool that writes the catalogue."""
    spec = importlib.util.spec_from_file_location("errors_page", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_code_is_stated_by_one_class(tool: ModuleType) -> None:
    """A code says what went wrong to a caller who has nothing else, so no two classes of all packages state the same.

    A class that states none is of its base's kind, and an instance may tell of another error far away: neither states
    a code of its own. That a class states a status and a title with its code is checked where it is defined.
    """
    stated: dict[str, list[str]] = {}
    for kind in tool.error_classes():
        if "code" in vars(kind):
            stated.setdefault(kind.code, []).append(f"{kind.__module__}.{kind.__name__}")
    assert len(stated) > 40  # the packages were found
    assert {code: classes for code, classes in stated.items() if len(classes) > 1} == {}


def test_each_title_belongs_to_one_code(tool: ModuleType) -> None:
    """People who read the titles of two problems in a list tell them apart."""
    titles: dict[str, set[str]] = {}
    for code, title in [*((kind.code, kind.title) for kind in tool.error_classes()), *tool.BY_STATUS.values()]:
        titles.setdefault(title, set()).add(code)
    assert {title: codes for title, codes in titles.items() if len(codes) > 1} == {}


def test_the_catalogue_is_what_the_classes_say(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page is current, a class that changes makes it stale, and the command writes it."""
    assert tool.main([]) == 0
    stale = tmp_path / "errors.md"
    stale.write_text(tool.PAGE.read_text().replace("| 409 |", "| 404 |"))
    monkeypatch.setattr(tool, "PAGE", stale)
    assert tool.main([]) == 1
    assert tool.main(["--write"]) == 0
    assert tool.main([]) == 0
