"""The error tree, and ids."""

import copy
import pickle
import threading
import time
from enum import StrEnum

import pytest

from mainstay.core import (
    ConfigurationError,
    DeadlineExceeded,
    MainstayError,
    NotBoundError,
    checked_id,
    derived_id,
    is_id,
    uuid7,
)


def test_an_error_keeps_detail_and_public_message_apart():
    """What a caller outside may see never contains the internal detail."""
    error = MainstayError("connection to 10.0.0.7 refused")
    assert str(error) == "connection to 10.0.0.7 refused"
    assert "10.0.0.7" not in error.public_message
    assert not error.retryable
    assert error.retry_after_seconds is None


def test_an_instance_overrides_what_its_class_says():
    """Flags given at the raise win over the class's, and other instances keep theirs."""
    loud = DeadlineExceeded(
        "late", retryable=False, no_effect=True, retry_after_seconds=2.5, public_message="Too late."
    )
    assert (loud.retryable, loud.no_effect, loud.retry_after_seconds, loud.public_message) == (
        False,
        True,
        2.5,
        "Too late.",
    )
    assert DeadlineExceeded("late").retryable
    assert not DeadlineExceeded("late").no_effect


def test_a_deadline_is_also_a_timeout():
    """Code that expects Python's own TimeoutError catches ours."""
    with pytest.raises(TimeoutError):
        raise DeadlineExceeded


class Overdrawn(MainstayError):
    """An error with parameters of its own."""

    code = "BIZ_OVERDRAWN"
    status = 409
    title = "Overdrawn"

    def __init__(self, *, account: str) -> None:
        super().__init__(f"account {account}", no_effect=True)
        self.account = account


class Late(Overdrawn, TimeoutError):
    """One that is Python's own, too."""


@pytest.mark.parametrize("kind", [Overdrawn, Late])
def test_an_error_crosses_processes(kind):
    """With parameters of its own, too: a process pool breaks down on an exception that cannot be read."""
    error = kind(account="7")
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301  our own bytes
        assert type(other) is kind
        assert (str(other), other.args, vars(other)) == (str(error), error.args, vars(error))


@pytest.mark.parametrize("code", ["OOPS_X", "SYS", "SYS_", "", "SYS_lower", "SYS_A B", "SYS__X", "XSYS_X"])
def test_a_code_outside_the_families_is_refused(code):
    """A class with an unknown code cannot be defined."""
    with pytest.raises(TypeError, match="starts with one of AUTH_, VAL_"):
        type("Odd", (MainstayError,), {"code": code, "status": 500, "title": "Odd"})


@pytest.mark.parametrize("left_out", ["code", "status", "title"])
def test_a_class_states_its_whole_kind_or_nothing_of_it(left_out):
    """A status that a class did not mean would be its base's; without any of the three the class is of that kind."""
    kind = {"code": "BIZ_SOLD_OUT", "status": 409, "title": "Sold out"}
    stated = {name: value for name, value in kind.items() if name != left_out}
    with pytest.raises(TypeError, match=f"SoldOut states .* without {left_out}: code, status and title belong"):
        type("SoldOut", (MainstayError,), stated)
    sold_out = type("SoldOut", (MainstayError,), kind)
    for name in ({"retryable": True}, kind):
        also = type("Also", (sold_out,), name)()
        assert isinstance(also, MainstayError)
        assert (also.code, also.status, also.title) == ("BIZ_SOLD_OUT", 409, "Sold out")


@pytest.mark.parametrize(
    ("family", "right", "wrong"),
    [
        ("AUTH", [401, 403], [500, 200]), ("VAL", [400, 422], [503]), ("RES", [404, 409, 410], [500]),
        ("BIZ", [409, 422], [502]), ("RATE", [429], [400, 503]), ("SYS", [500, 503], [404, 429]),
        ("EXT", [502, 503, 504], [404, 500, 507]),
    ],
)  # fmt: skip
def test_the_status_says_whose_failure_it_is_as_the_code_does(family, right, wrong):
    """A caller mends its request only where the request was wrong; a status that HTTP does not know is refused."""
    for status in right:
        type("Odd", (MainstayError,), {"code": f"{family}_X", "status": status, "title": "X"})
    for status in (*wrong, 499, 599, 0, "409", None):
        with pytest.raises(TypeError, match=f"Odd.status is {status!r}; for {family}_ it is a status of HTTP from"):
            type("Odd", (MainstayError,), {"code": f"{family}_X", "status": status, "title": "X"})


