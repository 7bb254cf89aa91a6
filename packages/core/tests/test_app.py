"""The App: order, binding, serving, draining, and every mistake at construction."""

import asyncio
import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import asynccontextmanager
from typing import Any, ClassVar, Never, cast

import pytest
from pydantic_settings import SettingsConfigDict

from mainstay.core import (
    App,
    Binding,
    ConfigurationError,
    Context,
    Health,
    Module,
    NotBoundError,
    Settings,
    _process,
    bind,
    current,
    given,
    stray_variables,
)
from mainstay.core._metrics_folder import check_folder
from mainstay.core._work import ended_by
from mainstay.core.testing import VirtualClock


class StoreSettings(Settings):
    model_config = SettingsConfigDict(env_prefix="MAINSTAY_TESTSTORE_")
    name: str = "store"


class PostSettings(Settings):
    model_config = SettingsConfigDict(env_prefix="MAINSTAY_TESTPOST_")
    needs_store: bool = True


class Store:
    def __init__(self, log):
        self.log = log


class Post:
    def __init__(self, store):
        self.store = store
        self.answer: Health | BaseException | None = Health("ok")

    async def health(self):
        if self.answer is None:
            await asyncio.get_running_loop().create_future()
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


class Route:
    def __init__(self, name):
        self.name = name
        self.binding: Binding[Post] = Binding("Route", remedy="PostModule.for_feature(route)")


class StoreModule(Module[StoreSettings, Never]):
    name: ClassVar[str] = "store"
    log: list[str]

    def yields(self):
        return (Store,)

    @asynccontextmanager
    async def running(self, app):
        self.log = log = ["store up"]
        try:
            yield (Store(log),)
        finally:
            log.append("store down")


class PostModule(Module[PostSettings, Route]):
    name: ClassVar[str] = "post"
    fail = False
    called: tuple[Any, ...] = ()

    def yields(self):
        return (Post,)

    def functions(self):
        return self.called

    def requires(self):
        return (StoreModule,) if self.settings.needs_store else ()

    @asynccontextmanager
    async def running(self, app):
        store = app.get(Store) if self.settings.needs_store else Store([])
        post = Post(store)
        store.log.append(f"post up with {len(self.parts)}")
        try:
            if self.fail:
                msg = "no horses"
                raise OSError(msg)
            for route in self.parts:
                with route.binding.to(post):
                    yield (post,)
                    break
            else:
                yield (post,)
        finally:
            store.log.append("post down")


async def test_modules_start_in_the_order_of_need_and_stop_in_reverse():
    """A requirement starts first although it is written last; stopping goes the other way."""
    store = StoreModule.for_root()
    app = App(PostModule.for_root(), PostModule.for_feature(Route("a")), store)
    async with app:
        assert isinstance(app.get(Post).store, Store)
    assert store.log == ["store up", "post up with 1", "post down", "store down"]


async def test_a_start_that_fails_half_way_stops_what_had_started():
    """Nothing stays open, and the error says which module was starting."""
    store, post = StoreModule.for_root(), PostModule.for_root()
    post.fail = True
    app = App(store, post)
    with pytest.raises(OSError, match="no horses") as caught:
        async with app:
            pytest.fail("must not start")
    assert caught.value.__notes__ == ["while starting PostModule"]
    assert store.log[-1] == "store down"
    post.fail = False
    async with app:  # and it can be started again
        assert app.get(Post).store.log[0] == "store up"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (lambda: [PostModule.for_root()], r"PostModule requires StoreModule: add StoreModule\.for_root\(\)"),
        (lambda: [StoreModule.for_root(), StoreModule.for_root()], r"StoreModule\.for_root appears twice"),
        (lambda: [PostModule.for_feature(Route("a"))], r"without its root: add PostModule\.for_root\(\)"),
        (lambda: [object()], r"an App takes XModule\.for_root"),
        (
            lambda: [PostModule.for_root(StoreSettings())],  # type: ignore[arg-type]  # type checkers see it, too
            r"takes PostSettings, not StoreSettings: write PostModule",
        ),
        (
            lambda: [PostModule.for_feature("a")],  # type: ignore[arg-type]  # type checkers see it, too
            r"PostModule\.for_feature takes Route, not str",
        ),
        (
            lambda: [StoreModule.for_feature("a")],  # type: ignore[arg-type]  # type checkers see it, too
            r"StoreModule\.for_feature takes nothing, not str",
        ),
    ],
)
def test_every_mistake_is_an_error_at_construction(entries, message):
    """The message names the module and the line to write."""
    with pytest.raises(ConfigurationError, match=message):
        App(*entries())


