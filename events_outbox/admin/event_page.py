"""An event's page: where it is on its way, what it carries, what it came of and what came of it.

The page shows at once what the database knows; what Kafka knows comes with the fragment that the page then asks for,
again and again until nothing more is to come.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from django.contrib import admin, messages
from django.contrib.admin.utils import unquote
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from google.protobuf.message import DecodeError
from opentelemetry.trace import format_trace_id

from events_outbox import life_line
from events_outbox.causation import correlation_group
from events_outbox.life_line import KafkaKnows, LifeLine, Step
from events_outbox.models import OutboxEvent, RelayCursor
from events_outbox.proto.base_event_pb2 import BaseEvent
from events_outbox.trace_context import span_contexts
from monitoring.conf import monitoring_settings

from . import kafka_answers
from .payload import readable_characters
from .read_only import ReadOnlyAdmin, tenant_of
from .texts import exact_time

SHOWN_SIBLINGS = 20
FIRST_TRANSACTION_ID = 3
"""Of a database; a rebuilt cursor gives the events that it takes for published a lower one."""
ICONS = {"good": "check_circle", "waiting": "schedule", "bad": "error", "off": "do_not_disturb_on"}


@dataclass(frozen=True)
class ShownStep:
    """A step as the user may see it."""

    step: Step
    icon: str
    at: str
    details: Sequence[str]
    link: str
    link_text: str


@dataclass(frozen=True)
class Fact:
    """A line of a table: `link` leads to what the value names, empty for none."""

    name: str
    value: str
    link: str = ""


class EventPage(ReadOnlyAdmin):
    fields = ("event_id",)
    change_form_template = "admin/events_outbox/event.html"

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        # Read once for the page, not for each row. Another thread may put its own, as fresh one here.
        self._cursor = RelayCursor.read()
        return super().get_queryset(request)

    def get_urls(self) -> list[URLPattern]:
        view, name = self.admin_site.admin_view, "events_outbox_outboxevent"
        return [
            path("event/<uuid:event_id>/", view(self.by_event_id_view), name=f"{name}_by_event_id"),
            path("<path:object_id>/life-line/", view(self.life_line_view), name=f"{name}_life_line"),
            *super().get_urls(),
        ]

    @admin.display(description="created", ordering="id")
    def created(self, event: OutboxEvent) -> str:
        return exact_time(event.created_at)

    @admin.display(description="status")
    def status(self, event: OutboxEvent) -> str:
        if hasattr(event, "undeliverable"):
            return "undeliverable" if event.undeliverable.discarded_at is None else "discarded"
        return "published" if self._cursor.has_published(event) else "pending"

    def by_event_id_view(self, request: HttpRequest, event_id: UUID) -> HttpResponse:
        """The page of the event with this id, as logs and dead letters name it."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        pk = self.get_queryset(request).filter(event_id=event_id).values_list("pk", flat=True).first()
        if pk is not None:
            return HttpResponseRedirect(_page_of(pk))
        self.message_user(request, f"There is no event {event_id}: it may have been pruned.", messages.WARNING)
        if request.user.has_perm("events_outbox.view_deadletter"):
            return HttpResponseRedirect(f"{reverse('admin:events_outbox_deadletter_changelist')}?q={event_id}")
        return HttpResponseRedirect(reverse("admin:events_outbox_outboxevent_changelist"))

    def life_line_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """The fragment that the page refreshes: the life line with what Kafka knows, and the records."""
        event = self.get_object(request, unquote(object_id))
        if event is None:
            raise Http404("no such event")
        if not self.has_view_permission(request, event):
            raise PermissionDenied
        # Never published: Kafka need not be asked.
        asks = not hasattr(event, "undeliverable") or event.undeliverable.redrive_requested_at is not None
        # Read before Kafka is asked: what Kafka did not hold then may have come since.
        cursor = RelayCursor.read()
        kafka = kafka_answers.lately(event, is_published=cursor.has_published(event)) if asks else None
        context = self._way(request, event, cursor, kafka)
        return TemplateResponse(request, "admin/events_outbox/event_way.html", context)

    def render_change_form(
        self,
        request: HttpRequest,
        context: dict[str, Any],
        add: bool = False,
        change: bool = False,
        form_url: str = "",
        obj: Any = None,
    ) -> HttpResponse:
        facts, base = _facts(obj)
        context |= {
            "title": "Event",
            "subtitle": None,
            "facts": facts,
            "metadata": sorted(base.metadata.items()) if base is not None else [],
            "row_facts": self._row_facts(obj),
            "payload": self.payload_on_page(obj, obj.value, subject=f"event {obj.event_id}"),
            "group": self._group(request, obj),
            "siblings": self._siblings(request, obj),
            "replay_url": self._replay_url(request, obj),
            "fragment_url": reverse("admin:events_outbox_outboxevent_life_line", args=[obj.pk]),
            **self._way(request, obj, RelayCursor.read(), None),
        }
        return super().render_change_form(request, context, add, change, form_url, obj)

    def _way(
        self, request: HttpRequest, event: OutboxEvent, cursor: RelayCursor, kafka: KafkaKnows | None
    ) -> dict[str, Any]:
        shows_operation = tenant_of(request) is None
        if kafka is not None and not shows_operation:
            kafka = life_line.without_operation(kafka)
        line = life_line.assemble(life_line.read(event, cursor, kafka), shows_operation=shows_operation)
        return {
            "line": line,
            "tone": _tone(line),
            "icon": ICONS[_tone(line)],
            "steps": [_shown(request, step) for step in (line.emitted, line.published, *line.consumers)],
            "event": event,
            "kafka": kafka,
            "records": [
                (
                    f"{event.topic}/{record.partition}/{record.offset}",
                    exact_time(record.published_at) if record.published_at else "no time",
                    [(name, _text(value)) for name, value in record.headers],
                )
                for record in (kafka.search.records if kafka is not None else ())
            ],
        }

    def _row_facts(self, event: OutboxEvent) -> list[Fact]:
        facts = [
            Fact("emitted", exact_time(event.created_at)),
            Fact("topic", event.topic),
            Fact("size", f"{len(event.value):,} bytes"),
            Fact("transaction id", str(event.transaction_id)),
            Fact("number in the outbox", str(event.pk)),
        ]
        if not event.traceparent:
            return [*facts, Fact("trace", "none")]
        traces = [format_trace_id(span.trace_id) for span in span_contexts([{"traceparent": event.traceparent}])]
        url = monitoring_settings().jaeger_url.rstrip("/")
        if not traces:
            facts.append(Fact("trace", f"not readable: {readable_characters(event.traceparent)}"))
        for trace_id in traces:
            facts.append(Fact("trace", trace_id, f"{url}/trace/{trace_id}" if url else ""))
        for name in ("tracestate", "baggage"):
            if text := getattr(event, name):
                facts.append(Fact(name, readable_characters(text)))
        return facts

    def _group(self, request: HttpRequest, event: OutboxEvent) -> dict[str, Any]:
        group = correlation_group(event, self.get_queryset(request).prefetch_related("undeliverable"))
        nodes = [
            (node, self.status(node.event), exact_time(node.event.created_at), _page_of(node.event.pk))
            for node in group.nodes
        ]
        return {"nodes": nodes, "has_more": group.has_more}

    def _siblings(self, request: HttpRequest, event: OutboxEvent) -> dict[str, Any]:
        """The other events of its transaction."""
        if event.transaction_id < FIRST_TRANSACTION_ID:
            return {"events": [], "has_more": False, "not_known": True}
        events = self.get_queryset(request).filter(transaction_id=event.transaction_id).exclude(pk=event.pk)
        found = list(events.defer("value", "baggage").order_by("id")[: SHOWN_SIBLINGS + 1])
        return {
            "events": [(one, _page_of(one.pk)) for one in found[:SHOWN_SIBLINGS]],
            "has_more": len(found) > SHOWN_SIBLINGS,
            "not_known": False,
        }

    def _replay_url(self, request: HttpRequest, event: OutboxEvent) -> str:
        if not self.may(request, "replay_events") or self.status(event) != "published":
            return ""
        return f"{reverse('admin:events_outbox_replay')}?event_id={event.event_id}"


