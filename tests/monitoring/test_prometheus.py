"""The client of Prometheus: against a real one, and against what is none, hangs, refuses or is away."""

import json
import socket
import subprocess
import threading
import time
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from monitoring import prometheus
from monitoring.prometheus import NOT_SET, FiringAlerts, Instant, Range, Round, Unanswered

from .conftest import answers, free_port, wait_until

PASSWORD = "s3cret-pass"
RULES = """
groups:
  - name: test
    rules:
      - alert: AlwaysOn
        expr: vector(1) > 0
        labels: {severity: page}
        annotations: {summary: It is on, runbook_url: "https://docs/runbook.md#on"}
      - alert: NotYet
        expr: vector(1) > 0
        for: 1h
"""


@pytest.fixture(autouse=True)
def _no_kept_answers():
    prometheus.forget_answers()
    yield
    prometheus.forget_answers()


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A Prometheus that scrapes itself each second."""
    directory, port = tmp_path_factory.mktemp("prometheus"), free_port()
    (directory / "rules.yml").write_text(RULES)
    (directory / "prometheus.yml").write_text(
        json.dumps(
            {
                "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
                "rule_files": ["rules.yml"],
                "scrape_configs": [
                    {"job_name": "self", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]},
                    {"job_name": "gone", "static_configs": [{"targets": ["127.0.0.1:1"]}]},
                ],
            }
        )
    )
    command = ["prometheus", f"--config.file={directory / 'prometheus.yml'}", f"--storage.tsdb.path={directory / 'd'}"]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/-/ready"), seconds=30)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def server(respond):
    """An HTTP server whose GETs `respond(handler)` answers; yields its URL and the paths asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers.get("Authorization")))
            respond(self)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.server_address[1]}", asked
        finally:
            listening.shutdown()
            thread.join()


def answer(body, status=200, content_type="application/json"):
    def respond(handler):
        handler.send_response(status)
        handler.send_header("Content-Type", content_type)
        handler.end_headers()
        handler.wfile.write(body.encode())

    return respond


VECTOR = json.dumps(
    {"status": "success", "data": {"resultType": "vector", "result": [{"metric": {"a": "b"}, "value": [1, "NaN"]}]}}
)


def ask(url, question=None, **options):
    return Round(url, **options).ask(question or Instant("up"))()


@pytest.mark.needs_tool("prometheus")
def test_a_real_prometheus_answers(real):
    def up():
        prometheus.forget_answers()
        found = {sample.labels["job"]: sample.value for sample in ask(real)}
        return found if len(found) == 2 else None

    assert wait_until(up) == {"self": 1.0, "gone": 0.0}
    assert [sample.value for sample in ask(real, Instant("vector(0) / 0"))] == [None]
    assert [sample.value for sample in ask(real, Instant("vector(1) / 0"))] == [None]
    assert ask(real, Instant("scalar(vector(3))"))[0].value == 3.0
    assert ask(real, Instant("nothing_like_this")) == []


@pytest.mark.needs_tool("prometheus")
def test_a_range_has_gaps_where_nothing_was_known(real):
    def recent():
        prometheus.forget_answers()
        [series] = ask(real, Range('up{job="self"}', seconds=30, step_seconds=1)) or [None]
        return series if series and series.values[-1] is not None else None

    wait_until(lambda: ask(real, Instant('up{job="self"}')) or prometheus.forget_answers())
    series = wait_until(recent)
    assert len(series.times) == len(series.values) == 31
    assert series.times[1] - series.times[0] == 1
    [hour] = ask(real, Range('up{job="self"} or vector(7) * 0 / 0'))
    assert len(hour.values) == 61
    assert None in hour.values  # it did not run an hour ago


@pytest.mark.needs_tool("prometheus")
def test_alerts_that_fire(real):
    def firing():
        prometheus.forget_answers()
        return ask(real, FiringAlerts())

    [alert] = wait_until(firing)
    assert (alert.name, alert.severity, alert.summary) == ("AlwaysOn", "page", "It is on")
    assert alert.runbook_url == "https://docs/runbook.md#on"
    assert abs(alert.since.timestamp() - time.time()) < 600