@pytest.mark.parametrize("title", ["", " ", "two\nlines"])
def test_a_title_is_a_few_words_on_one_line(title):
    """It is shown to people beside the code."""
    with pytest.raises(TypeError, match=r"Odd\.title is"):
        type("Odd", (MainstayError,), {"code": "BIZ_X", "status": 409, "title": title})


def test_a_mistake_in_the_configuration_is_no_outcome_of_the_business():
    """A durable step in which one turns up has not failed: an earlier call of the same step may have done its work."""
    assert not ConfigurationError("x").no_effect
    assert issubclass(NotBoundError, ConfigurationError)


def test_uuid7_sorts_by_creation_also_within_a_millisecond():
    """Ten thousand ids from one thread are strictly increasing, version 7, variant RFC."""
    ids = [uuid7() for _ in range(10_000)]
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)
    assert {i.version for i in ids} == {7}
    assert {i.variant for i in ids} == {"specified in RFC 4122"}


def test_uuid7_carries_the_time(monkeypatch):
    """The first 48 bits are Unix milliseconds, once the clock has passed what was handed out before."""
    future = time.time_ns() + 60 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: future)
    assert uuid7().int >> 80 == future // 1_000_000


def test_uuid7_never_goes_back_with_the_clock(monkeypatch):
    """A clock that jumps back by an hour does not produce smaller ids."""
    before = uuid7()
    past = time.time_ns() - 3_600 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: past)
    assert uuid7() > before


def test_uuid7_is_unique_across_threads():
    """Eight threads at once never draw the same tick."""
    ids: list[int] = []

    def draw():
        ids.extend([uuid7().int >> 64 for _ in range(2_000)])

    threads = [threading.Thread(target=draw) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == 16_000


def test_a_derived_id_depends_on_its_key_alone():
    """The same key gives the same id in every process; this value is a promise to stored data."""
    assert derived_id("run-1:publish:1") == derived_id("run-1:publish:1")
    assert derived_id("run-1:publish:1") != derived_id("run-1:publish:2")
    assert str(derived_id("a")) == str(derived_id("a"))
    assert derived_id("a").version == 5


class Kind(StrEnum):
    """Identifiers as members of an enum."""

    ORDER = "order-1"


def test_an_identifier_is_plain_text_of_one_alphabet():
    """What passes is a `str` itself, whatever it was given as."""
    for good in ("a", "Order-7/2:x@y.z+_=", "x" * 128):
        assert is_id(good)
        assert checked_id(good, "the id") == good
    assert type(checked_id(Kind.ORDER, "the id")) is str


@pytest.mark.parametrize(
    "bad", ["", "x" * 129, " a", "a b", "a\n", "\0", "\x1b[31m", "é", "e\u0301", "\ud800", "\u202e", "%s", "'", "😀"]
)
def test_another_identifier_is_refused_by_a_printable_message(bad):
    """The message names what was given and the rule, and moves no cursor."""
    assert not is_id(bad)
    with pytest.raises(ValueError, match=r"^the id is 1 to 128 ASCII letters, digits and .*, not ") as found:
        checked_id(bad, "the id")
    assert str(found.value).isascii()
    assert str(found.value).isprintable()


@pytest.mark.parametrize("bad", [5, b"x", None, True])
def test_what_is_no_text_is_no_identifier(bad):
    """The message names the type."""
    assert not is_id(bad)
    with pytest.raises(TypeError, match=rf"the id is text \(str\), not .* \({type(bad).__name__}\)"):
        checked_id(bad, "the id")