def test_the_same_part_twice_is_an_error():
    """Two features cannot add one router: its handlers would run twice."""
    route = Route("a")
    roots = StoreModule.for_root(), PostModule.for_root()
    with pytest.raises(ConfigurationError, match=r"was given .* twice"):
        App(*roots, PostModule.for_feature(route), PostModule.for_feature(route))


def test_modules_that_require_each_other_are_an_error():
    """A circle is named as one."""

    class Hen(StoreModule):
        name: ClassVar[str] = "hen"

        def requires(self):
            return (Egg,)

    class Egg(StoreModule):
        name: ClassVar[str] = "egg"

        def requires(self):
            return (Hen,)

    with pytest.raises(ConfigurationError, match="circle: Hen → Egg → Hen"):
        App(Hen.for_root(), Egg.for_root())


def test_requirements_depend_on_settings(monkeypatch):
    """What a module does not use it does not demand."""
    monkeypatch.setenv("MAINSTAY_TESTPOST_NEEDS_STORE", "false")
    App(PostModule.for_root())


async def test_a_router_binds_to_one_running_app():
    """A second App that brings the same router does not start, and the first goes on."""
    route = Route("a")

    def make():
        return App(StoreModule.for_root(), PostModule.for_root(), PostModule.for_feature(route))

    with pytest.raises(
        NotBoundError, match=r"the Route made at \S*test_app:\d+ belongs to no .* PostModule\.for_feature\(route\)"
    ):
        route.binding.get()
    async with make() as first:
        with pytest.raises(ConfigurationError, match="belongs to an App that is already running"):
            async with make():
                pytest.fail("must not start")
        assert route.binding.get() is first.get(Post)
    assert route.binding.value is None


async def test_get_names_what_there_is():
    """A missing service is an error that lists the ones that are there."""
    app = App(StoreModule.for_root())
    with pytest.raises(NotBoundError, match="the App is not running"):
        app.get(Store)
    async with app:
        with pytest.raises(NotBoundError, match="no service Post in this App; it has Store"):
            app.get(Post)
        with pytest.raises(ConfigurationError, match="already running"):
            async with app.running():
                pytest.fail("must not start twice")


async def test_two_modules_may_not_yield_the_same_service():
    """The class is the key, so there is one of each."""

    class Other(StoreModule):
        name: ClassVar[str] = "other"

    with pytest.raises(ConfigurationError, match="Other and the module store both yield a Store"):
        async with App(StoreModule.for_root(), Other.for_root()):
            pytest.fail("must not start")


async def test_health_asks_every_part_within_a_limit(caplog):
    """An answer, a failing check and a check that hangs, side by side."""
    app = App(StoreModule.for_root(), PostModule.for_root(), health_seconds=0.01)
    async with app:
        post = app.get(Post)
        assert await app.health() == {"post.Post": Health("ok")}
        post.answer = OSError("password=hunter2")
        assert await app.health() == {"post.Post": Health("down", "the check failed with OSError")}
        post.answer = None
        assert await app.health() == {"post.Post": Health("down", "no answer within 0.01 s")}
    assert "the health check of Post failed" in caplog.text


class Several:
    """A service that speaks for two."""

    def health_parts(self):
        return {"others.post": Post(None), "others.store": Post(None)}


class SeveralModule(StoreModule):
    name: ClassVar[str] = "several"

    def yields(self):
        return (Several,)

    @asynccontextmanager
    async def running(self, app):
        yield (Several(),)


async def test_a_service_may_speak_for_several_parts():
    """Each by a name that it chooses, asked and late for itself."""
    async with App(SeveralModule.for_root()) as app:
        assert await app.health() == {"others.post": Health("ok"), "others.store": Health("ok")}
        assert not app.worker
    async with app.running(until=asyncio.Event()):
        assert app.worker


