"""conversation_success_rate, read from the database at scrape time."""

from datetime import UTC, datetime, timedelta

import pytest
from django.db import connection
from django.test import Client

from tests.monitoring.conftest import sample
from voicehelper.conversations import success_rate
from voicehelper.conversations.models import Conversation
from voicehelper.conversations.services import complete_conversation, create_conversation, fail_conversation
from voicehelper.conversations.success_rate import MAX_TENANTS, SUCCESS_RATES, SuccessRateCollector
from voicehelper.identity.services import create_tenant, register_user

NAME = "conversation_success_rate"


def rates():
    """(mode, tenant) -> rate."""
    [family] = SuccessRateCollector().collect()
    return {(one.labels["mode"], one.labels["tenant_id"]): one.value for one in family.samples}


def end(user, mode, *, completed=0, failed=0):
    for ending, count in ((complete_conversation, completed), (fail_conversation, failed)):
        for _ in range(count):
            conversation = create_conversation(user=user, title="Roadmap", mode=mode)
            ending(user=user, conversation_id=conversation.id)


def test_the_rate_is_that_of_a_tenants_conversations_in_a_mode(bob, charlie):
    end(bob, "chat", completed=3, failed=1)
    end(bob, "voice", failed=2)
    end(charlie, "chat", completed=1)
    create_conversation(user=bob, title="Not ended", mode="agent")
    bobs, charlies = str(bob.tenant_id), str(charlie.tenant_id)
    assert rates() == {("chat", bobs): 0.75, ("voice", bobs): 0.0, ("chat", charlies): 1.0}


def test_what_ended_long_ago_does_not_count(bob):
    end(bob, "chat", completed=1, failed=1)
    failed = Conversation.objects.filter(status="failed")
    failed.update(ended_at=datetime.now(UTC) - timedelta(hours=23, minutes=59))
    assert list(rates().values()) == [0.5]
    failed.update(ended_at=datetime.now(UTC) - timedelta(hours=24, minutes=1))
    assert list(rates().values()) == [1.0]
    Conversation.objects.update(ended_at=datetime.now(UTC) - timedelta(days=2))
    assert rates() == {}


def test_the_largest_tenants_have_series(bob, charlie, monkeypatch):
    monkeypatch.setattr(success_rate, "MAX_TENANTS", 1)
    end(bob, "chat", completed=1)
    end(bob, "voice", completed=1)
    end(charlie, "chat", completed=3)
    assert rates() == {("chat", str(charlie.tenant_id)): 1.0}


@pytest.mark.django_db(transaction=True)
def test_a_scrape_has_it(bob):
    end(bob, "chat", completed=1, failed=1)
    text = Client().get("/metrics").content.decode()
    assert sample(text, NAME, mode="chat", tenant_id=str(bob.tenant_id)) == 0.5
    assert sample(text, "monitoring_collector_up", collector="SuccessRateCollector") == 1


@pytest.mark.django_db
def test_the_query_uses_its_index(django_assert_num_queries):
    """EXPLAIN with 50,000 conversations, of which one in fifty ended in the last day."""
    user = register_user(tenant=create_tenant(name="Large"), username="dave", password="dave's password")
    with connection.cursor() as cursor:
        cursor.execute(
            """INSERT INTO conversations_conversation
                   (id, tenant_id, user_id, title, mode, message_count, created_at, updated_at, status, ended_at)
               SELECT gen_random_uuid(), %s, %s, 'Roadmap', 'chat', 0, now(), now(), 'completed',
                      now() - n %% 50 * interval '1 day'
                 FROM generate_series(1, 50000) n""",
            [user.tenant_id, user.id],
        )
        # Now, and not under the time limit that the collector leaves in the test's transaction.
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
        cursor.execute("ANALYZE conversations_conversation")
        since = datetime.now(UTC) - timedelta(hours=23)
        cursor.execute(f"EXPLAIN {SUCCESS_RATES}", [since, MAX_TENANTS])
        plan = "\n".join(line for (line,) in cursor.fetchall())
    assert "conversation_ended" in plan and "Seq Scan" not in plan, plan
    with django_assert_num_queries(4):  # a savepoint, the time limit, the query
        assert rates() == {("chat", str(user.tenant_id)): 1.0}
