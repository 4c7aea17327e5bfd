"""Vector searches of a `pymilvus` client: time, number of results, errors, and a span each.

Nothing here reads vectors, filters or what was found. Spans follow OpenTelemetry's semantic conventions for databases.
"""

import functools
import inspect
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from opentelemetry import trace
from opentelemetry.trace import SpanKind
from prometheus_client import Counter, Histogram

from monitoring.failures import mark_failed
from monitoring.labels import bounded
from monitoring.metrics import MILVUS_ERRORS, MILVUS_SEARCH_RESULTS, MILVUS_SEARCH_SECONDS

logger = logging.getLogger(__name__)
tracer = trace.get_tracer(__name__)

_Client = TypeVar("_Client")


def observe_milvus(client: _Client) -> _Client:
    """Observe `search` and `hybrid_search` of a `MilvusClient` or `AsyncMilvusClient`, and return that client.

    milvus_search_results has one observation for each vector that was searched for. A search that fails is timed too;
    one whose task is cancelled is no error. Iterators and queries are not searches.
    """
    if not getattr(client, "_is_observed", False):
        client._is_observed = True  # type: ignore[attr-defined]
        for operation in ("search", "hybrid_search"):
            setattr(client, operation, _observed(operation, getattr(client, operation)))
    return client


def _observed(operation: str, call: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(inspect.unwrap(call)):

        @functools.wraps(call)
        async def search_async(collection_name: str, *args: Any, **kwargs: Any) -> Any:
            with _Search(operation, collection_name).making() as search:
                search.answer = await call(collection_name, *args, **kwargs)
            return search.answer

        return search_async

    @functools.wraps(call)
    def search_sync(collection_name: str, *args: Any, **kwargs: Any) -> Any:
        with _Search(operation, collection_name).making() as search:
            search.answer = call(collection_name, *args, **kwargs)
        return search.answer

    return search_sync


class _Search:
    """One search: recorded when it is over."""

    def __init__(self, operation: str, collection_name: str) -> None:
        self.answer: Any = None
        self._collection = bounded("collection", collection_name)
        self._span = tracer.start_span(
            f"{operation} {self._collection}",
            kind=SpanKind.CLIENT,
            attributes={
                "db.system.name": "milvus",
                "db.operation.name": operation,
                "db.collection.name": str(collection_name)[:100],
            },
        )
        self._started = time.perf_counter()

    @contextmanager
    def making(self) -> Iterator["_Search"]:
        try:
            with trace.use_span(self._span, record_exception=False, set_status_on_exception=False):
                yield self
        except BaseException as error:
            self._end(error)
            raise
        self._end()

    def _end(self, error: BaseException | None = None) -> None:
        seconds = time.perf_counter() - self._started
        try:
            series = _series(self._collection)
            series.seconds.observe(seconds)
            if isinstance(error, Exception):
                series.errors.inc()
                mark_failed(self._span, error)
                if isinstance(code := getattr(error, "code", None), int):  # of a MilvusException
                    self._span.set_attribute("db.response.status_code", str(code))
            elif error is None:
                results = [len(hits) for hits in self.answer]
                for count in results:
                    series.results.observe(count)
                self._span.set_attribute("db.response.returned_rows", sum(results))
        except Exception:  # a full disk under the shared metrics must not become a failed request
            logger.exception("a Milvus search could not be recorded")
        self._span.end()


class _Series(NamedTuple):
    seconds: Histogram
    results: Histogram
    errors: Counter


@functools.cache
def _series(collection: str) -> _Series:
    """All are born together: a collection whose searches never failed has 0 errors, not none."""
    return _Series(
        MILVUS_SEARCH_SECONDS.labels(collection),
        MILVUS_SEARCH_RESULTS.labels(collection),
        MILVUS_ERRORS.labels(collection),
    )
