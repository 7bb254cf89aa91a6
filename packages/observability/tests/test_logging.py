"""One stream of log lines: context in, secrets out, everybody's loggers, and everything as before afterwards."""

import io
import json
import logging
import subprocess
import sys
import textwrap
import threading
import warnings
from collections import UserDict, deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import structlog
from pydantic import BaseModel, Field, SecretStr, ValidationError

from mainstay.core import App, ConfigurationError, MainstayError, bind
from mainstay.observability import ObservabilityModule, ObservabilitySettings
from mainstay.observability._logging import configured
from mainstay.observability._redaction import redact_text
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


def test_what_is_passed_wins_over_the_context():
    """A line about somebody else's request may say so."""
    with lines() as written, bind(actor="ann"):
        structlog.get_logger().info("x", actor="bob")
        assert written()[0]["actor"] == "bob"


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


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("postgresql+asyncpg://app:hunter2@db:5432/x", "postgresql+asyncpg://app:[redacted]@db:5432/x"),
        ("GET https://api/x?token=hunter2&page=2", "GET https://api/x?token=[redacted]&page=2"),
        ("Authorization: Bearer hunter2", "Authorization: Bearer [redacted]"),
        ("password='hunter2'", "password='[redacted]'"),
        ("sent {'token': 'hunter2', 'n': 1}", "sent {'token': '[redacted]', 'n': 1}"),
        ('sent {"token": "hunter2", "n": 1}', 'sent {"token": "[redacted]", "n": 1}'),
        ("password: hunter2", "password: [redacted]"),
        ("password = 'a, hunter2' in force", "password = '[redacted]' in force"),
        ("{'password': \"it's, hunter2\", 'n': 1}", "{'password': \"[redacted]\", 'n': 1}"),
        ('body {"user":"a","password":"hunter2","n":1}', 'body {"user":"a","password":"[redacted]","n":1}'),
        (r'{"b": "{\"pwd\": \"x\\\"hunter2\", \"n\": 1}"}', r'{"b": "{\"pwd\": \"[redacted]\", \"n\": 1}"}'),
        ('{"tokens": ["hunter2", "hunter2"]}', '{"tokens": [redacted]]}'),
        ("client_secret=hunter2;access_key_id=hunter2", "client_secret=[redacted];access_key_id=[redacted]"),
        ('{"x-api-key": "hunter2"}', '{"x-api-key": "[redacted]"}'),
        ("Authorization: Token hunter2", "Authorization: Token [redacted]"),
        ("Authorization: Unheard-of hunter2", "Authorization: [redacted]"),
        ("{b'authorization': b'Bearer hunter2'}", "{b'authorization': b'[redacted]'}"),
        ("[('authorization', 'Bearer hunter2'), ('a', 'b')]", "[('authorization', '[redacted]'), ('a', 'b')]"),
        ("Set-Cookie: a=hunter2; b=hunter2", "Set-Cookie: [redacted]"),
        ("redis://:p@hunter2@db/0", "redis://:[redacted]@db/0"),
        ("amqp://app:p/hunter2@mq:5672/x", "amqp://app:[redacted]@mq:5672/x"),
        ("cloning https://hunter2@github.com/x?e=a@b", "cloning https://[redacted]@github.com/x?e=a@b"),
        ("[type=x, input_value='hunter2, a', input_type=str]", "[type=x, input_value=[redacted], input_type=str]"),
        (
            "nothing here: a=b http://host:80/p?e=a@b ssh://git@host",
            "nothing here: a=b http://host:80/p?e=a@b ssh://git@host",
        ),
        (
            "InvalidTokenError: it has expired, KeyError: 'token'",
            "InvalidTokenError: it has expired, KeyError: 'token'",
        ),
        ("password=SecretStr('***') token='' tokens: []", "password=SecretStr('***') token='' tokens: []"),
    ],
)
def test_secrets_in_prose_are_redacted(said, kept):
    """Addresses and assignments inside a message lose their secret and nothing else."""
    assert redact_text(said) == kept
    assert redact_text(kept) == kept
    with lines() as written:
        logging.getLogger("asyncpg").error("cannot connect to %s", said)
        assert "hunter2" not in json.dumps(written())


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
    kept_out: str = Field("hunter2", repr=False)


@dataclass
class Credentials:
    user: str
    private_key: str
    kept_out: str = field(default="hunter2", repr=False)


class Pair(NamedTuple):
    user: str
    token: str


class Kind(Enum):
    LOGIN = "login"


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (Form(user="ann", password="hunter2"), {"user": "ann", "password": "[redacted]"}),
        ([{"form": Form(user="ann", password="hunter2")}], [{"form": {"user": "ann", "password": "[redacted]"}}]),
        (Credentials("ann", "hunter2"), {"user": "ann", "private_key": "[redacted]"}),
        (Pair("ann", "hunter2"), {"user": "ann", "token": "[redacted]"}),
        (deque([UserDict({"pwd": "hunter2"})]), [{"pwd": "[redacted]"}]),
        (
            {b"password": b"hunter2", 1: {"access_key": "hunter2"}},
            {"password": "[redacted]", "1": {"access_key": "[redacted]"}},
        ),
        ({"x-api-key": "hunter2", "private-key": "hunter2"}, {"x-api-key": "[redacted]", "private-key": "[redacted]"}),
        ([(b"authorization", b"Bearer hunter2"), (b"a", b"b")], [["authorization", "[redacted]"], ["a", "b"]]),
        (("cookie", "hunter2"), ["cookie", "[redacted]"]),
        ({("token", 1), "token=hunter2"} - {("token", 1)}, ["token=[redacted]"]),
        ({"redis://:hunter2@host": 1}, {"redis://:[redacted]@host": 1}),
        (b'{"password":"hunter2"}', '{"password":"[redacted]"}'),
        (ValueError("token=hunter2"), "ValueError('token=[redacted]')"),
        ({"password": "hunter2"}.items(), "dict_items([('password', '[redacted]')])"),
        ([Kind.LOGIN, Path("/a"), 1.5, None], ["login", "/a", 1.5, None]),
    ],
)
def test_secrets_inside_of_values_are_redacted(value, kept):
    """Whatever names its parts is looked into: models, dataclasses, named tuples, headers, keys that are bytes."""
    with lines() as written:
        structlog.get_logger().info("in", value=value)
        logging.getLogger("lib").warning("in", extra={"value": value})
        structlog.get_logger().info(value)
        assert [line.get("value", line["event"]) for line in written()] == [kept] * 3


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
        monkeypatch.setattr("mainstay.observability._logging.redact", None)
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
