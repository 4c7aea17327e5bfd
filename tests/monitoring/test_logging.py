"""The lines: JSON of one schema, or text; what is in them, and what gets them into a process's output."""

import copy
import enum
import json
import logging
import os
import pty
import random
import signal
import subprocess
import sys
import uuid
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import jsonschema
import pytest
from opentelemetry import trace

from monitoring import context, log_lines
from monitoring.conf import service_name
from monitoring.logging import ConsoleHandler, JsonLineFormatter, TextLineFormatter

from .conftest import ROOT, get, project_environment, run_python, running_gunicorn, wait_until

SCHEMA = json.loads((Path(log_lines.__file__).parent / "log_line.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def parsed(line):
    """One line of JSON, as the schema has it."""
    assert len(line) <= log_lines.MAX_LINE_BYTES
    assert line.isascii()
    assert not any(ord(character) < 0x20 for character in line)
    fields = json.loads(line, object_pairs_hook=without_duplicates)
    VALIDATOR.validate(fields)
    return fields


def without_duplicates(pairs):
    names = [name for name, _ in pairs]
    assert len(names) == len(set(names)), names
    return dict(pairs)


def record(message="hello %s", *args, extra=None, exc_info=None):
    return logging.getLogger("some.logger").makeRecord(
        "some.logger", logging.WARNING, __file__, 1, message, args or ("world",), exc_info, extra=extra
    )


def json_line(one):
    return parsed(JsonLineFormatter().format(one))


def test_fields_in_order():
    one = record(extra={"size": 3, "price": Decimal("1.5"), "thing": object})
    line = json_line(one)
    assert list(line) == ["time", "level", "logger", "event", "message", "service", "size", "price", "thing"]
    assert line["level"] == "WARNING"
    assert line["logger"] == "some.logger"
    assert line["event"] == "hello %s"
    assert line["message"] == "hello world"
    assert line["service"] == service_name()
    assert line["size"] == 3
    assert (line["price"], line["thing"]) == ("1.5", "<class 'object'>")
    time = datetime.fromisoformat(line["time"])
    assert line["time"].endswith("Z")
    assert abs(time - datetime.fromtimestamp(one.created, UTC)).total_seconds() < 0.001


@pytest.mark.parametrize(
    ("message", "extra", "event"),
    [
        ("hello %s", {"event": "greeted"}, "greeted"),
        ("hello %s\nmore", {}, "hello %s"),
        ("hello %s", {"event": 7}, "int"),
        ("h" * 1000 + "%s", {}, None),
    ],
)
def test_event(message, extra, event):
    line = json_line(record(message, extra=extra))
    if event is None:
        assert "characters cut" in line["event"]
    else:
        assert line["event"] == event


def test_event_of_a_message_that_is_an_object_is_its_kind():
    one = logging.getLogger("x").makeRecord("x", 30, "f", 1, ValueError("wrong"), (), None)
    assert (json_line(one)["event"], json_line(one)["message"]) == ("ValueError", "wrong")


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


def test_ids_are_text_and_left_out_where_there_are_none():
    given = uuid.UUID(int=7)
    line = json_line(record(extra={"event_id": given, "tenant_id": 5, "correlation_id": None, "trace_id": Number.ONE}))
    assert (line["event_id"], line["tenant_id"], line["trace_id"]) == (str(given), "5", "1")
    assert "correlation_id" not in line


def test_exception_is_in_the_line():
    try:
        raise ValueError("two\nlines")
    except ValueError:
        line = json_line(record(exc_info=sys.exc_info()))
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("ValueError: two\nlines")


def test_line_breaks_and_control_characters_stay_inside_the_line():
    assert json_line(record("a\nb\x00\u2028\x9b%s"))["message"] == "a\nb\x00\u2028\x9bworld"


def test_names_of_the_line_are_not_taken_by_extra():
    line = json_line(record(extra={"time": 1, "level": 2, "service": "mine", "truncated": False, 'a"b': 3}))
    assert (line["level"], line["service"]) == ("WARNING", service_name())
    assert (line["extra_time"], line["extra_level"], line["extra_service"]) == (1, 2, "mine")
    assert (line["extra_truncated"], line['a"b']) == (False, 3)


class Unprintable:
    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __str__


class Colour(enum.StrEnum):
    RED = "red"


class Number(enum.IntEnum):
    ONE = 1


def cyclic():
    value = []
    value.append({"again": value})
    return value


def deep():
    value = []
    for _ in range(100_000):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, None),
        (True, True),
        (1.5, 1.5),
        (10**30, 10**30),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (Colour.RED, "red"),
        (Number.ONE, 1),
        (b"caf\xc3\xa9\xff", "café\\xff"),
        ("\ud800 lone", "\ud800 lone"),
        ({"a": {1}, 2: (None, float("nan"))}, {"a": [1], "2": [None, "nan"]}),
        (uuid.UUID(int=7), "00000000-0000-0000-0000-000000000007"),
        (Unprintable(), "<Unprintable without a text: RuntimeError>"),
        ({"a": Unprintable()}, {"a": "<Unprintable without a text: RuntimeError>"}),
        (10**5000, "<int without a text: ValueError>"),
        (cyclic(), [{"again": [{"again": [{"again": "..."}]}]}]),
        (deep(), [[[[[["..."]]]]]]),
        (list(range(1000)), list(range(100))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_of_every_kind(value, shown):
    assert json_line(record(extra={"value": value}))["value"] == shown
    TextLineFormatter().format(record(extra={"value": value}))


@pytest.mark.parametrize(
    ("message", "args"),
    [
        ("%d items", ("many",)),
        ("%s and %s", ("one",)),
        ("%s", (Unprintable(),)),
        (Unprintable(), ()),
        (Unprintable(), ("x",)),
        ("%(missing)s", ({"there": 1},)),
        ("100%", ("x",)),
    ],
)
def test_message_that_cannot_be_made_keeps_its_line(message, args):
    one = logging.getLogger("x").makeRecord("x", 30, "f", 1, message, args, None)
    assert json_line(one)["message"]
    assert TextLineFormatter().format(one)


def test_exception_without_a_text_keeps_its_line():
    class Bad(Exception):
        def __str__(self):
            raise RuntimeError

    def recursion():
        recursion()

    for raises in (Bad, recursion):
        try:
            raise raises()
        except Exception:
            line = json_line(record(exc_info=sys.exc_info()))
        assert raises.__name__ in line["exception"]


@pytest.mark.parametrize(
    "extra",
    [
        {"text": "x" * 20_000},
        {"text": "密" * 20_000},
        {"text": "\U0001f600" * 200_000, "more": b"\xff" * 50_000},
        {f"name{number}": "x" * 100 for number in range(1000)},
        {"n" * 100_000: 1},
        {"list": ["x" * 1000] * 1000},
    ],
    ids=["ascii", "chinese", "emoji", "many", "name", "list"],
)
def test_line_that_is_too_long_is_cut(extra):
    line = json_line(record(extra=extra))
    assert line["truncated"] is True
    assert line["message"] == "hello world"


def test_of_a_long_traceback_the_beginning_and_the_end_are_kept():
    try:
        raise ValueError("y" * 30_000 + " the end")
    except ValueError:
        line = json_line(record(exc_info=sys.exc_info()))
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("the end")


def test_secrets_are_hidden_wherever_they_are():
    secret = "s3cret"
    dsn = f"postgresql://bob:{secret}@db/x"
    extra = {
        **{"password": secret, "sasl.password": secret, "headers": {"Authorization": secret, "x": [{"token": secret}]}},
        **{"url": dsn, "raw": f"Bearer {secret}s3cret".encode(), "query": f"a=1&token={secret}"},
    }
    try:
        raise ValueError(f"cannot connect to {dsn}: password='{secret}'")
    except ValueError:
        records = [
            record(f"to {dsn}, %s", extra=extra, exc_info=sys.exc_info()),
            record("%s", {"password": secret, "n": 1}),
            record("%(password)s %(n)s", {"password": secret, "n": 1}),
            record("%s %s", {"password": secret}, [{"api_key": secret}]),
            record("%s", "token=***", extra={"event": f"password={secret}"}),
            record("got %s", ValueError(dsn)),
        ]
    for formatter in (JsonLineFormatter(), TextLineFormatter(), TextLineFormatter(in_colour=True)):
        for one in records:
            text = formatter.format(one)
            assert secret not in text
            assert "***" in text
    assert records[1].args == {"password": secret, "n": 1}  # other handlers' business
    line = json_line(records[0])
    assert (line["password"], line["headers"]) == ("***", {"Authorization": "***", "x": [{"token": "***"}]})


def test_configured_fields_are_hidden(settings):
    one = record(extra={"email": "alice", "tenant_id": "of alice"})
    assert json_line(one)["email"] == "alice"
    settings.MONITORING = {**settings.MONITORING, "LOG_REDACT": ["email", "tenant_id"]}
    assert (json_line(one)["email"], json_line(one)["tenant_id"]) == ("***", "***")


TEXTS = (
    "plain",
    "/api/<uuid:id>",
    "with space",
    "a=b",
    "p@q",
    "it's",
    'say "x"',
    "a: b",
    "é",
    "line\nbreak",
    "Bearer Abc.123",
)
TEXTS += ("", "basic Abc123", "password", "password=x", "://a:b@c", "cookie: x", "token: 'x'")
VALUES = (
    *TEXTS,
    1,
    -5,
    1.5,
    float("inf"),
    None,
    True,
    {"password": "x"},
    ["a"],
    b"x",
    Decimal(1),
    10**30,
    Number.ONE,
    Colour.RED,
)
NAMES = ("size", "event", "time", "password", "trace_id", "tenant_id", "a b", "message", "truncated", "request")


def test_short_way_makes_the_same_line_as_the_long_one():
    dice = random.Random(1)

    def some(values):
        return dice.choice(values if dice.random() < 0.3 else values[:2])

    short = 0
    for _ in range(3000):
        one = record(some(TEXTS))
        one.args = tuple(some((*TEXTS, *VALUES)) for _ in range(dice.randrange(3)))
        one.msg += " %s" * (len(one.args) if dice.random() < 0.8 else 1)
        one.__dict__ |= {name: some(VALUES) for name in dice.sample(NAMES, dice.randrange(4))}
        try:
            line = log_lines._short_way(one)
        except Exception:
            line = ""
        if line:
            short += 1
            assert parsed(line) == parsed(log_lines._bounded_json(log_lines.line_fields(one))), one.__dict__
        else:
            parsed(JsonLineFormatter().format(one))
    assert 300 < short < 2700


def test_record_of_another_kind_loses_no_extra():
    class Early(logging.LogRecord):
        def __init__(self, *args, **kwargs):
            self.early = "bird"
            super().__init__(*args, **kwargs)

    one = Early("x", 30, "f", 1, "hello", (), None)
    assert json_line(one)["early"] == "bird"
    assert json_line(copy.copy(record(extra={"size": 3})))["size"] == 3


def test_request_with_its_query_string_is_left_out(rf):
    text = JsonLineFormatter().format(record(extra={"request": rf.get("/?token=secret"), "status_code": 500}))
    assert "secret" not in text
    assert json.loads(text)["status_code"] == 500


def test_text_line():
    text = TextLineFormatter().format(record(extra={"size": 3}))
    assert text.endswith(f"Z WARNING {service_name()} some.logger: hello world size=3")


def test_text_line_does_nothing_to_the_terminal():
    try:
        raise ValueError("\x1b[2J\x9b")
    except ValueError:
        text = TextLineFormatter().format(
            record("a\nb\x1b[31m %s\r", extra={"v": "\x1b]0;title\x07"}, exc_info=sys.exc_info())
        )
    assert not {"\x1b", "\x9b", "\r", "\x07"} & set(text)
    assert "a\n    b" in text
    assert "\nTraceback (most recent call last):\n" in text


class Terminal:
    """A program's terminal: what it wrote there."""

    def __init__(self, code, **environment):
        ours, its = pty.openpty()
        with subprocess.Popen(
            [sys.executable, "-c", code],
            env=project_environment(**environment),
            cwd=ROOT,
            stderr=its,
            stdout=subprocess.DEVNULL,
        ) as process:
            os.close(its)
            text = b""
            try:
                while piece := os.read(ours, 1000):
                    text += piece
            except OSError:  # Linux's way to say that the other end is closed
                pass
        os.close(ours)
        assert process.returncode == 0, text
        self.lines = text.decode().splitlines()


SAY = "import django, logging; django.setup(); logging.getLogger('any').warning('said', extra={'n': 1})"


def test_terminal_gets_text_in_colour_by_itself():
    [line] = Terminal(SAY, LOG_FORMAT="auto", TERM="xterm").lines
    assert "\x1b[33mWARNING\x1b[0m" in line
    assert "said" in line


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1", "TERM": "xterm"}, {"TERM": "dumb"}])
def test_terminal_without_colour(environment):
    [line] = Terminal(SAY, LOG_FORMAT="auto", **environment).lines
    assert line.endswith("WARNING project any: said n=1")


def test_terminal_gets_json_when_told_so():
    [line] = Terminal(SAY, LOG_FORMAT="json", TERM="xterm").lines
    assert parsed(line)["message"] == "said"


def test_pipe_gets_json_by_itself():
    [line] = run_python(SAY, LOG_FORMAT="auto").stderr.splitlines()
    assert parsed(line)["n"] == 1


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
        ({"LOG_FORMAT": "xml"}, "LOG_FORMAT must be auto, json or text"),
        ({"LOG_LEVEL": "LOUD"}, "LOG_LEVEL must be a level"),
        ({"SAMPLING_RATE": 1.5}, "SAMPLING_RATE must be from 0.0 to 1.0"),
        ({"LOG_REDACT": "email"}, "LOG_REDACT must be a list of names"),
        ({"READY_DATABASES": [1]}, "READY_DATABASES must be a list of names"),
        ({"SERVICE": "x"}, "unexpected keyword argument 'service'"),
    ],
)
def test_bad_setting_is_refused(settings, setting, says):
    from django.core.exceptions import ImproperlyConfigured

    from monitoring.conf import monitoring_settings

    settings.MONITORING = setting
    with pytest.raises(ImproperlyConfigured, match=says):
        monitoring_settings()


