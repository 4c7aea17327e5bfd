"""Every metric: name, type, labels, buckets, meaning; and their exposition for a scrape."""

import logging
from collections.abc import Iterable
from functools import partial

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from monitoring import shared_files
from monitoring.readers import Reader, read_all
from monitoring.text_format import encode

logger = logging.getLogger(__name__)

# One series less for each counter and histogram, and the same series with several workers, which have none.
disable_created_metrics()  # type: ignore[no-untyped-call]

LATENCY_BUCKETS_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
GRPC_BUCKETS_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
DB_BUCKETS_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5)
LLM_BUCKETS_SECONDS = (0.1, 0.5, 1, 2, 5, 10, 30)
MILVUS_BUCKETS_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1)
MILVUS_BUCKETS_RESULTS = (0, 1, 5, 10, 20, 50, 100)

# --- HTTP (recorded by MonitoringMiddleware; names, labels and buckets are the specification's) ---
HTTP_REQUESTS = Counter(
    "http_requests_total",
    "Total number of HTTP requests",
    ["service", "method", "path", "status"],
)
HTTP_REQUEST_SECONDS = Histogram(
    "http_request_duration_seconds",
    "HTTP request duration in seconds",
    ["service", "method", "path"],
    buckets=LATENCY_BUCKETS_SECONDS,
)

# --- gRPC (recorded by the interceptors of monitoring.grpc; the specification's) ---
GRPC_REQUESTS = Counter(
    "grpc_requests_total",
    "Total number of gRPC requests",
    ["service", "method", "status"],
)
GRPC_REQUEST_SECONDS = Histogram(
    "grpc_request_duration_seconds",
    "gRPC request duration in seconds",
    ["service", "method"],
    buckets=GRPC_BUCKETS_SECONDS,
)

# --- LLM (recorded by monitoring.llm; the specification's, and the errors) ---
LLM_TOKENS = Counter(
    "llm_tokens_used_total",
    "Total number of LLM tokens used",
    ["model", "provider", "token_type"],
)
LLM_COST_DOLLARS = Counter(
    "llm_cost_dollars_total",
    "Total LLM cost in dollars",
    ["model", "provider", "tenant_id"],
)
LLM_REQUEST_SECONDS = Histogram(
    "llm_request_duration_seconds",
    "LLM request duration in seconds",
    ["model", "provider"],
    buckets=LLM_BUCKETS_SECONDS,
)
LLM_ERRORS = Counter(
    "llm_request_errors_total",
    "LLM requests that failed; they are in llm_request_duration_seconds too",
    ["model", "provider"],
)
LLM_UNPRICED = Counter(
    "llm_requests_without_price_total",
    "LLM requests missing in llm_cost_dollars_total, because LLM_PRICES has no price for their model",
    ["model", "provider"],
)

# --- Database (recorded by monitoring.database; the specification's, and the errors) ---
DB_QUERY_SECONDS = Histogram(
    "db_query_duration_seconds",
    "Database query duration in seconds",
    ["service", "operation", "table"],
    buckets=DB_BUCKETS_SECONDS,
)
DB_QUERY_ERRORS = Counter(
    "db_query_errors_total",
    "Database queries that failed; they are in db_query_duration_seconds too",
    ["service", "operation", "table"],
)

# --- Cache (recorded by the backends of monitoring.caches; the specification's, and the errors) ---
CACHE_HITS = Counter(
    "cache_hits_total",
    "Total number of cache hits",
    ["cache_name", "operation"],
)
CACHE_MISSES = Counter(
    "cache_misses_total",
    "Total number of cache misses",
    ["cache_name", "operation"],
)
CACHE_ERRORS = Counter(
    "cache_errors_total",
    "Cache operations that failed: neither hits nor misses",
    ["cache_name", "operation"],
)

# --- Vector search (recorded by monitoring.milvus; the specification's, and the errors) ---
MILVUS_SEARCH_SECONDS = Histogram(
    "milvus_search_duration_seconds",
    "Milvus search duration in seconds",
    ["collection"],
    buckets=MILVUS_BUCKETS_SECONDS,
)
MILVUS_SEARCH_RESULTS = Histogram(
    "milvus_search_results",
    "Number of results returned by Milvus search",
    ["collection"],
    buckets=MILVUS_BUCKETS_RESULTS,
)
MILVUS_ERRORS = Counter(
    "milvus_search_errors_total",
    "Milvus searches that failed; they are in milvus_search_duration_seconds too",
    ["collection"],
)

