"""One trace from the request over the row and the record to the handler and what it emits; and what is kept of it."""

import json
import logging

import pytest
from django.contrib.auth.models import Permission
from django.db import transaction
from opentelemetry import trace
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id
from prometheus_client import REGISTRY

from events_outbox import NewEvent, RetryPolicy, emit_event, emit_events
from events_outbox.consumer import ConsumerProcess
from events_outbox.handlers import consumer_named
from events_outbox.models import DeadLetter, OutboxEvent
from events_outbox.publisher import Publisher
from events_outbox.records import Record
from events_outbox.relay import Relay
from events_outbox.trace_context import span_contexts
from monitoring import tracing
from monitoring.logging import JsonLineFormatter
from monitoring.sampling import FailedTraces
from monitoring.span_queue import SpanQueue
from monitoring.tracing import TracingConfig, may_record
from voicehelper.proto.notification_pb2 import NotificationCreatedPayload

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def spans(monkeypatch):
    """A real SDK that keeps what it exports; the global provider can be set only once a process."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    monkeypatch.setattr("events_outbox.publisher.tracer", tracer)
    monkeypatch.setattr("events_outbox.consumer_spans._tracer", tracer)
    for module in ("handlers", "consumer_spans"):
        monkeypatch.setattr(f"events_outbox.{module}.may_record", lambda *_, **__: True)
    exporter.tracer = tracer
    return exporter


def test_one_trace_from_request_to_handler(spans, emit, topic_reader, make_consumer):
    with spans.tracer.start_as_current_span("request") as request:
        emit("c1")
    context = request.get_span_context()
    Relay().run(until_empty=True)
    (message,) = topic_reader.read(1)
    headers = dict(message.headers())
    assert headers["traceparent"].decode().split("-")[1:3] == [
        format_trace_id(context.trace_id),
        format_span_id(context.span_id),
    ]

    consumer = make_consumer()

    @consumer.handles("conversation.created")
    def emits_too(event):
        with transaction.atomic():
            emit_event(
                "notification.created", NotificationCreatedPayload(), aggregate_id="n1", tenant_id=event.tenant_id
            )

    record = Record(
        topic=message.topic(), partition=0, offset=3, key=b"c1", value=message.value(), headers=message.headers()
    )
    ConsumerProcess(consumer).handle_batch([record])

    by_name = {span.name: span for span in spans.get_finished_spans()}
    send = by_name["send conversation.events"]
    assert send.kind == SpanKind.CLIENT
    assert dict(send.attributes) == {
        "messaging.system": "kafka",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": "conversation.events",
        "messaging.batch.message_count": 1,
        "messaging.client.id": "relay_outbox",
    }
    assert [link.context.span_id for link in send.links] == [context.span_id]
    process = by_name["process conversation.events"]
    assert process.kind == SpanKind.CONSUMER
    assert (process.context.trace_id, process.parent.span_id) == (context.trace_id, context.span_id)
    event = OutboxEvent.objects.get(aggregate_id="c1")
    assert dict(process.attributes) == {
        "messaging.system": "kafka",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "conversation.events",
        "messaging.destination.partition.id": "0",
        "messaging.kafka.offset": 3,
        "messaging.kafka.message.key": "c1",
        "messaging.message.id": str(event.event_id),
        "messaging.message.conversation_id": event.correlation_id,
        "messaging.consumer.group.name": consumer.group_id,
    }
    emitted = OutboxEvent.objects.get(event_type="notification.created")
    assert emitted.traceparent.split("-")[1:3] == [
        format_trace_id(context.trace_id),
        format_span_id(process.context.span_id),
    ]


def test_a_batch_handlers_span_is_linked_to_the_requests(spans, emit):
    rows = []
    for number in range(2):
        with spans.tracer.start_as_current_span(f"request {number}"):
            rows.append(emit(f"c{number}"))
    records = [
        Record(
            topic="t", partition=0, offset=n, key=b"k", value=bytes(row.value),
            headers=[("traceparent", row.traceparent.encode())],
        )
        for n, row in enumerate(rows)
    ]  # fmt: skip
    ConsumerProcess(consumer_named("audit")).handle_batch(records)
    finished = {span.name: span for span in spans.get_finished_spans()}
    assert finished["process t"].attributes["messaging.batch.message_count"] == 2
    linked = {link.context.span_id for link in finished["process t"].links}
    assert linked == {finished[f"request {n}"].context.span_id for n in range(2)}


@pytest.fixture
def decide(monkeypatch):
    """Make this process trace as configured, and return what it exports and a tracer. It has one provider for good."""

    def install(enabled=True, sampling_rate=0.0, sampling_mode="keep_failed"):
        config = TracingConfig(
            service_name="test", service_version="", environment="dev", endpoint="", enabled=enabled,
            sampling_rate=sampling_rate, sampling_mode=sampling_mode,
        )  # fmt: skip
        exporter = InMemorySpanExporter()
        provider = TracerProvider(sampler=tracing._sampler(config), shutdown_on_exit=False)
        queue = SpanQueue(lambda: exporter, delay_seconds=0.01)
        kept = FailedTraces(queue) if sampling_mode == "keep_failed" else None
        provider.add_span_processor(kept or queue)
        tracer = provider.get_tracer("test")
        monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: provider)
        for name, value in {"_provider": provider, "_config": config, "_failed_traces": kept}.items():
            monkeypatch.setattr(tracing, name, value)
        for name in (
            "events_outbox.consumer_spans._tracer",
            "events_outbox.publisher.tracer",
            "monitoring.database._tracer",
        ):
            monkeypatch.setattr(name, tracer)
        providers.append(provider)

        def exported():
            assert provider.force_flush(5_000)
            return exporter.get_finished_spans()

        return exported, tracer

    providers = []
    yield install
    for provider in providers:
        provider.shutdown()


def traceparent(number, flags):
    return f"00-{number + 1:032x}-{'cd' * 8}-{flags}"


def record_of(row, offset, flags, **headers):
    given = [("traceparent", traceparent(offset, flags).encode()), *((n, v.encode()) for n, v in headers.items())]
    return Record(
        topic="conversation.events", partition=0, offset=offset, key=row.aggregate_id.encode(),
        value=bytes(row.value), headers=given,
    )  # fmt: skip


@pytest.mark.parametrize("decided_by", ["nobody records", "the caller did not sample"])
def test_without_a_span_the_trace_goes_on_all_the_same(emit, make_consumer, decide, decided_by):
    exported, _ = decide(enabled=decided_by != "nobody records", sampling_rate=1.0)
    flags = "01" if decided_by == "nobody records" else "00"
    consumer, lines = make_consumer(), []

    @consumer.handles("conversation.created")
    def emits_too(event):
        assert trace.get_current_span() is trace.INVALID_SPAN
        lines.append(JsonLineFormatter().format(logging.makeLogRecord({"msg": "handling"})))
        emit(f"from-{event.aggregate_id}")

    rows = [emit("c1"), emit("c2")]  # of a batch
    records = [record_of(row, n, flags, tracestate="vendor=1", baggage="plan=pro") for n, row in enumerate(rows)]
    ConsumerProcess(consumer).handle_batch(records)
    emitted = OutboxEvent.objects.get(aggregate_id="from-c2")
    assert (emitted.traceparent, emitted.tracestate, emitted.baggage) == (traceparent(1, flags), "vendor=1", "plan=pro")
    assert json.loads(lines[1])["trace_id"] == f"{2:032x}"
    assert json.loads(lines[1])["event_id"] == str(rows[1].event_id)
    assert exported() == ()


def test_what_a_handler_with_a_span_emits_carries_the_baggage_on(emit, make_consumer, decide):
    exported, _ = decide()
    consumer = make_consumer()

    @consumer.handles("conversation.created")
    def emits_too(event):
        emit("from-c1")

    ConsumerProcess(consumer).handle_batch([record_of(emit("c1"), 0, "01", tracestate="vendor=1", baggage="plan=pro")])
    emitted = OutboxEvent.objects.get(aggregate_id="from-c1")
    [process] = [span for span in exported() if span.name == "process conversation.events"]
    assert emitted.traceparent == f"00-{1:032x}-{process.context.span_id:016x}-01"
    assert (emitted.tracestate, emitted.baggage) == ("vendor=1", "plan=pro")


def test_rows_and_records_speak_w3c_whatever_requests_do(emit, monkeypatch, spans):
    monkeypatch.setattr("opentelemetry.propagate._HTTP_TEXT_FORMAT", CompositePropagator([]))
    with spans.tracer.start_as_current_span("request") as request:
        row = emit("c1")
    assert row.traceparent.split("-")[2] == format_span_id(request.get_span_context().span_id)


@pytest.mark.parametrize("is_batch", [False, True])
def test_a_failed_handler_has_its_trace_and_only_it(emit, make_consumer, decide, is_batch):
    exported, _ = decide()
    consumer = make_consumer(retry=RetryPolicy(max_retries=0))
    seen = []

    def handle(event):
        seen.append(trace.get_current_span().is_recording())
        OutboxEvent.objects.exists()
        if event.aggregate_id == "c2":
            raise KeyError("what somebody wrote")

    if is_batch:
        consumer.handles_batch("conversation.created")(lambda events: [handle(event) for event in events])
    else:
        consumer.handles("conversation.created")(handle)
    rows = [emit(f"c{number}") for number in range(5)]
    ConsumerProcess(consumer).handle_batch([record_of(row, n, "00") for n, row in enumerate(rows)])
    assert seen == [False] * 3 + [True] * 5  # the batch without spans, then one by one, recorded
    assert DeadLetter.objects.get().event_id == rows[2].event_id
    spans = [span for span in exported() if span.kind == SpanKind.CONSUMER]
    if is_batch:
        batch = spans.pop(0)
        assert [link.context.trace_id for link in batch.links] == [1, 2, 3, 4, 5]
        assert batch.attributes["error.type"] == "KeyError"
    else:
        first = spans.pop(0)  # told after it had failed in the batch
        assert (first.context.trace_id, first.status.status_code) == (3, StatusCode.ERROR)
    [span] = spans
    assert (span.context.trace_id, span.parent.span_id, span.attributes["messaging.kafka.offset"]) == (
        3,
        0xCDCDCDCDCDCDCDCD,
        2,
    )
    assert (span.status.status_code, span.attributes["error.type"]) == (StatusCode.ERROR, "KeyError")
    [query] = [span for span in exported() if span.name == "SELECT events_outbox_outboxevent"]
    assert query.parent.span_id == span.context.span_id


def test_an_event_that_fails_at_the_commit_has_its_trace(emit, make_consumer, decide):
    exported, _ = decide()
    consumer = make_consumer(retry=RetryPolicy(max_retries=0))

    @consumer.handles("conversation.created")
    def refer_to_what_is_not_there(event):
        if event.aggregate_id == "c1":  # the foreign key is looked at when the transaction commits
            Permission.objects.create(content_type_id=0, codename="x", name="x")

    rows = [emit(f"c{number}") for number in range(3)]
    ConsumerProcess(consumer).handle_batch([record_of(row, n, "00") for n, row in enumerate(rows)])
    assert DeadLetter.objects.get().event_id == rows[1].event_id
    [span] = [span for span in exported() if span.kind == SpanKind.CONSUMER]
    assert (span.context.trace_id, span.attributes["error.type"]) == (2, "django.db.utils.IntegrityError")


def test_spans_of_sampled_events_only_in_a_batch_that_goes_well(emit, make_consumer, decide):
    exported, _ = decide()
    consumer = make_consumer()
    consumer.handles("conversation.created")(lambda event: OutboxEvent.objects.exists())
    rows = [emit(f"c{number}") for number in range(4)]
    ConsumerProcess(consumer).handle_batch([record_of(row, n, f"0{n}") for n, row in enumerate(rows)])
    assert sorted((span.name, span.context.trace_id) for span in exported()) == [
        ("SELECT events_outbox_outboxevent", 2), ("SELECT events_outbox_outboxevent", 4),
        ("process conversation.events", 2), ("process conversation.events", 4),
    ]  # fmt: skip


def test_a_batch_that_cannot_be_published_has_its_trace_and_its_links(emit, decide):
    exported, _ = decide()
    emit("c1")
    row = (1, "conversation.events", b"c1", b"", *[b""] * 5, traceparent(6, "00").encode(), b"", b"")

    def give_up(_):
        raise RuntimeError("told to stop")

    publisher = Publisher(give_up)
    with pytest.raises(RuntimeError):
        publisher.publish([row], set(), meanwhile=lambda: give_up(""))
    publisher.close()
    [send] = exported()
    assert (send.name, send.status.status_code) == ("send conversation.events", StatusCode.ERROR)
    assert [link.context.trace_id for link in send.links] == [7]


def test_links_are_bounded_and_each_is_there_once():
    carriers = [{"traceparent": traceparent(number % 200, "01")} for number in range(1000)]
    assert [ids.trace_id for ids in span_contexts(carriers)] == list(range(1, 129))
    assert span_contexts([{}, {"traceparent": "nonsense"}]) == []


def test_events_emitted_by_copy_are_counted_as_a_query(emit):
    def copies():
        labels = {"service": "voicehelper", "operation": "COPY", "table": "events_outbox_outboxevent"}
        return REGISTRY.get_sample_value("db_query_duration_seconds_count", labels) or 0

    before = copies()
    with transaction.atomic():
        emit_events(
            NewEvent(
                event_type="notification.created",
                payload=NotificationCreatedPayload(),
                aggregate_id=str(number),
                tenant_id="t",
            )
            for number in range(3)
        )
    assert copies() == before + 1


SAMPLED, UNSAMPLED, ITS_ID_IS_RANDOM = (f"00-{'ab' * 16}-{'cd' * 8}-{flags}" for flags in ("01", "00", "02"))


@pytest.mark.parametrize(
    ("options", "answers", "answers_unless_failed"),
    [
        ({"enabled": False}, [False, False, False, False], [False, False, False, False]),
        ({"sampling_mode": "ratio"}, [False, True, False, False], [False, True, False, False]),
        ({"sampling_mode": "ratio", "sampling_rate": 0.1}, [True, True, False, False], [True, True, False, False]),
        ({"sampling_mode": "keep_failed"}, [True] * 4, [False, True, False, False]),
        ({"sampling_mode": "collector"}, [True] * 4, [True] * 4),
    ],
)
def test_whether_a_span_could_be_exported(decide, options, answers, answers_unless_failed):
    decide(**options)
    asked = ("", SAMPLED, UNSAMPLED, ITS_ID_IS_RANDOM)
    assert [may_record(one) for one in asked] == answers
    assert [may_record(one, if_failed=False) for one in asked] == answers_unless_failed


def test_whether_a_span_of_somebody_elses_could_be_exported(monkeypatch):
    for provider, expected in ((trace.ProxyTracerProvider(), False), (TracerProvider(), True)):
        monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda given=provider: given)
        assert may_record(UNSAMPLED) is expected
