"""Access lines, partly made beforehand, are what the formatters would make of them."""

import json
import logging
import os

import pytest
from opentelemetry.trace import SpanContext

from monitoring.access_log import RequestKind, access_logger
from monitoring.log_lines import JsonLineFormatter, TextLineFormatter, line_fields

IDS = SpanContext(0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331, is_remote=False)
KIND = RequestKind("GET", "/items/<uuid:id>", 200)
ID = "2f1e90a4c0d94d0e8b1c5a6c0a9d7e11"


@pytest.fixture
def logged():
    """Log a request and return its record."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    level = access_logger.level

    def log(kind=KIND, *, is_probe=False, correlation_id=ID, tenant_id="", ids=None):
        kind.log(0.0123456, is_probe=is_probe, correlation_id=correlation_id, tenant_id=tenant_id, ids=ids)
        return records.pop() if records else None

    access_logger.addHandler(handler)
    access_logger.setLevel(logging.DEBUG)
    yield log
    access_logger.removeHandler(handler)
    access_logger.setLevel(level)


@pytest.mark.parametrize("ids", [None, IDS])
@pytest.mark.parametrize("tenant_id", ["", "0191d1f0-0000-7000-8000-000000000000"])
def test_line_has_what_the_formatter_would_write(logged, ids, tenant_id):
    record = logged(ids=ids, tenant_id=tenant_id)
    assert record.json_line() != ""
    line = json.loads(JsonLineFormatter().format(record))
    assert line == line_fields(record)
    assert line["correlation_id"] == ID
    assert (line.get("trace_id"), line.get("tenant_id", "")) == (ids and "0af7651916cd43dd8448eb211c80319c", tenant_id)
    assert (line["method"], line["path"], line["status"], line["duration_ms"]) == (
        "GET",
        KIND.fields["path"],
        200,
        12.346,
    )
    assert "GET /items/<uuid:id> 200" in TextLineFormatter().format(record)


@pytest.mark.parametrize(
    ("correlation_id", "shown"),
    [('a"b\\', 'a"b\\'), ("order 17", "order 17"), ("token=abc123", "token=***"), ("Bearer abc.DEF123", "Bearer ***")],
)
def test_what_clients_make_up_takes_the_careful_way(logged, correlation_id, shown):
    record = logged(correlation_id=correlation_id)
    assert json.loads(JsonLineFormatter().format(record))["correlation_id"] == shown


def test_fields_that_the_settings_hide_are_hidden(logged, settings):
    before = JsonLineFormatter().format(logged(tenant_id="t1"))
    settings.MONITORING = {**settings.MONITORING, "LOG_REDACT": ["path", "tenant_id"]}
    line = json.loads(JsonLineFormatter().format(logged(tenant_id="t1")))
    assert (line["path"], line["tenant_id"]) == ("***", "***")
    assert json.loads(before)["tenant_id"] == "t1"


def test_record_is_as_the_logger_would_make_it(logged):
    record = logged()
    [usual] = [access_logger.makeRecord(access_logger.name, logging.INFO, "x", 0, KIND.message, (), None)]
    assert (
        record.__dict__.keys() - KIND.fields.keys() - {"duration_ms", "correlation_id", "message"}
        == usual.__dict__.keys()
    )
    for name in ("name", "levelname", "levelno", "msg", "process", "thread", "threadName", "processName"):
        assert getattr(record, name) == getattr(usual, name)
    assert abs(record.created - usual.created) < 5
    assert 0 <= record.msecs < 1000
    assert abs(record.relativeCreated - usual.relativeCreated) < 60_000
    assert record.getMessage() == "GET /items/<uuid:id> 200"


def test_probes_are_logged_at_debug(logged):
    assert logged(is_probe=True).levelno == logging.DEBUG
    access_logger.setLevel(logging.INFO)
    assert logged(is_probe=True) is None


def test_somebodys_own_records_are_used(logged):
    class Own(logging.LogRecord):
        pass

    logging.setLogRecordFactory(Own)
    try:
        record = logged()
    finally:
        logging.setLogRecordFactory(logging.LogRecord)
    assert (type(record), record.path, record.correlation_id) == (Own, "/items/<uuid:id>", ID)


def test_child_process_logs_its_own_id(logged):
    logged()
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writing, str(logged().process).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == str(child)
