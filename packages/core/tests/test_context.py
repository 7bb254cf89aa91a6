"""The context: what travels, and what is not believed."""

import asyncio
from contextlib import contextmanager
from contextvars import copy_context

import pytest

from mainstay.core import Context, Later, Noted, bind, current, rebind, remaining_seconds, spawn, timeout

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_bind_changes_fields_for_the_block_only():
    """Inner values win inside, outer ones return after, also after an exception."""
    with bind(correlation_id="c-1", actor="ann"):
        with pytest.raises(ZeroDivisionError), bind(actor="bob") as inner:
            assert (inner.correlation_id, current().actor) == ("c-1", "bob")
            _ = 1 / 0
        assert current().actor == "ann"
    assert current() == Context()


def test_bind_replaces_the_whole_context():
    """A given context replaces everything; changes apply on top of it."""
    with bind(tenant="acme"), bind(Context(correlation_id="c-2"), causation_id="e-1"):
        assert current() == Context(correlation_id="c-2", causation_id="e-1")


async def test_tasks_and_threads_carry_the_context():
    """Gather and to_thread see what their caller bound."""
    with bind(correlation_id="c-3"):

        async def seen():
            return current().correlation_id

        assert await asyncio.gather(seen(), seen()) == ["c-3", "c-3"]  # type: ignore[comparison-overlap]  # gather gives a list
        assert (await asyncio.to_thread(current)).correlation_id == "c-3"


async def test_a_long_lived_task_starts_with_an_empty_context():
    """The task that the first caller starts must not carry that caller's context for ever."""

    async def lane():
        return current()

    with bind(correlation_id="first"):
        task = spawn(lane(), name="lane")
        assert task.get_name() == "lane"
        assert await task == Context()


def test_headers_round_trip_between_our_services():
    """Everything but the deadline crosses HTTP when the other side is trusted."""
    context = Context("c", "e", "ann@example.org", "acme", TRACE, "vendor=1")
    assert Context.from_headers(context.to_headers(), trusted=True) == context


@pytest.mark.parametrize("name", ["auth0|5f7c", "Jürgen Groß", "ann@example.org", "a%20b", "会社"])
def test_an_actor_and_a_tenant_keep_the_names_they_have(name):
    """The authentication chose the name; it reaches records and other services as it is."""
    with bind(actor=name, tenant=name) as context:
        assert Context.from_dict(context.to_dict()) == context
        headers = context.to_headers()
        assert all(value.isascii() for value in headers.values())
        assert Context.from_headers(headers, trusted=True) == context


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("actor", "ann\nInjected: 1"),
        ("tenant", ""),
        ("tenant", "x" * 257),
        ("correlation_id", "a b"),
        ("traceparent", "junk"),
        ("actor", 7),
    ],
)
def test_a_malformed_field_is_refused_where_it_is_bound(field, value):
    """It would be dropped on its way to the next record or service, and the one who acted would be unknown."""
    with pytest.raises(ValueError, match=rf"bind\({field}=.*\): {field} is"):
        bind(**{field: value})


def test_a_stranger_names_a_conversation_and_a_trace_only():
    """Actor, tenant and cause from an untrusted caller are dropped."""
    headers = Context("c", "e", "admin", "acme", TRACE, "vendor=1").to_headers()
    assert Context.from_headers(headers) == Context("c", traceparent=TRACE, tracestate="vendor=1")


@pytest.mark.parametrize(
    "value", ["", "x" * 129, "a b", "a\nInjected: 1", "a;b", "ünï", '{"a":1}', "<script>", "a\x00"]
)
def test_a_malformed_id_is_dropped(value):
    """What could break a log line, a header or a record does not get in."""
    assert Context.from_headers({"x-correlation-id": value}) == Context()


@pytest.mark.parametrize(
    "value",
    ["00-" + "0" * 32 + "-b7ad6b7169203331-01", "ff" + TRACE[2:], TRACE.upper(), TRACE[:-1], TRACE + "0", "junk"],
)
def test_a_malformed_traceparent_is_dropped(value):
    """Only what W3C Trace Context allows is passed on."""
    assert Context.from_headers({"traceparent": value}) == Context()


