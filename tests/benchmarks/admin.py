"""How long a page of the admin's lists takes when ten million events, and a mark for each, are in the tables."""

import statistics
import time
from collections.abc import Callable
from typing import Any

from tests.benchmarks.bench import OUTBOX, Bench, Outbox
from tests.benchmarks.report import Row, number

CHUNK = 250_000
PENDING = 100
STEP_SECONDS = 1
"""An event a second: ten million are some four months."""
TIMES = 4  # a round
EVENTS_SQL = f"""
    INSERT INTO {OUTBOX} (transaction_id, event_id, created_at, event_type, event_version, aggregate_id, tenant_id,
                          topic, correlation_id, traceparent, tracestate, baggage, value)
    SELECT '3'::xid8, uuidv7(), now() - (%(rows)s - n) * %(step)s * interval '1 second',
           CASE WHEN n <= 20 THEN 'document.uploaded' WHEN mod(n, 12) = 0 THEN 'conversation.created'
                ELSE 'conversation.message.sent' END,
           'v1', 'c-' || n / 12, CASE WHEN n <= 20 OR n = %(rows)s - 3000 THEN 'rare' ELSE 't-' || mod(n, 20) END,
           'conversation.events', 'r-' || n / 3, repeat('0', 55), '', '', decode(repeat('00', 250), 'hex')
      FROM generate_series(%(low)s::bigint, %(high)s) n"""
MARKS_SQL = f"""
    INSERT INTO events_outbox_processedevent (consumer, event_id, processed_at)
    SELECT 'audit', event_id, created_at FROM {OUTBOX} WHERE id >= %s AND id < %s ORDER BY id"""


def run(bench: Bench) -> list[Row]:
    rows = bench.scale.admin_rows
    with bench.database() as outbox:
        _fill(bench, outbox, rows)
        size = outbox.megabytes()
        times = bench.call(time_pages, url=outbox.url, rounds=bench.scale.rounds)
        baseline = bench.call(time_django, url=outbox.url)
    return [
        Row(
            measure=f"admin: {name}",
            value=statistics.median(seconds) * 1e3,
            unit="ms",
            must="<= 200",
            baseline=baseline.get(name),
            detail=f"median of {len(seconds)}, {number(min(seconds) * 1e3)} to {number(max(seconds) * 1e3)}; "
            f"{rows:,} events ({size / 1e3:.1f} GB with indexes) and marks; request to rendered page",
        )
        for name, seconds in times.items()
    ]


def _fill(bench: Bench, outbox: Outbox, rows: int) -> None:
    outbox.seed(100)
    execute = outbox.connection.execute
    execute(f"TRUNCATE {OUTBOX} RESTART IDENTITY CASCADE")
    bench.say(f"adding {rows:,} events and marks")
    for low in range(1, rows + 1, CHUNK):
        high = min(low + CHUNK - 1, rows)
        execute(EVENTS_SQL, {"rows": rows, "step": STEP_SECONDS, "low": low, "high": high})
        execute(MARKS_SQL, [low, high + 1])
    outbox.place("all")
    outbox.rewind("all")
    pending = EVENTS_SQL.replace("'3'::xid8", "pg_current_xact_id()")
    execute(pending, {"rows": rows, "step": STEP_SECONDS, "low": rows + 1, "high": rows + PENDING})
    execute("VACUUM (ANALYZE) events_outbox_processedevent")
    outbox.settle()


# Jobs


def time_pages(rounds: int) -> dict[str, list[float]]:
    """Job: seconds of each list page, through Django's test client. The first of each is not counted."""
    from django.contrib.auth import get_user_model
    from django.test import Client

    client = Client(SERVER_NAME="localhost")
    client.force_login(get_user_model().objects.create_superuser("bench"))  # type: ignore[attr-defined]

    def opened(model: str, query: dict[str, str]) -> float:
        started = time.perf_counter()
        answer = client.get(f"/admin/events_outbox/{model}/", query)
        assert answer.status_code == 200, answer.status_code
        return time.perf_counter() - started

    times: dict[str, list[float]] = {}
    for name, (model, query) in _pages().items():
        opened(model, query)
        times[name] = [opened(model, query) for _ in range(rounds * TIMES)]
    return times


def _pages() -> dict[str, tuple[str, dict[str, str]]]:
    from events_outbox.models import OutboxEvent, ProcessedEvent

    last = OutboxEvent.objects.latest("id")
    middle = OutboxEvent.objects.filter(id__lte=last.id // 2).latest("id")
    day = f"{middle.created_at:%Y-%m-%d}"
    mark = ProcessedEvent.objects.filter(id__lte=last.id // 2).latest("id")
    events: dict[str, dict[str, str]] = {
        "events, newest": {},
        "events, deep": {"before": str(middle.id)},
        "events, oldest": {"oldest": "1"},
        "events, pending": {"status": "pending"},
        "events, published of a type": {"status": "published", "event_type": "conversation.created"},
        "events, a tenant with few": {"tenant_id": "rare"},
        "events, a tenant with none": {"tenant_id": "nobody"},
        "events, a tenant with none, deep": {"tenant_id": "nobody", "before": str(middle.id)},
        "events, search": {"q": middle.correlation_id},
        "events, search in vain": {"q": "nothing like it"},
        "events, a day": {"date": day},
        "events, an hour of a tenant": {"date": f"{day}T07", "tenant_id": "t-7"},
        "events, a month without a match": {"date": day[:7], "tenant_id": "nobody"},
    }
    marks: dict[str, dict[str, str]] = {
        "processed, newest": {},
        "processed, deep": {"before": str(mark.id)},
        "processed, of a consumer without any": {"consumer": "notification"},
        "processed, search": {"q": str(mark.event_id)},
        "processed, a day": {"date": day},
    }
    return {name: ("outboxevent", query) for name, query in events.items()} | {
        name: ("processedevent", query) for name, query in marks.items()
    }


def time_django() -> dict[str, str]:
    """Job: what Django's own list asks the database for the same pages, COUNT and OFFSET; nothing is rendered."""
    from django.core.paginator import Paginator

    from events_outbox.models import OutboxEvent, ProcessedEvent

    events, marks = OutboxEvent.objects.order_by("-id").defer("value"), ProcessedEvent.objects.order_by("-id")
    lists: dict[str, tuple[Any, bool]] = {
        "events, newest": (events, False),
        "events, deep": (events, True),
        "events, a tenant with few": (events.filter(tenant_id="rare"), False),
        "events, a tenant with none": (events.filter(tenant_id="nobody"), False),
        "processed, newest": (marks, False),
        "processed, deep": (marks, True),
    }

    def asked(rows: Any, deep: bool) -> Callable[[], None]:
        def ask() -> None:
            paginator = Paginator(rows, 50)
            list(paginator.page(max(1, paginator.num_pages // 2) if deep else 1).object_list)

        return ask

    result = {}
    for name, (rows, deep) in lists.items():
        ask = asked(rows, deep)
        ask()
        started = time.perf_counter()
        ask()
        milliseconds = (time.perf_counter() - started) * 1e3
        result[name] = f"Django's own paginator, its queries alone: {number(milliseconds)} ms"
    return result
