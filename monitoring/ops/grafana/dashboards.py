"""Grafana's dashboards: what is on them. `make dashboards` writes them to dashboards/*.json, which Grafana reads."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parent / "dashboards"
DATASOURCE = {"type": "prometheus", "uid": "prometheus"}
RUNBOOK = "/public/docs/runbook.md"  # Grafana serves the mounted docs/ itself
COLUMNS = 24
GREEN, RED = "green", "red"

# What the alert says: from there on it is red, below if the limit is a lower one.
LIMITS: dict[str, float] = {
    "HttpErrors": 0.01,
    "HttpSlow": 1,
    "ErrorBudgetBurnsFast": 14.4,
    "GrpcErrors": 0.01,
    "GrpcSlow": 0.05,
    "OutboxPublishFailures": 0.01,
    "RelayWithoutLeader": 1,
    "RelayPaused": 0,
    "OutboxEventsWait": 60,
    "OutboxEventsUndeliverable": 0,
    "OutboxTransactionOpen": 600,
    "ConsumerLag": 10_000,
    "ConsumerLate": 600,
    "ConsumerPaused": 0,
    "ConsumerDeadLetters": 0,
    "ConsumerWorkersDie": 2,
    "DeliveriesWait": 300,
    "EmailsFail": 20,
    "LlmErrors": 0.05,
    "CacheHitRateLow": 0.7,
    "DatabaseSlow": 0.05,
    "DatabaseErrors": 0.01,
    "MilvusSlow": 0.05,
    "MilvusErrors": 0.05,
    "TargetDown": 0,
    "MonitoringCollectorDown": 1,
}
LOWER_LIMITS = {"RelayWithoutLeader", "CacheHitRateLow", "MonitoringCollectorDown"}


@dataclass(frozen=True)
class Panel:
    """`queries`: expression and legend of each. `alert`: whose limit and section of the runbook the panel shows."""

    title: str
    description: str
    unit: str
    queries: Sequence[tuple[str, str]]
    kind: str = "timeseries"
    alert: str = ""
    width: int = 12
    height: int = 8
    exemplars: bool = False


def stat(title: str, description: str, unit: str, expr: str, alert: str = "", legend: str = "") -> Panel:
    return Panel(title, description, unit, [(expr, legend)], "stat", alert, width=6, height=4)


@dataclass(frozen=True)
class Dashboard:
    """`variables`: name, the series whose label of that name offers the values. `rows`: title and panels of each."""

    name: str
    title: str
    description: str
    rows: Sequence[tuple[str, Sequence[Panel]]]
    variables: Sequence[tuple[str, str]] = field(default=())


def quantiles(metric: str, selector: str) -> list[tuple[str, str]]:
    """P50, P95 and P99 of a histogram over all its series that the selector chooses."""
    buckets = f"sum by (le) (rate({metric}_bucket{selector}[$__rate_interval]))"
    return [(f"histogram_quantile({q}, {buckets})", name) for q, name in ((0.5, "P50"), (0.95, "P95"), (0.99, "P99"))]


def rate(metric: str, by: str, selector: str = "") -> str:
    return f"sum by ({by}) (rate({metric}{selector}[$__rate_interval]))"


def p95(metric: str, by: str, selector: str = "") -> str:
    return f"histogram_quantile(0.95, {rate(metric + '_bucket', f'{by}, le', selector)})"


def slower(metric: str, le: str, by: str, selector: str) -> str:
    """Share of what took longer than the bucket `le`. Above the last bucket a quantile says nothing; this does."""
    under = rate(f"{metric}_bucket", by, selector.replace("}", f',le="{le}"}}'))
    return f"1 - {under} / ({rate(f'{metric}_count', by, selector)} > 0)"


SERVICE = '{service=~"$service"}'
SERVICE_TABLE = '{service=~"$service",table=~"$table"}'
CONSUMER = '{consumer=~"$consumer"}'
TOPIC = '{topic=~"$topic"}'
MODEL = '{model=~"$model"}'
CACHE = '{cache_name=~"$cache_name"}'
COLLECTION = '{collection=~"$collection"}'

OVERVIEW = Dashboard(
    "overview",
    "Overview",
    "Is it well? One figure from each of the other dashboards.",
    [
        (
            "Now",
            [
                stat(
                    "Alerts: page",
                    "Alerts that somebody has to act on now.",
                    "short",
                    'count(ALERTS{alertstate="firing",severity="page"}) or vector(0)',
                ),
                stat(
                    "Alerts: ticket",
                    "Alerts that somebody has to act on in working hours.",
                    "short",
                    'count(ALERTS{alertstate="firing",severity="ticket"}) or vector(0)',
                ),
                stat(
                    "Targets down",
                    "Processes that Prometheus can not scrape.",
                    "short",
                    "count(up == 0) or vector(0)",
                    "TargetDown",
                ),
                stat(
                    "Collectors up",
                    "0 when a process can not read its state from the database.",
                    "short",
                    "min(monitoring_collector_up)",
                    "MonitoringCollectorDown",
                ),
                stat(
                    "Requests with errors",
                    "Share of the requests that got a 5xx, over 5 minutes; of the worst service.",
                    "percentunit",
                    "max(service:http_errors:ratio_rate5m)",
                    "HttpErrors",
                ),
                stat(
                    "P95 of requests",
                    "5 % of the requests took longer; of the slowest service.",
                    "s",
                    "max(service:http_request_duration_seconds:p95_5m)",
                    "HttpSlow",
                ),
                stat(
                    "Oldest pending event",
                    "How long an event has waited to be published.",
                    "s",
                    "outbox:oldest_pending_age_seconds:max",
                    "OutboxEventsWait",
                ),
                stat(
                    "Lag",
                    "Events that a consumer has not committed; of the one that is furthest behind.",
                    "short",
                    "max(consumer:consumer_group_lag_events:sum)",
                    "ConsumerLag",
                ),
            ],
        ),
        (
            "Over time",
            [
                Panel(
                    "Alerts that fire",
                    "By name.",
                    "short",
                    [('sum by (alertname) (ALERTS{alertstate="firing"}) or vector(0)', "{{alertname}}")],
                ),
                Panel(
                    "Conversation success rate",
                    "Share of conversations that succeed, by mode, averaged over the tenants.",
                    "percentunit",
                    [("avg by (mode) (max by (mode, tenant_id) (conversation_success_rate))", "{{mode}}")],
                ),
                Panel(
                    "Targets",
                    "Processes that answer scrapes, by job.",
                    "short",
                    [("sum by (job) (up)", "{{job}}")],
                ),
                Panel(
                    "Duration of scrapes",
                    "How long /metrics takes to answer; 10 s is the end of patience.",
                    "s",
                    [("max by (job) (scrape_duration_seconds)", "{{job}}")],
                ),
                Panel(
                    "Spans dropped",
                    "Spans that were to be exported and were given up, by reason: the collector is away or slow.",
                    "ops",
                    [(rate("tracing_spans_dropped_total", "reason"), "{{reason}}")],
                ),
            ],
        ),
    ],
)

HTTP = Dashboard(
    "http",
    "HTTP",
    "Requests, errors, latency and error budget of the web servers. Probes and scrapes are left out of the ratios.",
    [
        (
            "Now",
            [
                stat("Requests", "Over 5 minutes.", "reqps", f"sum(service:http_requests:rate5m{SERVICE})"),
                stat(
                    "Errors",
                    "Share of the requests that got a 5xx, over 5 minutes; of the worst service.",
                    "percentunit",
                    f"max(service:http_errors:ratio_rate5m{SERVICE})",
                    "HttpErrors",
                ),
                stat(
                    "P95",
                    "5 % of the requests of the last 5 minutes took longer; of the slowest service.",
                    "s",
                    f"max(service:http_request_duration_seconds:p95_5m{SERVICE})",
                    "HttpSlow",
                ),
                stat(
                    "Burn rate",
                    "How many times faster than 99.9 % allows the error budget is spent, over the last hour.",
                    "short",
                    f"max(service:http_errors:ratio_rate1h{SERVICE}) / 0.001",
                    "ErrorBudgetBurnsFast",
                ),
            ],
        ),
        (
            "Requests",
            [
                Panel(
                    "Requests by route",
                    "Method and route pattern; /unknown is what matched none.",
                    "reqps",
                    [(rate("http_requests_total", "method, path", SERVICE), "{{method}} {{path}}")],
                ),
                Panel(
                    "Requests by status",
                    "499: the client had gone.",
                    "reqps",
                    [(rate("http_requests_total", "status", SERVICE), "{{status}}")],
                ),
                Panel(
                    "Errors by route",
                    "Requests that got a 5xx. Empty while there are none.",
                    "reqps",
                    [
                        (
                            rate("http_requests_total", "method, path, status", '{service=~"$service",status=~"5.."}'),
                            "{{method}} {{path}} {{status}}",
                        )
                    ],
                ),
                Panel(
                    "Errors, by window",
                    "Share of the requests that got a 5xx: the windows of the alerts on the error budget of 0.1 %.",
                    "percentunit",
                    [
                        (f"max(service:http_errors:ratio_rate{window}{SERVICE})", window)
                        for window in ("5m", "30m", "1h", "6h", "3d")
                    ],
                    alert="HttpErrors",
                ),
            ],
        ),
        (
            "Latency",
            [
                Panel(
                    "P50, P95, P99",
                    "Of all requests that are no probes. The diamonds are traces of single requests.",
                    "s",
                    quantiles(
                        "http_request_duration_seconds",
                        '{service=~"$service",path!~"/(health|livez|readyz|metrics)"}',
                    ),
                    alert="HttpSlow",
                    exemplars=True,
                ),
                Panel(
                    "P95 by route",
                    "5 % of the requests of a route took longer.",
                    "s",
                    [(p95("http_request_duration_seconds", "method, path", SERVICE), "{{method}} {{path}}")],
                    alert="HttpSlow",
                ),
                Panel(
                    "Durations",
                    "How many requests took how long.",
                    "s",
                    [
                        (
                            "sum by (le) (increase(http_request_duration_seconds_bucket"
                            '{service=~"$service",path!~"/(health|livez|readyz|metrics)"}[$__rate_interval]))',
                            "{{le}}",
                        )
                    ],
                    kind="heatmap",
                    width=24,
                ),
            ],
        ),
    ],
    [("service", "http_requests_total")],
)

GRPC = Dashboard(
    "grpc",
    "gRPC",
    "Calls, errors and latency of gRPC servers.",
    [
        (
            "Calls",
            [
                Panel(
                    "Calls by method",
                    "Unary calls and streams that ended.",
                    "reqps",
                    [(rate("grpc_requests_total", "service, method", SERVICE), "{{service}} {{method}}")],
                ),
                Panel(
                    "Errors by method",
                    "Calls that did not end OK. Empty while there are none.",
                    "reqps",
                    [
                        (
                            rate(
                                "grpc_requests_total", "service, method, status", '{service=~"$service",status!="OK"}'
                            ),
                            "{{service}} {{method}} {{status}}",
                        )
                    ],
                ),
                Panel(
                    "Errors",
                    "Share of the calls that failed, over 5 minutes.",
                    "percentunit",
                    [(f"service:grpc_errors:ratio_rate5m{SERVICE}", "{{service}}")],
                    alert="GrpcErrors",
                ),
                Panel(
                    "Slower than 1 s",
                    "Share of the calls of the last 5 minutes: above 5 %, P95 is more than 1 s.",
                    "percentunit",
                    [(f"service:grpc_slower_than_1s:ratio_rate5m{SERVICE}", "{{service}}")],
                    alert="GrpcSlow",
                ),
                Panel(
                    "P95 by method",
                    "The buckets end at 1 s: what is slower shows as 1 s.",
                    "s",
                    [(p95("grpc_request_duration_seconds", "service, method", SERVICE), "{{service}} {{method}}")],
                    exemplars=True,
                ),
                Panel(
                    "Slower than 1 s by method",
                    "Share of the calls.",
                    "percentunit",
                    [
                        (
                            slower("grpc_request_duration_seconds", "1.0", "service, method", SERVICE),
                            "{{service}} {{method}}",
                        )
                    ],
                    alert="GrpcSlow",
                ),
            ],
        ),
    ],
    [("service", "grpc_requests_total")],
)

EVENTS = Dashboard(
    "events",
    "Events",
    "The outbox, and the relay that publishes it to Kafka.",
    [
        (
            "Now",
            [
                stat(
                    "Pending", "Committed, not yet published; counted to 100,000.", "short", "outbox:pending_events:max"
                ),
                stat(
                    "Oldest pending",
                    "How long an event has waited to be published.",
                    "s",
                    "outbox:oldest_pending_age_seconds:max",
                    "OutboxEventsWait",
                ),
                stat(
                    "Undeliverable",
                    "Parked: refused by Kafka, or behind one that was.",
                    "short",
                    "outbox:undeliverable_events:max",
                    "OutboxEventsUndeliverable",
                ),
                stat(
                    "Leaders",
                    "Relays that publish: there should be one.",
                    "short",
                    "outbox:relay_leaders:sum",
                    "RelayWithoutLeader",
                ),
            ],
        ),
        (
            "Publishing",
            [
                Panel(
                    "Published by topic",
                    "Events that Kafka acknowledged.",
                    "ops",
                    [(rate("outbox_events_published_total", "topic", TOPIC), "{{topic}}")],
                ),
                Panel(
                    "Publish failures by reason",
                    "Events that Kafka refused or did not acknowledge.",
                    "ops",
                    [(rate("outbox_publish_failures_total", "topic, reason", TOPIC), "{{topic}} {{reason}}")],
                ),
                Panel(
                    "Publish failures",
                    "Share of the events of the last 5 minutes.",
                    "percentunit",
                    [(f"topic:outbox_publish_failures:ratio_rate5m{TOPIC}", "{{topic}}")],
                    alert="OutboxPublishFailures",
                ),
                Panel(
                    "Batch duration",
                    "From reading a batch out of the outbox to moving the cursor past it.",
                    "s",
                    quantiles("outbox_publish_batch_duration_seconds", ""),
                    exemplars=True,
                ),
            ],
        ),
        (
            "Outbox",
            [
                Panel(
                    "Pending events",
                    "Committed, not yet published; counted to 100,000.",
                    "short",
                    [("outbox:pending_events:max", "pending")],
                ),
                Panel(
                    "Oldest pending event",
                    "How long it has waited.",
                    "s",
                    [("outbox:oldest_pending_age_seconds:max", "age")],
                    alert="OutboxEventsWait",
                ),
                Panel(
                    "Oldest open transaction",
                    "How long the oldest one that emitted events has been open: those wait for its end.",
                    "s",
                    [("max(outbox_oldest_open_transaction_age_seconds)", "age")],
                    alert="OutboxTransactionOpen",
                ),
                Panel(
                    "Who leads",
                    "1 in the relay that publishes.",
                    "short",
                    [('max by (instance) (outbox_relay_leader{job="relay"})', "{{instance}}")],
                ),
                Panel(
                    "Paused",
                    "1 while an operator has paused the relay: it leads and publishes nothing.",
                    "short",
                    [("outbox:relay_paused:max", "paused")],
                    alert="RelayPaused",
                ),
            ],
        ),
    ],
    [("topic", "outbox_events_published_total")],
)

CONSUMERS = Dashboard(
    "consumers",
    "Consumers",
    "What consumers handle, how far they are behind, and what they could not handle.",
    [
        (
            "Now",
            [
                stat(
                    "Lag",
                    "Events that the groups have not committed; of the one that is furthest behind.",
                    "short",
                    f"max(consumer:consumer_group_lag_events:sum{CONSUMER})",
                    "ConsumerLag",
                ),
                stat(
                    "Oldest event not committed",
                    "Its age.",
                    "s",
                    f"max(consumer:consumer_group_lag_seconds:max{CONSUMER})",
                    "ConsumerLate",
                ),
                stat(
                    "Dead letters",
                    "Open: events that could not be handled, and wait for a person.",
                    "short",
                    f"sum(consumer:consumer_dead_letters:max{CONSUMER})",
                    "ConsumerDeadLetters",
                ),
                stat(
                    "Paused",
                    "Consumers that an operator or their failure guard has paused.",
                    "short",
                    f"sum(consumer:consumer_paused:max{CONSUMER})",
                    "ConsumerPaused",
                ),
            ],
        ),
        (
            "Lag",
            [
                Panel(
                    "Lag by consumer",
                    "Events that its group has not committed, as Kafka sees it: true also of a dead consumer.",
                    "short",
                    [(f"consumer:consumer_group_lag_events:sum{CONSUMER}", "{{consumer}}")],
                    alert="ConsumerLag",
                ),
                Panel(
                    "Age of the oldest event not committed",
                    "0 when there is none.",
                    "s",
                    [(f"consumer:consumer_group_lag_seconds:max{CONSUMER}", "{{consumer}}")],
                    alert="ConsumerLate",
                ),
                Panel(
                    "Lag by partition",
                    "One that stands out has a key with very many events, or is stuck.",
                    "short",
                    [
                        (
                            f"max by (consumer, topic, partition) (consumer_group_lag_events{CONSUMER})",
                            "{{consumer}} {{topic}} {{partition}}",
                        )
                    ],
                ),
                Panel(
                    "Lag as the consumers see it",
                    "Events that their processes have fetched or know of, and not handled.",
                    "short",
                    [(f"sum by (consumer) (consumer_lag_events{CONSUMER})", "{{consumer}}")],
                ),
                Panel(
                    "Age as the consumers see it",
                    "Age of the last event handled in a partition while later ones wait.",
                    "s",
                    [(f"max by (consumer) (consumer_lag_seconds{CONSUMER})", "{{consumer}}")],
                ),
                Panel(
                    "Lag not measured",
                    "Times that the leading relay was not told the offsets of a group.",
                    "ops",
                    [(rate("consumer_group_lag_failures_total", "consumer", CONSUMER), "{{consumer}}")],
                ),
            ],
        ),
        (
            "Handling",
            [
                Panel(
                    "Handled by event type",
                    "Events whose handlers' transaction committed.",
                    "ops",
                    [
                        (
                            rate("consumer_events_handled_total", "consumer, event_type", CONSUMER),
                            "{{consumer}} {{event_type}}",
                        )
                    ],
                ),
                Panel(
                    "Left alone",
                    "Duplicates were handled before; for what is skipped the consumer has no handler.",
                    "ops",
                    [
                        (rate("consumer_events_duplicate_total", "consumer", CONSUMER), "{{consumer}} duplicate"),
                        (rate("consumer_events_skipped_total", "consumer", CONSUMER), "{{consumer}} skipped"),
                    ],
                ),
                Panel(
                    "Handler duration, P95",
                    "5 % of the calls of a handler took longer.",
                    "s",
                    [
                        (
                            p95("consumer_handler_duration_seconds", "consumer, handler", CONSUMER),
                            "{{consumer}} {{handler}}",
                        )
                    ],
                    exemplars=True,
                ),
                Panel(
                    "Time in handlers",
                    "Seconds of each second that a handler is at work: near the number of processes is the limit.",
                    "short",
                    [
                        (
                            rate("consumer_handler_duration_seconds_sum", "consumer, handler", CONSUMER),
                            "{{consumer}} {{handler}}",
                        )
                    ],
                ),
            ],
        ),
        (
            "Failures",
            [
                Panel(
                    "Retries",
                    "Further attempts at events whose handler had failed.",
                    "ops",
                    [(rate("consumer_event_retries_total", "consumer", CONSUMER), "{{consumer}}")],
                ),
                Panel(
                    "New dead letters",
                    "Events parked in a quarter of an hour, by reason.",
                    "short",
                    [
                        (
                            f"sum by (consumer, reason) (increase(consumer_events_dead_lettered_total{CONSUMER}[15m]))",
                            "{{consumer}} {{reason}}",
                        )
                    ],
                    alert="ConsumerDeadLetters",
                ),
                Panel(
                    "Open dead letters",
                    "Neither replayed nor discarded.",
                    "short",
                    [(f"consumer:consumer_dead_letters:max{CONSUMER}", "{{consumer}}")],
                ),
                Panel(
                    "Failed commit hooks",
                    "Functions given to transaction.on_commit() in a handler that raised.",
                    "ops",
                    [(rate("consumer_commit_hook_failures_total", "consumer", CONSUMER), "{{consumer}}")],
                ),
                Panel(
                    "Workers started again",
                    "Processes of `consume --workers` that died, in a quarter of an hour. Empty without --workers.",
                    "short",
                    [("sum by (instance) (increase(consumer_worker_restarts_total[15m]))", "{{instance}}")],
                    alert="ConsumerWorkersDie",
                ),
                Panel(
                    "Processed marks",
                    "Rows, as PostgreSQL estimates them.",
                    "short",
                    [("max(processed_events_rows)", "rows")],
                    width=6,
                ),
                Panel(
                    "Space of processed marks",
                    "On disk, with indexes.",
                    "bytes",
                    [("max(processed_events_bytes)", "bytes")],
                    width=6,
                ),
            ],
        ),
        (
            "Deliveries",
            [
                Panel(
                    "Due for",
                    "How long the e-mail or webhook has been due that nobody has taken for longest.",
                    "s",
                    [("channel:notification_deliveries_overdue_seconds:max", "{{channel}}")],
                    alert="DeliveriesWait",
                ),
                Panel(
                    "Tried again",
                    "Could not be sent before. Webhooks are their receivers' matter.",
                    "short",
                    [("channel:notification_deliveries_failing:max", "{{channel}}")],
                    alert="EmailsFail",
                ),
                Panel(
                    "To be sent",
                    "Counted to 10,000, with those that are tried again later.",
                    "short",
                    [("channel:notification_deliveries_pending:max", "{{channel}}")],
                ),
            ],
        ),
    ],
    [("consumer", "consumer_paused")],
)

LLM = Dashboard(
    "llm",
    "LLM",
    "Cost, tokens, latency and errors of the language models.",
    [
        (
            "Now",
            [
                stat("Cost, 24 h", "In dollars.", "currencyUSD", "llm:llm_cost_dollars:increase1d", "LlmCostGrowth"),
                stat(
                    "Cost, 1 h",
                    "In dollars.",
                    "currencyUSD",
                    f"sum(increase(llm_cost_dollars_total{MODEL}[1h]))",
                ),
                stat("Tokens", "A second, over 15 minutes.", "ops", "llm:llm_tokens_used:rate15m", "LlmTokenSurge"),
                stat(
                    "Errors",
                    "Share of the requests of the last 15 minutes that failed; of the worst provider.",
                    "percentunit",
                    "max(provider:llm_request_errors:ratio_rate15m)",
                    "LlmErrors",
                ),
            ],
        ),
        (
            "Cost",
            [
                Panel(
                    "Cost by model",
                    "Dollars an hour.",
                    "currencyUSD",
                    [
                        (
                            f"sum by (provider, model) (increase(llm_cost_dollars_total{MODEL}[1h]))",
                            "{{provider}} {{model}}",
                        )
                    ],
                ),
                Panel(
                    "Cost by tenant",
                    "Dollars an hour; the ten that cost most.",
                    "currencyUSD",
                    [(f"topk(10, sum by (tenant_id) (increase(llm_cost_dollars_total{MODEL}[1h])))", "{{tenant_id}}")],
                ),
                Panel(
                    "Cost of a day, and what is too much",
                    "The last 24 hours, and 1.5 times the average of the week before.",
                    "currencyUSD",
                    [
                        ("llm:llm_cost_dollars:increase1d", "24 h"),
                        ("1.5 * avg_over_time(llm:llm_cost_dollars:increase1d[1w] offset 1d)", "limit"),
                    ],
                    alert="LlmCostGrowth",
                ),
                Panel(
                    "Tokens, and what is too much",
                    "Tokens a second over 15 minutes, and 3 times the average of the day before.",
                    "ops",
                    [
                        ("llm:llm_tokens_used:rate15m", "tokens"),
                        ("3 * avg_over_time(llm:llm_tokens_used:rate15m[1d] offset 15m)", "limit"),
                    ],
                    alert="LlmTokenSurge",
                ),
            ],
        ),
        (
            "Use",
            [
                Panel(
                    "Tokens by model",
                    "Tokens a second, input and output.",
                    "ops",
                    [(rate("llm_tokens_used_total", "model, token_type", MODEL), "{{model}} {{token_type}}")],
                ),
                Panel(
                    "Tokens per request",
                    "Input and output: how long prompts and answers are.",
                    "short",
                    [
                        (
                            f"{rate('llm_tokens_used_total', 'model, token_type', MODEL)} / on (model) group_left () "
                            f"({rate('llm_request_duration_seconds_count', 'model', MODEL)} > 0)",
                            "{{model}} {{token_type}}",
                        )
                    ],
                ),
                Panel(
                    "Requests",
                    "By model.",
                    "reqps",
                    [(rate("llm_request_duration_seconds_count", "provider, model", MODEL), "{{provider}} {{model}}")],
                ),
                Panel(
                    "Errors by model",
                    "Requests that failed. Empty while there are none.",
                    "reqps",
                    [(rate("llm_request_errors_total", "provider, model", MODEL), "{{provider}} {{model}}")],
                ),
                Panel(
                    "Requests without a price",
                    "They are missing in the cost: LLM_PRICES does not have their model.",
                    "reqps",
                    [(rate("llm_requests_without_price_total", "provider, model", MODEL), "{{provider}} {{model}}")],
                ),
                Panel(
                    "P50, P95, P99",
                    "The buckets end at 30 s: what is slower shows as 30 s.",
                    "s",
                    quantiles("llm_request_duration_seconds", MODEL),
                    exemplars=True,
                ),
                Panel(
                    "P95 by model",
                    "5 % of the requests to a model took longer.",
                    "s",
                    [(p95("llm_request_duration_seconds", "provider, model", MODEL), "{{provider}} {{model}}")],
                ),
            ],
        ),
    ],
    [("model", "llm_tokens_used_total")],
)

CACHE_DASHBOARD = Dashboard(
    "cache",
    "Cache",
    "How often the caches have what is looked for.",
    [
        (
            "Cache",
            [
                Panel(
                    "Hit rate",
                    "Share of the lookups of the last 5 minutes that found something.",
                    "percentunit",
                    [(f"cache:cache_hits:ratio_rate5m{CACHE}", "{{cache_name}}")],
                    alert="CacheHitRateLow",
                ),
                Panel(
                    "Lookups",
                    "Hits and misses together, over 5 minutes.",
                    "ops",
                    [(f"cache:cache_lookups:rate5m{CACHE}", "{{cache_name}}")],
                ),
                Panel(
                    "Hits by operation",
                    "Lookups that found something.",
                    "ops",
                    [(rate("cache_hits_total", "cache_name, operation", CACHE), "{{cache_name}} {{operation}}")],
                ),
                Panel(
                    "Misses by operation",
                    "Lookups that found nothing.",
                    "ops",
                    [(rate("cache_misses_total", "cache_name, operation", CACHE), "{{cache_name}} {{operation}}")],
                ),
                Panel(
                    "Errors by operation",
                    "Neither hits nor misses. Empty while there are none.",
                    "ops",
                    [(rate("cache_errors_total", "cache_name, operation", CACHE), "{{cache_name}} {{operation}}")],
                ),
            ],
        ),
    ],
    [("cache_name", "cache_hits_total")],
)

DATABASE = Dashboard(
    "database",
    "Database",
    "Queries, as the processes see them.",
    [
        (
            "Queries",
            [
                Panel(
                    "Queries by operation",
                    "A second.",
                    "ops",
                    [(rate("db_query_duration_seconds_count", "operation", SERVICE_TABLE), "{{operation}}")],
                ),
                Panel(
                    "Queries by table",
                    "A second; the ten with most.",
                    "ops",
                    [(f"topk(10, {rate('db_query_duration_seconds_count', 'table', SERVICE_TABLE)})", "{{table}}")],
                ),
                Panel(
                    "P50, P95, P99",
                    "The buckets end at 500 ms: what is slower shows as 500 ms.",
                    "s",
                    quantiles("db_query_duration_seconds", SERVICE_TABLE),
                    exemplars=True,
                ),
                Panel(
                    "P95 by table",
                    "5 % of the queries took longer.",
                    "s",
                    [(p95("db_query_duration_seconds", "operation, table", SERVICE_TABLE), "{{operation}} {{table}}")],
                ),
                Panel(
                    "Slower than 500 ms",
                    "Share of the queries of the last 5 minutes: above 5 %, P95 is more than 500 ms.",
                    "percentunit",
                    [(f"service:db_queries_slower_than_500ms:ratio_rate5m{SERVICE}", "{{service}}")],
                    alert="DatabaseSlow",
                ),
                Panel(
                    "Slower than 500 ms by table",
                    "Share of the queries.",
                    "percentunit",
                    [
                        (
                            slower("db_query_duration_seconds", "0.5", "operation, table", SERVICE_TABLE),
                            "{{operation}} {{table}}",
                        )
                    ],
                    alert="DatabaseSlow",
                ),
                Panel(
                    "Errors",
                    "Share of the queries of the last 5 minutes that failed.",
                    "percentunit",
                    [(f"service:db_query_errors:ratio_rate5m{SERVICE}", "{{service}}")],
                    alert="DatabaseErrors",
                ),
                Panel(
                    "Errors by table",
                    "Queries that failed. Empty while there are none.",
                    "ops",
                    [(rate("db_query_errors_total", "operation, table", SERVICE_TABLE), "{{operation}} {{table}}")],
                ),
            ],
        ),
    ],
    [("service", "db_query_duration_seconds_count"), ("table", "db_query_duration_seconds_count")],
)

MILVUS = Dashboard(
    "milvus",
    "Milvus",
    "Vector searches, as the processes see them.",
    [
        (
            "Searches",
            [
                Panel(
                    "Searches",
                    "A second, over 5 minutes.",
                    "ops",
                    [(f"collection:milvus_searches:rate5m{COLLECTION}", "{{collection}}")],
                ),
                Panel(
                    "Slower than 100 ms",
                    "Share of the searches of the last 5 minutes: above 5 %, P95 is more than 100 ms.",
                    "percentunit",
                    [(f"collection:milvus_searches_slower_than_100ms:ratio_rate5m{COLLECTION}", "{{collection}}")],
                    alert="MilvusSlow",
                ),
                Panel(
                    "P50, P95, P99",
                    "The buckets end at 100 ms: what is slower shows as 100 ms.",
                    "s",
                    quantiles("milvus_search_duration_seconds", COLLECTION),
                    exemplars=True,
                ),
                Panel(
                    "Results per search",
                    "On average.",
                    "short",
                    [
                        (
                            f"{rate('milvus_search_results_sum', 'collection', COLLECTION)} "
                            f"/ ({rate('milvus_search_results_count', 'collection', COLLECTION)} > 0)",
                            "{{collection}}",
                        )
                    ],
                ),
                Panel(
                    "Searches without a result",
                    "Share of the searches.",
                    "percentunit",
                    [
                        (
                            rate("milvus_search_results_bucket", "collection", '{collection=~"$collection",le="0.0"}')
                            + f" / ({rate('milvus_search_results_count', 'collection', COLLECTION)} > 0)",
                            "{{collection}}",
                        )
                    ],
                ),
                Panel(
                    "Errors",
                    "Share of the searches of the last 5 minutes that failed.",
                    "percentunit",
                    [(f"collection:milvus_search_errors:ratio_rate5m{COLLECTION}", "{{collection}}")],
                    alert="MilvusErrors",
                ),
            ],
        ),
    ],
    [("collection", "milvus_search_duration_seconds_count")],
)

DASHBOARDS = [OVERVIEW, HTTP, GRPC, EVENTS, CONSUMERS, LLM, CACHE_DASHBOARD, DATABASE, MILVUS]


def as_json(dashboard: Dashboard) -> dict[str, Any]:
    """Return the dashboard in Grafana's model. Panels flow from left to right, and down."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in dashboard.rows:
        panels.append(_row(len(panels) + 1, title, y))
        x, y, tallest = 0, y + 1, 0
        for panel in row:
            if x + panel.width > COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            panels.append(_panel(len(panels) + 1, panel, x, y))
            x, tallest = x + panel.width, max(tallest, panel.height)
        y += tallest
    return {
        "uid": f"voicehelper-{dashboard.name}",
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": ["voicehelper"],
        "schemaVersion": 41,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "links": [
            _link("VoiceHelper", type="dashboards", tags=["voicehelper"], keepTime=True),
            _link("Runbook", url=RUNBOOK, icon="doc", targetBlank=True),
        ],
        "templating": {"list": [_variable(name, metric) for name, metric in dashboard.variables]},
        "panels": panels,
    }


