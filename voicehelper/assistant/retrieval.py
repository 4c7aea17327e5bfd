"""Retrieval: passages of the tenant's documents that may answer a question."""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any, Protocol
from uuid import UUID

from django.conf import settings
from opentelemetry import trace

from monitoring.failures import error_type, mark_failed

logger = logging.getLogger(__name__)
tracer = trace.get_tracer(__name__)


class Passage(Protocol):
    """What a search finds. `score`: the higher, the nearer to the query."""

    @property
    def text(self) -> str: ...
    @property
    def document_id(self) -> Any: ...
    @property
    def title(self) -> str: ...
    @property
    def score(self) -> float: ...


def passages(tenant_id: UUID, query: str, limit: int) -> Sequence[Passage]:
    """Search the tenant's documents; nothing where no search is installed.

    A search that fails is logged and finds nothing: a reply without passages is better than none.
    """
    search = _search(settings.ASSISTANT.search)
    if search is None or limit < 1:
        return []
    with tracer.start_as_current_span(
        "retrieval documents",
        attributes={"gen_ai.operation.name": "retrieval", "gen_ai.data_source.id": "documents"},
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        try:
            found = list(search(tenant_id=tenant_id, query=query, limit=limit))[:limit]
        except Exception as error:
            mark_failed(span, error)
            # Not the error's text: it may quote the question.
            logger.warning("the search failed, the reply goes without passages: %s", error_type(error))
            return []
        span.set_attribute("voicehelper.passages", len(found))
        return found


@cache
def _search(path: str) -> Callable[..., Sequence[Passage]] | None:
    module, _, name = path.rpartition(".")
    try:
        search: Callable[..., Sequence[Passage]] = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            return None
        raise  # it is there, and something that it needs is not
    return search
