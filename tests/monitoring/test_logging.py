"""The line format: one JSON object a line, or text."""

import json
import logging
import sys
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from opentelemetry import trace

from monitoring import context
from monitoring.conf import service_name
from monitoring.logging import JsonLineFormatter, TextLineFormatter

from .conftest import run_python


def record(message="hello %s", *args, extra=None, exc_info=None):
    return logging.getLogger("some.logger").makeRecord(
        "some.logger", logging.WARNING, __file__, 1, message, args or ("world",), exc_info, extra=extra
    )


def json_line(one):
    text = JsonLineFormatter().format(one)
    assert "\n" not in text
    return json.loads(text)


def test_fields_in_order():
    one = record(extra={"size": 3, "price": Decimal("1.5"), "thing": object})
    line = json_line(one)
    assert list(line)[:5] == ["time", "level", "logger", "message", "service"]
    assert line["level"] == "WARNING"
    assert line["logger"] == "some.logger"
    assert line["message"] == "hello world"
    assert line["service"] == service_name()
    assert line["size"] == 3
    assert {"price", "thing"} <= line.keys()
    time = datetime.fromisoformat(line["time"])
    assert line["time"].endswith("Z")
    assert abs(time - datetime.fromtimestamp(one.created, UTC)).total_seconds() < 0.001


def test_ids_are_there_when_there_are_any():
    assert json_line(record()).keys().isdisjoint({"trace_id", "span_id", "tenant_id", "event_id", "correlation_id"})
    variables = (context.tenant_id, context.event_id, context.correlation_id)
    tokens = [(variable, variable.set(f"a {variable.name}")) for variable in variables]
    try:
        with trace.get_tracer(__name__).start_as_current_span("work") as span:
            line = json_line(record())
    finally:
        for variable, token in tokens:
            variable.reset(token)
    ids = span.get_span_context()
    assert line["trace_id"] == f"{ids.trace_id:032x}"
    assert line["span_id"] == f"{ids.span_id:016x}"
    for name in ("tenant_id", "event_id", "correlation_id"):
        assert line[name] == f"a {name}"


def test_what_the_record_says_wins():
    assert json_line(record(extra={"tenant_id": "of the record"}))["tenant_id"] == "of the record"


def test_exception_is_in_the_line():
    try:
        raise ValueError("two\nlines")
    except ValueError:
        line = json_line(record(exc_info=sys.exc_info()))
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("ValueError: two\nlines")


def test_line_breaks_and_control_characters_stay_inside_the_line():
    assert json_line(record("a\nb\x00\u2028%s"))["message"] == "a\nb\x00\u2028world"


def test_request_with_its_query_string_is_left_out(rf):
    text = JsonLineFormatter().format(record(extra={"request": rf.get("/?token=secret"), "status_code": 500}))
    assert "secret" not in text
    assert json.loads(text)["status_code"] == 500


def test_text_line():
    text = TextLineFormatter().format(record(extra={"size": 3}))
    assert text.endswith(f"Z WARNING {service_name()} some.logger: hello world size=3")


LOG_ONE_OF_EACH = """
import django, logging, warnings
django.setup()
logging.getLogger("any").info("said")
logging.getLogger("any").debug("unsaid")
warnings.warn("old", DeprecationWarning, stacklevel=1)
logging.getLogger("django.request").warning("unsaid: refused requests are in the access log")
print("result")
"""


def test_django_process_logs_json_to_stderr_and_leaves_stdout_to_results():
    done = run_python("import warnings; warnings.simplefilter('default')" + LOG_ONE_OF_EACH)
    assert (done.returncode, done.stdout) == (0, "result\n")
    said, warned = (json.loads(line) for line in done.stderr.splitlines())
    assert (said["message"], said["service"], said["logger"]) == ("said", "project", "any")
    assert (warned["logger"], "old" in warned["message"]) == ("py.warnings", True)


def test_django_process_logs_text_when_told_so():
    done = run_python("import warnings; warnings.simplefilter('ignore')" + LOG_ONE_OF_EACH, LOG_FORMAT="text")
    [line] = done.stderr.splitlines()
    assert line.endswith("INFO    project any: said")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"LOG_FORMAT": "xml"}, "LOG_FORMAT must be json or text"),
        ({"LOG_LEVEL": "LOUD"}, "LOG_LEVEL must be a level"),
        ({"SAMPLING_RATE": 1.5}, "SAMPLING_RATE must be from 0.0 to 1.0"),
        ({"SERVICE": "x"}, "unexpected keyword argument 'service'"),
    ],
)
def test_bad_setting_is_refused(settings, setting, says):
    from django.core.exceptions import ImproperlyConfigured

    from monitoring.conf import monitoring_settings

    settings.MONITORING = setting
    with pytest.raises(ImproperlyConfigured, match=says):
        monitoring_settings()