def _link(title: str, **options: Any) -> dict[str, Any]:
    switches = dict.fromkeys(("asDropdown", "includeVars", "keepTime", "targetBlank"), False)
    return {"type": "link", "title": title, "icon": "", "tags": [], "tooltip": "", **switches, **options}


def _row(number: int, title: str, y: int) -> dict[str, Any]:
    position = {"h": 1, "w": COLUMNS, "x": 0, "y": y}
    return {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": position, "panels": []}


def _panel(number: int, panel: Panel, x: int, y: int) -> dict[str, Any]:
    is_heatmap, is_graph = panel.kind == "heatmap", panel.kind == "timeseries"
    steps: list[dict[str, Any]] = [{"color": GREEN, "value": None}]
    if panel.alert in LIMITS:
        colors = (RED, GREEN) if panel.alert in LOWER_LIMITS else (GREEN, RED)
        # A limit of 0 is that of a count: red from 1 on.
        limit = LIMITS[panel.alert] or 1
        steps = [{"color": colors[0], "value": None}, {"color": colors[1], "value": limit}]
    custom = {"drawStyle": "line", "fillOpacity": 10, "lineWidth": 1, "showPoints": "never", "spanNulls": 60_000}
    if len(steps) > 1:
        custom["thresholdsStyle"] = {"mode": "dashed"}
    options: dict[str, Any] = {
        "timeseries": {
            "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"]},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "stat": {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"},
        "heatmap": {"calculate": False, "yAxis": {"unit": panel.unit}, "color": {"mode": "scheme", "scheme": "Blues"}},
    }[panel.kind]
    alert_link = _link(f"Runbook: {panel.alert}", url=f"{RUNBOOK}#{panel.alert.lower()}", targetBlank=True)
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": {"h": panel.height, "w": panel.width, "x": x, "y": y},
        "links": [alert_link] if panel.alert else [],
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "min": 0,
                "noValue": "none",
                "thresholds": {"mode": "absolute", "steps": steps},
                **({"custom": custom} if is_graph else {}),
            },
            "overrides": [],
        },
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "datasource": DATASOURCE,
                "expr": expr,
                "legendFormat": legend or "__auto",
                "format": "heatmap" if is_heatmap else "time_series",
                "range": True,
                **({"exemplar": True} if panel.exemplars else {}),
            }
            for place, (expr, legend) in enumerate(panel.queries)
        ],
    }


def _variable(name: str, metric: str) -> dict[str, Any]:
    query = f"label_values({metric}, {name})"
    return {
        "type": "query",
        "name": name,
        "label": name.replace("_name", "").capitalize(),
        "datasource": DATASOURCE,
        "query": {"qryType": 1, "query": query, "refId": "variable"},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def files() -> dict[Path, str]:
    """Return what each file is to contain."""
    return {
        DIRECTORY / f"{dashboard.name}.json": json.dumps(as_json(dashboard), indent=1) + "\n"
        for dashboard in DASHBOARDS
    }


def main() -> None:
    """Write the files, and remove those of dashboards that are gone."""
    contents = files()
    for path in DIRECTORY.glob("*.json"):
        if path not in contents:
            path.unlink()
    for path, text in contents.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
