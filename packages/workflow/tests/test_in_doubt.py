"""The database does not say whether a claim's last word landed: a run that is not lost is not taken for lost."""

import pytest
import sqlalchemy as sa

from mainstay.core import SYSTEM_CLOCK
from mainstay.database import CommitUnknown, Database
from mainstay.workflow import WorkflowRouter
from mainstay.workflow._payloads import Payloads
from mainstay.workflow._recording import Places, Recording
from mainstay.workflow.errors import Lost
from mainstay.workflow.tables import END, PARK, RELEASE, RUN_FENCE, runs
from mainstay.workflow.testing import workflows


class Silent:
    """A database that commits the first batch and does not say so; `meanwhile` happens right after."""

    def __init__(self, database, meanwhile):
        self._database = database
        self._meanwhile = meanwhile
        self.batches = 0

    def __getattr__(self, name):
        return getattr(self._database, name)

    def batch(self, **options):
        return _SilentBatch(self, self._database.batch(**options))


class _SilentBatch:
    def __init__(self, silent, batch):
        self._silent = silent
        self._batch = batch

    async def __aenter__(self):
        return await self._batch.__aenter__()

    async def __aexit__(self, *error):
        await self._batch.__aexit__(*error)
        self._silent.batches += 1
        if self._silent.batches == 1:
            await self._silent._meanwhile()
            raise CommitUnknown


@pytest.mark.parametrize("word", ["end", "park", "release"])
@pytest.mark.parametrize("taken", [False, True])
async def test_a_last_word_that_landed_unseen_is_no_lost_run(url, word, taken):
    """Its repetition meets its own end of the fence; only where another claim has begun the run is another's."""
    flows = WorkflowRouter()

    @flows.workflow(name="w")
    async def w(n: int) -> int:
        return n

    words: dict[str, tuple[sa.Update, dict[str, object]]] = {
        "end": (END, {"status": "completed", "output": "1", "failure": None}),
        "park": (PARK, {"status": "parked", "note": "x", "cancellable": False}),
        "release": (RELEASE, {"delay": 0.0, "seen": 0, "knows": False}),
    }
    statement, values = words[word]
    async with workflows(flows, url=url, serve=False) as app:
        database = app.get(Database)
        await w.start(1, id="r")
        await database.write(sa.update(runs).values(status="running", worker="me", epoch=1))

        async def meanwhile():
            if taken:
                await database.write(sa.update(runs).values(status="running", worker="another", epoch=2))

        silent = Silent(database, meanwhile)
        fence = RUN_FENCE.at("r", 1, "me")
        recording = Recording(
            silent,  # type: ignore[arg-type]  # it stands in for a Database
            SYSTEM_CLOCK,
            "r",
            fence,
            0,
            unrecorded=Places(1),
            payloads=Payloads(),
        )
        change = (statement, {"run": "r", "at_epoch": 1, **values})
        if taken:
            with pytest.raises(Lost):
                await recording.end(change)
        else:
            await recording.end(change)
        assert silent.batches == 1, "the repetition did not get as far as a commit"