# --- Tracing (recorded by monitoring.span_queue) ---
TRACING_SPANS_DROPPED = Counter(
    "tracing_spans_dropped_total",
    "Spans that were to be exported, or held in case their trace fails, and were given up, by reason",
    ["reason"],
)

# --- Relay (recorded by relay_outbox) ---
OUTBOX_PUBLISHED = Counter(
    "outbox_events_published_total",
    "Events acknowledged by Kafka",
    ["topic"],
)
OUTBOX_PUBLISH_FAILURES = Counter(
    "outbox_publish_failures_total",
    "Events that Kafka refused or did not acknowledge, by reason",
    ["topic", "reason"],
)
OUTBOX_PUBLISH_BATCH_SECONDS = Histogram(
    "outbox_publish_batch_duration_seconds",
    "Time from reading a batch out of the outbox to moving the cursor past it, in seconds",
    buckets=LATENCY_BUCKETS_SECONDS,
)
OUTBOX_RELAY_LEADER = Gauge(
    "outbox_relay_leader",
    "1 in the relay that publishes, 0 in its standbys; the sum over all processes should be 1",
    multiprocess_mode="livesum",
)

# --- Worker processes (recorded by the process that keeps them going) ---
# Of its own registry: that process answers scrapes with what the workers count, and this.
_SUPERVISION = CollectorRegistry()
CONSUMER_WORKER_RESTARTS = Counter(
    "consumer_worker_restarts_total",
    "Worker processes that died and were started again, by the worker's number",
    ["worker"],
    registry=_SUPERVISION,
)

# --- Consumers (recorded by consume) ---
CONSUMER_HANDLED = Counter(
    "consumer_events_handled_total",
    "Events whose handlers' transaction committed",
    ["consumer", "event_type"],
)
CONSUMER_DUPLICATES = Counter(
    "consumer_events_duplicate_total",
    "Events delivered again after they had been handled, and therefore left alone",
    ["consumer"],
)
CONSUMER_SKIPPED = Counter(
    "consumer_events_skipped_total",
    "Events of a type that the consumer has no handler for",
    ["consumer"],
)
CONSUMER_RETRIES = Counter(
    "consumer_event_retries_total",
    "Further attempts at events whose handler had failed",
    ["consumer"],
)
CONSUMER_DEAD_LETTERED = Counter(
    "consumer_events_dead_lettered_total",
    "Events parked as dead letters, by reason",
    ["consumer", "reason"],
)
CONSUMER_HANDLER_SECONDS = Histogram(
    "consumer_handler_duration_seconds",
    "Time a handler took, in seconds",
    ["consumer", "handler"],
    buckets=LATENCY_BUCKETS_SECONDS,
)
CONSUMER_LAG = Gauge(
    "consumer_lag_events",
    "Events in the partition that the consumer has not handled yet",
    ["consumer", "topic", "partition"],
    multiprocess_mode="livemostrecent",
)
CONSUMER_LAG_SECONDS = Gauge(
    "consumer_lag_seconds",
    "Age of the last event handled in the partition while later ones wait, in seconds; 0 when none waits",
    ["consumer", "topic", "partition"],
    multiprocess_mode="livemostrecent",
)
CONSUMER_COMMIT_HOOK_FAILURES = Counter(
    "consumer_commit_hook_failures_total",
    "Functions given to transaction.on_commit() in a handler that raised; the handler's effects are committed",
    ["consumer"],
)

# --- Lag as Kafka sees it (recorded by the leading relay; true also of a consumer that is dead) ---
CONSUMER_GROUP_LAG = Gauge(
    "consumer_group_lag_events",
    "Events in the partition that the consumer's group has not committed; no series while that cannot be measured",
    ["consumer", "topic", "partition"],
    multiprocess_mode="livemostrecent",
)
CONSUMER_GROUP_LAG_SECONDS = Gauge(
    "consumer_group_lag_seconds",
    "Age of the first event in the partition that the consumer's group has not committed, 0 when there is none",
    ["consumer", "topic", "partition"],
    multiprocess_mode="livemostrecent",
)
CONSUMER_GROUP_LAG_FAILURES = Counter(
    "consumer_group_lag_failures_total",
    "Times that the lag of the consumer's group could not be measured",
    ["consumer"],
)

