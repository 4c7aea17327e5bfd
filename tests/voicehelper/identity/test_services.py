import pytest
from django.core.exceptions import ValidationError
from django.db import transaction

from events_outbox.models import OutboxEvent
from tests.voicehelper.conftest import PASSWORD
from voicehelper.identity.models import Tenant, User
from voicehelper.identity.services import create_tenant, register_user


def test_create_tenant_emits_the_fact(db, emitted):
    tenant = create_tenant(name="Demo")

    [event] = emitted("identity.tenant.created")
    assert event.topic == "identity.events"
    assert event.aggregate_id == event.tenant_id == event.payload.tenant_id == str(tenant.id)
    assert event.payload.name == "Demo"
    assert event.user_id == ""


def test_register_user_emits_the_fact(tenant, alice, emitted):
    bob = register_user(tenant=tenant, username="bob", password=PASSWORD, by=alice)

    event = emitted("identity.user.created")[-1]
    assert event.aggregate_id == event.payload.user_id == str(bob.id)
    assert event.tenant_id == str(tenant.id)
    assert event.user_id == str(alice.id)
    assert (event.payload.username, event.payload.role) == ("bob", "member")
    assert bob.check_password(PASSWORD)


def test_rolled_back_writes_emit_nothing(db):
    with pytest.raises(RuntimeError), transaction.atomic():
        tenant = create_tenant(name="Demo")
        register_user(tenant=tenant, username="bob", password=PASSWORD)
        assert OutboxEvent.objects.count() == 2
        raise RuntimeError

    assert OutboxEvent.objects.count() == 0
    assert Tenant.objects.count() == User.objects.count() == 0


def test_a_weak_password_is_refused(tenant):
    with pytest.raises(ValidationError):
        register_user(tenant=tenant, username="bob", password="12345")

    assert not User.objects.exists()
