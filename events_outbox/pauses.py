"""Pausing a consumer: its members stay in their group and handle nothing until it is resumed."""

from django.db import transaction
from django.utils import timezone

from .models import ConsumerPause
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
    return {
        pause.consumer: f"since {timezone.localtime(pause.paused_at).isoformat(sep=' ', timespec='seconds')} "
        f"by {pause.paused_by}: {pause.reason}"
        for pause in ConsumerPause.objects.all()
    }
