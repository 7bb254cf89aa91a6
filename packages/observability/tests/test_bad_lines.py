"""Anything that a line may be given: one safe line comes of it, and nothing raises into who logs."""

import asyncio
import io
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import copy_context
from threading import Thread
from typing import Any

import pytest
import structlog

from mainstay.core import bind
from mainstay.observability import ObservabilitySettings
from mainstay.observability._logging import configured
from mainstay.observability._tracebacks import traceback_of
from mainstay.observability.testing import metric


@contextmanager
def lines(**settings):
    """The settings' pipeline, and a function that gives what was written so far, parsed."""
    stream = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger(), "handlers", [])  # pytest's own raise
        with configured(ObservabilitySettings(service_name="orders", **settings), stream):
            yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


def broken(name: str, error: type[BaseException]) -> Any:
    def fail(*_args: object, **_named: object) -> Any:
        raise error

    return type("Broken", (), {name: fail})()


METHODS = (
    *("__str__", "__repr__", "__eq__", "__len__", "__hash__", "__bool__", "__iter__", "__format__", "__getattr__"),
    "__getattribute__",
)


@pytest.mark.parametrize("error", [RuntimeError, RecursionError, MemoryError, asyncio.CancelledError, GeneratorExit])
@pytest.mark.parametrize("method", METHODS)
def test_an_object_that_breaks_costs_its_own_place(method, error):
    """As a field, inside of another, as the event, as an argument, as an exception's text."""
    value = broken(method, error)
    broken_text = dict.fromkeys(("__str__", "__repr__"), lambda _self: str(value))
    failing = type("Failing", (Exception,), broken_text)()
    with lines() as written:
        structlog.get_logger().error("said", value=value, inner=[{"value": value}], beside="it")
        logging.getLogger("lib").error("said", extra={"value": value, "beside": "it"})
        logging.getLogger("lib").error("said %s and %r", value, value, extra={"beside": "it"})
        logging.getLogger("lib").error(value, extra={"beside": "it"})
        structlog.get_logger().error(value, beside="it")
        logging.getLogger("lib").error("said", exc_info=failing, extra={"beside": "it"})
        assert [line["beside"] for line in written()] == ["it"] * 6


class Subclass(str):
    __slots__ = ()

    def __str__(self):
        raise RuntimeError

    def __len__(self):
        raise RuntimeError

    def isidentifier(self):
        raise RuntimeError


class Sized(list[int]):
    def __len__(self):
        raise RuntimeError