def test_a_prometheus_without_rules_does_not_say_that_no_alert_fires():
    empty = json.dumps({"status": "success", "data": {"groups": []}})
    with server(answer(empty)) as (url, asked):
        assert ask(url, FiringAlerts()) == Unanswered("Prometheus has no alert rules")
    assert asked[0][0] == "/api/v1/rules?type=alert"


@pytest.mark.needs_tool("prometheus")
def test_a_wrong_question_is_refused_in_words(real):
    refused = ask(real, Instant("sum("))
    assert isinstance(refused, Unanswered)
    assert "HTTP 400" in refused.why and "parse error" in refused.why


def test_no_url():
    assert Round("").ask(Instant("up"))() is NOT_SET
    assert "set PROMETHEUS_URL" in NOT_SET.why


def test_a_refused_connection():
    assert ask(f"http://user:{PASSWORD}@127.0.0.1:{free_port()}").why == (
        "Prometheus does not answer: connection refused"
    )


def test_a_silent_listener_costs_a_page_its_time_once_for_all_questions():
    with closing(socket.socket()) as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(50)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        questions = Round(url, seconds=0.5)
        waits = [questions.ask(Instant(f"up + {number}")) for number in range(20)]
        found = [wait() for wait in waits]
        assert {each.why for each in found} == {"Prometheus does not answer: nothing within 0.5 s"}
        assert time.monotonic() - started < 5  # not 20 times


def test_what_comes_in_drops_is_given_up():
    def drip(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.end_headers()
        with pytest.raises(OSError):
            while True:
                handler.wfile.write(b" ")
                handler.wfile.flush()
                time.sleep(0.05)

    with server(drip) as (url, _):
        wait = Round(url, seconds=30).ask(Instant("up"))
        assert wait().why == "Prometheus does not answer: nothing within 2 s"


@pytest.mark.parametrize(
    ("respond", "words"),
    [
        (answer("<html>Log in</html>", content_type="text/html; charset=utf-8"), "is not Prometheus's API: HTTP 200"),
        (answer("no", 401, "text/plain"), "HTTP 401, text/plain"),
        (answer('{"status":"error","error":"too many samples"}', 422), "HTTP 422, too many samples"),
        (answer("", 302, "text/html"), "HTTP 302"),
        (answer("{", 200), "was not understood: JSONDecodeError"),
        (answer('{"status":"success","data":{}}', 200), "was not understood: KeyError"),
        (answer('{"status":"success","data":null}', 200), "was not understood: TypeError"),
        (lambda handler: handler.wfile.write(b"SSH-2.0\r\n\r\n"), "what came back is not HTTP"),
        (lambda handler: None, "Prometheus does not answer"),
    ],
    ids=["html", "401", "422", "redirect", "broken", "empty", "null", "no-http", "hung-up"],
)
def test_what_is_wrong_becomes_a_value_in_words(respond, words):
    with server(respond) as (url, _):
        found = ask(url.replace("//", f"//user:{PASSWORD}@"))
    assert isinstance(found, Unanswered)
    assert words in found.why
    assert PASSWORD not in found.why and PASSWORD not in repr(found)


def test_credentials_and_a_path_in_the_url_are_used_and_not_shown():
    with server(answer(VECTOR)) as (url, asked):
        questions = Round(url.replace("//", "//user:p%40ss@") + "/prom/")
        [sample] = questions.ask(Instant("a b"))()
        assert sample.value is None  # NaN
        assert asked == [("/prom/api/v1/query?query=a+b", "Basic dXNlcjpwQHNz")]
        assert "p%40ss" not in repr(questions)


def test_open_pages_share_an_answer_for_some_seconds(monkeypatch):
    with server(answer(VECTOR)) as (url, asked):
        for _ in range(10):
            ask(url)
        assert len(asked) == 1
        monkeypatch.setattr(prometheus, "KEPT_SECONDS", 0)
        ask(url)
        assert len(asked) == 2