def run(code, **environment):
    """Lines of stdout and of stderr, each JSON."""
    done = run_python("import django, logging, sys, threading; django.setup()\n" + code, **environment)
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


SERVER = "from monitoring.logging import log_to; log_to('stdout')\n"


def test_server_that_ends_by_an_exception_says_so_in_a_line():
    status, [line], err = run(SERVER + "raise ValueError('gone')")
    assert (status, err) == (1, [])
    assert parsed(line)["level"] == "CRITICAL"
    assert "ValueError: gone" in parsed(line)["exception"]


def test_worker_that_ends_by_an_exception_says_so_once_under_its_name():
    status, [line], err = run(
        "from monitoring.worker import Worker\nwith Worker('relay', 0):\n  raise ValueError('gone')"
    )
    assert (status, err) == (1, [])
    assert parsed(line)["service"] == "project-relay"
    assert "ValueError: gone" in parsed(line)["exception"]


def test_command_that_fails_shows_its_traceback_as_python_does():
    status, out, err = run("raise ValueError('gone')")
    assert (status, out) == (1, [])
    assert err[0] == "Traceback (most recent call last):"
    assert err[-1] == "ValueError: gone"


def test_thread_that_ends_by_an_exception_says_so_in_a_line():
    code = "def end(error): raise error\n"
    code += "for error in (ValueError('gone'), SystemExit(3)):\n"
    code += "  thread = threading.Thread(target=end, args=(error,), name='lost'); thread.start(); thread.join()"
    status, out, [line] = run(code)
    assert (status, out) == (0, [])
    assert (parsed(line)["level"], parsed(line)["thread_name"]) == ("ERROR", "lost")
    assert "ValueError: gone" in parsed(line)["exception"]


