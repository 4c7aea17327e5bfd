"""Every query of every dashboard, variable, rule and alert, and the specification's, asked of a real Prometheus.

It scrapes the running product (gunicorn, relay, consumers) and a process that records the rest, under traffic that
fails now and then. An answer has to have a number in it: a query about a series that is not there is as wrong as one
with an error.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import psycopg
import pytest
import yaml

from monitoring import prometheus
from tests.services import TOPICS, free_ports
from voicehelper.console.figures import Questions
from voicehelper.devstack.child import Child
from voicehelper.devstack.embedded_broker import EmbeddedBroker

from .conftest import answers, wait_until

ROOT = Path(__file__).resolve().parent.parent.parent
OPS = ROOT / "monitoring/ops"
MANAGE = [sys.executable, "manage.py"]
DATABASE = "every_query"
START_SECONDS, ANSWER_SECONDS = 60, 60
DAY_SECONDS = 86_400
# What the rules look back on for days, as they would have recorded it every 4 minutes.
HISTORY = {"llm:llm_cost_dollars:increase1d": 20.0, "llm:llm_tokens_used:rate15m": 100.0}

pytestmark = [pytest.mark.needs_tool("prometheus"), pytest.mark.needs_tool("promtool")]


# --- The queries ---

SPECIFICATION = {
    "QPS": 'rate(http_requests_total{service="conversation-service"}[5m])',
    "P95": """histogram_quantile(0.95,
  rate(http_request_duration_seconds_bucket{service="conversation-service"}[5m])
)""",
    "error rate": """sum(rate(http_requests_total{status=~"5.."}[5m]))
/
sum(rate(http_requests_total[5m]))""",
    "LLM cost per hour": "increase(llm_cost_dollars_total[1h])",
    "cache hit rate": """sum(rate(cache_hits_total[5m]))