def _page_of(pk: int) -> str:
    return reverse("admin:events_outbox_outboxevent_change", args=[pk])


def _tone(line: LifeLine) -> str:
    tones = [step.tone for step in (line.published, *line.consumers)]
    if line.published.tone != "good":
        return line.published.tone
    return "bad" if "bad" in tones else "waiting" if "waiting" in tones else "good"


def _shown(request: HttpRequest, step: Step) -> ShownStep:
    """What went wrong with it, and where to do something about it, is for those who may see that page."""
    link = text = ""
    details = step.details
    for model, pk, name in (
        ("deadletter", step.letter_id, "dead letter"),
        ("undeliverableevent", step.undeliverable_id, "undeliverable event"),
    ):
        if pk is None:
            continue
        if request.user.has_perm(f"events_outbox.view_{model}"):
            link, text = reverse(f"admin:events_outbox_{model}_change", args=[pk]), f"{name} {pk}"
        elif step.tone != "good":
            details = []
    at = exact_time(step.at) if step.at is not None else ""
    return ShownStep(step, ICONS[step.tone], at, [readable_characters(line) for line in details], link, text)


def _facts(event: OutboxEvent) -> tuple[list[Fact], BaseEvent | None]:
    """The fields of the BaseEvent, but for its metadata; those of the row where its bytes are no event."""
    try:
        base = BaseEvent.FromString(bytes(event.value))
    except DecodeError:
        names = ("event_id", "event_type", "event_version", "aggregate_id", "tenant_id", "correlation_id")
        return [Fact(name, readable_characters(str(getattr(event, name)))) for name in names], None
    facts = [
        Fact(name, readable_characters(getattr(base, name)) or "none", _link(name, getattr(base, name)))
        for name in ("event_id", "event_type", "event_version", "aggregate_id", "tenant_id", "user_id")
    ]
    message = base.payload.type_url.rpartition("/")[2] or "none"
    facts += [
        Fact("timestamp", _timestamp(base)),
        Fact("payload", f"{readable_characters(message)}, {len(base.payload.value):,} bytes"),
    ]
    facts += [
        Fact(name, readable_characters(getattr(base, name)) or "none", _link(name, getattr(base, name)))
        for name in ("correlation_id", "causation_id")
    ]
    return facts, base


def _link(name: str, value: str) -> str:
    """Where the value leads: to the events with the same one, or to the event it names."""
    if not value:
        return ""
    if name in ("aggregate_id", "correlation_id"):
        return reverse("admin:events_outbox_outboxevent_changelist", query={"q": value})
    if name == "causation_id":
        try:
            return reverse("admin:events_outbox_outboxevent_by_event_id", args=[UUID(value)])
        except ValueError:
            return ""
    return ""


def _timestamp(base: BaseEvent) -> str:
    if not base.HasField("timestamp"):
        return "none"
    try:
        return base.timestamp.ToJsonString()
    except ValueError as error:
        return f"{base.timestamp.seconds} s, {base.timestamp.nanos} ns: {error}"


def _text(value: bytes | None) -> str:
    return readable_characters((value or b"").decode(errors="backslashreplace"))
