"""Where lines go: at once while the reader reads, never waiting when it does not, whole in a child of a fork."""

import io
import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager

import pytest
import structlog

from mainstay.core import bind
from mainstay.observability import ObservabilitySettings, _sink
from mainstay.observability._logging import configured
from mainstay.observability._sink import Sink
from mainstay.observability.testing import metric

PATIENCE_SECONDS = 60


@contextmanager
def pipe():
    """A pipe's reading end, and a stream of text over its writing end."""
    reads, writes = os.pipe()
    with os.fdopen(writes, "w", encoding="utf-8") as stream:
        try:
            yield reads, stream
        finally:
            os.close(reads)


def read_until(reads: int, wanted: bytes) -> bytes:
    """Everything until `wanted` has come."""
    got = b""
    end = time.monotonic() + PATIENCE_SECONDS
    while wanted not in got:
        assert time.monotonic() < end
        if select.select([reads], [], [], 0.1)[0]:
            got += os.read(reads, 1 << 20)
    return got


@pytest.mark.parametrize("way", ["refused by the system", "asked before"])
def test_a_reader_that_stands_still_stops_no_writer(way, monkeypatch):
    """A full pipe: what is logged waits or is lost, counted and told, and comes in order once it is read."""
    if way == "asked before":
        monkeypatch.setattr(Sink, "_unless_it_waits", Sink._if_there_is_room)
    monkeypatch.setattr(_sink, "_HELD_BYTES", 300_000)
    lost = metric("mainstay_log_lines_lost_total", reason="queue_full")
    with pipe() as (reads, stream), configured(ObservabilitySettings(service_name="s"), stream):
        log = logging.getLogger("lib")
        for n in range(5000):  # 64 KB fit into the pipe, 300 KB into the queue
            log.warning("line", extra={"n": n, "filling": "x" * 200})
        missing = metric("mainstay_log_lines_lost_total", reason="queue_full") - lost
        assert 0 < missing < 5000
        got = read_until(reads, b"were lost").decode()
        log.warning("after")
        got += read_until(reads, b'"after"').decode()
    written = [json.loads(line) for line in got.splitlines()]
    came = [line["n"] for line in written if line["event"] == "line"]
    assert len(came) == 5000 - missing
    assert came == sorted(set(came))
    (told,) = [line for line in written if "were lost" in line["event"]]
    assert (told["lines"], told["level"]) == (missing, "error")
    assert written[-1]["event"] == "after"


def test_a_line_larger_than_the_pipe_comes_whole():
    """What does not fit at once is continued, and what is logged meanwhile comes behind it."""
    with pipe() as (reads, stream), configured(ObservabilitySettings(service_name="s"), stream):
        for n in range(20):
            logging.getLogger("lib").warning("large", extra={"n": n, **{f"f{m}": "x" * 8000 for m in range(3)}})
        logging.getLogger("lib").warning("last")
        written = [json.loads(line) for line in read_until(reads, b'"last"').splitlines()]
    assert [line.get("n") for line in written] == [*range(20), None]


def test_a_line_is_there_when_it_was_logged():
    """Nothing is kept back while the reader reads: a process that is killed now has written it."""
    code = """
        import logging, os, signal, sys
        from mainstay.observability import ObservabilitySettings
        from mainstay.observability._logging import configured
        with configured(ObservabilitySettings(service_name="s")):
            logging.getLogger("lib").warning("last words")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], stderr=subprocess.PIPE, timeout=60, check=False
    )
    assert ended.returncode == -9
    assert json.loads(ended.stderr)["event"] == "last words"


def test_what_waits_is_written_when_the_process_ends():
    """At the interpreter's exit, as far as the reader reads."""
    code = """
        import logging
        from mainstay.observability import ObservabilitySettings
        from mainstay.observability._logging import configured
        block = configured(ObservabilitySettings(service_name="s"))
        block.__enter__()
        for n in range(2000):
            logging.getLogger("lib").warning("line", extra={"n": n, "filling": "x" * 100})
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        select.select([process.stderr], [], [], PATIENCE_SECONDS)
        text = process.stderr.read()
        assert process.wait(60) == 0
    assert [json.loads(line)["n"] for line in text.splitlines()] == list(range(2000))


def test_trap_a_child_of_a_fork_logs_while_its_parent_s_threads_do():
    """Threads that log, to a stream and to a full pipe, at the moment of the fork: each child logs and ends."""
    code = """
        import io, logging, os, sys, threading, time, warnings
        from mainstay.observability import ObservabilitySettings
        from mainstay.observability._logging import configured
        warnings.simplefilter("ignore")
        log = logging.getLogger("lib")
        over = threading.Event()

        def talk():
            while not over.is_set():
                log.warning("parent", extra={"filling": "x" * 500})

        def children(stream, reads):
            with configured(ObservabilitySettings(service_name="s"), stream):
                threads = [threading.Thread(target=talk, daemon=True) for _ in range(3)]
                for thread in threads:
                    thread.start()
                for n in range(15):
                    pid = os.fork()
                    if pid == 0:
                        for _ in range(3):
                            log.warning("child", extra={"n": n})
                        os._exit(0)
                    end = time.monotonic() + 30
                    while os.waitpid(pid, os.WNOHANG) == (0, 0):
                        if time.monotonic() > end:
                            os.kill(pid, 9)
                            raise SystemExit("a child hangs")
                        time.sleep(0.001)  # and ask again
                over.set()
                for thread in threads:
                    thread.join()
                over.clear()

        children(io.StringIO(), None)
        reads, writes = os.pipe()
        children(open(writes, "w"), reads)  # without a reader: the parent's queue is full, and has a thread
        os._exit(0)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=300)


