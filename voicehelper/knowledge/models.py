"""Documents that a tenant's conversations can draw on."""

from uuid import UUID

from django.conf import settings
from django.db import models
from uuid_utils.compat import uuid7


class DocumentQuerySet(models.QuerySet["Document"]):
    def for_tenant(self, tenant_id: UUID) -> "DocumentQuerySet":
        """What the users of a tenant may see."""
        return self.filter(tenant_id=tenant_id)


class Document(models.Model):
    """A file that somebody uploaded. Everybody in the tenant may read, find and delete it.

        uploaded ──▶ indexed       its chunks are in the vector collection `collection`
            └──────▶ failed        `error` says why, for people

    A deleted document has no row any more.
    """

    class ContentType(models.TextChoices):
        TEXT = "text/plain"
        MARKDOWN = "text/markdown"
        PDF = "application/pdf"

    class Status(models.TextChoices):
        UPLOADED = "uploaded"
        INDEXED = "indexed"
        FAILED = "failed"

    TITLE_MAX_CHARS = 200
    FILE_NAME_MAX_CHARS = 255

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    # No index of its own: the one below begins with it.
    tenant = models.ForeignKey("identity.Tenant", on_delete=models.PROTECT, related_name="+", db_index=False)
    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="+")
    title = models.CharField(max_length=TITLE_MAX_CHARS)
    file_name = models.CharField(max_length=FILE_NAME_MAX_CHARS)
    content_type = models.CharField(max_length=50, choices=ContentType.choices)
    size_bytes = models.PositiveIntegerField()
    page_count = models.PositiveIntegerField(null=True, help_text="Of a PDF.")
    status = models.CharField(max_length=20, choices=Status.choices, default=Status.UPLOADED)
    error = models.TextField(blank=True, help_text="Why it could not be indexed.")
    chunk_count = models.PositiveIntegerField(default=0)
    collection = models.CharField(max_length=255, blank=True, help_text="The vector collection its chunks are in.")
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)
    indexed_at = models.DateTimeField(null=True)

    objects = DocumentQuerySet.as_manager()

    class Meta:
        ordering = ["-id"]
        indexes = [models.Index(fields=["tenant", "-id"], name="document_newest_first")]
        constraints = [
            models.CheckConstraint(
                condition=models.Q(status="uploaded", error="", indexed_at__isnull=True)
                | models.Q(status="indexed", error="", indexed_at__isnull=False)
                | (models.Q(status="failed", indexed_at__isnull=True) & ~models.Q(error="")),
                name="document_says_what_became_of_it",
            ),
        ]

    def __str__(self) -> str:
        return self.title


class DocumentContent(models.Model):
    """The file's bytes, in a table of their own: no list, lock or update of a document touches them."""

    document = models.OneToOneField(Document, on_delete=models.CASCADE, primary_key=True, related_name="content")
    data = models.BinaryField()

    class Meta:
        default_permissions = ()  # it is no page of the admin

    def __str__(self) -> str:
        return f"content of {self.document_id}"