/
(sum(rate(cache_hits_total[5m])) + sum(rate(cache_misses_total[5m])))""",
    "vector search P99": """histogram_quantile(0.99,
  rate(milvus_search_duration_seconds_bucket[5m])
)""",
}


def at_top_level(expression):
    """The expression with what stands in parentheses, braces and brackets blanked out."""
    depth, text = 0, []
    for character in expression:
        depth -= character in ")}]"
        text.append(" " if depth else character)
        depth += character in "({["
    return "".join(text)


def operands(expression):
    """What an alert compares and combines, each to be asked alone, and comparisons as 0 or 1 instead of a filter.

    `a > 1 and b > 2` is `a > bool 1` and `b > bool 2`: a healthy system, of which the whole is empty, has both.
    `absent(a)` is `a`: there has to be something that could go missing.
    """
    top, start = at_top_level(expression), 0
    parts = []
    for operator in re.finditer(r"\b(and|or|unless)\b", top):
        parts.append(expression[start : operator.start()])
        # `on (consumer)` belongs to the operator.
        matching = re.match(r" *(on|ignoring) ?\([^)]*\)", expression[operator.end() :])
        start = operator.end() + (matching.end() if matching else 0)
    parts.append(expression[start:])
    for part in (part.strip() for part in parts):
        if inner := re.fullmatch(r"absent\((.*)\)", part, re.DOTALL):
            yield from operands(inner[1])
            continue
        blank = at_top_level(part)
        comparison = re.search(r"(==|!=|>=|<=|>|<)", blank)
        yield part if comparison is None else f"{part[: comparison.end()]} bool{part[comparison.end() :]}"


def test_operands_of_an_alert():
    assert list(operands('a:b > 0.01\nand c{d="e and f"} > 10 / 60')) == [
        "a:b > bool 0.01",
        'c{d="e and f"} > bool 10 / 60',
    ]
    assert list(operands('absent(up{job="web"} == 1)')) == ['up{job="web"} == bool 1']
    assert list(operands("a unless on (b) c and on () d > 0")) == ["a", "c", "d > bool 0"]
    assert list(operands("(a or vector(0)) < 1")) == ["(a or vector(0)) < bool 1"]
    assert list(operands("sum(a > 0) * 2")) == ["sum(a > 0) * 2"]


def rules(name):
    return [
        rule for group in yaml.safe_load((OPS / f"rules/{name}.yml").read_text())["groups"] for rule in group["rules"]
    ]


def all_queries():
    for path in sorted((OPS / "grafana/dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                expression = re.sub(r"\$(?!__)\w+", ".+", target["expr"]).replace("$__rate_interval", "1m")
                yield pytest.param(expression, id=f"{path.stem}: {panel['title']}: {target['refId']}")
    for rule in rules("recording"):
        yield pytest.param(rule["expr"], id=f"rule {rule['record']}")
        yield pytest.param(rule["record"], id=f"recorded {rule['record']}")
    for rule in rules("alerts"):
        for number, operand in enumerate(operands(rule["expr"])):
            yield pytest.param(operand, id=f"alert {rule['alert']}: {number}")
    for name, query in SPECIFICATION.items():
        yield pytest.param(query, id=f"specification: {name}")


def all_variables():
    for path in sorted((OPS / "grafana/dashboards").glob("*.json")):
        for variable in json.loads(path.read_text())["templating"]["list"]:
            yield pytest.param(variable["query"]["query"], id=f"{path.stem}: {variable['name']}")


# --- The system ---


class System:
    """The product with its database and broker, one process more, and a Prometheus that scrapes them each second."""

    def __init__(self, directory, url, output):
        self.directory, self.output, self.children = directory, output, []
        self.over, self.traffic = threading.Event(), threading.Thread(target=self._make_traffic, daemon=True)
        ports = free_ports(7)
        self.web, self.relay, self.consumer, self.workers, self.recorder, self.prometheus, broker_port = ports
        self.broker = EmbeddedBroker(broker_port, TOPICS, output=output)
        self.environment = {
            "DATABASE_URL": url_of(DATABASE, url),
            "KAFKA_BOOTSTRAP_SERVERS": self.broker.bootstrap_servers,
            "VOICEHELPER_DATA_DIR": str(directory),
            "OTEL_SERVICE_NAME": "conversation-service",
            "WEB_PORT": str(self.web),
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",  # spans get ids, and nobody takes them
            "GRAFANA_URL": "http://grafana",
            "DOCS_URL": "docs",
        }

    def start(self):
        self._run(self.broker)
        self.broker.wait_until_ready()
        demo = self.directory / "demo.json"
        prepare = self._child("prepare", sys.executable, "-m", "voicehelper.devstack.prepare", f"--demo-file={demo}")
        wait_until(lambda: not prepare.is_running(), seconds=START_SECONDS)
        assert prepare.process.returncode == 0
        self.token = json.loads(demo.read_text())["users"][0]["token"]
        self._child("web", sys.executable, "-m", "gunicorn", "-c", "voicehelper/gunicorn.conf.py")
        self._child("relay", *MANAGE, "relay_outbox", f"--metrics-port={self.relay}")
        self._child("consumer", *MANAGE, "consume", "analytics", "notification", f"--metrics-port={self.consumer}")
        self._child("workers", *MANAGE, "consume", "audit", "--workers=2", f"--metrics-port={self.workers}")
        self._child("recorder", sys.executable, "-m", "tests.monitoring.record_everything", str(self.recorder))
        self._start_prometheus()
        urls = [f"{port}/livez" for port in (self.web, self.relay, self.consumer, self.workers, self.recorder)]
        for url in (*urls, f"{self.prometheus}/-/ready"):
            wait_until(lambda url=url: answers(f"http://127.0.0.1:{url}"), seconds=START_SECONDS)
        self.traffic.start()
        self.deadline = time.monotonic() + ANSWER_SECONDS

    def _child(self, name, *command):
        child = Child(name, command, output=self.output, env=self.environment, stop_seconds=15)
        self._run(child)
        return child

    def _run(self, child):
        self.children.append(child)
        child.start()

    def stop(self):
        self.over.set()
        if self.traffic.ident:
            self.traffic.join(30)
        for child in self.children:
            child.ask_to_stop()
        for child in self.children:
            child.stop()

    def _start_prometheus(self):
        config = yaml.safe_load((OPS / "prometheus.yml").read_text())
        config["global"] |= {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        del config["alerting"]
        targets = {
            "web": [self.web],
            "relay": [self.relay],
            "consumer": [self.consumer, self.workers],
            "ai": [self.recorder],
        }
        config["scrape_configs"] = [
            {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}" for port in ports]}]}
            for job, ports in targets.items()
        ]
        (self.directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        shutil.copytree(OPS / "rules", self.directory / "rules", ignore=shutil.ignore_patterns("tests"))
        history, storage = self.directory / "history.txt", self.directory / "prometheus"
        history.write_text(made_up_history(time.time()))
        command = ["promtool", "tsdb", "create-blocks-from", "openmetrics", history, storage]
        subprocess.run(command, check=True, capture_output=True)
        self._child(
            "prometheus",
            "prometheus",
            f"--config.file={self.directory / 'prometheus.yml'}",
            f"--storage.tsdb.path={storage}",
            f"--web.listen-address=127.0.0.1:{self.prometheus}",
            "--enable-feature=exemplar-storage,expand-external-labels",
        )

    def _make_traffic(self):
        """Conversations, messages, odd paths, and notifications while their table is away: that is a 5xx each."""
        conversation = None
        while not self.over.wait(0.2):
            with suppress(OSError):
                created = self.request("POST", "/api/v1/conversations", {"title": "Hello", "mode": "chat"})
                conversation = created.get("id", conversation)
                self.request("POST", "/api/v1/messages", {"conversation_id": conversation, "content": "Hello"})
                self.request("GET", "/api/v1/conversations")
                self.request("POST", f"/api/v1/conversations/{conversation}/complete")
                self.request("GET", "/no/such/page")
                with psycopg.connect(self.environment["DATABASE_URL"], autocommit=True) as session:
                    session.execute("ALTER TABLE notifications_notification RENAME TO gone")
                    try:
                        self.request("GET", "/api/v1/notifications")
                    finally:
                        session.execute("ALTER TABLE gone RENAME TO notifications_notification")

    def request(self, method, path, body=None):
        headers = {"Authorization": f"Token {self.token}", "Content-Type": "application/json"}
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(f"http://127.0.0.1:{self.web}{path}", data, headers, method=method)
        with suppress(urllib.error.HTTPError), urllib.request.urlopen(request) as response:  # noqa: S310 our own
            return json.load(response)
        return {}

    def api(self, path, **parameters):
        url = f"http://127.0.0.1:{self.prometheus}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=20) as response:
            return json.load(response)["data"]

    def numbers(self, query):
        """The numbers of a query's answer that are numbers. Raises HTTPError for a query that is wrong."""
        result = self.api("query", query=query)["result"]
        return [value for one in result if not math.isnan(value := float(one["value"][1]))]

    def wait_for(self, condition):
        """Poll it until it is true; all queries together have until the deadline, so that many that fail do so soon."""
        return wait_until(condition, seconds=max(self.deadline - time.monotonic(), 0.1))


