"""Figures over time and of the processes: from Prometheus, else what the web processes know themselves."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from monitoring import metrics
from monitoring.prometheus import Alert, FiringAlerts, Instant, Range, Round, Sample, Series, Unanswered

from .own_metrics import OwnMetrics

HOUR_SECONDS = 3600
STEP_SECONDS = 60
PROBES = ("/health", "/livez", "/readyz", "/metrics")
"""Not the users' requests: see monitoring/ops/rules/recording.yml."""
SINCE_START = "since the web processes started"
LAST_MINUTES = "over the last 5 minutes"
PUBLISHED, FAILURES = "Published per minute", "Failure rate"

_NO_PROBES = f'path!~"{"|".join(PROBES)}"'


@dataclass(frozen=True)
class Http:
    """`per_second` needs Prometheus, `total` is known without it. None: no data. `over`: of what time the rest is."""

    per_second: float | None = None
    total: int | None = None
    error_share: float | None = None
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None
    over: str = LAST_MINUTES
    missing: str = ""


@dataclass(frozen=True)
class ModelUse:
    """What a model was used for: dollars, and tokens by their type. None: not known."""

    model: str
    dollars: float | None
    tokens: dict[str, float] = field(default_factory=dict)

    @property
    def all_tokens(self) -> float | None:
        return sum(self.tokens.values()) if self.tokens else None


@dataclass(frozen=True)
class Llm:
    """`models` and `tenants` (tenant, dollars): the dearest first. `dollars`, `tokens`: None when not known."""

    dollars: float | None = None
    tokens: float | None = None
    models: Sequence[ModelUse] = ()
    tenants: Sequence[tuple[str, float]] = ()
    over: str = "since midnight, UTC"
    missing: str = ""


@dataclass(frozen=True)
class Stores:
    """`caches`: name and hit rate. `*_limit`: what a P95 cannot exceed, for want of longer buckets."""

    caches: Sequence[tuple[str, float | None]] = ()
    database_p95: float | None = None
    milvus_p95: float | None = None
    database_limit: float = metrics.DB_BUCKETS_SECONDS[-1]
    milvus_limit: float = metrics.MILVUS_BUCKETS_SECONDS[-1]
    over: str = LAST_MINUTES
    missing: str = ""


@dataclass(frozen=True)
class Line:
    """One line of a chart: values at `Chart.times`. None is a gap."""

    label: str
    values: Sequence[float | None]

    @property
    def latest(self) -> float | None:
        """The value of now: the last step's, or the one before while that has none yet."""
        return next((value for value in reversed(self.values[-2:]) if value is not None), None)


@dataclass(frozen=True)
class Chart:
    """The last hour. `missing`: why there are no lines."""

    times: Sequence[float] = ()
    lines: Sequence[Line] = ()
    missing: str = ""


@dataclass(frozen=True)
class Figures:
    """All of them. `handled`, `lag`, `lag_seconds`: by consumer, empty when not known."""

    http: Http
    llm: Llm
    stores: Stores
    publishing: Chart
    http_rate: Chart
    http_p95: Chart
    alerts: Sequence[Alert] | Unanswered
    published_per_minute: float | None
    failure_share: float | None
    handled: dict[str, float]
    lag: dict[str, float]
    lag_seconds: dict[str, float]
    prometheus: Unanswered | None
    """Why Prometheus' figures are missing; None: it answers."""


Asked = Callable[[], list[Sample] | Unanswered]


