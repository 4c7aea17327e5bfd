"""Writes of the notification domain. What becomes of a delivery is in `deliveries`."""

import json
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

from django.conf import settings
from django.db import transaction
from django.db.models import Q
from django.db.models.functions import Coalesce, Now
from django.utils import timezone
from google.protobuf.message import Message

from events_outbox import Event, NewEvent, emit_events
from monitoring.context import correlation_id
from voicehelper.identity.models import Tenant, User
from voicehelper.proto.notification_pb2 import NotificationCreatedPayload, NotificationSentPayload

from .events import NOTIFICATION_CREATED, NOTIFICATION_SENT
from .kinds import KINDS, TEST, USER_CHANNELS, Facts, Kind
from .models import Channel, Delivery, Notification, NotificationPreference, WebhookEndpoint
from .texts import Texts, line, render
from .webhooks import ROTATION_OVERLAP, check_url

METADATA = {"source": "notification-service"}
DELIVERIES_KEPT = timedelta(days=30)
NOTIFICATIONS_KEPT = timedelta(days=365)
"""What is older is deleted, and events that are older are not told any more."""


class PreferenceRefused(Exception):
    """A preference that nobody has a say in."""


class TooManyWebhooks(Exception):
    """The tenant has as many webhooks as it may."""


# -- notifications


@transaction.atomic
def notify(
    *,
    recipient: User,
    kind: str,
    aggregate_id: str,
    subject: str,
    body: str = "",
    in_app: bool = True,
    event_id: UUID | None = None,
) -> Notification:
    """Tell a user of something and emit notification.created, and notification.sent for the app.

    `in_app`: whether the user sees it in the app, or is told by other ways alone. Raises IntegrityError when the user
    was told of the event `event_id` already.
    """
    notification = Notification(
        tenant_id=recipient.own_tenant_id,
        recipient=recipient,
        kind=kind,
        aggregate_id=aggregate_id,
        subject=subject,
        body=body,
        in_app=in_app,
        event_id=event_id,
    )
    _keep([notification])
    return notification


def _keep(notifications: Sequence[Notification]) -> None:
    """Insert them and emit what there is to say of them, in as many queries for many as for one."""
    Notification.objects.bulk_create(notifications)
    emit_events(event for notification in notifications for event in _events_of(notification))


def _events_of(notification: Notification) -> Iterator[NewEvent]:
    about, recipient = str(notification.id), str(notification.recipient_id)
    created = NotificationCreatedPayload(
        notification_id=about, recipient_id=recipient, kind=notification.kind, subject=notification.subject
    )
    sent = NotificationSentPayload(
        notification_id=about, recipient_id=recipient, channel=Channel.IN_APP, kind=notification.kind, attempts=1
    )
    payloads: dict[str, Message] = {NOTIFICATION_CREATED: created}
    if notification.in_app:
        payloads[NOTIFICATION_SENT] = sent
    for event_type, payload in payloads.items():
        yield NewEvent(
            event_type=event_type,
            payload=payload,
            aggregate_id=notification.id,
            tenant_id=notification.tenant_id,
            metadata=METADATA,
        )


@transaction.atomic
def mark_read(*, recipient: User, notification_id: UUID) -> Notification:
    """Mark a user's notification as read; a second time changes nothing.

    Raises Notification.DoesNotExist when the user has no such notification.
    """
    own = Notification.objects.for_recipient(recipient).filter(id=notification_id)
    own.update(read_at=Coalesce("read_at", Now()))
    return own.get()


@transaction.atomic
def announce(*, event: Event[Any], tenant_id: UUID) -> None:
    """Tell whom an event of one of KINDS concerns: in the app now, by e-mail and webhook through deliveries.

    Users who prefer it so are left out, and so is whoever was told of this event before. Where nobody can know that any
    more, as what was told is no longer kept, the event is too old to be told.
    """
    tenant = Tenant.objects.filter(id=tenant_id).first()
    age = timezone.now() - event.timestamp
    if tenant is None or age >= NOTIFICATIONS_KEPT:
        return
    kind = KINDS[event.event_type]
    facts = kind.facts(event, tenant_id)
    texts = render(kind.event_type, {**facts.context, "tenant": line(tenant.name)})
    goes_out = age < DELIVERIES_KEPT
    _tell_users(event, kind, texts, _recipients(kind, facts, tenant_id), goes_out=goes_out)
    if goes_out:
        _tell_webhooks(event, tenant_id, facts, texts)


def _recipients(kind: Kind, facts: Facts, tenant_id: UUID) -> list[User]:
    """Active users of the tenant, each once."""
    meant = Q(pk__in=[])
    if kind.tells_concerned and facts.concerned is not None:
        meant |= Q(id=facts.concerned)
    if kind.tells_admins:
        meant |= Q(role=User.Role.ADMIN)
    users = User.objects.filter(meant, tenant_id=tenant_id, is_active=True)
    return list(users.exclude(id=facts.actor).order_by("id") if facts.actor else users.order_by("id"))


