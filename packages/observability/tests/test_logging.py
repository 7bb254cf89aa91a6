"""One stream of log lines: context in, secrets out, everybody's loggers, and everything as before afterwards."""

import io
import json
import logging
import subprocess
import sys
import textwrap
import threading
import warnings
from collections import UserDict
from contextlib import contextmanager
from typing import Any

import pytest
import structlog
from pydantic import BaseModel, Field, SecretStr, ValidationError

from mainstay.core import App, ConfigurationError, MainstayError, bind
from mainstay.observability import ObservabilityModule, ObservabilitySettings
from mainstay.observability._logging import configured
from mainstay.observability.testing import captured_logs


@contextmanager
def lines(**settings):
    """The settings' pipeline, and a function that gives what was written so far, parsed."""
    stream = io.StringIO()
    with configured(ObservabilitySettings(service_name="orders", **settings), stream):
        yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


def test_both_ways_lead_to_the_same_line():
    """A structlog call and a stdlib call differ only in the logger's name."""
    with lines() as written, bind(correlation_id="c-1", actor="ann", tenant="acme", causation_id="e-1"):
        structlog.get_logger().warning("late", seconds=3)
        logging.getLogger("lib").warning("late", extra={"seconds": 3})
        native, stdlib = written()
    assert stdlib.pop("logger") == "lib"
    for line in (native, stdlib):
        assert line.pop("timestamp").endswith("Z")
    assert native == stdlib
    assert native == {
        "level": "warning", "service": "orders", "event": "late", "seconds": 3,
        "correlation_id": "c-1", "causation_id": "e-1", "actor": "ann", "tenant": "acme",
    }  # fmt: skip