class Questions:
    """Asked when it is made, answered by `figures()`: meanwhile there is time for other work."""

    def __init__(self, now: datetime) -> None:
        self._round = Round()
        self._alerts = self._round.ask(FiringAlerts())
        self._published = self._range("60 * sum(rate(outbox_events_published_total[2m]))")
        self._failures = self._range(
            "sum(topic:outbox_publish_failures:ratio_rate5m * topic:outbox_publishings:rate5m)"
            " / (sum(topic:outbox_publishings:rate5m) > 0)"
        )
        self._http_rate = self._range("sum(service:http_requests:rate5m)")
        self._http_p95 = self._range(_http_quantile(0.95))
        self._http_errors = self._now(
            "sum(service:http_errors:ratio_rate5m * service:http_requests:rate5m)"
            " / (sum(service:http_requests:rate5m) > 0)"
        )
        self._http_now = self._now("sum(service:http_requests:rate5m)")
        self._quantiles = [self._now(_http_quantile(share)) for share in (0.5, 0.95, 0.99)]
        self._handled = self._now("sum by (consumer) (rate(consumer_events_handled_total[5m]))")
        self._lag = self._now("consumer:consumer_group_lag_events:sum")
        self._lag_seconds = self._now("consumer:consumer_group_lag_seconds:max")
        self._caches = self._now("cache:cache_hits:ratio_rate5m")
        self._database = self._now(_quantile(0.95, "db_query_duration_seconds"))
        self._milvus = self._now(_quantile(0.95, "milvus_search_duration_seconds"))
        self._llm = LlmQuestions(self._round, now)

    def _now(self, expression: str) -> Asked:
        return self._round.ask(Instant(expression))

    def _range(self, expression: str) -> Callable[[], list[Series] | Unanswered]:
        return self._round.ask(Range(expression, HOUR_SECONDS, STEP_SECONDS))

    def figures(self) -> Figures:
        own: OwnMetrics | None = None
        alerts, rate = self._alerts(), self._http_now()
        unanswered = next((each for each in (alerts, rate) if isinstance(each, Unanswered)), None)
        if unanswered is not None:
            own = OwnMetrics()
        publishing = _chart([(PUBLISHED, self._published()), (FAILURES, self._failures())])
        latest = {line.label: line.latest for line in publishing.lines}
        return Figures(
            http=self._http() if own is None else _own_http(own, unanswered),
            llm=self._llm.answer() if own is None else _own_llm(own, unanswered),
            stores=self._stores() if own is None else _own_stores(own, unanswered),
            publishing=publishing,
            http_rate=_chart([("Requests per second", self._http_rate())]),
            http_p95=_chart([("P95 in seconds", self._http_p95())]),
            alerts=alerts,
            published_per_minute=latest.get(PUBLISHED),
            failure_share=latest.get(FAILURES),
            handled=_by(self._handled(), "consumer"),
            lag=_by(self._lag(), "consumer"),
            lag_seconds=_by(self._lag_seconds(), "consumer"),
            prometheus=unanswered,
        )

    def _http(self) -> Http:
        p50, p95, p99 = (_value(asked()) for asked in self._quantiles)
        return Http(
            per_second=_value(self._http_now()), error_share=_value(self._http_errors()), p50=p50, p95=p95, p99=p99
        )

    def _stores(self) -> Stores:
        caches = self._caches()
        return Stores(
            caches=sorted((sample.labels.get("cache_name", ""), sample.value) for sample in caches)
            if not isinstance(caches, Unanswered)
            else (),
            database_p95=_value(self._database()),
            milvus_p95=_value(self._milvus()),
        )