@pytest.mark.parametrize("value", ["", "missing", "file"])
def test_a_folder_for_metrics_that_is_none_is_refused(tmp_path, monkeypatch, value):
    """With its variable and what to do, before prometheus-client fails with the name of a file in it."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    check_folder()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / value) if value else "")
    with pytest.raises(ConfigurationError, match=r"^PROMETHEUS_MULTIPROC_DIR (is empty|names)"):
        check_folder()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConfigurationError, match="may not write"):
        check_folder()


class WorkModule(StoreModule):
    """Registers one worker that a test describes."""

    name: ClassVar[str] = "work"
    worker: Any = None
    how = "serve"

    def yields(self):
        return ()

    @asynccontextmanager
    async def running(self, app):
        getattr(app, self.how)("worker", self.worker)
        self.log = ["up"]
        try:
            yield ()
        finally:
            self.log.append("down")


def serving(worker, **options):
    module = WorkModule.for_root()
    module.worker = worker
    return App(module, **options), module


async def test_workers_run_only_while_serving_with_an_empty_context():
    """Starting opens connections and no more; a worker begins with an empty context."""
    ran = []

    async def worker(drain):
        ran.append(current())
        await drain.wait()

    app, _ = serving(worker)
    with bind(actor="ann"):
        async with app.running():
            await asyncio.sleep(0)
        assert ran == []
        async with app.running(serve=True):
            await asyncio.sleep(0)
        assert ran == [Context()]


async def test_stopping_drains_before_anything_is_closed():
    """A worker finishes what it has while its module is still up."""
    log = []

    async def worker(drain):
        await drain.wait()
        await asyncio.sleep(0)
        log.append(list(module.log))

    app, module = serving(worker)
    async with app.running(serve=True):
        pass
    assert log == [["up"]]
    assert module.log == ["up", "down"]


async def test_started_is_true_only_between_the_last_start_and_the_first_stop():
    """While work in progress is drained, the App already says that it wants no more."""
    seen = []

    async def worker(drain):
        await drain.wait()
        seen.append(app.started)

    app, _ = serving(worker)
    assert not app.started
    async with app.running(serve=True):
        seen.append(app.started)
    assert seen == [True, False]


async def test_a_worker_that_does_not_finish_is_cancelled(caplog):
    """At the end of the drain time the App stops all the same, and says who was late."""
    ended = []

    async def worker(drain):
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.append("cancelled")

    app, _ = serving(worker, drain_seconds=0.01)
    async with app.running(serve=True):
        await asyncio.sleep(0)
    assert ended == ["cancelled"]
    assert "work.worker did not finish within 0.01 s" in caplog.text


@pytest.mark.parametrize("how", ["raise", "return", "cancel"])
async def test_a_worker_that_stops_by_itself_is_never_silent(how, caplog):
    """Raising, returning or being cancelled before the drain: health is down and the log says so."""

    async def worker(drain):
        if how == "raise":
            msg = "boom"
            raise OSError(msg)
        if how == "cancel":
            raise asyncio.CancelledError

    app, _ = serving(worker)
    until = asyncio.Event()
    async with app.running(serve=True, until=until):
        await until.wait()
        (report,) = (await app.health()).values()
        assert report.status == "down"
    assert "no longer does all of its work" in caplog.text
    assert caplog.records[0].levelno == logging.CRITICAL


async def test_lifespan_is_what_asgi_servers_want():
    """`app.lifespan` takes the ASGI application; `app.lifespan(serve=True)` makes one that serves."""
    ran = []

    async def worker(drain):
        ran.append("served")
        await drain.wait()

    app, _ = serving(worker)
    async with app.lifespan(object()):
        await asyncio.sleep(0)
    assert ran == []
    async with app.lifespan(serve=True)(object()):
        await asyncio.sleep(0)
    assert ran == ["served"]


def test_the_clock_is_the_app_s():
    """Modules measure with the clock that the App was given."""
    clock = VirtualClock()
    assert App(clock=clock).clock is clock


async def test_background_work_runs_from_start_to_stop_also_without_serving():
    """It ends before its module does, and after the work that serves."""
    log: list[Any] = []

    async def worker(drain):
        log.append(("began", current()))
        await drain.wait()
        log.append(list(module.log))

    app, module = serving(worker)
    module.how = "background"
    with bind(actor="ann"):
        async with app:
            await asyncio.sleep(0)
            assert log == [("began", Context())]
    assert log[1:] == [["up"]]
    assert module.log == ["up", "down"]


async def test_background_work_is_cancelled_when_its_module_does_not_start():
    """A start that fails leaves no task."""

    class Failing(WorkModule):
        name: ClassVar[str] = "failing"

        @asynccontextmanager
        async def running(self, app):
            app.background("worker", self.worker)
            await asyncio.sleep(0)
            msg = "no"
            raise OSError(msg)
            yield

    ended = []

    async def worker(drain):
        try:
            await drain.wait()
        finally:
            ended.append(True)

    module = Failing.for_root()
    module.worker = worker
    with pytest.raises(OSError, match="no"):
        async with App(module):
            pytest.fail("must not start")
    assert ended == [True]
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_crash_in_the_background_is_logged_at_once_and_shown(caplog):
    """It is known at once, not only when the App stops."""
    crashed = asyncio.Event()

    async def worker(drain):
        crashed.set()
        msg = "boom"
        raise OSError(msg)

    app, module = serving(worker)
    module.how = "background"
    async with app:
        await crashed.wait()
        await asyncio.sleep(0)
        assert await app.health() == {"work.worker": Health("down", "stopped by OSError")}
        assert "work.worker stopped" in caplog.text
        assert "boom" in caplog.text


async def test_an_application_may_run_work_of_its_own():
    """After the start it belongs to the App; before it, there is nothing to run it."""
    app, ran = App(StoreModule.for_root()), []

    async def work(drain):
        ran.append(True)
        await drain.wait()

    with pytest.raises(NotBoundError, match="outside a running App"):
        app.background("mine", work)
    async with app:
        app.background("mine", work)
        await asyncio.sleep(0)
    assert ran == [True]


async def test_the_services_that_a_module_states_are_those_that_it_yields():
    """`given` is checked against the statement, so the statement must be true."""

    class Modest(StoreModule):
        name: ClassVar[str] = "modest"

        def yields(self):
            return ()

    class Boastful(StoreModule):
        name: ClassVar[str] = "boastful"

        def yields(self):
            return (Store, Post)

    with pytest.raises(ConfigurationError, match="Modest yielded a Store, which its method `yields` does not state"):
        async with App(Modest.for_root()):
            pytest.fail("must not start")
    with pytest.raises(ConfigurationError, match="Boastful states that it yields Post, and did not"):
        async with App(Boastful.for_root()):
            pytest.fail("must not start")


def test_a_module_has_a_name():
    """Health, logs, metrics and tasks use it."""
    with pytest.raises(TypeError, match=r"Nameless\.name is None; it is a lower-case word"):

        class Nameless(Module[StoreSettings, Never]): ...

    with pytest.raises(TypeError, match=r"Odd\.name is 'Od d'"):

        class Odd(Module[StoreSettings, Never]):
            name: ClassVar[str] = "Od d"

    class Twin(StoreModule):
        pass

    with pytest.raises(ConfigurationError, match="StoreModule and Twin are both named 'store'"):
        App(StoreModule.for_root(), Twin.for_root())


def test_a_module_that_finds_a_mistake_stops_the_construction():
    """Nothing has to be started to see it."""

    class Picky(StoreModule):
        name: ClassVar[str] = "picky"

        def check(self):
            msg = f"{self.settings.name} will not do"
            raise ConfigurationError(msg)

    with pytest.raises(ConfigurationError, match="store will not do"):
        App(Picky.for_root())


async def count(number: int, *, store: Store = given(Store)) -> tuple[int, Store]:
    return number, store


async def test_a_function_is_given_the_services_of_the_app():
    """The App fills them in by class; an argument goes before, and a function without any is left as it is."""
    module = PostModule.for_root()
    module.called = (count,)
    app = App(StoreModule.for_root(), module)
    filled = app.fill(count)
    async with app:
        assert await filled(1) == (1, app.get(Store))
        mine = Store([])
        assert await filled(2, store=mine) == (2, mine)

    def plain() -> None: ...

    assert app.fill(plain) is plain


async def test_a_service_that_no_app_filled_in_says_what_to_pass():
    """A test that calls a function itself passes the service."""
    _, store = await count(1)
    with pytest.raises(NotBoundError, match=r"given\(Store\) has not been filled in: .* passes a Store"):
        _ = store.log
    assert repr(store) == "given(Store)"
    with pytest.raises(TypeError, match="it takes a class"):
        given("Store")  # type: ignore[arg-type]  # type checkers see it, too


def test_a_service_that_nobody_yields_is_an_error_at_construction():
    """So is a parameter that could be filled by position."""

    async def by_position(store: Store = given(Store)) -> None: ...

    module = PostModule.for_root()
    for function, message in (
        (by_position, "by_position: store.* must be keyword-only"),
        (count, "count: no module of this App yields the Store that its parameter 'store' is given; the App has Post"),
    ):
        module.called = (function,)
        module.settings = PostSettings(needs_store=False)
        with pytest.raises(ConfigurationError, match=message):
            App(module)


lost = Route("lost")


async def through_a_global() -> None:
    lost.binding.get()


async def through_a_helper() -> None:
    async def inner() -> None:
        await through_a_global()

    await inner()


async def through_a_module() -> None:
    sys.modules[__name__].lost.binding.get()


def through_a_closure() -> Any:
    hidden = Route("hidden")

    async def function() -> None:
        hidden.binding.get()

    return function


@pytest.mark.parametrize("function", [through_a_global, through_a_helper, through_a_closure()])
def test_a_router_that_belongs_to_no_feature_is_an_error_at_construction(function):
    """The forgotten line is named before the first event is lost, wherever the function has the router from."""
    module = PostModule.for_root()
    module.called = (function,)
    with pytest.raises(ConfigurationError, match=r"uses the Route made at \S+:\d+, .* add PostModule\.for_feature"):
        App(StoreModule.for_root(), module)


def test_a_router_that_is_there_is_no_error():
    """The same functions are fine with the line; one whose name is computed is found at its first use."""
    module = PostModule.for_root()
    module.called = (through_a_global, through_a_helper, through_a_module)
    App(StoreModule.for_root(), module, PostModule.for_feature(lost))
    module.called = (through_a_module,)
    App(StoreModule.for_root(), module)


def test_run_passes_on_the_crash_of_a_worker():
    """The process must not end as if all were well."""

    async def crash(drain):
        msg = "boom"
        raise OSError(msg)

    before = signal.getsignal(signal.SIGTERM)
    app, _ = serving(crash)
    with pytest.raises(OSError, match="boom"):
        app.run()
    assert signal.getsignal(signal.SIGTERM) == before


WORKER = """
    import asyncio, gc, sys, threading, time
    from contextlib import asynccontextmanager
    from typing import Any, Never, cast
    from pydantic_settings import SettingsConfigDict
    from mainstay.core import App, Module, Settings

    class ToySettings(Settings):
        model_config = SettingsConfigDict(env_prefix="MAINSTAY_TOY_")

    class ToyModule(Module[ToySettings, Never]):
        name = "toy"

        @asynccontextmanager
        async def running(self, app):
            async def worker(drain):
                print("serving", flush=True)
                if "crash" in sys.argv:
                    raise OSError("boom")
                if "exits" in sys.argv:
                    sys.exit(0)
                if "collector" in sys.argv:
                    while not gc.get_freeze_count():
                        await asyncio.sleep(0.001)
                    print(gc.isenabled(), gc.get_threshold()[0], flush=True)
                await drain.wait()
                print("draining", flush=True)
                if "stuck" in sys.argv:
                    await asyncio.Event().wait()
                if "thread" in sys.argv:
                    await asyncio.to_thread(time.sleep, 1000)
                if "loop" in sys.argv:
                    time.sleep(1000)
                while "swallows" in sys.argv:
                    try:
                        await asyncio.sleep(1000)
                    except asyncio.CancelledError:
                        pass
            getattr(app, "background" if "background" in sys.argv else "serve")("worker", worker)
            if "own-thread" in sys.argv:
                threading.Thread(target=time.sleep, args=(1000,), name="own").start()
            try:
                yield ()
            finally:
                print("down", flush=True)

    class LateSettings(Settings):
        model_config = SettingsConfigDict(env_prefix="MAINSTAY_LATEST_")

    class LateModule(Module[LateSettings, Never]):
        name = "late"

        @asynccontextmanager
        async def running(self, app):
            async def swallow(drain):
                while True:
                    try:
                        await asyncio.sleep(1000)
                    except asyncio.CancelledError:
                        pass
            if "fails" in sys.argv:
                app.background("swallow", swallow)
                await asyncio.sleep(0)
                raise OSError("no start")
            if "hangs" in sys.argv:
                print("serving", flush=True)
                await asyncio.Event().wait()
            try:
                yield ()
            finally:
                if "stays" in sys.argv:
                    await asyncio.Event().wait()

    if "own" in sys.argv:
        gc.set_threshold(1234)
    if "impatient" in sys.argv:  # to wait for less where the end has to be forced
        from mainstay.core import _process, _work, app as _app
        _process._ENDING_SECONDS, _work._GRACE_SECONDS, _app._STOP_SECONDS = 3.0, 1.0, 1.0
    app = App(ToyModule.for_root(), LateModule.for_root(), drain_seconds=0.2)

    async def serve():  # what an ASGI server does
        asyncio.get_running_loop().add_signal_handler(15, asyncio.current_task().cancel)
        async with app.lifespan(object(), serve=True):
            await asyncio.sleep(1000)

    if "server" in sys.argv:
        try:
            asyncio.run(serve())
        except asyncio.CancelledError:
            pass
    else:
        app.run()