def test_hooks_of_others_are_left_alone():
    done = run_python(
        "import sys, threading, django\n"
        "sys.excepthook = threading.excepthook = print\n"
        "django.setup()\n"
        "assert sys.excepthook is threading.excepthook is print"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_logging_at_the_end_of_the_process_and_in_signal_handlers():
    code = (
        SERVER
        + """
import atexit, os, signal
logger = logging.getLogger("late")
class Late:
    def __del__(self): logger.warning("deleted")
late = Late()
late.itself = late
atexit.register(logger.warning, "at exit")
signal.signal(signal.SIGUSR1, lambda *_: logger.warning("signalled"))
for _ in range(200):
    logger.warning("loop")
    os.kill(os.getpid(), signal.SIGUSR1)
"""
    )
    status, out, err = run(code)
    assert (status, err) == (0, [])
    said = [parsed(line)["message"] for line in out]
    assert (said.count("loop"), said.count("signalled"), said.count("at exit")) == (200, 200, 1)


def test_text_that_logs_itself_ends():
    code = (
        SERVER
        + """
class Chatty:
    def __str__(self):
        logging.getLogger("chatty").warning("%s", self)
        return "chatty"
logging.getLogger("chatty").warning("%s", Chatty())
"""
    )
    status, out, err = run(code)
    assert (status, err) == (0, [])
    assert parsed(out[-1])["logger"] == "chatty"


def test_process_goes_on_when_the_reader_of_its_log_is_gone():
    code = SERVER + "sys.stdin.read(1)\nfor _ in range(10): logging.getLogger('x').warning('said')\n"
    code += "import os; os.write(2, b'alive')\nos._exit(0)"
    with subprocess.Popen(
        [sys.executable, "-c", "import django, logging, sys; django.setup()\n" + code],
        env=project_environment(),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.close()
        process.stdin.write(b"x")
        process.stdin.close()
        assert process.stderr.read() == b"alive"
    assert process.returncode == 0


@pytest.fixture
def console(monkeypatch):
    """A logger with a ConsoleHandler of its own, on the test's stderr."""
    logger = logging.Logger("own")
    logger.addHandler(ConsoleHandler())
    yield logger


def test_lost_lines_are_told_of_when_one_can_be_written_again(console, monkeypatch, tmp_path):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        for _ in range(3):
            console.warning("lost")
        target = console.handlers[0]._target
        with (tmp_path / "log").open("w") as good:
            os.dup2(good.fileno(), full.fileno())  # room again
        console.warning("said")
        assert target.output.lost == 0
    told, said = map(parsed, (tmp_path / "log").read_text().splitlines())
    assert (told["event"], told["lines"], said["message"]) == ("log lines lost", 3, "said")


@pytest.mark.parametrize("stream", [None, "closed"])
def test_process_without_a_stream_goes_on(console, monkeypatch, tmp_path, stream):
    if stream == "closed":
        stream = (tmp_path / "closed").open("w")
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    console.warning("said to nobody")


def test_filters_of_the_handler_are_asked(console, capfd):
    console.handlers[0].addFilter(lambda record: record.msg != "unwanted")
    console.warning("unwanted")
    console.warning("wanted")
    [line] = capfd.readouterr().err.splitlines()
    assert parsed(line)["message"] == "wanted"


def test_every_line_of_web_and_worker_is_of_the_schema(tmp_path):
    with running_gunicorn(tmp_path) as server:
        get(f"{server.url}/items/0191d1f0-0000-7000-8000-000000000000", X_Correlation_ID="abc")
        get(f"{server.url}/fail")
        get(f"{server.url}/not-there?token=s3cret")
        wait_until(lambda: any(line.get("path") == "/unknown" for line in server.lines()))
        # A worker that dies is gunicorn's own business to tell of.
        victim = min(server.pids())
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: len(server.pids()) == 2 and victim not in server.pids())
        assert server.stop() == 0
        text = server.log.read_text()
    lines = [parsed(line) for line in text.splitlines()]
    assert any(str(victim) in line["message"] and line["level"] == "ERROR" for line in lines)
    assert {"gunicorn.error", "monitoring.access", "django.request"} <= {line["logger"] for line in lines}
    assert "s3cret" not in text