def test_a_child_does_not_write_what_waits_in_its_parent():
    """Lines that wait at the fork are written once, by the parent."""
    with pipe() as (reads, stream), configured(ObservabilitySettings(service_name="s"), stream):
        for n in range(1000):
            logging.getLogger("lib").warning("line", extra={"n": n, "filling": "x" * 200})
        pid = os.fork()
        if pid == 0:
            logging.getLogger("lib").warning("child")
            os._exit(0)
        os.waitpid(pid, 0)
        logging.getLogger("lib").warning("after")
        written = [json.loads(line) for line in read_until(reads, b'"after"').splitlines()]
    assert [line["n"] for line in written if line["event"] == "line"] == list(range(1000))


@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize("kind", ["file", "stream"])
def test_what_an_encoding_lacks_is_escaped_and_counted(kind, log_format, tmp_path):
    """A line that a stream in ASCII cannot hold comes as JSON writes such characters, on every way."""
    raw = io.BytesIO()
    place = tmp_path / "log"
    before = metric("mainstay_log_lines_changed_total", reason="escaped")
    with (
        place.open("w", encoding="ascii") if kind == "file" else io.TextIOWrapper(raw, "ascii") as stream,
        configured(ObservabilitySettings(service_name="s", log_format=log_format), stream),
    ):
        structlog.get_logger().warning("grüße \U0001f600")
        structlog.get_logger().warning("plain")
        stream.flush()
        written = (place.read_bytes() if kind == "file" else raw.getvalue()).decode("ascii")
    assert "gr\\u00fc\\u00dfe \\ud83d\\ude00" in written
    assert "plain" in written
    if log_format == "json":
        assert json.loads(written.splitlines()[0])["event"] == "grüße \U0001f600"
    assert metric("mainstay_log_lines_changed_total", reason="escaped") == before + 1


@pytest.mark.parametrize("how", ["closed", "no reader", "no stream"])
def test_a_line_that_cannot_be_written_is_counted(how, monkeypatch):
    """A closed stream, a pipe without a reader, a process without standard error: quiet, and counted."""
    before = metric("mainstay_log_lines_lost_total", reason="stream_broken")
    reads, writes = os.pipe()
    stream = os.fdopen(writes, "w")
    if how == "no reader":
        os.close(reads)
    if how == "no stream":
        monkeypatch.setattr(sys, "stderr", None)
    with configured(ObservabilitySettings(service_name="s"), None if how == "no stream" else stream):
        if how == "closed":
            stream.close()
        logging.getLogger("lib").warning("x")
        structlog.get_logger().warning("x")
    stream.close()
    if how != "no reader":
        os.close(reads)
    assert metric("mainstay_log_lines_lost_total", reason="stream_broken") == before + 2