"""


def start_worker(*arguments):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WORKER), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def test_a_mistake_in_the_configuration_ends_a_process_with_one_message():
    """A traceback would bury the line that says what to write."""

    class Broken(StoreModule):
        name: ClassVar[str] = "broken"

        @asynccontextmanager
        async def running(self, app):
            msg = "the tables are old: run `mainstay db upgrade`"
            raise ConfigurationError(msg)
            yield ()

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as ended:
        App(Broken.for_root()).run()
    assert ended.value.code == 2
    assert errors.getvalue() == "ConfigurationError: the tables are old: run `mainstay db upgrade`\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_drains_on_a_signal(number):
    """A real process finishes its work and ends with status 0."""
    with start_worker() as process:
        assert process.stdout.readline() == "serving\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert out == "draining\ndown\n"
    assert (process.returncode, err) == (0, "")


@pytest.mark.parametrize(("own", "threshold"), [([], 50_000), (["own"], 1234)])
def test_a_worker_spares_the_garbage_collector(own, threshold):
    """What is there when it serves is frozen; a threshold that the service has set stays."""
    with start_worker("collector", *own) as process:
        assert process.stdout.readline() == "serving\n"
        assert process.stdout.readline() == f"True {threshold}\n"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "draining\ndown\n", "")


@pytest.mark.parametrize("how", ["stuck", "thread", "loop", "swallows"])
def test_a_second_signal_ends_the_process_at_once(how):
    """Also with work that blocks a thread or the event loop, or swallows its cancellation."""
    with start_worker(how) as process:
        assert process.stdout.readline() == "serving\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "draining\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("swallows", "toy.worker does not end, although it was cancelled"),
        ("thread", "the process does not end: thread asyncio_0 is at"),
        ("loop", "the process does not end: task toy.worker"),
    ],
)
def test_a_stop_ends(how, said):
    """Work that ends by no means is named in the log, and the process ends with a status other than 0."""
    with start_worker(how, "impatient") as process:
        assert process.stdout.readline() == "serving\n"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert said in err


def test_a_stop_ends_in_a_server_that_is_not_ours():
    """The server cancels all tasks at its end, and would wait for one that swallows that for ever."""
    with start_worker("swallows", "server", "impatient") as process:
        assert process.stdout.readline() == "serving\n"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "toy.worker does not end, although it was cancelled" in err
    assert "the process does not end: task toy.worker" in err


async def test_a_loop_that_goes_on_is_left_alone(monkeypatch):
    """A stopped App with a task that does not end is no reason to end a process with other work."""
    monkeypatch.setattr(_process, "_ENDING_SECONDS", 0.0)
    monkeypatch.setattr(_process, "_LOOK_SECONDS", 0.005)
    ended = []
    monkeypatch.setattr(_process, "_exit", lambda: ended.append(True))
    over = asyncio.Event()

    async def swallow(drain):
        while not over.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await over.wait()

    monkeypatch.setattr("mainstay.core._work._GRACE_SECONDS", 0.05)
    app, _ = serving(swallow)
    app._drain_seconds = 0.01
    async with app.lifespan(object(), serve=True):
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)  # time in which nothing happens
    assert not ended
    over.set()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("thread", "the process does not end: thread asyncio_0 is at"),
        ("own-thread", "the process does not end: thread own is at"),
    ],
)
@pytest.mark.parametrize("where", ["server", "worker"])
def test_a_thread_that_does_not_end_does_not_keep_the_process(how, said, where):
    """Neither one of the loop's, nor one that the App knows nothing of; in a worker and in a server alike."""
    with start_worker(how, where, "impatient") as process:
        assert process.stdout.readline() == "serving\n"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert said in err


