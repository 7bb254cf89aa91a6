"""The command `mainstay`: exit codes, both forms of output, and what data may not do to a terminal."""

import asyncio
import gc
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import asyncpg
import pytest

from mainstay.cli import main, say, shown, table
from mainstay.core.testing import eventually

MAINSTAY = str(Path(sys.executable).with_name("mainstay"))

APP = """
from mainstay.core import App
from mainstay.database import DatabaseModule, DatabaseSettings
from mainstay.events import Event, EventRouter, EventsModule

events = EventRouter()

class Lent(Event, type="book.lent", version="1.0", key="book"):
    book: str

@events.on(Lent, group="counts")
async def count(event: Lent) -> None:
    print("counted", event.book, flush=True)

app = App(
    DatabaseModule.for_root(DatabaseSettings(pool_size=3)), EventsModule.for_root(), EventsModule.for_feature(events)
)
"""


def test_an_app_is_described_with_the_origin_of_each_setting(service, capsys, monkeypatch):
    """Code, an environment variable by its name, or the default; a secret is never shown; JSON says the same."""
    monkeypatch.setenv("MAINSTAY_EVENTS_SOURCE", "library")
    monkeypatch.setenv("MAINSTAY_DATABASE_URL", "postgresql://ann:hunter2@nowhere/library")
    place = service(APP)
    assert main(["describe", "--app", place]) == 0
    text = capsys.readouterr().out
    assert "hunter2" not in text
    lines = [line.split() for line in text.splitlines()]
    assert ["pool_size", "3", "code"] in lines
    assert ["source", "library", "MAINSTAY_EVENTS_SOURCE"] in lines
    assert ["concurrency", "64", "default"] in lines
    assert "  count handles book.lent 1.0 in group counts" in text.replace("service.", "")
    assert main(["--json", "--app", place, "describe"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [module["module"] for module in found["modules"]] == ["database", "events"]
    assert "hunter2" not in json.dumps(found)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["describe"], "MAINSTAY_APP"),
        (["describe", "--app", "nothing_here:app"], "nothing_here"),
        (["describe", "--app", "json:nothing"], "json:nothing"),
        (["describe", "--app", "json:dumps"], "function"),
        (["describe", "--app", "json"], "module:name"),
        (["no-such-command"], "no-such-command"),
        (["db", "status", "--url", "mysql://x/y"], "mysql"),
        (["run", "service:app"], "service"),
        (["describe", "--app"], "--app needs a value"),
        (["describe", "--app", ".main:app"], "module:name"),
        (["db", "status", "--url", "postgresql://u:hunter2@x@y/z"], "--url"),
        (["audit", "verify", "--max-age", "-1"], "--max-age"),
        (["workflow", "list", "--limit", "9999999999999999999"], "--limit"),
        (["events", "dead-letters", "list", "--limit", "9999999999999999999"], "--limit"),
    ],
)
def test_wrong_use_is_one_message_and_status_2(arguments, named, service, capsys):
    """No traceback, and the message names the thing."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert named in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert "hunter2" not in captured.err


def test_a_mistake_in_the_configuration_is_one_message(service):
    """Also where the App cannot even be constructed; an error of the service's own code keeps its traceback."""
    service(
        "from mainstay.core import App\nfrom mainstay.events import EventsModule\napp = App(EventsModule.for_root())\n"
    )
    done = subprocess.run([MAINSTAY, "run", "service:app"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("mainstay: ")
    assert "DatabaseModule.for_root()" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    service("import no_such_library\n")
    done = subprocess.run([MAINSTAY, "run", "service:app"], capture_output=True, text=True, check=False)
    assert "no_such_library" in done.stderr
    assert "Traceback" in done.stderr


async def test_a_worker_runs_until_it_is_told_to_stop(service, tmp_path):
    """`mainstay run` serves, and a SIGTERM ends it with status 0."""
    service(APP)
    worker = await asyncio.create_subprocess_exec(MAINSTAY, "run", "service:app", stdout=subprocess.PIPE)
    try:
        await eventually((tmp_path / "mainstay.db").exists)
        publish = (
            "import asyncio, service\n"
            "async def main():\n"
            "    async with service.app: await service.events.publish(service.Lent(book='b1'))\n"
            "asyncio.run(main())\n"
        )
        publisher = await asyncio.create_subprocess_exec(sys.executable, "-c", publish)
        assert await publisher.wait() == 0
        assert worker.stdout is not None
        async with asyncio.timeout(60):
            assert b"counted b1" in await worker.stdout.readline()
            worker.send_signal(signal.SIGTERM)
            assert await worker.wait() == 0
    finally:
        if worker.returncode is None:
            worker.kill()
            await worker.wait()


def test_data_cannot_move_the_cursor(capsys):
    """Escapes, line ends and the marks that reverse text are shown as escapes, in lines and in tables."""
    bait = "ok\x1b[2J\r\nFAKE\u202egnp\x07"
    assert shown(bait) == "ok\\x1b[2J\\r\\nFAKE\\u202egnp\\x07"
    say(bait)
    table(("id",), [{"id": bait}])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert len(out.splitlines()) == 3


def test_a_terminal_gets_a_table_and_a_pipe_plain_columns(tmp_path):
    """The same command: in a pipe not one escape, in a terminal of 80 columns no data that acts."""
    url = f"sqlite:///{tmp_path / 'none.db'}"
    piped = subprocess.run([MAINSTAY, "db", "status", "--url", url], capture_output=True, text=True, check=False)
    assert piped.returncode == 1
    assert "\x1b" not in piped.stdout
    leader, follower = pty.openpty()
    process = subprocess.Popen([MAINSTAY, "db", "status", "--url", url], stdout=follower, stderr=follower)
    os.close(follower)
    seen = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # what a terminal says at its end
            break
        if not part:
            break
        seen += part
    os.close(leader)
    assert process.wait(60) == 1
    assert "database" in seen.decode()
    assert "─" in seen.decode()
    assert not (tmp_path / "none.db").exists()


def test_a_reader_that_has_gone_ends_it_quietly():
    """`mainstay … | head`: no traceback."""
    process = subprocess.Popen([MAINSTAY, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait(60)


def test_completion_does_not_import_the_app(service, tmp_path):
    """A shell that completes must not run the service's code."""
    service("raise SystemExit('the App was imported')\n")
    environment = os.environ | {
        "_MAINSTAY_COMPLETE": "complete_bash",
        "COMP_WORDS": "mainstay des",
        "COMP_CWORD": "1",
        "MAINSTAY_APP": "service:app",
    }
    done = subprocess.run([MAINSTAY], env=environment, capture_output=True, text=True, check=False)
    assert "describe" in done.stdout, done.stderr
    assert "imported" not in done.stdout + done.stderr


def test_health_of_an_app_that_is_started_for_it(service, capsys, tmp_path):
    """A part a row; nothing stored is changed, so a database that is not there stays so."""
    place = service(APP)
    assert main(["health", f"--app={place}"]) == 2
    assert "mainstay.db" in capsys.readouterr().err
    assert not (tmp_path / "mainstay.db").exists()
    assert main(["db", "upgrade", "--app", place]) == 0
    assert capsys.readouterr().out.startswith("up to date: ")
    service(APP)
    assert main(["health", "--app", place, "--json"]) == 0
    parts = {row["part"]: row["status"] for row in json.loads(capsys.readouterr().out)}
    assert set(parts.values()) == {"ok"}
    assert any("database" in name for name in parts)
    service(APP_WITH_SICK + "\nfrom mainstay.core import App\napp = App(Sick.for_root())\n")
    assert main(["health", "--app", place]) == 1
    assert "no answer from the ward" in capsys.readouterr().out


APP_WITH_SICK = """
from contextlib import asynccontextmanager
from typing import ClassVar, Never
from mainstay.core import Health, Module, Settings
from pydantic_settings import SettingsConfigDict

class SickSettings(Settings):
    model_config = SettingsConfigDict(env_prefix="SICK_")

class Ward:
    async def health(self):
        return Health("down", "no answer from the ward")

class Sick(Module[SickSettings, Never]):
    name: ClassVar[str] = "sick"

    def yields(self):
        return (Ward,)

    async def inspect(self, app):
        raise RuntimeError("the ward cannot be reached")

    @asynccontextmanager
    async def running(self, app):
        yield [Ward()]
"""


def test_a_check_that_cannot_be_made_is_a_finding(service, capsys):
    """The others are made all the same."""
    place = service(APP_WITH_SICK + "\nfrom mainstay.core import App\napp = App(Sick.for_root())\n")
    assert main(["check", "--app", place]) == 1
    assert "sick: could not be checked: RuntimeError: the ward cannot be reached" in capsys.readouterr().out
    place = service("from mainstay.core import App\napp = App()\n")
    assert main(["check", "--app", place]) == 0
    assert capsys.readouterr().out == "nothing was found\n"


def test_a_table_in_a_terminal_is_drawn(monkeypatch, capsys):
    """With a line below the headings; a value is folded, never cut."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    table(("id", "note"), [{"id": 1, "note": "x" * 200}, {"id": 2}])
    out = capsys.readouterr().out
    assert "─" in out
    assert out.count("x") == 200
    table(("id", "note"), [{"id": "a", "note": "short"}, {"id": "b"}], beneath="note")
    assert "a    short" in capsys.readouterr().out
    table(("id",), [], empty="no ids")
    assert capsys.readouterr().out == "no ids\n"


def test_a_long_text_stands_beneath_its_row_in_a_narrow_terminal(monkeypatch, capsys):
    """An id stays whole, to be copied; no escape of the data reaches the terminal."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "30")
    rows: list[dict[str, object]] = [
        {"id": "one-of-twenty-letters", "note": "it broke \x1b[2J and waits for a person"},
        {"id": "two", "note": None},
    ]
    table(("id", "note"), rows, beneath="note")
    assert capsys.readouterr().out.splitlines() == [
        "id",
        "─" * 30,
        "one-of-twenty-letters",
        "    it broke \\x1b[2J and waits",
        "    for a person",
        "two",
    ]


def test_an_interrupt_is_status_130(monkeypatch):
    """Ctrl-C is no error and no traceback."""

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("mainstay.cli.commands.needed_app", interrupted)
    assert main(["describe"]) == 130


def test_settings_come_from_the_app_where_one_is_named(service, capsys, tmp_path):
    """Two databases: that of the App, and that of the environment."""
    place = service(APP.replace("pool_size=3", f"url='sqlite:///{tmp_path / 'of-the-app.db'}'"))
    assert main(["db", "upgrade", "--app", place]) == 0
    assert main(["db", "status", "--app", place]) == 0
    assert main(["db", "status"]) == 1
    assert (tmp_path / "of-the-app.db").exists()
    service("from mainstay.core import App\napp = App()\n")
    capsys.readouterr()
    assert main(["db", "status", "--app", place]) == 2
    assert "DatabaseModule.for_root()" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("raise ValueError('no number')", "ValueError: no number"),
        ("raise OSError('no file')", "OSError: no file"),
        ("raise RuntimeError('boom\\x1b[2J')", "RuntimeError: boom\\x1b[2J"),
        ("def f(:", "SyntaxError"),
        ("class Held:\n    @property\n    def app(self): return 1 / 0\napp = Held()", "ZeroDivisionError"),
    ],
)
def test_an_error_of_the_services_own_code_keeps_its_traceback(text, named, service, capsys):
    """Whatever its class is; the status is not that of a finding, and a message cannot act on the terminal."""
    service(text)
    assert main(["check", "--json", "--app", "service:app.app"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" in captured.err
    assert "service.py" in captured.err
    assert named in captured.err
    assert "\x1b" not in captured.err
    assert captured.err.splitlines()[-1] == "mainstay: 'service:app.app': the import of service failed"


@pytest.mark.parametrize("end", ["", "raise ValueError"])
def test_the_collector_of_garbage_waits_for_the_import(end, service, capsys):
    """And goes on afterwards, also where the import fails."""
    service(f"import gc\nprint(gc.isenabled())\n{end}\n")
    assert main(["check", "--app", "service:app"]) == 2
    assert capsys.readouterr().err.splitlines()[0] == "False"
    assert gc.isenabled()


@pytest.mark.parametrize("code", ["", "0", "'the database has no name'"])
def test_an_import_that_exits_is_not_taken_for_success(code, service, capsys):
    """`check` would be done, with nothing checked, or would end with nothing said."""
    service(f"import sys\nsys.exit({code})\n")
    assert main(["check", "--app", "service:app"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "the import of service exits" in captured.err
    assert code.strip("'") in captured.err


TALKS = """
from contextlib import asynccontextmanager
from typing import Never
from pydantic_settings import SettingsConfigDict
from mainstay.core import App, Module, Settings

print("a banner")

class TalksSettings(Settings):
    model_config = SettingsConfigDict(env_prefix="MAINSTAY_TALKS_")
    seconds: float = float("inf")
    fails: bool = False

class Talks(Module[TalksSettings, Never]):
    name = "talks"

    def describe(self):
        return {"places": ["Bj\u00f6rk"]}

    @asynccontextmanager
    async def running(self, app):
        print("a greeting")
        if self.settings.fails:
            raise OSError("no start")
        yield ()

app = App(Talks.for_root())
"""


@pytest.mark.parametrize("command", ["describe", "check", "health"])
def test_what_the_service_prints_does_not_get_into_the_output(command, service, capsys):
    """Standard output is one JSON document of numbers that JSON has, whatever the App says at its import and start."""

    def refuse(name):
        raise AssertionError(name)

    assert main([command, "--json", "--app", service(TALKS)]) == 0
    captured = capsys.readouterr()
    json.loads(captured.out, parse_constant=refuse)
    assert "a banner" in captured.err
    assert ("a greeting" in captured.err) is (command != "describe")


def test_a_start_that_fails_is_a_finding_in_whichever_way_it_does(service, capsys, monkeypatch):
    """An error of a module's own too, which no mistake in the configuration is."""
    monkeypatch.setenv("MAINSTAY_TALKS_FAILS", "true")
    assert main(["check", "--json", "--app", service(TALKS)]) == 1
    (finding,) = json.loads(capsys.readouterr().out)
    assert finding == {"module": "start", "finding": "OSError: no start (while starting Talks)"}
    assert main(["health", "--app", service(TALKS)]) == 2


def test_a_worker_prints_where_it_will_and_keeps_the_traceback_of_its_end(service):
    """Standard output is the service's own there, and the error is shown as `python main.py` would."""
    service(TALKS)
    done = subprocess.run(
        [MAINSTAY, "run", "service:app"],
        env=os.environ | {"MAINSTAY_TALKS_FAILS": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "a banner\na greeting\n"
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "OSError: no start" in done.stderr


def test_streams_that_are_closed_full_or_know_few_characters(service):
    """A closed one is nothing to fail for; what could not be written is; a character that it lacks is escaped."""
    service(TALKS)
    describe = f"{MAINSTAY} describe --app service:app"

    def shell(command, **variables):
        return subprocess.run(
            ["sh", "-c", command], env=os.environ | variables, capture_output=True, text=True, check=False
        )

    done = shell(f"{describe} >&-")
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    done = shell(f"{describe} >/dev/full")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, "mainstay: [Errno 28] No space left on device")
    done = shell(f"{MAINSTAY} describe --app nothing:app 2>&-")
    assert (done.returncode, done.stdout) == (2, "")
    done = shell(describe, PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "Bj\\xf6rk" in done.stdout


def test_a_reader_that_has_gone_is_no_finding(service):
    """The status is the one that a shell gives to a program that was ended so, and nothing is said."""
    service(TALKS)
    for arguments in (["describe", "--app", "service:app"], ["--help"]):
        with subprocess.Popen([MAINSTAY, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.stderr.read().decode() in {"", "a banner\n"}
            assert process.wait(60) == 141


@pytest.mark.parametrize(
    "arguments",
    [
        ["db", "upgrade"],
        ["db", "upgrade", "--sql"],
        ["db", "status"],
        ["events", "dead-letters", "list"],
        ["events", "dead-letters", "redrive", "--all"],
        ["workflow", "list"],
        ["audit", "export"],
    ],
)
def test_what_was_done_is_one_json_document(arguments, capsys, tmp_path, monkeypatch):
    """Also where people are told a line, or statements, and where there is nothing."""
    monkeypatch.setenv("MAINSTAY_DATABASE_URL", f"sqlite:///{tmp_path / 'library.db'}")
    assert main(["db", "upgrade", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"up to date": ["audit", "database", "events", "workflow"]}
    assert main([*arguments, "--json"]) == 0
    json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("command", [["status"], ["upgrade"]])
def test_a_file_that_is_no_database_is_no_finding(command, capsys, tmp_path):
    """One message that names it, on status 2: a finding would say that `db upgrade` helps."""
    (tmp_path / "notes.txt").write_text("no database at all, but long enough to be looked at" * 100)
    assert main(["db", *command, "--url", f"sqlite:///{tmp_path / 'notes.txt'}"]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert "notes.txt" in captured.err


async def test_ctrl_c_ends_an_upgrade_that_waits(postgres):
    """Another upgrade holds the lock; the database undoes what was begun."""
    connection = await asyncpg.connect(postgres.replace("+asyncpg", ""))
    try:
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock(7261153904017)")
            upgrade = await asyncio.create_subprocess_exec(MAINSTAY, "db", "upgrade", "--url", postgres)
            waiting = (
                "SELECT count(*) FROM pg_locks JOIN pg_database ON pg_database.oid = pg_locks.database "
                "WHERE locktype = 'advisory' AND NOT granted AND datname = current_database()"
            )
            async with asyncio.timeout(60):
                while not await connection.fetchval(waiting):  # noqa: ASYNC110  another process's statement
                    await asyncio.sleep(0.05)
            upgrade.send_signal(signal.SIGINT)
            async with asyncio.timeout(60):
                assert await upgrade.wait() == -signal.SIGINT  # of which a shell makes 130
        assert await connection.fetchval("SELECT to_regclass('mainstay_events_version')") is None
    finally:
        await connection.close()