def test_a_received_trace_is_in_the_line():
    """Without any SDK, the ids of the trace that the caller named are there."""
    with lines() as written, bind(traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"):
        logging.getLogger("lib").error("x")
        (line,) = written()
    assert line["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
    assert line["span_id"] == "b7ad6b7169203331"


OURS = ("correlation_id", "causation_id", "actor", "tenant", "trace_id", "span_id")


@pytest.mark.parametrize("bound", [True, False])
def test_the_context_of_a_line_cannot_be_forged(bound):
    """A field that is called like one of the context's is written beside it, also where the context has none."""
    forged: dict[str, Any] = {name: f"forged-{name}" for name in OURS}
    context: dict[str, Any] = dict.fromkeys(OURS[:4], "true")
    context["traceparent"] = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with lines() as written, bind(**(context if bound else {})):
        structlog.get_logger().info("x", **forged)
        structlog.get_logger().bind(**forged).info("x")
        with structlog.contextvars.bound_contextvars(**forged):
            structlog.get_logger().info("x")
        logging.getLogger("lib").warning("x", extra=forged)
        for line in written():
            assert {name: line[f"{name}_"] for name in OURS} == forged
            assert [name for name in OURS if "forged" in str(line.get(name))] == []
            assert set(OURS).issubset(line) is bound
    with captured_logs() as got, bind(actor="ann"):
        structlog.get_logger().info("x", actor="bob")
    assert (got[0]["actor"], got[0]["actor_"]) == ("ann", "bob")


def test_no_extra_field_is_lost():
    """All that stdlib lets pass as `extra` is in the line, also under names that the line uses itself."""
    names = (
        "event",
        "logger",
        "level",
        "service",
        "timestamp",
        "stack",
        "exception",
        "code",
        "color_message",
        "event_",
    )
    extra: dict[str, Any] = dict.fromkeys(names, 7)
    with lines() as written:
        try:
            raise MainstayError
        except MainstayError:
            logging.getLogger("lib").exception("said", stack_info=True, extra=extra)
        logging.getLogger("lib").error("said", extra=extra)
        structlog.get_logger("app").error("said", **{name: 7 for name in extra if name != "event"}, level_=8)
        first, second, third = written()
    assert (first["event"], first["logger"], first["level"], first["service"]) == ("said", "lib", "error", "orders")
    assert first["exception"].startswith("Traceback")
    assert "Stack (most" in first["stack"]
    for line in (first, second):
        assert sum(value == 7 for value in line.values()) == len(extra), line
    assert (third["event"], third["logger"], third["level_"], third["level__"]) == ("said", "app", 8, 7)


def test_structlog_s_own_context_is_in_the_lines():
    """Code that binds by `structlog.contextvars` keeps its fields, on both ways, without secrets; explicit ones win."""
    with lines() as written, structlog.contextvars.bound_contextvars(request="r-1", password="hunter2"):
        structlog.get_logger().info("x")
        structlog.get_logger().info("x", request="r-2")
        logging.getLogger("lib").warning("x")
        assert [(line["request"], line["password"]) for line in written()] == [
            ("r-1", "[redacted]"),
            ("r-2", "[redacted]"),
            ("r-1", "[redacted]"),
        ]


def test_secrets_under_telling_keys_are_redacted_at_any_depth():
    """Passwords, tokens and keys disappear from values, nested ones too, and the caller's object stays as it was."""
    mine: dict[str, Any] = {"user": "ann", "nested": [{"api_key": "K", "list": ({"Authorization": "Bearer Z"},)}]}
    with lines() as written:
        log = structlog.get_logger()
        log.info("in", password="P", mine=mine, secret=SecretStr("S"), value=SecretStr("V"), session_token=["T"])
        logging.getLogger("lib").warning("in", extra={"cookie": "C", "mine": mine})
        text = json.dumps(written())
    for secret in "PKZSVTC":
        assert f'"{secret}"' not in text
    assert "Bearer Z" not in text
    assert text.count("[redacted]") == 8
    assert mine["nested"][0]["api_key"] == "K"


def test_a_structure_without_end_ends():
    """A mapping that contains itself is cut off instead of ending the line with a RecursionError."""
    loop: dict[str, object] = {"a": 1}
    loop["self"] = loop
    with lines() as written:
        structlog.get_logger().info("round", loop=loop)
        assert "too deep" in json.dumps(written())


def test_a_traceback_has_no_local_variables_and_no_secret_message():
    """An exception is one string in the line, with the code of a domain error, and without what the frames held."""

    def charge():
        card = "4111-hunter2"  # noqa: F841  this is what must not be seen
        msg = "connecting to redis://:hunter3@host failed"
        raise MainstayError(msg)

    for log_format in ("json", "console"):
        stream = io.StringIO()
        with configured(ObservabilitySettings(service_name="s", log_format=log_format), stream):
            try:
                charge()
            except MainstayError:
                logging.getLogger("lib").exception("no")
                structlog.get_logger().exception("no")
        assert "hunter" not in stream.getvalue().replace('card = "4111-hunter2"', "")
        assert stream.getvalue().count("Traceback (most recent call last)") == 2
        assert stream.getvalue().count("SYS_INTERNAL") == 2


def test_values_that_json_does_not_know_do_not_lose_the_line():
    """NaN, bytes, sets and objects whose repr fails are all written as something."""

    class Broken:
        def __repr__(self):
            raise ValueError

    with lines() as written:
        structlog.get_logger().info("odd", nan=float("nan"), some={1}, broken=Broken(), kind=Broken)
        structlog.get_logger().info("odder", raw=b"\xff", half="\ud800", broken=Broken(), pairs={(1, 2): 3})
        odd, odder = written()
    assert odd["nan"] == "NaN"
    assert "repr fails" in odd["broken"]
    assert odder["raw"] == "b'\\xff'"
    assert odder["half"] == "\ud800"


def test_levels_hold_for_everybody():
    """Below the level nothing is written, whichever way it comes."""
    with lines(log_level="WARNING") as written:
        structlog.get_logger().info("x")
        logging.getLogger("lib").info("x")
        structlog.get_logger().warning("y")
        logging.getLogger("lib").warning("y")
        assert [line["event"] for line in written()] == ["y", "y"]


def test_uvicorn_asyncio_and_warnings_come_through_once():
    """What already had handlers of its own for the terminal is written once, in our form; file handlers stay."""
    terminal, file = logging.StreamHandler(io.StringIO()), logging.FileHandler("/dev/null")
    access = logging.getLogger("uvicorn.access")
    access.addHandler(terminal)
    access.addHandler(file)
    access.propagate = False
    try:
        with lines() as written:
            access.info('%s - "%s %s HTTP/%s" %d', "127.0.0.1:1", "GET", "/x", "1.1", 200)
            logging.getLogger("asyncio").error("never awaited")
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                logging.captureWarnings(True)  # catch_warnings has put the original function back
                warnings.warn("old", DeprecationWarning, stacklevel=1)
            loggers = [line["logger"] for line in written()]
            assert access.handlers == [file]
        assert loggers == ["uvicorn.access", "asyncio", "py.warnings"]
        assert terminal.stream.getvalue() == ""
        assert access.handlers == [file, terminal]
        assert access.propagate is False
    finally:
        access.handlers.clear()
        access.propagate = True
        file.close()


def test_everything_is_undone():
    """After the App stops, structlog and stdlib are as they were, for loggers made meanwhile too."""
    root = logging.getLogger()
    before = (list(root.handlers), root.level, structlog.is_configured())
    with lines():
        log = structlog.get_logger()
        log.info("inside")
    assert (list(root.handlers), root.level, structlog.is_configured()) == before
    structlog.configure(processors=[structlog.processors.KeyValueRenderer()])
    try:
        mine = structlog.get_config()
        with lines():
            assert structlog.get_config()["processors"] != mine["processors"]
        assert structlog.get_config()["processors"] == mine["processors"]
    finally:
        structlog.reset_defaults()


def test_stack_info_and_a_missing_exception():
    """`stack_info=True` brings the stack, and `exception` outside of any handler does not fail."""
    with lines() as written:
        logging.getLogger("lib").warning("here", stack_info=True)
        structlog.get_logger().exception("nothing to see")
        structlog.get_logger().error("as an object", exc_info=ValueError("v"))
        first, second, third = written()
    assert "Stack (most recent call last)" in first["stack"]
    assert "exception" not in second
    assert third["exception"] == "ValueError: v"


def test_a_closed_stream_does_not_fail_the_service():
    """When nobody reads any more, logging goes quiet instead of raising."""
    stream = io.StringIO()
    with configured(ObservabilitySettings(service_name="s", log_format="console"), stream):
        structlog.get_logger().info("for a person", a=1)
        assert "for a person" in stream.getvalue()
        stream.close()
        structlog.get_logger().info("x")
        logging.getLogger("lib").warning("x")


def test_arguments_that_do_not_fit_are_not_printed(capsys, monkeypatch):
    """The line says where the mistake is; stdlib would print the arguments, a secret too, to standard error."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own raise
    with lines() as written:
        logging.getLogger("lib").warning("%d tries", "hunter2")
        (line,) = written()
    assert line["event"].startswith("%d tries [TypeError: its arguments do not fit, ")
    assert __file__ in line["event"]
    assert "hunter2" not in json.dumps(line) + capsys.readouterr().err


def test_lines_of_many_threads_stay_whole():
    """Eight threads at once: every line parses and none is missing."""

    def talk(n):
        for _ in range(50):
            logging.getLogger("t").info("x" * 500, extra={"n": n})

    with lines() as written:
        threads = [threading.Thread(target=talk, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(written()) == 400


async def test_the_module_configures_and_undoes(capfd):
    """An App with the module writes JSON to standard error and nothing to standard output."""
    async with App(ObservabilityModule.for_root(ObservabilitySettings(service_name="orders"))):
        logging.getLogger("lib").warning("hello")
    logging.getLogger("lib").warning("bye")
    out, err = capfd.readouterr()
    assert out == ""
    assert [json.loads(line)["event"] for line in err.splitlines()] == ["hello"]


def test_settings_name_their_variable(monkeypatch):
    """A missing name and a wrong level are configuration errors that say what to write."""
    with pytest.raises(ConfigurationError, match="MAINSTAY_OBSERVABILITY_SERVICE_NAME"):
        ObservabilityModule.for_root()
    monkeypatch.setenv("MAINSTAY_OBSERVABILITY_LOG_LEVEL", "loud")
    with pytest.raises(ConfigurationError, match="MAINSTAY_OBSERVABILITY_LOG_LEVEL"):
        ObservabilitySettings(service_name="x")


def test_captured_logs_collects_both_kinds_and_prints_nothing(capsys):
    """Tests see structlog's and stdlib's lines with context and without secrets; the configuration comes back."""
    with captured_logs() as got, bind(correlation_id="c"):
        structlog.get_logger().info("one", password="p")
        logging.getLogger("lib").debug("two")
    assert [(line["event"], line["correlation_id"]) for line in got] == [("one", "c"), ("two", "c")]
    assert got[0]["password"] == "[redacted]"
    assert capsys.readouterr().out == ""
    assert not structlog.is_configured()
    with lines() as written:
        with captured_logs():
            structlog.get_logger().info("hidden")
        structlog.get_logger().info("shown")
        assert [line["event"] for line in written()] == ["shown"]


def test_importing_the_package_configures_nothing():
    """An import leaves structlog and the root logger alone, and needs neither FastAPI nor the database."""
    code = (
        "import sys, logging, structlog, mainstay.observability\n"
        "assert not structlog.is_configured() and not logging.getLogger().handlers\n"
        "heavy = {'fastapi', 'starlette', 'sqlalchemy', 'mainstay.database', 'cryptography'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class Form(BaseModel):
    user: str
    password: str = Field(min_length=5)


def test_pydantic_does_not_repeat_its_input_in_a_traceback():
    """A ValidationError says what is wrong with a password, not which."""
    with lines() as written:
        try:
            Form(user="ann", password="pw-4")
        except ValidationError:
            logging.getLogger("lib").exception("no")
        (line,) = written()
    assert "input_value=[redacted], input_type=str" in line["exception"]
    assert "pw-4" not in line["exception"].replace('password="pw-4"', "")


def test_generators_are_not_advanced():
    """What is passed on its way into a line is still whole afterwards, and one without end does not end the process."""

    def endless():
        n = 0
        while True:
            yield (n := n + 1)

    rows, ids = (row for row in range(3)), endless()
    with lines() as written:
        structlog.get_logger().info("x", rows=rows, nested={"ids": [ids, map(str, ids)]})
        logging.getLogger("lib").warning("x", extra={"rows": rows, "ids": ids})
        first, second = written()
    assert first["rows"] == second["rows"] == repr(rows)
    assert first["nested"]["ids"][0] == repr(ids)
    assert (list(rows), next(ids)) == ([0, 1, 2], 1)


class Lazy(UserDict[str, int]):
    def items(self):
        msg = "dictionary changed size during iteration"
        raise RuntimeError(msg)


class Classless:
    @property  # type: ignore[misc]  # as proxies do
    def __class__(self):
        raise RuntimeError

    def __repr__(self):
        raise RuntimeError


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError

    def __getattr__(self, name):
        raise ValueError


@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize("kind", [Lazy, Classless, Unprintable])
@pytest.mark.parametrize("nested", [False, True])
def test_no_value_fails_who_logs_it(kind, nested, log_format, monkeypatch):
    """An object that breaks when it is looked at costs its own place in the line, nothing else."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own raise
    value = [{"a": kind()}, "kept"] if nested else kind()
    stream = io.StringIO()
    with configured(ObservabilitySettings(service_name="s", log_format=log_format), stream):
        structlog.get_logger().error("said", value=value, beside="it")
        logging.getLogger("lib").error("said", extra={"value": value, "beside": "it"})
        structlog.get_logger().error("said it", exc_info=value)
        logging.getLogger("lib").error("said it", exc_info=Unprintable())
    written = stream.getvalue()
    assert written.count("said") == 4
    assert written.count("beside") == 2


def test_a_line_that_cannot_be_made_is_replaced(monkeypatch):
    """Even where our own processors break, a line comes out and the program goes on."""
    with lines() as written:
        monkeypatch.setattr("mainstay.observability._logging.merge_contextvars", None)
        structlog.get_logger().warning("x")
        logging.getLogger("lib").warning("x")
        monkeypatch.undo()
        first, second = written()
    assert first["event"] == second["event"] == "a log line could not be made"
    assert first["error"] == "TypeError"


def test_the_line_s_own_fields_are_its_own():
    """A field that is called like one of the line's own is written beside it."""
    with lines() as written:
        structlog.get_logger().error("stock", level=3, service="fake", timestamp="1999", service_="kept")
        logging.getLogger("lib").error("stock", extra={"level": 3, "service": "fake", "timestamp": "1999"})
        for line in written():
            assert (line["level"], line["service"], line["timestamp"][:2]) == ("error", "orders", "20")
            assert (line["level_"], line["timestamp_"]) == (3, "1999")
    with captured_logs() as got:
        structlog.get_logger().error("stock", level=3)
    assert (got[0]["level"], got[0]["level_"]) == ("error", 3)


def test_what_is_no_utf_8_does_not_make_the_line_invalid():
    """A half surrogate beside NaN is still JSON, which has no NaN."""

    def refuse(constant):
        raise ValueError(constant)

    stream = io.StringIO()
    with configured(ObservabilitySettings(service_name="s"), stream):
        structlog.get_logger().info("x", half="\ud800", nan=float("nan"), nested={"half": "\ud800", "n": float("inf")})
    line = json.loads(stream.getvalue(), parse_constant=refuse)
    assert (line["half"], line["nan"]) == ("\ud800", "NaN")
    assert "inf" in line["nested"]


def test_structlog_s_stack_info_is_the_caller_s_stack():
    """`stack_info=True` brings the stack as it does with stdlib, and it ends where the line was written."""
    with lines() as written:
        structlog.get_logger().info("here", stack_info=True)
        structlog.get_logger().info("here", stack_info=False)
        first, second = written()
    assert 'structlog.get_logger().info("here", stack_info=True)' in first["stack"].splitlines()[-1]
    assert "stack_info" not in first
    assert "stack" not in second


def test_the_console_shows_no_line_that_nobody_wrote():
    """What moves the cursor or begins a line is escaped, but for the lines of a traceback."""
    stream = io.StringIO()
    with configured(ObservabilitySettings(service_name="s", log_format="console"), stream):
        logging.getLogger("lib").warning("a\nFAKE\x1b[2J", extra={"b\n": "c\u2028\x9b"})
        structlog.get_logger().error("x", exc_info=ValueError("two\nlines\x1b"))
    first, *rest = stream.getvalue().split("\n")
    assert "a\\nFAKE\\x1b[2J" in first
    assert "\\u2028\\x9b" in first
    assert [line for line in rest if "lines" in line] == ["lines\\x1b"]


def test_a_logger_that_was_bound_at_import_is_redacted_too(capsys):
    """`structlog.get_logger().bind(…)` keeps the processors of its moment, but its lines come through ours."""
    early = structlog.get_logger().bind(component="early", password="hunter2")
    for _ in range(2):
        with lines(log_level="WARNING") as written:
            early.info("below the level")
            early.warning("late")
            (line,) = written()
        assert (line["component"], line["password"], line["event"]) == ("early", "[redacted]", "late")
    assert capsys.readouterr().out == ""
    early.warning("as before")
    assert "as before" in capsys.readouterr().out


@pytest.mark.parametrize("first_to_go", [0, 1])
def test_of_two_configurations_the_newest_has_the_loggers(first_to_go):
    """With two Apps each line is written once and redacted, whichever stops first; the last restores the original."""
    root = logging.getLogger()
    before = (list(root.handlers), root.level, structlog.is_configured())
    streams = [io.StringIO(), io.StringIO()]
    blocks = [
        configured(ObservabilitySettings(service_name=f"s{n}", log_level=level), stream)
        for n, (stream, level) in enumerate(zip(streams, ["INFO", "WARNING"], strict=True))
    ]

    def said():
        for stream in streams:
            stream.truncate(0)
            stream.seek(0)
        structlog.get_logger().warning("x", password="hunter2")
        logging.getLogger("lib").warning("x", extra={"password": "hunter2"})
        structlog.get_logger().info("y")
        logging.getLogger("lib").info("y")
        written = [[json.loads(line) for line in stream.getvalue().splitlines()] for stream in streams]
        assert "hunter2" not in json.dumps(written)
        return [[line["event"] for line in stream] for stream in written]

    for block in blocks:
        block.__enter__()
    assert said() == [[], ["x", "x"]]
    blocks[first_to_go].__exit__(None, None, None)
    assert said() == [[["x", "x", "y", "y"], []], [[], ["x", "x"]]][1 - first_to_go]
    blocks[1 - first_to_go].__exit__(None, None, None)
    assert (list(root.handlers), root.level, structlog.is_configured()) == before


async def test_trap_two_apps_in_one_process(capfd):
    """Each line comes once, and the App that stops first does not take the other's redaction along."""
    first, second = (App(ObservabilityModule.for_root(ObservabilitySettings(service_name=n))) for n in "ab")
    await first.__aenter__()
    async with second:
        logging.getLogger("lib").warning("both")
        await first.__aexit__()
        structlog.get_logger().warning("one", password="hunter2")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            logging.captureWarnings(True)  # catch_warnings has put the original function back
            warnings.warn("old", DeprecationWarning, stacklevel=1)
    out, err = capfd.readouterr()
    assert out == ""
    written = [json.loads(line) for line in err.splitlines()]
    assert [(line["service"], line.get("logger")) for line in written] == [
        ("b", "lib"),
        ("b", None),
        ("b", "py.warnings"),
    ]
    assert written[1]["password"] == "[redacted]"


@pytest.mark.parametrize("where", ["text", "raw"])
def test_trap_a_signal_handler_may_log_while_a_line_is_being_written(where):
    """A signal that arrives in the middle of a write, where a lock is held, neither hangs the process nor fails it."""
    code = """
        import io, logging, signal, sys
        from mainstay.observability import ObservabilitySettings
        from mainstay.observability._logging import configured

        log = logging.getLogger("lib")
        signal.signal(signal.SIGUSR1, lambda *_: (log.warning("handled"), handled.append(1)))
        written, handled = [], []

        class Text(io.StringIO):
            def write(self, text):
                if "interrupted" in text:
                    signal.raise_signal(signal.SIGUSR1)
                written.append(text)

        class Raw(io.RawIOBase):
            def writable(self):
                return True

            def write(self, data):
                text = bytes(data).decode()
                if "interrupted" in text:
                    signal.raise_signal(signal.SIGUSR1)  # the BufferedWriter refuses the handler's line
                written.append(text)
                return len(data)

        stream = Text() if sys.argv[1] == "text" else io.TextIOWrapper(io.BufferedWriter(Raw()))
        with configured(ObservabilitySettings(service_name="s"), stream):
            log.warning("interrupted")
            log.warning("after")
        for event in ("interrupted", "after"):
            assert "".join(written).count(event) == 1, written
        assert handled == [1]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), where], check=True, timeout=30)


def test_a_logger_that_was_used_follows_each_configuration():
    """A module's logger, used and bound under one configuration, has the next one's level, form and stream, or none."""
    log = structlog.get_logger("module")
    bound: Any = None
    for level, expected in (("INFO", ["info"]), ("DEBUG", ["debug", "info"]), ("WARNING", [])):
        with lines(log_level=level) as written:
            bound = bound or log.bind(bound=True)
            for each in (log, bound):
                each.debug("debug")
                each.info("info")
            assert [(line["event"], line["logger"]) for line in written()] == [(e, "module") for e in expected * 2]
            with captured_logs() as got:
                log.debug("debug")
                bound.info("info")
            assert [line["event"] for line in got] == ["debug", "info"]
            with structlog.testing.capture_logs() as caught:
                log.error("caught")
            assert [entry["event"] for entry in caught] == ["caught"]
            assert len(written()) == 2 * len(expected)
    with captured_logs(logging.INFO) as got:
        log.debug("debug")
        bound.info("info")
    assert [(line["event"], line["bound"]) for line in got] == [("info", True)]
    heard: list[Any] = []

    def hear(_logger: object, method: str, event: Any) -> Any:
        heard.append((method, dict(event)))
        raise structlog.DropEvent

    structlog.configure(processors=[hear])
    try:
        log.warning("after", n=1)
    finally:
        structlog.reset_defaults()
    assert heard == [("warning", {"event": "after", "n": 1})]


def test_a_capture_that_outlives_the_app_leaves_loggers_that_work(caplog):
    """What structlog gets back then is the configuration of an App that is gone: lines go to stdlib instead."""
    log = structlog.get_logger("module")
    block = lines()
    written = block.__enter__()
    log.info("x")
    with captured_logs() as got:
        block.__exit__(None, None, None)
        log.info("y")
    with captured_logs() as later:
        log.warning("z")
    log.warning("to stdlib")
    structlog.reset_defaults()
    assert [line["event"] for line in [*written(), *got, *later]] == ["x", "z"]
    assert "to stdlib" in caplog.messages
