"""Answers that are kept, to be given again."""

from django.conf import settings
from django.db import models
from django.db.models.functions import Now


class KeptAnswer(models.Model):
    """What a POST with a key was answered. The row is written in the transaction of what the POST does."""

    id = models.BigAutoField(primary_key=True)
    # No index of its own: the constraint below begins with it.
    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="+", db_index=False)
    key = models.CharField(max_length=255)
    fingerprint = models.BinaryField(max_length=32, help_text="SHA-256 of the method, path and body.")
    status = models.PositiveSmallIntegerField(default=0, help_text="0 only within the transaction that writes it.")
    body = models.JSONField(null=True)
    created_at = models.DateTimeField(db_default=Now(), db_index=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["user", "key"], name="kept_answer_key")]

    def __str__(self) -> str:
        return f"{self.key}: {self.status}"
