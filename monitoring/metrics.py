"""Every metric: name, type, labels, buckets, meaning; and their exposition for a scrape."""

import logging
import os
from collections.abc import Iterable

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

logger = logging.getLogger(__name__)

# One series less for each counter and histogram, and the same series with several workers, which have none.
disable_created_metrics()  # type: ignore[no-untyped-call]

LATENCY_BUCKETS_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

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

# --- State read at scrape time, by collectors that other packages register ---
_collectors: list[Collector] = []


def register_collector(collector: Collector) -> None:
    """Expose what `collector.collect()` yields on every /metrics of this process; registering twice is once.

    It is called in the thread of the scrape and may read the database. If it raises, the scrape goes on
    without it and `monitoring_collector_up{collector}` is 0.
    """
    if collector not in _collectors:
        _collectors.append(collector)


class _Everything(Collector):
    """This process's metrics (all web workers' metrics where they share a directory) and the collectors'."""

    def collect(self) -> Iterable[Metric]:
        # Each scrape reaches one of the web workers, which answers for all of them from shared files.
        shared = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        source: Collector = MultiProcessCollector(None) if shared else REGISTRY  # type: ignore[no-untyped-call]
        yield from source.collect()
        if not _collectors:
            return
        up = GaugeMetricFamily(
            "monitoring_collector_up",
            "0 when the state that this collector reads could not be read for this scrape",
            labels=["collector"],
        )
        for collector in _collectors:
            name = type(collector).__name__
            try:
                metrics = list(collector.collect())
            except Exception:
                logger.warning("metrics collector %s failed", name, exc_info=True)
                up.add_metric([name], 0)
            else:
                up.add_metric([name], 1)
                yield from metrics
        yield up


def exposition(accept: str = "") -> tuple[bytes, str]:
    """Return all metrics and their content type: OpenMetrics if `accept` says so, else Prometheus text."""
    encode, content_type = choose_encoder(accept)
    return encode(_Everything()), content_type