# --- State of the domain, read at scrape time: call it for a family to fill (the specification's) ---
CONVERSATION_SUCCESS_RATE = partial(
    GaugeMetricFamily,
    "conversation_success_rate",
    "Conversation success rate by mode (0.0-1.0)",
    labels=["mode", "tenant_id"],
)

# --- Deliveries, read at scrape time: call one for a family to fill (yielded by notifications' BacklogCollector) ---
DELIVERIES_PENDING = partial(
    GaugeMetricFamily,
    "notification_deliveries_pending",
    "E-mails or webhooks that are to be sent, counted to 10,000",
    labels=["channel"],
)
DELIVERIES_FAILING = partial(
    GaugeMetricFamily,
    "notification_deliveries_failing",
    "Those of them that could not be sent before, and are tried again",
    labels=["channel"],
)
DELIVERIES_OVERDUE_SECONDS = partial(
    GaugeMetricFamily,
    "notification_deliveries_overdue_seconds",
    "How long the one has been due that nobody has taken for longest, 0 when none is due",
    labels=["channel"],
)

# --- State of the outbox, read at scrape time: call one for a family to fill (yielded by StatusCollector) ---
OUTBOX_PENDING = partial(
    GaugeMetricFamily,
    "outbox_pending_events",
    "Committed events not published yet, counted to 100,000",
)
OUTBOX_OLDEST_PENDING_AGE = partial(
    GaugeMetricFamily,
    "outbox_oldest_pending_age_seconds",
    "Age of the oldest pending event",
)
OUTBOX_OLDEST_OPEN_TRANSACTION_AGE = partial(
    GaugeMetricFamily,
    "outbox_oldest_open_transaction_age_seconds",
    "Age of the oldest open transaction that has written events: those wait for its end",
)
OUTBOX_UNDELIVERABLE = partial(
    GaugeMetricFamily,
    "outbox_undeliverable_events",
    "Events parked because the broker refused them or one before",
)
OUTBOX_RELAY_PAUSED = partial(
    GaugeMetricFamily,
    "outbox_relay_paused",
    "1 while an operator has paused the relay, else 0",
)
CONSUMER_DEAD_LETTERS = partial(
    GaugeMetricFamily,
    "consumer_dead_letters",
    "Open dead letters",
    labels=["consumer"],
)
CONSUMER_PAUSED = partial(
    GaugeMetricFamily,
    "consumer_paused",
    "1 while the consumer is paused by an operator or its failure guard, else 0",
    labels=["consumer"],
)
PROCESSED_EVENTS_ROWS = partial(
    GaugeMetricFamily,
    "processed_events_rows",
    "Processed marks, as PostgreSQL estimates them",
)
PROCESSED_EVENTS_BYTES = partial(
    GaugeMetricFamily,
    "processed_events_bytes",
    "Disk space of the processed marks with their indexes",
)

# --- State read at scrape time, by collectors that other packages register ---
_readers: dict[Collector, Reader] = {}


def register_collector(collector: Collector) -> None:
    """Expose what `collector.collect()` yields on every /metrics of this process; registering twice is once.

    It is called in a thread of its own for each scrape and may read the database. If it raises or takes longer than
    `monitoring.readers.READ_SECONDS`, the scrape goes on without it and `monitoring_collector_up{collector}` is 0.
    """
    _readers.setdefault(collector, Reader(collector))


def unregister_collector(collector: Collector) -> None:
    """Expose it no longer."""
    _readers.pop(collector, None)


class _Everything(Collector):
    """This process's metrics (all workers' metrics where they share a directory) and the collectors'."""

    def collect(self) -> Iterable[Metric]:
        # One process answers for all from shared files: one of the web workers, the parent of the consumer's.
        yield from shared_files.collect() if shared_files.are_used() else REGISTRY.collect()
        yield from _SUPERVISION.collect()
        if not _readers:
            return
        up = GaugeMetricFamily(
            "monitoring_collector_up",
            "0 when the state that this collector reads could not be read for this scrape",
            labels=["collector"],
        )
        for reader, read in read_all(list(_readers.values())).items():
            name = type(reader.collector).__name__
            error = read.exception() if read.done() else TimeoutError("it takes too long")
            up.add_metric([name], error is None)
            if error is None:
                yield from read.result()
            else:
                logger.warning("metrics collector %s failed", name, exc_info=error)
        yield up


def exposition(accept: str = "") -> tuple[bytes, str]:
    """Return all metrics and their content type: OpenMetrics if `accept` says so, else Prometheus text."""
    return encode(_Everything(), accept)