def url_of(database, url):
    """The URL of another database of the same server."""
    return re.sub(r"/[^/?@]+(?=\?|$)", f"/{database}", url, count=1)


def made_up_history(now):
    """A week of what the rules compare with, in OpenMetrics."""
    times = range(int(now - 9 * DAY_SECONDS), int(now - 600), 240)
    lines = []
    for name, value in HISTORY.items():
        lines += [f"# TYPE {name} gauge", *(f"{name} {value} {at}" for at in times)]
    return "\n".join([*lines, "# EOF", ""])


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    directory = tmp_path_factory.mktemp("every-query")
    url = os.environ["DATABASE_URL"]
    with psycopg.connect(url, autocommit=True) as session:
        session.execute(f"DROP DATABASE IF EXISTS {DATABASE} WITH (FORCE)")
        session.execute(f"CREATE DATABASE {DATABASE}")
    with (directory / "output.log").open("wb") as output:
        system = System(directory, url, output.fileno())
        try:
            try:
                system.start()
            except AssertionError:
                print((directory / "output.log").read_text()[-5000:])
                raise
            yield system
        finally:
            system.stop()


@pytest.mark.parametrize("query", list(all_queries()))
def test_query_has_an_answer(system, query):
    system.wait_for(lambda: system.numbers(query))


