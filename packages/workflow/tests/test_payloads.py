"""Payloads through a codec: sealed in every table, opened everywhere else, and refused where they cannot be."""

import asyncio
import os
import sys
import zlib
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import sqlalchemy as sa
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import SecretStr

from mainstay.cli import main
from mainstay.core import App, ConfigurationError
from mainstay.core.testing import eventually
from mainstay.database import Database, DatabaseModule, DatabaseSettings
from mainstay.workflow import (
    PayloadCodec,
    PayloadNotStored,
    PayloadUnreadable,
    RunConflict,
    RunParked,
    RunStatus,
    WorkflowEngine,
    WorkflowFailed,
    WorkflowModule,
    WorkflowRouter,
)
from mainstay.workflow.testing import explore, workflows

SECRET = "strictly-confidential"


class Sealed(PayloadCodec):
    """AES-GCM bound to the run, under named keys."""

    name = "sealed"

    def __init__(self, **keys: bytes) -> None:
        self.keys = keys

    def encode(self, payload: bytes, run_id: str) -> bytes:
        name, key = next(iter(self.keys.items()))
        nonce = os.urandom(12)
        return name.encode() + b" " + nonce + AESGCM(key).encrypt(nonce, payload, run_id.encode())

    def decode(self, stored: bytes, run_id: str) -> bytes:
        name, _, rest = stored.partition(b" ")
        return AESGCM(self.keys[name.decode()]).decrypt(rest[:12], rest[12:], run_id.encode())


class Small(PayloadCodec):
    """Compressed."""

    name = "small"

    def encode(self, payload: bytes, run_id: str) -> bytes:
        return zlib.compress(payload)

    def decode(self, stored: bytes, run_id: str) -> bytes:
        return zlib.decompress(stored)


class Fickle(Small):
    """Compressed, as long as its key is there: for so many payloads."""

    left = 1_000_000

    def encode(self, payload: bytes, run_id: str) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise OSError(payload)
        return super().encode(payload, run_id)


OLD, NEW = b"o" * 32, b"n" * 32


def of_everything() -> SimpleNamespace:
    """A workflow that stores a payload in every way there is."""
    flows = WorkflowRouter()
    told = flows.signal("told", str)
    heard_so_far = flows.value("heard", str)
    doubled = flows.value("doubled", str)

    @flows.step(harmless=True)
    async def double(text: str) -> str:
        await doubled.set(text)
        return text + text

    @flows.step(harmless=True, transactional=True)
    async def inside(text: str) -> str:
        return text[::-1]

    @flows.step(transactional=True)
    async def refused(text: str) -> str:
        raise LookupError

    @refused.compensation
    async def _undo(outcome, text: str) -> None: ...

    @flows.workflow(name="child")
    async def child(text: str) -> str:
        return await double(text)

    @flows.workflow(name="all")
    async def everything(text: str) -> str:
        heard = await told.wait()
        await heard_so_far.set(text + heard)
        one = await inside(await child(text + heard))
        (two,) = await flows.gather(double(one))
        await flows.now()
        return two

    @flows.workflow(name="back")
    async def back(text: str) -> str:
        return await refused(await double(text))

    return SimpleNamespace(flows=flows, told=told, everything=everything, back=back, heard=heard_so_far)


async def stored(app: App) -> str:
    """All that the tables of this package hold."""
    database = app.get(Database)
    found: list[sa.Row[tuple[object, ...]]] = []
    for table in (
        "mainstay_workflow_runs",
        "mainstay_workflow_history",
        "mainstay_workflow_signals",
        "mainstay_workflow_values",
    ):
        found += await database.read(sa.text(f"SELECT * FROM {table}"))  # noqa: S608
    return repr([tuple(row) for row in found])