def _tell_users(event: Event[Any], kind: Kind, texts: Texts, recipients: Sequence[User], *, goes_out: bool) -> None:
    told = set(
        Notification.objects.filter(event_id=event.event_id, recipient__in=recipients).values_list(
            "recipient_id", flat=True
        )
    )
    choices = _choices_of(recipients, kind)
    notifications, mailed = [], []
    for user in recipients:
        if user.id in told:
            continue
        in_app, by_email = (choices.get((user.id, channel), kind.is_default(channel)) for channel in USER_CHANNELS)
        in_app = in_app or kind.is_fixed(Channel.IN_APP)
        by_email = by_email and bool(user.email) and settings.EMAIL_IS_CONFIGURED and goes_out
        if not (in_app or by_email):
            continue
        notification = Notification(
            tenant_id=user.own_tenant_id,
            recipient=user,
            kind=kind.event_type,
            aggregate_id=event.aggregate_id,
            subject=texts.subject,
            body=texts.body,
            in_app=in_app,
            event_id=event.event_id,
        )
        notifications.append(notification)
        if by_email:
            mailed.append(notification)
    _keep(notifications)
    Delivery.objects.bulk_create(
        Delivery(
            tenant_id=notification.tenant_id,
            channel=Channel.EMAIL,
            kind=kind.event_type,
            event_id=event.event_id,
            correlation_id=event.correlation_id,
            notification=notification,
            recipient_id=notification.recipient_id,
            subject=texts.subject,
            body=texts.email_text,
            body_html=texts.email_html,
        )
        for notification in mailed
    )


def _choices_of(users: Sequence[User], kind: Kind) -> dict[tuple[UUID, str], bool]:
    preferences = NotificationPreference.objects.filter(user__in=users, kind=kind.event_type)
    return {(preference.user_id, preference.channel): preference.enabled for preference in preferences}


def _tell_webhooks(event: Event[Any], tenant_id: UUID, facts: Facts, texts: Texts) -> None:
    endpoints = [
        endpoint
        for endpoint in WebhookEndpoint.objects.for_tenant(tenant_id).filter(active=True).order_by("id")
        if not endpoint.kinds or event.event_type in endpoint.kinds
    ]
    told = set(
        Delivery.objects.filter(event_id=event.event_id, endpoint__in=endpoints).values_list("endpoint_id", flat=True)
    )
    data = {
        "event_id": str(event.event_id),
        "tenant_id": str(tenant_id),
        "aggregate_id": event.aggregate_id,
        "subject": texts.subject,
        "text": texts.body,
        **facts.context,
    }
    body, now = _webhook_body(event.event_type, event.timestamp.isoformat(), data), timezone.now()
    Delivery.objects.bulk_create(
        Delivery(
            tenant_id=tenant_id,
            channel=Channel.WEBHOOK,
            kind=event.event_type,
            event_id=event.event_id,
            correlation_id=event.correlation_id,
            endpoint=endpoint,
            subject=texts.subject,
            body=body,
            next_attempt_at=max(now, endpoint.resting_until or now),
        )
        for endpoint in endpoints
        if endpoint.id not in told
    )


def _webhook_body(kind: str, happened_at: str, data: Mapping[str, Any]) -> str:
    """What is posted: the shape that the Standard Webhooks convention advises."""
    return json.dumps({"type": kind, "timestamp": happened_at, "data": data}, ensure_ascii=False, separators=(",", ":"))


@transaction.atomic
def prune(*, at_once: int = 1000) -> int:
    """Delete what is kept for long enough: at most so many deliveries and notifications. Return how many it were."""
    old = Delivery.objects.filter(id__lt=_first_id_after(DELIVERIES_KEPT)).exclude(state__in=Delivery.UNDER_WAY)
    deliveries = list(old.order_by("id").values_list("id", flat=True)[:at_once])
    old.filter(id__in=deliveries).delete()  # but what an operator has just had tried again
    forgotten = Notification.objects.filter(id__lt=_first_id_after(NOTIFICATIONS_KEPT), deliveries__isnull=True)
    notifications = list(forgotten.order_by("id").values_list("id", flat=True)[:at_once])
    Notification.objects.filter(id__in=notifications).delete()
    return len(deliveries) + len(notifications)


def _first_id_after(kept: timedelta) -> UUID:
    """Where ids of that age begin: UUIDs of version 7 begin with the milliseconds since 1970."""
    return UUID(int=int((timezone.now() - kept).timestamp() * 1000) << 80)


# -- preferences