@pytest.mark.parametrize("query", list(all_variables()))
def test_variable_has_values(system, query):
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", query).groups()
    assert system.wait_for(lambda: system.api(f"label/{label}/values", **{"match[]": metric}))


def test_every_figure_of_the_overview_has_an_answer(system, settings):
    """Asked as the admin's first page does: a query that finds nothing here is wrong."""
    settings.MONITORING = {**settings.MONITORING, "PROMETHEUS_URL": f"http://127.0.0.1:{system.prometheus}"}

    def figures():
        prometheus.forget_answers()
        return Questions(datetime.now(UTC)).figures()

    def missing(found):
        charts = (found.publishing, found.http_rate, found.http_p95)
        known = {
            "alerts": found.prometheus is None,
            "published": found.published_per_minute,
            "failures": found.failure_share is not None,
            "charts": all(line.latest is not None for chart in charts for line in chart.lines) and charts[0].lines,
            "http": None not in (found.http.per_second, found.http.error_share, found.http.p95, found.http.p99),
            "handled": {"analytics", "audit"} <= found.handled.keys(),
            "lag": {"analytics", "audit", "notification"} <= found.lag.keys() & found.lag_seconds.keys(),
            "llm": found.llm.dollars is not None and found.llm.tokens and found.llm.tenants,
            "caches": any(rate is not None for _, rate in found.stores.caches),
            "stores": None not in (found.stores.database_p95, found.stores.milvus_p95),
        }
        return [name for name, is_known in known.items() if not is_known]

    # A range has whole minutes alone: the first of them may take one to come.
    wait_until(lambda: not missing(figures()), seconds=ANSWER_SECONDS + 75)


def test_alerts_are_evaluated_without_error(system):
    def evaluated():
        found = [rule for group in system.api("rules")["groups"] for rule in group["rules"]]
        return found if all(rule["health"] == "ok" for rule in found) else None

    names = {rule["name"] for rule in system.wait_for(evaluated)}
    assert names == {rule["record"] for rule in rules("recording")} | {rule["alert"] for rule in rules("alerts")}


def test_alerts_carry_their_links(system):
    """A fifth of the requests fails: the alert waits for its five minutes to be over."""

    def pending():
        return [alert for alert in system.api("alerts")["alerts"] if alert["labels"]["alertname"] == "HttpErrors"]

    [alert] = system.wait_for(pending)
    assert alert["labels"]["service"] == "conversation-service"
    assert re.fullmatch(
        r"[\d.]+% of the requests of the last 5 minutes got a 5xx\.", alert["annotations"]["description"]
    )
    assert alert["annotations"]["runbook_url"] == "docs/runbook.md#httperrors"
    assert alert["annotations"]["dashboard_url"] == "http://grafana/d/voicehelper-http"


def test_requests_lead_to_their_traces(system):
    """The web server's histogram has exemplars, which Prometheus keeps; Grafana takes `trace_id` to Jaeger."""
    metric = "http_request_duration_seconds_bucket"

    def exemplars():
        now = time.time()
        found = system.api("query_exemplars", query=metric, start=now - 300, end=now)
        return [exemplar["labels"]["trace_id"] for series in found for exemplar in series["exemplars"]]

    assert all(re.fullmatch("[0-9a-f]{32}", trace_id) for trace_id in system.wait_for(exemplars))


def test_targets_are_all_up(system):
    system.wait_for(lambda: len(system.numbers("up == 1")) == 5)
