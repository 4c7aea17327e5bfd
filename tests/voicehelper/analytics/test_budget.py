"""The alert of a tenant's day that exceeds three times its average."""

import random
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from decimal import Decimal

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.core.management import call_command
from django.core.management.base import SystemCheckError
from django.db import connection, transaction

from events_outbox.handlers import consumer_named
from events_outbox.models import OutboxEvent
from events_outbox.testing import capture_events, handle_now
from tests.voicehelper.analytics.conftest import DAY, history, reply
from voicehelper.analytics.conf import analytics_settings
from voicehelper.analytics.event_handlers import count
from voicehelper.analytics.models import BudgetDay

TENANT = uuid.UUID("00000000-0000-7000-8000-000000000001")
OTHER = uuid.UUID("00000000-0000-7000-8000-000000000002")


def counted(*events) -> list[tuple[str, str, str]]:
    """Count events as one batch; return what was alerted: tenant, day, measure."""
    with capture_events() as emitted, transaction.atomic():
        count(list(events))
    return [(event.tenant_id, event.payload.day, event.payload.measure) for event in emitted]


COST, TOKENS = (str(TENANT), "2026-03-31", "cost_dollars"), (str(TENANT), "2026-03-31", "tokens")


def test_what_an_alert_says(db, captured_events):
    count(history(TENANT, cost=1.0) + history(TENANT, cost=1.0, model="large"))
    cause = reply(TENANT, cost=6.5)
    count([cause])

    [event] = captured_events
    assert (event.event_type, event.topic) == ("analytics.budget.exceeded", "default.events")
    assert event.aggregate_id == event.tenant_id == str(TENANT)
    payload = event.payload
    assert (payload.day, payload.measure, payload.value) == ("2026-03-31", "cost_dollars", 6.5)
    assert (payload.average, payload.limit) == (2.0, 6.0)
    assert (event.causation_id, event.correlation_id) == (str(cause.event_id), cause.correlation_id)
    assert event.metadata == {"source": "analytics-service"}


def test_once_per_tenant_day_and_measure(db):
    counted(*history(TENANT, cost=1.0, tokens=(60_000, 40_000)), *history(OTHER, cost=1.0))
    assert counted(reply(TENANT, cost=3.0, tokens=(200_000, 100_000))) == []  # exactly three times is no more than that
    assert counted(reply(TENANT, cost=0.000001)) == [COST]
    assert counted(reply(TENANT, cost=5.0)) == []
    assert counted(reply(TENANT, cost=5.0, tokens=(1, 0))) == [TOKENS]
    assert counted(reply(TENANT, cost=5.0, tokens=(1_000_000, 0))) == []
    assert counted(reply(OTHER, cost=9.0)) == [(str(OTHER), "2026-03-31", "cost_dollars")]
    next_day = DAY + timedelta(days=1)  # the average is higher now
    assert counted(reply(TENANT, next_day, cost=10.0)) == []
    assert (str(TENANT), "2026-04-01", "cost_dollars") in counted(reply(TENANT, next_day, cost=100.0))


def test_both_measures_and_several_tenants_in_one_batch(db):
    for tenant_id in (TENANT, OTHER):
        counted(*history(tenant_id, cost=1.0, tokens=(50_000, 0)))
    found = counted(*(reply(tenant_id, cost=2.5, tokens=(100_000, 0)) for tenant_id in (TENANT, OTHER) * 2))
    assert found == [
        (str(tenant), DAY.isoformat(), m) for tenant in (TENANT, OTHER) for m in ("cost_dollars", "tokens")
    ]


def test_a_replay_alerts_nothing_again(db):
    events = [*history(TENANT, cost=1.0), reply(TENANT, cost=9.0)]
    handle_now("analytics", events=events)
    handle_now("analytics", events=events)
    assert OutboxEvent.objects.filter(event_type="analytics.budget.exceeded").count() == 1


