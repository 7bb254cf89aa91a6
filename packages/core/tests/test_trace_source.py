"""The trace context is OpenTelemetry's: `current()` names the span that is active now, and never an older one."""

import asyncio
import subprocess
import sys

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState

from mainstay.core import Context, Later, bind, current, rebind, spawn

RECEIVED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def tracer():
    """Of a real SDK, whose provider is not installed: `current()` looks at spans only."""
    provider = TracerProvider()
    yield provider.get_tracer("test")
    provider.shutdown()


def _named(span):
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def test_inside_of_a_span_and_its_children_each_is_named_while_it_is_active(tracer):
    """So an event that is published in a child span has it as its parent, and headers and records name it, too."""
    with bind(correlation_id="c-1", actor="ann", traceparent=RECEIVED, tracestate="vendor=1"):
        with tracer.start_as_current_span("request") as request:
            assert current() == Context("c-1", None, "ann", None, _named(request), None)
            with tracer.start_as_current_span("child") as child:
                assert current().traceparent == current().to_dict()["traceparent"] == _named(child)
                assert current().to_headers()["traceparent"] == _named(child)
            assert current().traceparent == _named(request)
        assert current() == Context("c-1", None, "ann", None, RECEIVED, "vendor=1")


def test_a_span_is_not_kept_by_what_is_bound_in_it(tracer):
    """It ends before the block does here, and what comes after belongs to what was received."""
    span = tracer.start_span("short")
    with bind(traceparent=RECEIVED):
        active = trace.use_span(span, end_on_exit=True)
        with active:
            binding = bind(actor="ann")
            with tracer.start_as_current_span("inner") as inner:
                assert binding.__enter__().traceparent == _named(inner)
        assert current() == Context(actor="ann", traceparent=RECEIVED)
        binding.__exit__(None, None, None)


def test_a_span_stands_above_a_trace_that_is_bound_inside_of_it(tracer):
    """Its source has the last word: a bound trace is one that was received."""
    with tracer.start_as_current_span("now") as span, bind(Context("c", traceparent=RECEIVED)):
        assert current().traceparent == _named(span)
        rebind(Later(lambda name: Context(name, traceparent=RECEIVED), "later"))
        assert (current().correlation_id, current().traceparent) == ("later", _named(span))
        rebind(Context())


def test_the_state_and_the_flags_are_the_spans():
    """What is not sampled says so, and the tracestate goes along; that of another trace does not."""
    state = TraceState([("vendor", "2")])
    other = NonRecordingSpan(SpanContext(7, 8, is_remote=False, trace_flags=TraceFlags(0), trace_state=state))
    with bind(traceparent=RECEIVED, tracestate="vendor=1"), trace.use_span(other):
        assert current() == Context(traceparent=f"00-{7:032x}-{8:016x}-00", tracestate="vendor=2")
    unsampled = TracerProvider(sampler=ALWAYS_OFF).get_tracer("test")
    with unsampled.start_as_current_span("dropped") as span:
        assert current().traceparent == _named(span)
        assert int(current().to_headers()["traceparent"][-2:], 16) & 1 == 0


async def test_threads_and_tasks_carry_the_span_and_a_long_lived_task_does_not(tracer):
    """A worker that a request happened to start is no part of that request's trace."""

    async def seen():
        return current().traceparent

    with tracer.start_as_current_span("request") as span:
        assert await asyncio.to_thread(lambda: current().traceparent) == _named(span)
        assert await asyncio.create_task(seen()) == _named(span)
        assert await spawn(seen(), name="worker") is None


def test_without_a_span_what_was_received_travels_on():
    """With the API alone a span records nothing and names nothing."""
    with bind(traceparent=RECEIVED), trace.NoOpTracer().start_as_current_span("nothing"):
        assert current().traceparent == RECEIVED


def test_opentelemetry_is_never_imported_for_it():
    """It is no dependency of core: who has not imported it has no spans."""
    code = (
        "import sys\n"
        "from mainstay.core import bind, current\n"
        f"with bind(traceparent='{RECEIVED}'):\n"
        f"    assert current().traceparent == '{RECEIVED}'\n"
        "    assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
        "    from opentelemetry import trace\n"
        "    from opentelemetry.sdk.trace import TracerProvider\n"
        "    with TracerProvider().get_tracer('late').start_as_current_span('late') as span:\n"
        "        assert current().traceparent.split('-')[2] == format(span.get_span_context().span_id, '016x')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