@pytest.mark.parametrize(
    "value",
    [
        Subclass("x"), {Subclass("x"): 1}, Sized([1]), "\ud800", "\x00\x1b\r\n\u2028", b"\xff\x00",
        bytearray(b"x"), memoryview(b"x"),
        1e400, float("nan"), 10**6000, -(10**6000), complex(1, 2), ..., object, type, range(10**12), iter([1]),
        (n for n in [1]),
        {1: {2: {3: 4}}}, {None: 1, True: 2, 1.5: 3, b"k": 4, (1, 2): 5}, frozenset({1}), [[[[[[[[1]]]]]]]],
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_exotic_values_come_as_something(value):
    """Text that is none, numbers without end, keys of every type."""
    with lines() as written:
        structlog.get_logger().info("x", value=value, **{"odd\nname": value})
        logging.getLogger("lib").warning("x", extra={"value": value})
        assert len(written()) == 2
    for log_format in ("console", "ecs", "journal"):
        stream = io.StringIO()
        with configured(ObservabilitySettings(service_name="s", log_format=log_format), stream):
            structlog.get_logger().info("x", value=value, **{"odd\nname": value})
        assert len(stream.getvalue().splitlines()) == 1


def test_extra_may_have_any_keys():
    """Stdlib accepts names that are no names."""
    record = logging.LogRecord("lib", logging.WARNING, "f", 1, "said", None, None)
    record.__dict__.update({"": 1, "a b\n": 2, "k" * 100_000: 3})
    record.__dict__[5] = 4  # type: ignore[index]  # no name at all
    with lines() as written:
        logging.getLogger("lib").handle(record)
        (line,) = written()
    assert line["event"] == "said"
    assert (line[""], line["a b\n"], line["5"]) == (1, 2, 4)


def deep_group(depth: int) -> BaseException:
    error: Exception = ValueError("innermost")
    for n in range(depth):
        error = ExceptionGroup(f"g{n}", [error])
    return error


def wide_group(width: int) -> BaseException:
    return ExceptionGroup("wide", [ValueError(str(n)) for n in range(width)])


def chain(length: int) -> BaseException:
    error: BaseException = ValueError("first")
    for n in range(length):
        following = ValueError(str(n))
        following.__cause__ = error
        error = following
    return error


def circle() -> BaseException:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    one.__context__, other.__context__ = other, one
    return one


@pytest.mark.parametrize(
    "error",
    [deep_group(20), deep_group(5000), wide_group(20), wide_group(50_000), chain(10), chain(50_000), circle()],
    ids=["deep", "deeper", "wide", "wider", "long", "longer", "circle"],
)
def test_exceptions_that_are_linked_to_very_many_are_one_line(error):
    """Groups in groups, causes of causes, circles: of a bounded size, with the outermost one's text."""
    with lines() as written:
        structlog.get_logger().error("x", exc_info=error)
        logging.getLogger("lib").error("x", exc_info=error)
        first, second = written()
    assert str(error) in first["exception"]
    assert first["exception"] == second["exception"]
    assert len(first["exception"]) < 9000


def test_an_exception_with_a_huge_text_is_cut():
    """A megabyte of text, and secrets in it are hidden."""
    with lines() as written:
        structlog.get_logger().error("x", exc_info=ValueError("token=hunter2 " * 100_000))
        (line,) = written()
    assert len(line["exception"]) < 9000
    assert "hunter2" not in line["exception"]


def test_usual_exceptions_look_as_python_prints_them():
    """Causes and groups with their frames."""
    try:
        try:
            raise KeyError("inner")  # noqa: EM101  short
        except KeyError as error:
            msg = "outer"
            raise ExceptionGroup(msg, [ValueError("a")]) from error
    except ExceptionGroup as error:
        text = traceback_of(error)
    assert "The above exception was the direct cause" in text
    assert "| ValueError: a" in text


def test_filters_that_fail_lose_no_line():
    """A filter on the handler that raises lets the line through; one that says no is heard."""
    with lines() as written:
        (handler,) = logging.getLogger().handlers
        handler.addFilter(lambda _record: broken("__bool__", RuntimeError))
        logging.getLogger("lib").warning("x")
        handler.filters.clear()
        handler.addFilter(lambda record: record.getMessage() != "no")
        logging.getLogger("lib").warning("no")
        logging.getLogger("lib").warning("y")
        assert [line["event"] for line in written()] == ["x", "y"]


def test_at_the_end_of_the_stack_nothing_raises(monkeypatch):
    """A line that is logged where there is no room for a call any more is written or counted."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own raise
    stream = io.StringIO()
    calls = 0

    def down(log):
        nonlocal calls
        with suppress(RecursionError):
            down(log)
        calls += 1
        if calls < 60:
            log.emit(record)

    record = logging.LogRecord("lib", logging.WARNING, "f", 1, "said", None, None)
    lost = metric("mainstay_log_lines_lost_total", reason="unmade")
    with configured(ObservabilitySettings(service_name="s"), stream):
        (handler,) = logging.getLogger().handlers
        with suppress(RecursionError):  # of the call of `emit` itself
            down(handler)
    for line in stream.getvalue().splitlines():
        json.loads(line)
    lost = metric("mainstay_log_lines_lost_total", reason="unmade") - lost
    assert stream.getvalue().count("\n") + lost > 0


async def test_the_context_goes_where_the_work_goes():
    """Tasks, `to_thread`; and executors and threads with a copy of the context, which Python gives not by itself."""

    def log(where):
        logging.getLogger("lib").warning("x", extra={"where": where})

    async def task():
        log("task")

    loop = asyncio.get_running_loop()
    with lines() as written, ThreadPoolExecutor(1) as pool:
        with bind(correlation_id="c-1"), structlog.contextvars.bound_contextvars(request="r-1"):
            await asyncio.create_task(task())
            await asyncio.to_thread(log, "to_thread")
            await loop.run_in_executor(pool, copy_context().run, log, "executor")
            thread = Thread(target=copy_context().run, args=(log, "thread"))
            thread.start()
            thread.join()
            await structlog.get_logger().awarning("x", where="awarning")
        log("outside")
        got = {line["where"]: (line.get("correlation_id"), line.get("request")) for line in written()}
    inside = dict.fromkeys(("task", "to_thread", "executor", "thread", "awarning"), ("c-1", "r-1"))
    assert got == {**inside, "outside": (None, None)}