@pytest.mark.parametrize("where", ["server", "worker"])
def test_a_start_that_fails_ends_also_with_a_task_that_does_not(where):
    """What the module had started is named, and the process ends."""
    with start_worker("fails", where, "impatient") as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "late.swallow does not end, although it was cancelled" in err
    assert "the process does not end: task late.swallow" in err


def test_a_signal_ends_a_start_that_hangs():
    """At once, what had started is stopped, and the status says that all is as it was asked for."""
    with start_worker("hangs", "background") as process:
        lines = {process.stdout.readline(), process.stdout.readline()}
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert lines == {"serving\n"}  # of the work of the first module, and of the one that hangs
    assert (out, process.returncode, err) == ("draining\ndown\n", 0, "")


@pytest.mark.parametrize(("where", "status"), [("worker", 1), ("server", 0)])
def test_a_module_that_does_not_stop_holds_up_no_other(where, status):
    """It is cancelled and named, and those before it stop in order."""
    with start_worker("stays", where, "impatient") as process:
        assert process.stdout.readline() == "serving\n"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert out == "draining\ndown\n"
    assert process.returncode == status
    assert "the module late did not stop within 1.2 s" in err


def test_a_stop_that_is_cut_short_says_so():
    """A server of others may cancel once more: the module is named, and those before it stop in order."""
    with start_worker("stays", "server", "impatient") as process:
        assert process.stdout.readline() == "serving\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "draining\n"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (out, process.returncode) == ("down\n", 0)
    assert "the stop of the module late was cut short by a cancellation" in err