class LlmQuestions:
    """Cost and tokens of today, of all tenants or of one. Tokens are not counted by tenant."""

    def __init__(self, questions: Round, now: datetime, tenant: str | None = None) -> None:
        midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
        # In steps, so that pages opened together ask the same; at least a minute, for two scrapes to be in it.
        seconds = max(int((now - midnight).total_seconds()) // 5 * 5, 60)
        of_tenant = f"{{tenant_id={_quoted(tenant)}}}" if tenant is not None else ""
        cost = _increase(f"llm_cost_dollars_total{of_tenant}", "model, tenant_id", seconds)
        self._cost = questions.ask(Instant(cost))
        self._tokens: Asked | None = None
        if tenant is None:
            self._tokens = questions.ask(Instant(_increase("llm_tokens_used_total", "model, token_type", seconds)))

    def answer(self) -> Llm:
        cost, tokens = self._cost(), self._tokens() if self._tokens else []
        for each in (cost, tokens):
            if isinstance(each, Unanswered):
                return Llm(missing=str(each))
        return _llm(
            [(s.labels.get("model", ""), s.labels.get("tenant_id", ""), s.value) for s in _samples(cost)],
            [(s.labels.get("model", ""), s.labels.get("token_type", ""), s.value) for s in _samples(tokens)],
        )


def _increase(counter: str, labels: str, seconds: int) -> str:
    """By how much counters grew, with the value that those came with which were not there before.

    Prometheus' increase() leaves that out, and a tenant's first request of the day would cost nothing.
    """
    grown = f"sum by ({labels}) (increase({counter}[{seconds}s]))"
    born = f"sum by ({labels}) (min_over_time({counter}[{seconds}s]) unless {counter} offset {seconds}s)"
    return f"({grown} + {born}) or {grown} or {born}"


Use = Iterable[tuple[str, str, float | None]]


def _llm(cost: Use, tokens: Use, over: str = "") -> Llm:
    """From (model, tenant, dollars) and (model, type, tokens). What is no number is left out."""
    by_model: dict[str, float] = {}
    by_tenant: dict[str, float] = {}
    by_type: dict[str, dict[str, float]] = {}
    for model, tenant, dollars in _numbers(cost):
        by_model[model] = by_model.get(model, 0.0) + dollars
        by_tenant[tenant] = by_tenant.get(tenant, 0.0) + dollars
    for model, token_type, count in _numbers(tokens):
        of_model = by_type.setdefault(model, {})
        of_model[token_type] = of_model.get(token_type, 0.0) + count
    models = [ModelUse(name, by_model.get(name), by_type.get(name, {})) for name in {*by_model, *by_type}]
    return Llm(
        dollars=sum(by_model.values()) if by_model else None,
        tokens=sum(sum(types.values()) for types in by_type.values()) if by_type else None,
        models=sorted(models, key=lambda use: (-(use.dollars or 0), use.model)),
        tenants=sorted(by_tenant.items(), key=lambda pair: -pair[1]),
        over=over or Llm.over,
    )


def _numbers(use: Use) -> Iterable[tuple[str, str, float]]:
    return ((model, of, value) for model, of, value in use if value is not None)


def _own_http(own: OwnMetrics, why: Unanswered | None) -> Http:
    requests = own.samples("http_requests_total", without_paths=PROBES)
    total = sum(sample.value for sample in requests)
    errors = sum(sample.value for sample in requests if sample.labels["status"].startswith("5"))
    p50, p95, p99 = (
        own.quantile(share, "http_request_duration_seconds", without_paths=PROBES) for share in (0.5, 0.95, 0.99)
    )
    return Http(None, int(total), errors / total if total else None, p50, p95, p99, SINCE_START, str(why))


def _own_llm(own: OwnMetrics, why: Unanswered | None) -> Llm:
    cost = own.samples("llm_cost_dollars_total")
    tokens = own.samples("llm_tokens_used_total")
    if not cost and not tokens:
        return Llm(missing=str(why))
    known = _llm(
        [(s.labels["model"], s.labels["tenant_id"], s.value) for s in cost],
        [(s.labels["model"], s.labels["token_type"], s.value) for s in tokens],
        SINCE_START,
    )
    return Llm(known.dollars, known.tokens, known.models, known.tenants, SINCE_START, f"today {why}")


def _own_stores(own: OwnMetrics, why: Unanswered | None) -> Stores:
    hits: dict[str, float] = {}
    lookups: dict[str, float] = {}
    for name in ("cache_hits_total", "cache_misses_total"):
        for sample in own.samples(name):
            cache = sample.labels["cache_name"]
            lookups[cache] = lookups.get(cache, 0.0) + sample.value
            hits[cache] = hits.get(cache, 0.0) + (sample.value if name == "cache_hits_total" else 0.0)
    return Stores(
        caches=sorted((cache, hits[cache] / count if count else None) for cache, count in lookups.items()),
        database_p95=own.quantile(0.95, "db_query_duration_seconds"),
        milvus_p95=own.quantile(0.95, "milvus_search_duration_seconds"),
        over=SINCE_START,
        missing=str(why),
    )


def _quantile(share: float, histogram: str, labels: str = "") -> str:
    return f"histogram_quantile({share}, sum by (le) (rate({histogram}_bucket{{{labels}}}[5m])))"


def _http_quantile(share: float) -> str:
    return _quantile(share, "http_request_duration_seconds", _NO_PROBES)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'"{escaped}"'


def _samples(answer: list[Sample] | Unanswered) -> list[Sample]:
    return [] if isinstance(answer, Unanswered) else answer


def _value(answer: list[Sample] | Unanswered) -> float | None:
    """The one value, as far as there is one."""
    return next((sample.value for sample in _samples(answer)), None)


def _by(answer: list[Sample] | Unanswered, label: str) -> dict[str, float]:
    return {s.labels[label]: s.value for s in _samples(answer) if label in s.labels and s.value is not None}


def _chart(answers: Sequence[tuple[str, list[Series] | Unanswered]]) -> Chart:
    """A line for each answer, a gap all along where it has no series; no lines without an answer to the first."""
    if answers and isinstance(answers[0][1], Unanswered):
        return Chart(missing=str(answers[0][1]))
    found = {label: answer[0] if answer else None for label, answer in answers if not isinstance(answer, Unanswered)}
    if times := next((series.times for series in found.values() if series is not None), None):
        no_value: list[float | None] = [None] * len(times)
        return Chart(times, [Line(label, series.values if series else no_value) for label, series in found.items()])
    return Chart(missing="no data in the last hour")