def test_records_leave_out_what_is_not_set_and_ignore_what_is_unknown():
    """to_dict holds only set fields; from_dict drops unknown names and values that are no strings."""
    assert Context(actor="ann").to_dict() == {"actor": "ann"}
    assert Context.from_dict({"actor": "ann", "rank": "admiral", "tenant": 7}) == Context(actor="ann")


async def test_binding_another_context_does_not_escape_the_deadline():
    """The context that came with an event replaces who and what, never until when."""
    async with timeout(10):
        with bind(Context(correlation_id="from-an-event")):
            assert 0 < (remaining_seconds() or 0) <= 10
    assert remaining_seconds() is None


def test_an_unknown_field_is_an_error():
    """A misspelt field does not vanish."""
    with pytest.raises(TypeError, match="acter"):
        bind(acter="ann")


async def test_a_context_can_be_made_when_it_is_asked_for():
    """A loop binds what it has not read yet; the first use gets the context, read once, and binds over it as always."""
    made: list[object] = []

    def make(source: object) -> Context:
        made.append(source)
        return Context(correlation_id=str(source), actor="ann")

    async def loop() -> list[Context]:
        seen = []
        for source in (1, 2):
            rebind(Later(make, source))
            if source == 2:
                with bind(actor="bob") as inner:
                    seen += [inner, current()]
                seen += [current(), await asyncio.to_thread(current)]
        return seen

    seen = await asyncio.create_task(loop())
    assert seen == [Context("2", actor="bob")] * 2 + [Context("2", actor="ann")] * 2
    assert made == [2]
    assert current() == Context()


async def test_what_was_bound_inside_is_known_outside():
    """Also of tasks and threads, whose contexts are copies; the first that names another actor is the one who acts."""
    gateway = Context(correlation_id="c-1", actor="gateway")

    def in_a_thread():
        with bind(tenant="acme"):
            pass

    async def in_a_task():
        with bind(causation_id="e-1"), bind(actor="ann"), bind(actor="batch"):
            pass

    with Noted(gateway) as noted:
        assert current() == gateway
        await asyncio.gather(in_a_task())
        await asyncio.to_thread(in_a_thread)
        await spawn(in_a_task(), name="its own")
        assert current() == gateway
    assert (noted.actor, noted.tenant) == ("ann", "acme")
    with Noted(gateway) as noted, bind(tenant="acme"):
        assert (noted.actor, noted.tenant) == ("gateway", "acme")


async def test_an_error_is_known_by_the_innermost_context_that_it_left():
    """By itself, as the cause of another, or in a group; of an error that left none, and of none, nothing is known."""

    async def failing():
        with bind(actor="ann"), bind(actor="bob"):
            raise LookupError

    with Noted(Context()) as noted:
        with pytest.raises(LookupError) as plain:
            await failing()
        left = noted.left_by(plain.value)
        assert left is not None
        assert left.actor == "bob"
        assert noted.left_by(RuntimeError()) is None
        with pytest.raises(ExceptionGroup) as group:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(failing())
        assert noted.left_by(group.value) == left
        with pytest.raises(RuntimeError) as second:
            try:
                await failing()
            except LookupError as error:
                raise RuntimeError from error
        assert noted.left_by(second.value) == left
    assert noted.left_by(second.value) is None


def test_halves_of_a_block_in_two_threads_undo_nothing_that_is_not_theirs():
    """The framework runs either in a copy of the context: there is nothing to undo, and nothing to fail for."""

    @contextmanager
    def dependency(context):
        with bind(context):
            yield

    for context in (Context(actor="ann"), None):
        halves = dependency(context)
        copy_context().run(halves.__enter__)
        assert current() == Context()
        copy_context().run(halves.__exit__, None, None, None)
        assert current() == Context()
    leaking = dependency(Context(actor="ann"))
    with bind(Context()):
        leaking.__enter__()
        with pytest.raises(ValueError, match="different Context"):
            copy_context().run(leaking.__exit__, None, None, None)