def test_work_that_exits_does_not_end_the_process_as_if_all_were_well():
    """`sys.exit(0)` in background work is a crash like any other return of it."""
    with start_worker("exits") as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "toy.worker was stopped by SystemExit" in err


async def test_run_says_where_it_belongs(capsys):
    """Inside an event loop and in another thread there are no signals to wait for."""
    with pytest.raises(SystemExit) as inside:
        App().run()
    assert "is for the main thread" in capsys.readouterr().err
    with pytest.raises(SystemExit) as elsewhere:
        await asyncio.to_thread(App().run)
    assert "is for the main thread" in capsys.readouterr().err
    assert inside.value.code == elsewhere.value.code == 2


async def test_the_end_of_a_block_that_comes_too_late_ends_nothing():
    """A start that has just been done when the signal comes is stopped as any other, not cancelled."""
    event = asyncio.Event()
    async with ended_by(event):
        event.set()
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    with pytest.raises(TimeoutError, match="mine"):
        async with ended_by(asyncio.Event()):
            msg = "mine"
            raise TimeoutError(msg)


def test_work_that_is_cancelled_at_the_end_of_the_drain_is_no_failure():
    """It was late, and it ended: the status is 0."""
    with start_worker("stuck") as process:
        assert process.stdout.readline() == "serving\n"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (out, process.returncode) == ("draining\ndown\n", 0)
    assert "toy.worker did not finish within 0.2 s" in err


