"""One trace from the request over the row and the record to the handler and what it emits."""

import json
import logging

import pytest
from django.db import transaction
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, format_span_id, format_trace_id

from events_outbox import emit_event
from events_outbox.consumer import ConsumerProcess
from events_outbox.handlers import consumer_named
from events_outbox.models import OutboxEvent
from events_outbox.records import Record
from events_outbox.relay import Relay
from monitoring.logging import JsonLineFormatter
from monitoring.tracing import may_record
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
    send = by_name["send"]
    assert send.kind == SpanKind.CLIENT and send.attributes["messaging.batch.message_count"] == 1
    assert [link.context.span_id for link in send.links] == [context.span_id]
    process = by_name["process conversation.events"]
    assert process.kind == SpanKind.CONSUMER
    assert (process.context.trace_id, process.parent.span_id) == (context.trace_id, context.span_id)
    assert process.attributes["messaging.kafka.offset"] == 3
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
    linked = {link.context.span_id for link in finished["process batch"].links}
    assert linked == {finished[f"request {n}"].context.span_id for n in range(2)}


@pytest.mark.parametrize("decided_by", ["nobody records", "the caller did not sample"])
def test_without_a_span_the_trace_goes_on_all_the_same(emit, make_consumer, monkeypatch, decided_by):
    trace_id, flags = "ab" * 16, "01" if decided_by == "nobody records" else "00"
    traceparent = f"00-{trace_id}-{'cd' * 8}-{flags}"
    own = TracerProvider()
    monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: own)
    monkeypatch.setattr("monitoring.tracing._provider", own)
    monkeypatch.setattr("monitoring.tracing._is_exporting", decided_by != "nobody records")
    consumer, lines = make_consumer(), []

    @consumer.handles("conversation.created")
    def emits_too(event):
        assert trace.get_current_span() is trace.INVALID_SPAN
        lines.append(JsonLineFormatter().format(logging.makeLogRecord({"msg": "handling"})))
        emit(f"from-{event.aggregate_id}")

    row = emit("c1")
    headers = [("traceparent", traceparent.encode()), ("tracestate", b"vendor=1"), ("baggage", b"plan=pro")]
    record = Record(topic=row.topic, partition=0, offset=0, key=b"c1", value=bytes(row.value), headers=headers)
    ConsumerProcess(consumer).handle_batch([record])
    emitted = OutboxEvent.objects.get(aggregate_id="from-c1")
    assert (emitted.traceparent, emitted.tracestate, emitted.baggage) == (traceparent, "vendor=1", "plan=pro")
    assert json.loads(lines[0])["trace_id"] == trace_id
    assert json.loads(lines[0])["event_id"] == str(row.event_id)


def test_whether_a_span_could_be_recorded(monkeypatch):
    own, foreign = TracerProvider(), TracerProvider()
    monkeypatch.setattr("monitoring.tracing._provider", own)
    sampled, unsampled = (f"00-{'ab' * 16}-{'cd' * 8}-{flags}" for flags in ("01", "00"))

    def answers(provider, exporting):
        monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: provider)
        monkeypatch.setattr("monitoring.tracing._is_exporting", exporting)
        return [may_record(traceparent) for traceparent in ("", sampled, unsampled)]

    assert answers(trace.ProxyTracerProvider(), True) == [False, False, False]
    assert answers(own, False) == [False, False, False]
    assert answers(own, True) == [True, True, False]
    assert answers(foreign, False) == [True, True, True]  # who knows what its sampler does
