"""`manage.py index_documents`: after a change of the embedder or of the chunks, or when Milvus has lost its data."""

import argparse
from typing import Any
from uuid import UUID

from django.core.management.base import BaseCommand, CommandError, CommandParser

from voicehelper.knowledge.embedding import EmbedderTooSlow, EmbedderUnavailable
from voicehelper.knowledge.models import Document
from voicehelper.knowledge.services import index_document
from voicehelper.knowledge.vectors import VectorsUnavailable


class Command(BaseCommand):
    help = "Index documents anew, the oldest first. To do it again changes nothing."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--tenant-id", type=_uuid, help="those of one tenant")
        parser.add_argument("--status", choices=Document.Status.values, help="those in this status")

    def handle(self, **options: Any) -> None:
        documents = Document.objects.order_by("id")
        if options["tenant_id"]:
            documents = documents.filter(tenant_id=options["tenant_id"])
        if options["status"]:
            documents = documents.filter(status=options["status"])
        done = left_out = 0
        for document_id in documents.values_list("id", flat=True):
            try:
                index_document(document_id=document_id, again=True)
            except EmbedderTooSlow as error:
                left_out += 1
                self.stderr.write(f"left out: {document_id}: {error}")
                continue
            except (VectorsUnavailable, EmbedderUnavailable) as error:
                raise CommandError(
                    f"stopped at document {document_id}, after {done}: {type(error).__name__}: {error}"
                ) from error
            done += 1
        self.stdout.write(f"{done} documents")
        if left_out:
            raise CommandError(f"{left_out} left out, which take too long to embed")


def _uuid(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a UUID") from error