@pytest.mark.parametrize("kind", ["serve", "background"])
def test_a_crashed_worker_ends_the_process_with_a_status(kind):
    """The supervisor must see that the process is not fine."""
    with start_worker("crash", kind) as process:
        out, err = process.communicate(timeout=60)
    assert out == "serving\ndown\n"
    assert process.returncode == 1
    assert "OSError: boom" in err
    assert "toy.worker stopped" in err


def test_an_environment_that_does_not_fit_names_the_module(monkeypatch):
    """The log of a start that failed says which of many modules could not be configured."""
    monkeypatch.setenv("MAINSTAY_TESTPOST_NEEDS_STORE", "perhaps")
    with pytest.raises(
        ConfigurationError, match=r"^PostModule\.for_root: PostSettings\.needs_store: .*; set MAINSTAY_"
    ):
        PostModule.for_root()


@pytest.mark.parametrize("word", ["TESTPOSTS", "TETSPOST", "testpots"])
def test_a_misspelt_prefix_is_an_error(word, monkeypatch):
    """Its variable would be ignored and the default taken; the message names what was meant."""
    monkeypatch.setenv(f"MAINSTAY_{word}_NEEDS_STORE", "false")
    with pytest.raises(
        ConfigurationError, match=rf"{word}_NEEDS_STORE .* did you mean MAINSTAY_TESTPOST_NEEDS_STORE\?"
    ):
        App(StoreModule.for_root(), PostModule.for_root())


