"""One stream of log lines: context in, secrets out, everybody's loggers, and everything as before afterwards."""

import io
import json
import logging
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager
from typing import Any

import pytest
import structlog
from pydantic import SecretStr

from mainstay.core import App, ConfigurationError, MainstayError, bind
from mainstay.observability import ObservabilityModule, ObservabilitySettings
from mainstay.observability.logging import configured, redact_text
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
        ("no secret: a=b http://host:80/path", "no secret: a=b http://host:80/path"),
    ],
)
def test_secrets_in_prose_are_redacted(said, kept):
    """Addresses and assignments inside a message lose their secret and nothing else."""
    assert redact_text(said) == kept
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


def test_a_broken_record_is_stdlib_s_business(monkeypatch):
    """A format string that does not fit its arguments is reported as stdlib does, and raises nothing."""
    seen = []
    monkeypatch.setattr(logging.Handler, "handleError", lambda _self, record: seen.append(record))
    with lines():
        (ours,) = [handler for handler in logging.getLogger().handlers if type(handler).__name__ == "_Handler"]
        ours.handle(logging.makeLogRecord({"msg": "%d", "args": ("no number",), "levelno": logging.WARNING}))
    assert len(seen) == 1


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
