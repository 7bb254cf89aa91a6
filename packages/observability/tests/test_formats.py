"""A line for Loki, Elasticsearch, systemd and a terminal, of whichever logger it comes, a server's too."""

import io
import json
import logging
import os
import re
import socket
import threading
from contextlib import contextmanager

import structlog

from mainstay.core import MainstayError, bind
from mainstay.observability import ObservabilitySettings
from mainstay.observability._logging import configured


@contextmanager
def text(**settings):
    """The settings' pipeline, and a function that gives what was written so far."""
    stream = io.StringIO()
    with configured(ObservabilitySettings(service_name="orders", **settings), stream):
        yield stream.getvalue


def test_ecs_has_the_schema_s_names():
    """What the schema knows stands under its names, the rest in labels, and a caller's fields under `fields` alone."""
    with text(log_format="ecs") as written, bind(correlation_id="c", causation_id="e", actor="ann", tenant="acme"):
        try:
            raise MainstayError
        except MainstayError:
            logging.getLogger("lib").exception("no", extra={"order": {"id": 3}, "log.level": "fake", "message_": 1})
        structlog.get_logger().info("plain")
        first, second = (json.loads(line) for line in written().splitlines())
    assert first.pop("error.stack_trace").startswith("Traceback")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", first.pop("@timestamp"))
    assert first == {
        "log.level": "error",
        "log.logger": "lib",
        "message": "no",
        "ecs.version": "8.11.0",
        "service.name": "orders",
        "user.id": "ann",
        "organization.id": "acme",
        "error.code": "SYS_INTERNAL",
        "labels": {"correlation_id": "c", "causation_id": "e"},
        "fields": {"order": {"id": 3}, "log.level": "fake", "message_": 1},
    }
    assert (second["message"], "fields" in second) == ("plain", False)


def test_ecs_s_message_is_always_text():
    """An index refuses a document whose message is once a text and once an object."""
    with text(log_format="ecs") as written:
        structlog.get_logger().info({"a": 1})
        structlog.get_logger().info(None)
        logging.getLogger("lib").warning(["a"])
        assert [json.loads(line)["message"] for line in written().splitlines()] == ['{"a":1}', "", "['a']"]


def test_journal_lines_carry_their_priority():
    """What systemd reads at the beginning of a line; behind it is JSON."""
    with text(log_format="journal", log_level="DEBUG") as written:
        for level in ("debug", "info", "warning", "error", "critical"):
            structlog.get_logger().__getattr__(level)("x\n<0>y")
        logging.getLogger("lib").log(25, "between")
        lines = written().splitlines()
    assert [line[:3] for line in lines] == ["<7>", "<6>", "<4>", "<3>", "<2>", "<6>"]
    assert json.loads(lines[0][3:])["event"] == "x\n<0>y"


def test_a_socket_of_the_journal_takes_the_lines():
    """Systemd gives a service a stream socket for its standard error, and not a pipe."""
    ours, journald = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    got = bytearray()

    def read() -> None:
        while data := journald.recv(4096):
            got.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    with (
        os.fdopen(ours.detach(), "w", encoding="utf-8") as stream,
        configured(ObservabilitySettings(service_name="s", log_format="journal"), stream),
    ):
        for n in range(500):
            logging.getLogger("lib").warning("line", extra={"n": n, "filling": "x" * 3000})
    reader.join(60)
    journald.close()
    assert [json.loads(line[3:])["n"] for line in got.decode().splitlines()] == list(range(500))


def test_json_is_what_loki_s_parser_takes():
    """One object a line, flat at its own fields, with a time that begins each line and sorts as text."""
    with text() as written:
        for n in range(3):
            structlog.get_logger("shop").info("x\ny", n=n)
        lines = [json.loads(line) for line in written().splitlines()]
    assert [line["n"] for line in lines] == [0, 1, 2]
    times = [line["timestamp"] for line in lines]
    assert times == sorted(times)
    assert all(isinstance(line[name], str) for line in lines for name in ("level", "service", "logger", "event"))


def test_the_lines_of_servers_have_fields_and_no_colours():
    """Uvicorn's and gunicorn's access lines name method, path and status; uvicorn's message for terminals goes."""
    with text() as written:
        logging.getLogger("uvicorn.access").info(
            '%s - "%s %s HTTP/%s" %d', "1.2.3.4:5", "GET", "/x?token=a", "1.1", 200
        )
        logging.getLogger("uvicorn.error").info("Started", extra={"color_message": "\x1b[32mStarted"})
        atoms = {
            "h": "1.2.3.4",
            "m": "GET",
            "U": "/x",
            "H": "HTTP/1.1",
            "s": "200",
            "B": 17,
            "L": "0.01",
            "r": "GET /x",
        }
        logging.getLogger("gunicorn.access").info("%(h)s %(r)s %(s)s", atoms)
        logging.getLogger("uvicorn.access").info("another form %s", 1)
        uvicorn, started, gunicorn, other = (json.loads(line) for line in written().splitlines())
    assert (uvicorn["client"], uvicorn["method"], uvicorn["path"], uvicorn["status"]) == (
        "1.2.3.4:5", "GET", "/x?token=[redacted]", 200,
    )  # fmt: skip
    assert "token=[redacted]" in uvicorn["event"]
    assert "color_message" not in started
    assert (gunicorn["method"], gunicorn["path"], gunicorn["status"], gunicorn["bytes"]) == ("GET", "/x", "200", 17)
    assert other["event"] == "another form 1"


def test_the_console_is_for_people():
    """In colour at a terminal only, with the event and the fields, and without the service that is the only one."""
    with text(log_format="console") as written:
        structlog.get_logger("shop").warning("late", seconds=3)
        line = written()
    assert "\x1b" not in line
    for part in ("warning", "late", "shop", "seconds", "3"):
        assert part in line
    assert "orders" not in line

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with configured(ObservabilitySettings(service_name="orders", log_format="console"), stream):
        structlog.get_logger().warning("late")
    assert "\x1b[" in stream.getvalue()
