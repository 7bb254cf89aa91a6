"""One rule for the names of runs, signals, workflows and steps: what passes works everywhere, the rest is refused."""

import asyncio
import string

import pytest

from mainstay.cli import main
from mainstay.core import current
from mainstay.database import Database
from mainstay.workflow import RunStatus, WorkflowEngine, WorkflowRouter, current_step
from mainstay.workflow.tables import runs, signals
from mainstay.workflow.testing import workflows

WAIT = 15.0
ALPHABET = string.ascii_letters + string.digits + "._:@/+=-"
GOOD = ["a", "ABC", "abc", "a/b/../c", "good:s:1", "ann+1@example.org", "=", "..", ALPHABET, "x" * 128]
BAD = {
    "empty": "",
    "129": "x" * 129,
    "space": " a b ",
    "quote": "a'b\"c;--",
    "percent": "%s%d{0}",
    "newline": "a\nb",
    "nul": "a\0b",
    "escape": "\x1b[31mred",
    "emoji": "😀",
    "half a pair": "a\ud800",
    "right to left": "\u202eabc",
    "composed": "é",
    "decomposed": "e\u0301",
    "digits of others": "\u0661",
}
RULE = r"1 to 1\d\d ASCII letters, digits and "

flows = WorkflowRouter()
told = flows.signal("told", str)


@flows.step(harmless=True)
async def look(word: str) -> str:
    return f"{word} {current().causation_id} {current_step().key}"


@flows.workflow(name="listen")
async def listen() -> str:
    return await look(await told.wait(WAIT))


async def test_a_run_with_an_accepted_id_is_executed(url):
    """On each database, with its own signal, and as the cause of what it does."""
    async with workflows(flows, url=url):
        for good in GOOD:
            run = await listen.start(id=good)
            await told.send(good, "yes", id=good)
            assert await run.result(WAIT) == f"yes {good} {good}:look:1"
            assert await listen.handle(good).status() is RunStatus.COMPLETED


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
async def test_an_id_that_breaks_the_rule_is_refused_at_each_door(bad):
    """The same error everywhere, printable, and nothing is kept."""
    async with workflows(flows, serve=False) as app:
        engine = app.get(WorkflowEngine)
        for door in (
            lambda: listen.start(id=bad),
            lambda: engine.execute(listen.input().named(bad)),
            lambda: told.send(bad, "v"),
            lambda: told.send("r", "v", id=bad),
            lambda: engine.status(bad),
            lambda: engine.run(bad),
            lambda: engine.history(bad),
            lambda: engine.cancel(bad),
            lambda: engine.compensate(bad),
            lambda: engine.resume(bad),
            lambda: engine.ended(bad, 1.0),
        ):
            with pytest.raises(ValueError, match=RULE) as found:
                await door()
            assert str(found.value).isprintable()
        with pytest.raises(ValueError, match=RULE):
            listen.handle(bad)
        assert await app.get(Database).read(runs.select()) == []
        assert await app.get(Database).read(signals.select()) == []


@pytest.mark.parametrize("bad", [5, b"x", 1.5])
async def test_an_id_that_is_no_text_is_refused(bad):
    """The message says what an id is, and what it was."""
    async with workflows(flows, serve=False) as app:
        for door in (
            lambda: listen.start(id=bad),
            lambda: told.send(bad, "v"),
            lambda: told.send("r", "v", id=bad),
            lambda: app.get(WorkflowEngine).cancel(bad),
        ):
            with pytest.raises(TypeError, match=rf"is text \(str\), not .* \({type(bad).__name__}\)"):
                await door()


@pytest.mark.parametrize(
    "bad", [name for name in BAD.values() if name.isidentifier() or name == ""] + ["x" * 101, "a b"]
)
def test_names_follow_the_same_rule(bad):
    """Those of workflows, signals and steps, where they are declared."""

    async def charge(n: int) -> int:
        return n

    charge.__name__ = bad
    router = WorkflowRouter()
    with pytest.raises(ValueError, match=f"the name of a workflow is {RULE}"):
        router.workflow(name=bad)
    with pytest.raises(ValueError, match=f"the name of a signal is {RULE}"):
        router.signal(bad, str)
    with pytest.raises(ValueError, match=f"the name of a step is {RULE}"):
        router.step(harmless=True)(charge)


@pytest.mark.parametrize("bad", ["a/b", "charge:1", "2"])
def test_the_name_of_a_step_does_not_break_its_keys(bad):
    """A key is branches, name and number; a name that looks like more of them is refused."""

    async def charge(n: int) -> int:
        return n

    charge.__name__ = bad
    with pytest.raises(ValueError, match="the name of a step is a Python identifier"):
        WorkflowRouter().step(harmless=True)(charge)


@pytest.mark.parametrize("command", ["show", "resume", "cancel"])
def test_no_escape_of_an_id_reaches_the_terminal(command, capsys, tmp_path):
    """The command refuses such an id with exit code 2, and what it prints is printable."""
    url = f"sqlite+aiosqlite:///{tmp_path}/t.db"

    async def make() -> None:
        async with workflows(flows, url=url):
            pass

    asyncio.run(make())
    assert main(["workflow", command, "\x1b[31mred", "--url", url]) == 2
    said = capsys.readouterr()
    assert "the id of a run is 1 to 128 ASCII letters" in said.err
    assert (said.out + said.err).replace("\n", "").isprintable()
