"""Probes as an ASGI application and as a router: under any prefix, mount and root path."""

import httpx
import pytest
from fastapi import Depends, FastAPI, HTTPException, Request

from mainstay.core import App
from mainstay.observability import ObservabilityModule, ObservabilitySettings, Probes
from mainstay.observability.fastapi_probes import probe_router

TOKEN = "a-token-of-16-characters"


def service(**settings):
    return App(ObservabilityModule.for_root(ObservabilitySettings(service_name="s", **settings)))


def client(api, root_path=""):
    return httpx.AsyncClient(transport=httpx.ASGITransport(api, root_path=root_path), base_url="http://s")


def mounted(app, *, private):
    api = FastAPI()
    api.mount("/internal", Probes(app, private=private))
    return api


def included(app, *, private):
    api = FastAPI()
    api.include_router(probe_router(app, private=private), prefix="/internal")
    return api


@pytest.mark.parametrize("make", [mounted, included])
async def test_they_are_where_they_are_put(make):
    """Below the prefix, for GET and HEAD, with the format that is asked for; details for those who may see them."""
    app = service(access_token=TOKEN)
    for private, status in ((True, 200), (False, 404)):
        async with client(make(app, private=private)) as http:
            assert (await http.get("/internal/health/live")).status_code == 503
            async with app:
                assert (await http.get("/internal/health/live")).json() == {"status": "ok"}
                for path in ("/internal/health/ready", "/internal/health/startup"):
                    assert (await http.get(path)).status_code == 200
                for path in ("/internal/health", "/internal/metrics"):
                    assert (await http.get(path)).status_code == status
                    answer = await http.get(path, headers={"authorization": f"Bearer {TOKEN}"})
                    assert answer.status_code == 200
                    assert answer.headers["cache-control"] == "no-store"
                assert answer.headers["content-type"].count("charset") == 1
                head = await http.head("/internal/health/live")
                assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", "16")
                assert (await http.post("/internal/health/live")).status_code == 405
                assert (await http.get("/internal/health/other")).status_code == 404
                assert (await http.get("/health/live")).status_code == 404


async def test_a_root_path_is_no_part_of_it():
    """A server that is told under which path a proxy shows it puts that before every path."""
    app = service()
    async with app, client(Probes(app), root_path="/api") as http:
        assert (await http.get("/api/health/live")).status_code == 200
        assert (await http.get("/health/live")).status_code == 200
    async with app, client(mounted(app, private=False), root_path="/api") as http:
        assert (await http.get("/api/internal/health/live")).status_code == 200


async def test_a_routers_dependencies_guard_it():
    """As those of any router do."""

    async def operator(request: Request):
        if request.headers.get("x-operator") != "ann":
            raise HTTPException(403)

    app, api = service(), FastAPI()
    api.include_router(probe_router(app, private=True), dependencies=[Depends(operator)])
    async with app, client(api) as http:
        assert (await http.get("/metrics")).status_code == 403
        assert "mainstay_build_info" in (await http.get("/metrics", headers={"x-operator": "ann"})).text


async def test_other_connections_are_left_alone():
    """A lifespan or a socket is none of its business."""

    async def never(*message):
        pytest.fail("it has said or asked something")

    await Probes(service())({"type": "lifespan"}, never, never)


def test_paths_come_from_the_environment_too(monkeypatch):
    """As JSON, those that differ."""
    monkeypatch.setenv("MAINSTAY_OBSERVABILITY_PATHS", '{"live": "/healthz"}')
    assert ObservabilitySettings(service_name="s").paths.live == "/healthz"
    assert [getattr(route, "path", "") for route in probe_router(service()).routes].count("/healthz") == 1
