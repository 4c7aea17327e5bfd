"""A share of the traces is exported, and each one in which something failed, within bounds."""

import gc
import logging
import threading

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, StatusCode, TraceFlags

from monitoring import context, sampling, span_queue
from monitoring.sampling import FailedTraces, ShareSampler, is_sampled
from monitoring.span_queue import SpanQueue

from .conftest import counted


class Traces:
    """A real SDK with our sampler and processor, and what it exports."""

    def __init__(self, rate=0.0, **options):
        self.exporter = InMemorySpanExporter()
        self.queue = SpanQueue(lambda: self.exporter, delay_seconds=0.01)
        self.kept = FailedTraces(self.queue)
        options.setdefault("keeps_unsampled", True)
        self.provider = TracerProvider(sampler=ShareSampler(rate, **options), shutdown_on_exit=False)
        self.provider.add_span_processor(self.kept)
        self.tracer = self.provider.get_tracer("test")
        self.span = self.tracer.start_as_current_span

    def exported(self):
        assert self.provider.force_flush(5_000)
        return self.exporter.get_finished_spans()

    def names(self):
        return sorted(span.name for span in self.exported())


@pytest.fixture
def traces():
    made = Traces()
    yield made
    made.provider.shutdown()
    assert not made.kept._traces and made.kept._spans_held == 0


def dropped(reason):
    return counted("tracing_spans_dropped_total", reason=reason)


def remote(flags, trace_id=0xAB << 100):
    ids = SpanContext(trace_id, 0xCD, is_remote=True, trace_flags=TraceFlags(flags))
    return trace.set_span_in_context(NonRecordingSpan(ids))


def test_nothing_of_a_trace_that_went_well(traces):
    with traces.span("root"), traces.span("child"):
        pass
    assert traces.exported() == ()


def test_all_of_a_trace_that_failed_flagged_as_sampled(traces):
    with pytest.raises(KeyError), traces.span("root", attributes={"size": 3}) as root:
        with traces.span("before"):
            pass
        with traces.span("failing"):
            raise KeyError("x")
    assert traces.names() == ["before", "failing", "root"]
    for span in traces.exported():
        assert span.context.trace_flags.sampled
        assert span.context.trace_id == root.get_span_context().trace_id
    [exported] = [span for span in traces.exported() if span.name == "root"]
    assert dict(exported.attributes) == {"size": 3}
    assert exported.events[0].name == "exception"


def test_a_failed_child_is_enough_and_what_ends_later_follows(traces):
    with traces.span("root"):
        with traces.span("child") as child:
            child.set_status(StatusCode.ERROR)
        assert traces.names() == ["child"]
        with traces.span("later"):
            pass
    assert traces.names() == ["child", "later", "root"]


def test_a_child_that_fails_after_its_root_has_ended(traces):
    with traces.span("root"):
        late = traces.tracer.start_span("late")
    assert traces.exported() == ()
    late.set_status(StatusCode.ERROR)
    late.end()
    assert traces.names() == ["late", "root"]


def test_other_traces_of_the_same_time_are_not_kept(traces):
    with traces.span("outer"):
        with pytest.raises(ValueError), traces.span("nested", context=remote(0)):
            raise ValueError
        with traces.span("inner"):
            pass
    assert traces.names() == ["nested"]


@pytest.mark.parametrize("flags", [0x00, 0x02])  # with the bit that says the id is random, too
def test_an_unsampled_caller_does_not_keep_a_failure_back(traces, flags):
    with traces.span("fine", context=remote(flags)):
        pass
    with pytest.raises(ValueError), traces.span("failing", context=remote(flags)):
        raise ValueError
    [span] = traces.exported()
    assert (span.name, span.context.trace_id, span.parent.span_id) == ("failing", 0xAB << 100, 0xCD)


def test_a_sampled_caller_is_followed_unless_told_otherwise():
    for follows, expected in ((True, ["child", "root"]), (False, [])):
        traces = Traces(follows_caller=follows)
        with traces.span("root", context=remote(1)), traces.span("child"):
            pass
        assert traces.names() == expected


@pytest.mark.parametrize(
    ("kind", "status", "answered", "kept"),
    [
        (SpanKind.SERVER, StatusCode.UNSET, 503, True),
        (SpanKind.SERVER, StatusCode.ERROR, 404, False),  # Django's Http404, as the instrumentation sees it
        (SpanKind.SERVER, StatusCode.ERROR, 200, True),  # said by the application, as of a stream that broke
        (SpanKind.SERVER, StatusCode.UNSET, 200, False),
        (SpanKind.CLIENT, StatusCode.ERROR, 404, True),
        (SpanKind.CLIENT, StatusCode.UNSET, 500, False),
    ],
)
def test_what_has_failed(traces, kind, status, answered, kept):
    with traces.span("request", kind=kind) as span:
        span.set_attribute("http.response.status_code", answered)
        span.set_status(status)
    assert bool(traces.exported()) is kept


def test_without_keeping_only_the_share_is_exported():
    traces = Traces(keeps_unsampled=False)
    with pytest.raises(ValueError), traces.span("root") as span:
        assert not span.is_recording()
        raise ValueError
    assert traces.exported() == ()


def test_the_share_is_a_share_and_the_same_for_the_same_trace():
    traces = Traces(rate=0.5, keeps_unsampled=False)
    decisions = []
    for _ in range(400):
        with traces.span("root") as root, traces.span("child") as child:
            decisions.append(root.is_recording())
            assert root.is_recording() == child.is_recording()
    assert 140 < sum(decisions) < 260  # 200 expected, standard deviation 10


