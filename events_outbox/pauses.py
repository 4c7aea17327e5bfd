"""Pausing: a consumer's members stay in their group and handle nothing, the relay's leader leads and publishes nothing.

Until it is resumed.
"""

from django.db import transaction
from django.utils import timezone

from .models import ConsumerPause, RelayPause
from .operators import note_action


def pause(consumer: str, *, by: str, reason: str) -> bool:
    """Pause a consumer; its members notice within about a second. False: it is paused already, and stays as it is."""
    with transaction.atomic():
        _, is_new = ConsumerPause.objects.get_or_create(
            consumer=consumer, defaults={"paused_by": by[:150], "reason": reason}
        )
        if is_new:
            note_action("consumer.paused", consumer=consumer, subject=consumer, by=by, reason=reason)
    return is_new


def resume(consumer: str, *, by: str) -> bool:
    """Let a paused consumer go on. False: it was not paused."""
    with transaction.atomic():
        deleted, _ = ConsumerPause.objects.filter(consumer=consumer).delete()
        if deleted:
            note_action("consumer.resumed", consumer=consumer, subject=consumer, by=by)
    return bool(deleted)


def is_paused(consumer: str) -> bool:
    """Whether the consumer is paused."""
    return ConsumerPause.objects.filter(consumer=consumer).exists()


def paused() -> dict[str, str]:
    """Return the paused consumers, and of each since when, by whom and why, in words."""
    return {pause.consumer: in_words(pause) for pause in ConsumerPause.objects.all()}


def in_words(pause: ConsumerPause | RelayPause) -> str:
    """Since when, by whom and why."""
    since = timezone.localtime(pause.paused_at).isoformat(sep=" ", timespec="seconds")
    return f"since {since} by {pause.paused_by}: {pause.reason}"


def pause_relay(*, by: str, reason: str) -> bool:
    """Pause the relay, whoever leads: within about a second it publishes nothing any more.

    Events go on being emitted, and wait. False: it is paused already, and stays as it is.
    """
    with transaction.atomic():
        _, is_new = RelayPause.objects.get_or_create(id=1, defaults={"paused_by": by[:150], "reason": reason})
        if is_new:
            note_action("relay.paused", consumer="", subject="relay", by=by, reason=reason)
    return is_new


def resume_relay(*, by: str) -> bool:
    """Let the paused relay go on. False: it was not paused."""
    with transaction.atomic():
        deleted, _ = RelayPause.objects.all().delete()
        if deleted:
            note_action("relay.resumed", consumer="", subject="relay", by=by)
    return bool(deleted)


def relay_pause() -> RelayPause | None:
    """The relay's pause; None: it is not paused."""
    return RelayPause.objects.first()