@pytest.mark.parametrize("codec", [Sealed(new=NEW), Small()], ids=["sealed", "small"])
async def test_no_table_holds_a_payload_in_plain_text(url, codec):
    """Inputs, arguments, results, signals, children and compensations are sealed; the run sees its values."""
    there = of_everything()
    async with workflows(there.flows, codec, url=url) as app:
        handle = await there.everything.start(SECRET, id="one")
        await there.told.send("one", f"-{SECRET}")
        text = f"{SECRET}-{SECRET}"
        assert await handle.result(30) == (text + text)[::-1] * 2
        with pytest.raises(WorkflowFailed):
            await (await there.back.start(SECRET, id="two")).result(30)
        published = await there.heard.of("one")
        assert published is not None
        assert published.value == text
        rows = await stored(app)
        assert SECRET not in rows
        assert SECRET[::-1] not in rows
        assert f"~{codec.name}:" in rows
        engine = app.get(WorkflowEngine)
        view = await engine.run("one")
        assert SECRET in view.input
        assert SECRET[::-1] in str(view.output)
        assert SECRET in str((await engine.history("one")).records["inside:1"].input)


async def test_the_same_input_is_the_same_run(url):
    """Equal inputs are compared by value, although each is sealed differently."""
    there = of_everything()
    async with workflows(there.flows, Sealed(new=NEW), url=url, serve=False):
        await there.everything.start(SECRET, id="one")
        assert (await there.everything.start(SECRET, id="one")).id == "one"
        with pytest.raises(RunConflict) as caught:
            await there.everything.start(f"{SECRET}!", id="one")
        assert SECRET not in str(caught.value)


async def test_keys_rotate_and_old_payloads_stay_readable(shared):
    """A run that was begun in plain text goes on under one key, and ends under the next."""
    there = of_everything()
    async with workflows(there.flows, url=shared, serve=False):
        await there.everything.start(SECRET, id="one")
    async with workflows(there.flows, Sealed(old=OLD), url=shared, serve=False):
        await there.told.send("one", "-")
    async with workflows(there.flows, Sealed(new=NEW, old=OLD), url=shared) as app:
        assert await there.everything.handle("one").result(30)
        assert "~sealed:" in await stored(app)


async def test_a_payload_that_cannot_be_read_parks_its_run_alone(shared):
    """Without the codec or the key the run waits for a person, others go on, and a resume with the key finishes it."""
    there = of_everything()
    async with workflows(there.flows, Sealed(old=OLD), url=shared) as app:
        await there.everything.start(SECRET, id="one")
        engine = app.get(WorkflowEngine)
        async with asyncio.timeout(30):
            while not (await engine.history("one")).records:  # noqa: ASYNC110  it is in the database that it counts
                await asyncio.sleep(0.01)
        with pytest.raises(InvalidTag):  # bound to its run
            codec = Sealed(old=OLD)
            codec.decode(codec.encode(b"1", "one"), "two")
    cases: list[tuple[list[PayloadCodec], str]] = [
        ([], "by the codec 'sealed'"),
        ([Sealed(new=NEW)], "cannot read a payload of run 'one'"),
    ]
    for codecs, why in cases:
        async with workflows(there.flows, *codecs, url=shared) as app:
            if await app.get(WorkflowEngine).status("one") is RunStatus.PARKED:  # by the App before
                await app.get(WorkflowEngine).resume("one")
            with pytest.raises(RunParked, match=why) as caught:
                await there.everything.handle("one").result(30)
            assert SECRET not in str(caught.value)
            assert "(" in (await app.get(WorkflowEngine).run("one")).input  # says that it cannot be shown
            await there.told.send(f"other{len(codecs)}", "-")
            assert await (await there.everything.start("x", id=f"other{len(codecs)}")).result(30)
            with pytest.raises(PayloadUnreadable):
                await there.everything.start(SECRET, id="one")
    async with workflows(there.flows, Sealed(old=OLD), url=shared) as app:
        await app.get(WorkflowEngine).resume("one")
        await there.told.send("one", "-")
        assert await there.everything.handle("one").result(30)


async def test_a_crash_at_every_moment_with_a_codec(url):
    """What a dead worker sealed, the next one opens."""
    there = of_everything()

    async def start(_app):
        handle = await there.everything.start(SECRET, id="crashed")
        await there.told.send("crashed", "-")
        return handle

    async def check(handle, app):
        assert await handle.status() is RunStatus.COMPLETED
        assert SECRET not in await stored(app)

    assert await explore(there.flows, Sealed(new=NEW), start=start, check=check) > 10