def test_work_on_an_unsampled_trace_without_a_span_begins_no_traces_of_its_own():
    traces = Traces(rate=1.0)
    for flags, expected in (("00", 0), ("01", 1)):
        token = context.trace_headers.set({"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-{flags}"})
        records = context.records_unsampled.set(False)
        with traces.span("inside"):
            pass
        context.records_unsampled.reset(records)
        context.trace_headers.reset(token)
        assert len(traces.exported()) == expected


def test_first_tries_of_many_record_only_what_is_sampled(traces):
    token = context.records_unsampled.set(False)
    with traces.span("root") as span:
        assert not span.is_recording()
    context.records_unsampled.reset(token)


@pytest.mark.parametrize(
    ("traceparent", "expected"),
    [(f"00-{'ab' * 16}-{'cd' * 8}-{flags}", flags in ("01", "03", "ff")) for flags in ("00", "01", "02", "03", "ff")]
    + [("", False), ("00-ab", False)],
)
def test_flags_of_a_traceparent(traceparent, expected):
    assert is_sampled(traceparent) is expected


def test_deferred_spans_are_made_when_their_trace_fails(traces):
    def query(name):
        def make(parent):
            traces.tracer.start_span(name, parent, start_time=1).end(2)

        ids = trace.get_current_span().get_span_context()
        if not traces.kept.defer(ids, make):
            make(None)

    with traces.span("fine"):
        query("never made")
    with pytest.raises(ValueError), traces.span("root") as root:
        query("before")
        with traces.span("child") as child:
            child.set_status(StatusCode.ERROR)
        query("after")
        raise ValueError
    assert traces.names() == ["after", "before", "child", "root"]
    for span in traces.exported():
        if span.name in ("before", "after"):
            assert span.parent.span_id == root.get_span_context().span_id
            assert span.context.trace_flags.sampled


def test_a_trace_with_too_many_spans_keeps_its_failures(traces, monkeypatch, caplog):
    monkeypatch.setattr(sampling, "MAX_SPANS_OF_TRACE", 3)
    monkeypatch.setattr(span_queue, "_told", set())
    before = dropped("trace_too_large")
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError), traces.span("root"):
        for number in range(6):
            with traces.span(f"child {number}"):
                pass
        with traces.span("failing"):
            raise ValueError
    assert traces.names() == ["child 0", "child 1", "child 2", "failing", "root"]
    assert dropped("trace_too_large") == before + 3
    assert [record.why for record in caplog.records] == ["trace_too_large"]  # said once


def test_too_many_traces_give_up_the_oldest(traces, monkeypatch):
    monkeypatch.setattr(sampling, "MAX_TRACES", 2)
    before = dropped("too_many_traces")
    roots = [traces.tracer.start_span(f"root {number}", context=remote(0, number + 1)) for number in range(3)]
    with pytest.raises(ValueError), traces.span("child", context=trace.set_span_in_context(roots[2])):
        raise ValueError
    child = traces.tracer.start_span("child of the first", context=trace.set_span_in_context(roots[0]))
    child.end()
    for root in roots:
        root.set_status(StatusCode.ERROR)
        root.end()
    # A failed span is exported even where its trace was given up.
    assert traces.names() == ["child", "root 0", "root 1", "root 2"]
    assert dropped("too_many_traces") == before  # nothing was held of those given up


def test_too_many_spans_in_all_give_up_the_oldest_trace(traces, monkeypatch):
    monkeypatch.setattr(sampling, "MAX_SPANS", 3)
    before = dropped("too_many_traces")
    roots = [traces.tracer.start_span(f"root {number}", context=remote(0, number + 1)) for number in range(2)]
    for root in roots:
        for number in range(2):
            traces.tracer.start_span(f"child {number}", context=trace.set_span_in_context(root)).end()
    for root in roots:
        root.set_status(StatusCode.ERROR)
        root.end()
    assert traces.names() == ["child 0", "child 1", "root 0", "root 1"]
    assert dropped("too_many_traces") == before + 2


def test_a_trace_that_never_ends_is_given_up(traces, monkeypatch):
    monkeypatch.setattr(sampling, "MAX_AGE_SECONDS", 0.0)
    before = dropped("trace_too_old")
    old = traces.tracer.start_span("old")
    traces.tracer.start_span("child", context=trace.set_span_in_context(old)).end()
    with traces.span("new"):
        assert list(traces.kept._traces) == [trace.get_current_span().get_span_context().trace_id]
    old.end()
    assert dropped("trace_too_old") == before + 1


def test_many_threads_at_once_keep_what_failed_and_nothing_else(traces):
    def work(number):
        for turn in range(50):
            with traces.span(f"root {number} {turn}") as root:
                with traces.span("child"):
                    pass
                if turn % 10 == 0:
                    root.set_status(StatusCode.ERROR)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(traces.exported()) == 8 * 5 * 2


def test_a_span_that_the_garbage_collector_ends(traces, monkeypatch):
    """A span may end anywhere, also where the processor is at work in the same thread."""

    def forgotten():
        with traces.span("forgotten"):
            yield

    class Collects(dict):
        def get(self, *args):
            gc.collect()
            return super().get(*args)

    generator = forgotten()
    next(generator)
    traces.kept._traces = Collects(traces.kept._traces)
    cycle = [generator]
    cycle.append(cycle)
    del generator, cycle
    with traces.span("root"):
        pass
    assert traces.exported() == ()