def test_sampling_keeps_errors_and_whole_requests():
    """A share by logger, else by level; lines of one correlation id all or none; errors always; the rest is counted."""
    stream = io.StringIO()
    sampling = {"mainstay.access": 0.5, "mainstay.access.all": 1.0, "noisy": 0.0, "INFO": 0.0}
    before = metric("mainstay_log_lines_lost_total", reason="sampled_out")
    with configured(ObservabilitySettings(service_name="s", log_sampling=sampling), stream):
        for n in range(200):
            with bind(correlation_id=f"request-{n}"):
                for _ in range(3):
                    logging.getLogger("mainstay.access").info("request")
        logging.getLogger("mainstay.access.all.x").info("kept")
        logging.getLogger("mainstay.accessories").info("dropped by its level")
        logging.getLogger("noisy").warning("dropped")
        structlog.get_logger("noisy.too").warning("dropped")
        structlog.get_logger().info("dropped")
        structlog.get_logger().warning("kept")
        for level in ("error", "critical"):
            getattr(logging.getLogger("noisy"), level)("kept")
            getattr(structlog.get_logger("noisy"), level)("kept")
    written = [json.loads(line) for line in stream.getvalue().splitlines()]
    requests = [line["correlation_id"] for line in written if line["event"] == "request"]
    assert {requests.count(each) for each in requests} == {3}
    assert 50 < len(set(requests)) < 150
    assert [line["event"] for line in written if line["event"] != "request"] == ["kept"] * 6
    dropped = 3 * (200 - len(set(requests))) + 4
    assert metric("mainstay_log_lines_lost_total", reason="sampled_out") == before + dropped


def test_threads_that_log_at_the_same_time_do_not_mix_their_lines():
    """Eight threads through one pipe that is read slowly: every line is whole, and none is missing."""

    def talk(n):
        for _ in range(200):
            logging.getLogger("t").warning("x" * 300, extra={"n": n})

    with pipe() as (reads, stream), configured(ObservabilitySettings(service_name="s"), stream):
        threads = [threading.Thread(target=talk, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        got = b""
        end = time.monotonic() + PATIENCE_SECONDS
        while got.count(b"\n") < 1600:
            assert time.monotonic() < end
            got += os.read(reads, 4096)
        for thread in threads:
            thread.join()
    written = [json.loads(line) for line in got.splitlines()]
    assert sorted(line["n"] for line in written) == sorted(list(range(8)) * 200)


def test_a_disk_that_was_full_costs_the_lines_that_had_no_room_and_says_so(tmp_path, monkeypatch):
    """A limit of a file's size does what a full disk does: it takes a part of a line, and then nothing."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    monkeypatch.setattr(logging, "raiseExceptions", False)  # pytest's own file, if any, is under the limit too
    path = tmp_path / "log"
    log = logging.getLogger("lib")
    with path.open("w") as stream, configured(ObservabilitySettings(service_name="s"), stream):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
            for n in range(10):
                log.warning("early", extra={"n": n})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        log.warning("first")
        log.warning("second")
    lines = path.read_text().splitlines()
    torn = [at for at, line in enumerate(lines) if not line.endswith("}")]
    whole = [json.loads(line) for at, line in enumerate(lines) if at not in torn]
    early = [line for line in whole if line["event"] == "early"]
    assert 0 < len(early) < 10
    assert len(torn) <= 1
    told, first, second = whole[len(early) :]
    assert told["lines"] == 10 - len(early)
    assert (first["event"], second["event"]) == ("first", "second")


def test_a_line_whose_writer_is_interrupted_for_good_does_not_hold_up_the_next(monkeypatch):
    """An exception of a signal's handler comes anywhere, also between a line and what settles it."""
    settle = Sink._settle

    def interrupted(sink: Sink) -> None:
        monkeypatch.setattr(Sink, "_settle", settle)
        raise KeyboardInterrupt

    with pipe() as (reads, stream), configured(ObservabilitySettings(service_name="s"), stream):
        monkeypatch.setattr(Sink, "_settle", interrupted)
        log = logging.getLogger("lib")
        with pytest.raises(KeyboardInterrupt):
            log.warning("interrupted")
        log.warning("second")
        log.warning("third")
        lines = read_until(reads, b"third").splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["interrupted", "second", "third"]


def test_what_waits_is_written_when_a_process_of_multiprocessing_ends():
    """A child that `multiprocessing` has forked ends without `atexit`."""
    program = """
        import logging, multiprocessing, sys
        from mainstay.observability import ObservabilitySettings
        from mainstay.observability._logging import configured

        def child():
            for n in range(1000):
                logging.getLogger("child").warning("line", extra={"n": n, "filling": "x" * 300})
            print("logged", flush=True)

        with configured(ObservabilitySettings(service_name="s")):
            process = multiprocessing.get_context("fork").Process(target=child)
            process.start()
            process.join()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"logged\n"  # all of it, and the pipe is full
        lines = process.stderr.read().splitlines()
    assert [json.loads(line)["n"] for line in lines] == list(range(1000))
