"""A web process that is told to end says so to its load balancer before it stops taking requests."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import textwrap

import httpx

from mainstay.core import App
from mainstay.core.testing import eventually
from mainstay.observability import HealthWatch, ObservabilityModule, ObservabilitySettings

SERVICE = """
    import uvicorn
    from fastapi import FastAPI
    from mainstay.core import App
    from mainstay.observability import ObservabilityModule, ObservabilitySettings
    from mainstay.observability.fastapi import instrument

    app = App(ObservabilityModule.for_root(ObservabilitySettings(service_name="orders")))
    api = FastAPI(lifespan=app.lifespan)

    @api.get("/")
    async def hello() -> str:
        return "hello"

    instrument(api, app)
    uvicorn.run(api, host="127.0.0.1", port=0)
"""


async def started(seconds):
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", textwrap.dedent(SERVICE)),
        env=os.environ | {"MAINSTAY_OBSERVABILITY_NOT_READY_SECONDS": str(seconds)},
        stderr=subprocess.PIPE,
    )
    assert child.stderr is not None
    async with asyncio.timeout(60):
        while not (found := re.search(rb"running on (http://127.0.0.1:\d+)", await child.stderr.readline())):
            pass
    return child, found[1].decode()


async def asked(url):
    async with httpx.AsyncClient(base_url=url) as http:  # a connection of its own: a closed port refuses it
        return (await http.get("/health/ready")).status_code, (await http.get("/")).status_code


async def test_the_signal_is_not_lost_with_an_app_that_stops_meanwhile():
    """What would have got it later gets it then; afterwards it has the signal to itself again."""
    got = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: got.append(number))
    try:
        own = signal.getsignal(signal.SIGTERM)
        settings = ObservabilitySettings(service_name="s", not_ready_seconds=3600)
        async with App(ObservabilityModule.for_root(settings)) as app:
            watch = app.get(HealthWatch)
            assert watch.ready()
            signal.raise_signal(signal.SIGTERM)
            await eventually(lambda: not watch.ready())
            assert got == []
        assert got == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_it_is_not_ready_while_it_still_takes_requests():
    """After SIGTERM, for as long as the settings say, or until the second signal; then it ends as uvicorn does."""
    for seconds, second_signal in ((3600, True), (1, False)):
        child, url = await started(seconds)
        try:
            assert await asked(url) == (200, 200)
            child.send_signal(signal.SIGTERM)
            if second_signal:

                async def leaving(url=url):
                    return await asked(url) == (503, 200)

                await eventually(leaving)
                child.send_signal(signal.SIGTERM)
            _, log = await asyncio.wait_for(child.communicate(), 60)
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        assert child.returncode == -signal.SIGTERM
        assert log.index(b"SIGTERM: not ready from now on") < log.index(b"Shutting down")