def test_an_app_has_one_codec():
    """Two of them, and one whose name could not be read again, are mistakes of the configuration."""

    class Misnamed(Small):
        name = "a:b"

    for codecs, why in (((Small(), Sealed(new=NEW)), "two payload codecs, small and sealed"), ((Misnamed(),), "'a:b'")):
        with pytest.raises(ConfigurationError, match=why):
            App(
                DatabaseModule.for_root(),
                WorkflowModule.for_root(),
                WorkflowModule.for_feature(WorkflowRouter(), *codecs),
            )


def test_the_command_opens_the_payloads_of_a_named_app(tmp_path, monkeypatch, capsys):
    """`show --app` has the App's codec; without it the command says that it cannot read them."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'test.db'}"
    there = of_everything()

    async def one_run() -> None:
        async with workflows(there.flows, Small(), url=url, serve=False):
            await there.everything.start(SECRET, id="one")

    asyncio.run(one_run())
    module = ModuleType("service_with_codec")
    module.app = App(  # type: ignore[attr-defined]  # a module made here
        DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url))),
        WorkflowModule.for_root(),
        WorkflowModule.for_feature(there.flows, Small()),
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert main(["--app", "service_with_codec:app", "workflow", "show", "one"]) == 0
    assert SECRET in capsys.readouterr().out
    monkeypatch.setenv("MAINSTAY_DATABASE_URL", url)
    assert main(["workflow", "show", "one"]) == 0
    said = capsys.readouterr().out
    assert SECRET not in said
    assert "stored by the codec 'small'" in said
    assert "name the App that has it with --app" in said


def test_the_command_opens_the_payloads_of_an_archive(tmp_path, monkeypatch, capsys):
    """`show --archive --app` reads a file with the App's codec, as it reads the tables."""
    url, path = f"sqlite+aiosqlite:///{tmp_path / 'test.db'}", str(tmp_path / "runs.jsonl")
    flows = WorkflowRouter()

    @flows.workflow(name="say")
    async def say(text: str) -> str:
        return text

    module = ModuleType("service_with_codec")
    module.app = App(  # type: ignore[attr-defined]  # a module made here
        DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url))),
        WorkflowModule.for_root(),
        WorkflowModule.for_feature(flows, Small()),
    )

    async def one_run() -> None:
        async with module.app.running(serve=True):
            await (await say.start(SECRET, id="one")).result()

    asyncio.run(one_run())
    monkeypatch.setitem(sys.modules, module.__name__, module)
    named = ["--app", "service_with_codec:app", "workflow"]
    assert main([*named, "archive", "--older-than", "0s", "--to", path, "--delete"]) == 0
    assert SECRET not in Path(path).read_text()
    assert main([*named, "show", "one", "--archive", path]) == 0
    assert SECRET in capsys.readouterr().out
    assert main(["workflow", "show", "one", "--archive", path]) == 0
    assert SECRET not in capsys.readouterr().out


async def test_a_payload_that_cannot_be_stored_parks_its_run(url: str) -> None:
    """Whichever it is: who starts or signals is told, the run waits for a person, and goes on once that is mended."""
    service, fickle = of_everything(), Fickle()
    told: list[str] = []
    text = SECRET

    async def insist(act: Callable[[], Awaitable[object]]) -> None:
        try:
            await act()
        except PayloadNotStored as error:
            told.append(str(error))
            fickle.left = 1_000_000
            await act()

    async with workflows(service.flows, fickle, url=url) as app:
        engine = app.get(WorkflowEngine)

        async def resumed_to_its_end(run_id: str) -> bool:
            for parked in await engine.runs(RunStatus.PARKED):
                assert "the codec 'small' cannot store a payload of run" in (parked.note or "")
                assert (parked.attempts, SECRET in (parked.note or "")) == (1, False)
                fickle.left = 1_000_000
                await engine.resume(parked.id)
            return (await engine.status(run_id)).terminal

        places = 0
        while fickle.left >= 0:
            run_id = f"r{places}"
            fickle.left = places
            await insist(partial(service.everything.start, text, id=run_id))
            await insist(partial(service.told.send, run_id, "!", id="told"))
            await eventually(partial(resumed_to_its_end, run_id), seconds=60)
            assert await service.everything.handle(run_id).result() == (text + "!" + text + "!")[::-1] * 2
            if fickle.left < 1_000_000 - 100:  # it was never in the way
                break
            places += 1
        assert places > 10
    assert told
    assert SECRET not in "".join(told)