def test_three_days_of_the_last_thirty_are_needed(db):
    counted(*history(TENANT, 2, cost=1.0))
    assert counted(reply(TENANT, cost=100.0)) == []  # two days
    counted(reply(OTHER, DAY - timedelta(days=31), cost=1.0), *history(OTHER, 2, cost=1.0))
    assert counted(reply(OTHER, cost=100.0)) == []  # the third is too long ago
    counted(reply(OTHER, DAY - timedelta(days=30), cost=1.0))
    assert counted(reply(OTHER, cost=0.1)) == [(str(OTHER), "2026-03-31", "cost_dollars")]


def test_days_without_any_are_no_part_of_the_average(db):
    """Free replies, and days of users' messages alone."""
    counted(*history(TENANT, 9, tokens=(100_000, 0)), *history(TENANT, 3, cost=1.0))
    assert counted(reply(TENANT, cost=3.0)) == []
    assert counted(reply(TENANT, cost=0.1)) == [COST]


def test_a_small_amount_is_not_alerted(db, settings):
    settings.ANALYTICS = {"BUDGET_MIN_COST_DOLLARS": "0.5", "BUDGET_MIN_TOKENS": 1000}
    counted(*history(TENANT, cost=0.001, tokens=(1, 0)))
    assert counted(reply(TENANT, cost=0.499, tokens=(999, 0))) == []
    assert counted(reply(TENANT, cost=0.001, tokens=(0, 1))) == [COST, TOKENS]


def test_what_is_rolled_back_is_not_alerted_and_is_alerted_later(db):
    counted(*history(TENANT, cost=1.0))
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        count([reply(TENANT, cost=9.0)])
        raise ZeroDivisionError
    assert not OutboxEvent.objects.filter(event_type="analytics.budget.exceeded").exists()
    assert counted(reply(TENANT, cost=9.0)) == [COST]


@pytest.mark.django_db(transaction=True)
def test_several_workers_at_once_alert_each_day_once():
    """Each worker's own share exceeds nothing: only whoever comes last sees that all of them do."""
    tenant_ids = [uuid.UUID(int=number) for number in range(1, 13)]
    count([event for tenant_id in tenant_ids for event in history(tenant_id, cost=1.0)])

    def work(worker: int) -> None:
        try:
            for batch in range(4):
                events = [
                    reply(tenant_id, cost=0.2, model=f"model-{worker}", mode=random.choice(["chat", "voice"]))
                    for tenant_id in random.sample(tenant_ids, len(tenant_ids))
                ]
                assert len(events) == 12, batch
                with transaction.atomic():
                    count(events)
        finally:
            connection.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    alerted = OutboxEvent.objects.filter(event_type="analytics.budget.exceeded").values_list("tenant_id", flat=True)
    assert sorted(alerted) == sorted(map(str, tenant_ids))  # 16 times 0.2 is 3.2
    assert BudgetDay.objects.filter(cost_exceeded=True).count() == 12
    assert not BudgetDay.objects.filter(tokens_exceeded=True).exists()


def test_the_consumer_itself_does_not_care_for_alerts():
    assert consumer_named("analytics").route("analytics.budget.exceeded", "v1") is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"BUDGET_MIN_TOKENS": "many"},
        {"BUDGET_MIN_TOKENS": -1},
        {"BUDGET_MIN_TOKENS": True},
        {"BUDGET_MIN_COST_DOLLARS": "NaN"},
        {"BUDGET_MIN_COST_DOLLARS": None},
        {"BUDGET": 1},
    ],
    ids=str,
)
def test_settings_that_are_no_good(settings, wrong):
    settings.ANALYTICS = wrong
    with pytest.raises(ImproperlyConfigured, match=r"ANALYTICS"):
        analytics_settings()
    with pytest.raises(SystemCheckError, match=r"analytics\.E001"):
        call_command("check")


def test_the_defaults(settings):
    assert analytics_settings().BUDGET_MIN_COST_DOLLARS == Decimal(settings.ANALYTICS["BUDGET_MIN_COST_DOLLARS"]) == 1
    settings.ANALYTICS = {}
    assert (analytics_settings().BUDGET_MIN_COST_DOLLARS, analytics_settings().BUDGET_MIN_TOKENS) == (1, 100_000)
