"""The errors of all packages beside each other."""

import importlib
import pkgutil
from collections.abc import Iterator

import mainstay
from mainstay.core import MainstayError


def error_classes() -> list[type[MainstayError]]:
    """Every class of an error in an installed package, after each of their modules was imported."""
    for module in pkgutil.walk_packages(mainstay.__path__, "mainstay."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)

    def below(kind: type[MainstayError]) -> Iterator[type[MainstayError]]:
        yield kind
        for each in kind.__subclasses__():
            yield from below(each)

    return sorted({each for each in below(MainstayError) if each.__module__.startswith("mainstay.")}, key=str)


def test_each_code_is_stated_by_one_class() -> None:
    """A code says what went wrong to a caller who has nothing else, so no two classes of all packages state the same.

    A class that states none is of its base's kind, and an instance may tell of another error far away: neither states
    a code of its own. That a class states a status and a title with its code is checked where it is defined.
    """
    stated: dict[str, list[str]] = {}
    for kind in error_classes():
        if "code" in vars(kind):
            stated.setdefault(kind.code, []).append(f"{kind.__module__}.{kind.__name__}")
    assert len(stated) > 40  # the packages were found
    assert {code: classes for code, classes in stated.items() if len(classes) > 1} == {}


def test_each_title_belongs_to_one_code() -> None:
    """People who read the titles of two problems in a list tell them apart."""
    titles: dict[str, set[str]] = {}
    for kind in error_classes():
        titles.setdefault(kind.title, set()).add(kind.code)
    assert {title: codes for title, codes in titles.items() if len(codes) > 1} == {}
