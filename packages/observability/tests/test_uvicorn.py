"""A real server in a process of its own: whose lines they are, and what the last of them says."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import textwrap

import httpx
import pytest

SERVICE = """
    import logging
    import uvicorn
    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse
    from mainstay.core import App
    from mainstay.observability import ObservabilityModule, ObservabilitySettings
    from mainstay.observability.fastapi import instrument

    app = App(ObservabilityModule.for_root(ObservabilitySettings(service_name="orders", http_port=0)))
    api = FastAPI(lifespan=app.lifespan)

    @api.get("/bug")
    async def bug():
        raise RuntimeError("token=hunter2")

    @api.get("/half")
    async def half():
        async def parts():
            yield b"half"
            raise RuntimeError("token=hunter2")

        return StreamingResponse(parts())

    async def early(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})

    class Unlike(BaseException):
        pass

    async def unlike(scope, receive, send):
        raise Unlike

    inner = FastAPI()
    instrument(inner, app)
    api.mount("/early", early)
    api.mount("/unlike", unlike)
    api.mount("/inner", inner)
    instrument(api, app)
    uvicorn.run(api, host="127.0.0.1", port=0, root_path="/api")
"""


async def test_every_line_of_a_real_server_is_ours():
    """A request has one line, an unhandled error one more, both with its id; probes have none; a stop is orderly."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(SERVICE), stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stderr is not None
    assert child.stdout is not None
    ports: dict[str, str] = {}
    try:
        async with asyncio.timeout(60):
            while len(ports) < 2:
                line = (await child.stderr.readline()).decode()
                assert line, "the service ended by itself"
                for what, pattern in (("probes", r"probes and metrics on (\S+?)\""), ("api", r"running on (\S+)")):
                    if found := re.search(pattern, line):
                        ports[what] = found[1]
            async with httpx.AsyncClient() as http:
                answer = await http.get(f"{ports['api']}/bug", headers={"x-correlation-id": "c-9"})
                assert answer.status_code == 500
                assert answer.json()["correlation_id"] == "c-9"
                assert (await http.get(f"{ports['probes']}/health/ready")).status_code == 200
                assert 'route="/bug"' in (await http.get(f"{ports['probes']}/metrics")).text
                # The server puts its root path before every path, and a proxy may have left it there.
                for path in ("/health/live", "/api/health/ready", "/inner/health/live", "/api/api/inner/health/live"):
                    assert (await http.get(f"{ports['api']}{path}")).status_code == (404 if "/api/api" in path else 200)
                for path in ("/half", "/early/"):
                    with pytest.raises(httpx.RemoteProtocolError):
                        await http.get(f"{ports['api']}{path}")
                assert (await http.get(f"{ports['api']}/unlike/")).json()["code"] == "SYS_INTERNAL"
            child.send_signal(signal.SIGTERM)
            out, err = await child.communicate()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    assert out == b""
    assert b"hunter2" not in err
    # What uvicorn says before and after the App runs is its own; everything between is one JSON object a line.
    lines = [json.loads(line) for line in err.decode().splitlines() if line.startswith("{")]
    told = [(line["logger"], line["event"], line.get("correlation_id")) for line in lines if "/bug" in line["event"]]
    assert told == [("mainstay.observability", "GET /bug failed", "c-9"), ("mainstay.access", "GET /bug 500", "c-9")]
    assert not [line for line in lines if line["logger"].startswith("uvicorn") and line["level"] == "error"]
    assert not [line for line in lines if line["logger"] == "uvicorn.access" or "GET /health" in line["event"]]
    failures = [line for line in lines if line["level"] == "error"]
    assert [(line["event"], line["status"], "exception" in line) for line in failures] == [
        ("GET /bug failed", 500, True), ("GET /half failed", 500, True), ("GET unmatched failed", 500, False),
        ("GET unmatched failed", 500, True),
    ]  # fmt: skip
    assert all(line["correlation_id"] for line in failures)
    assert err.decode().count("Traceback (most recent call last)") == 3