@transaction.atomic
def set_preferences(*, user: User, preferences: Iterable[tuple[str, str, bool]]) -> None:
    """Replace what a user prefers: kind, channel, whether enabled. What is not among them follows the kind's default.

    Raises PreferenceRefused, and changes nothing, for what a user has no say in.
    """
    chosen = list(preferences)
    for kind, channel, enabled in chosen:
        if KINDS[kind].is_fixed(channel) and not enabled:
            raise PreferenceRefused(f"{kind} cannot be switched off in the app: it is the one place that keeps it.")
    lock_preferences(user=user)
    NotificationPreference.objects.filter(user=user).delete()
    NotificationPreference.objects.bulk_create(
        NotificationPreference(user=user, kind=kind, channel=channel, enabled=enabled)
        for kind, channel, enabled in chosen
        if not KINDS[kind].is_fixed(channel)
    )


def lock_preferences(*, user: User) -> None:
    """Keep what the user prefers as it is until the transaction ends: of two requests at once one waits."""
    User.objects.select_for_update(no_key=True).get(id=user.id)


# -- webhooks


@transaction.atomic
def create_webhook(*, by: User, url: str, description: str = "", kinds: Sequence[str] = ()) -> WebhookEndpoint:
    """Add a webhook to the user's tenant. Its secret: `webhooks.secret_of()`.

    Raises webhooks.AddressRefused for a URL that nothing would be sent to, TooManyWebhooks.
    """
    check_url(url)
    # Two requests at once must not make one too many.
    Tenant.objects.select_for_update(no_key=True).get(id=by.own_tenant_id)
    endpoints = WebhookEndpoint.objects.for_tenant(by.own_tenant_id)
    if endpoints.count() >= WebhookEndpoint.MOST_OF_A_TENANT:
        raise TooManyWebhooks(f"A tenant has at most {WebhookEndpoint.MOST_OF_A_TENANT} webhooks.")
    return WebhookEndpoint.objects.create(
        tenant_id=by.own_tenant_id,
        url=url,
        description=description,
        kinds=sorted(set(kinds)),
        salt=secrets.token_hex(),
        created_by=by,
    )


@transaction.atomic
def change_webhook(*, by: User, endpoint_id: UUID, **changes: Any) -> WebhookEndpoint:
    """Change `active`, `description` or `kinds` of a webhook of the user's tenant.

    Raises WebhookEndpoint.DoesNotExist when the tenant has no such webhook.
    """
    endpoint = _lock_webhook(by, endpoint_id)
    if "kinds" in changes:
        changes["kinds"] = sorted(set(changes["kinds"]))
    if changes.get("active") and (endpoint.failures or not endpoint.active):
        # It is said to be well: what waits for it need not wait any longer.
        changes |= {"failures": 0, "resting_until": None}
        Delivery.objects.waiting_for(endpoint.id).update(next_attempt_at=timezone.now())
    for name, value in changes.items():
        setattr(endpoint, name, value)
    endpoint.save(update_fields=list(changes))
    return endpoint


@transaction.atomic
def delete_webhook(*, by: User, endpoint_id: UUID) -> None:
    """Delete a webhook of the user's tenant: nothing is sent to it any more, nor what waits for it.

    Raises WebhookEndpoint.DoesNotExist when the tenant has no such webhook.
    """
    endpoint = _lock_webhook(by, endpoint_id)
    endpoint.active, endpoint.deleted_at = False, timezone.now()
    endpoint.save(update_fields=["active", "deleted_at"])


@transaction.atomic
def rotate_webhook_secret(*, by: User, endpoint_id: UUID) -> WebhookEndpoint:
    """Give a webhook of the user's tenant a new secret. For a day what is sent carries the old one's signature as well.

    Raises WebhookEndpoint.DoesNotExist when the tenant has no such webhook.
    """
    endpoint = _lock_webhook(by, endpoint_id)
    endpoint.previous_salt, endpoint.salt = endpoint.salt, secrets.token_hex()
    endpoint.previous_salt_until = timezone.now() + ROTATION_OVERLAP
    endpoint.save(update_fields=["salt", "previous_salt", "previous_salt_until"])
    return endpoint


@transaction.atomic
def try_webhook(*, by: User, endpoint_id: UUID) -> Delivery:
    """Have a test sent to a webhook of the user's tenant, as everything is sent to it: one that fails rests first.

    Raises WebhookEndpoint.DoesNotExist when the tenant has no such webhook.
    """
    endpoint = _lock_webhook(by, endpoint_id)
    test_id, now = uuid4(), timezone.now()
    subject = "This is a test."
    data = {"event_id": str(test_id), "tenant_id": str(endpoint.tenant_id), "subject": subject, "text": subject}
    return Delivery.objects.create(
        tenant_id=endpoint.tenant_id,
        channel=Channel.WEBHOOK,
        kind=TEST,
        event_id=test_id,
        correlation_id=correlation_id.get(),
        endpoint=endpoint,
        subject=subject,
        body=_webhook_body(TEST, now.isoformat(), data),
        next_attempt_at=max(now, endpoint.resting_until or now),
    )


def _lock_webhook(by: User, endpoint_id: UUID) -> WebhookEndpoint:
    return WebhookEndpoint.objects.for_tenant(by.own_tenant_id).select_for_update(no_key=True).get(id=endpoint_id)