def test_a_variable_of_another_process_stops_nothing(monkeypatch, caplog):
    """Another App may read it: here nothing is said of it, and the list of such variables leaves out known ones."""
    for name in ("MAINSTAY_WEB_PORT", "MAINSTAY_BOATS_NEEDS_STORE", "MAINSTAY_TESTPOST_NEEDS_STORE", "MAINSTAY_TEST_X"):
        monkeypatch.setenv(name, "s3cret")
    App(StoreModule.for_root())
    assert caplog.records == []
    assert stray_variables() == ["MAINSTAY_BOATS_NEEDS_STORE", "MAINSTAY_WEB_PORT"]


@pytest.mark.parametrize("answer", [asyncio.CancelledError(), GeneratorExit(), "ok", Health(cast("Any", "fine"))])
async def test_health_is_down_whatever_a_check_does(answer):
    """A check that is cancelled, raises what is no Exception, or answers with no Health is down, alone."""
    async with App(StoreModule.for_root(), PostModule.for_root()) as app:
        app.get(Post).answer = answer
        assert {name: health.status for name, health in (await app.health()).items()} == {"post.Post": "down"}
        app.get(Post).answer = Health("ok")
        assert await app.health() == {"post.Post": Health("ok")}


async def test_health_does_not_wait_for_a_check_that_swallows_its_cancellation(caplog):
    """Such a check is asked once, not once a round; a stopping App awaits it for a while and then names it."""
    app = App(StoreModule.for_root(), PostModule.for_root(), health_seconds=0.01)
    asked, end, ended = 0, asyncio.Event(), asyncio.Event()

    async def health():
        nonlocal asked
        asked += 1
        while not end.is_set():
            try:
                await end.wait()
            except asyncio.CancelledError:
                continue
        ended.set()

    async with app:
        cast("Any", app.get(Post)).health = health
        for _ in range(3):
            assert await app.health() == {"post.Post": Health("down", "no answer within 0.01 s")}
        assert asked == 1
    assert "the health check of post.Post does not end" in caplog.text
    end.set()
    await ended.wait()


async def test_who_gives_up_asking_leaves_no_check_behind():
    """A cancelled `health()` cancels the checks that it started, and the App awaits them before it has stopped."""
    app = App(StoreModule.for_root(), PostModule.for_root())
    async with app:
        app.get(Post).answer = None
        asking = asyncio.ensure_future(app.health())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    assert asyncio.all_tasks() == {asyncio.current_task()}
