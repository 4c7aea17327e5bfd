"""`simulate_traffic`: what it sends is counted exactly, whatever is killed meanwhile; differences are told."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from uuid import uuid4

import pytest

from tests.stack import Stack, wait_for
from voicehelper.services import BASE_DIR
from voicehelper.simulation import Ledger, Person, Simulation, differences

T1, T2 = uuid4(), uuid4()
PERSON = Person(T1, "token")


@pytest.mark.parametrize(
    ("conversations", "messages", "tokens", "told"),
    [
        ({(T1, "chat"): 2}, {(T1, "chat"): 5}, {(T1, "chat"): 70}, []),
        ({(T1, "chat"): 1}, {(T1, "chat"): 5}, {(T1, "chat"): 70}, ["chat: 2 conversations accepted, 1 counted"]),
        ({(T1, "chat"): 2}, {(T1, "chat"): 6}, {(T1, "chat"): 70}, ["chat: 5 messages accepted, 6 counted"]),
        ({(T1, "chat"): 2}, {(T1, "chat"): 5}, {(T1, "chat"): 71}, ["chat: 70 tokens accepted, 71 counted"]),
        ({(T1, "voice"): 2}, {(T1, "chat"): 5}, {(T1, "chat"): 70}, 2),
    ],
)
def test_differences_are_told(conversations, messages, tokens, told):
    ledger = Ledger(*(Counter({(T1, "chat"): number}) for number in (2, 5, 70)))
    before = Counter({(T1, "chat"): 7}), Counter({(T1, "chat"): 1}), Counter()
    grown = conversations, messages, tokens
    after = [old + Counter(more) for old, more in zip(before, grown, strict=True)]
    found = differences(ledger, before, after)
    assert found == [f"tenant {T1}, {line}" for line in told] if isinstance(told, list) else len(found) == told


def test_what_grew_in_another_tenant_is_told():
    before = Counter(), Counter(), Counter()
    after = Counter({(T2, "chat"): 1}), Counter(), Counter()
    assert differences(Ledger(), before, after) == [f"tenant {T2}, chat: 0 conversations accepted, 1 counted"]


class Web(BaseHTTPRequestHandler):
    """Answers with the statuses that the test has queued, None: with nothing; then with 201."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.server.keys.append(self.headers["Idempotency-Key"])
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(self.server.seconds)
        status = self.server.statuses.pop(0) if self.server.statuses else 201
        if status is None:
            self.close_connection = True
            return
        content = b'{"id": "1"}' if status == 201 else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def web():
    with ThreadingHTTPServer(("127.0.0.1", 0), Web) as server:
        server.statuses, server.seconds, server.keys = [], 0, []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def simulate(web, **options):
    options = {"rate": 1, "seconds": 60, "error_rate": 0, "reply_share": 0, "seed": 1, "threads": 1} | options
    return Simulation(f"http://127.0.0.1:{web.server_port}", [PERSON], **options)


@pytest.mark.parametrize(
    ("statuses", "accepted", "refused"),
    [
        ([None, 409, 201], True, {}),  # the first one was under way still
        ([503, 201], True, {}),
        ([409], False, {409: 1}),
        ([301], False, {301: 1}),
        ([404], False, {404: 1}),
    ],
)
def test_it_is_found_out_what_became_of_a_request(web, statuses, accepted, refused):
    web.statuses = statuses
    simulation = simulate(web)
    assert (simulation._post(PERSON, "conversations", {}) is not None) is accepted
    assert simulation.ledger.refused == refused and simulation.ledger.unknown == 0
    assert len(set(web.keys)) == 1 and web.statuses == []


def test_stopped_it_begins_no_conversation_that_waits_for_its_turn(web):
    web.seconds = 0.02
    simulation = simulate(web, rate=1_000)
    summaries = simulation.run()
    next(summaries)
    simulation.stop()
    started = time.monotonic()
    *_, whole = summaries
    assert time.monotonic() - started < 3
    assert 0 < whole.requests < 200


@pytest.mark.parametrize(
    "option", ["--rate=0", "--seconds=-1", "--error-rate=2", "--reply-share=x", "--tenants=0", "--rate=fast"]
)
def test_options_that_make_no_sense_are_refused(option):
    done = subprocess.run(
        [sys.executable, "manage.py", "simulate_traffic", option], cwd=BASE_DIR, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert option.partition("=")[0] in done.stderr


def test_all_is_counted_whatever_is_killed_meanwhile(tmp_path):
    stack = Stack(tmp_path)
    try:
        stack.start()
        command = [sys.executable, "manage.py", "simulate_traffic", "--rate=30", "--seconds=8", "--error-rate=0.2"]
        with (tmp_path / "simulation.log").open("w+") as log:
            simulation = subprocess.Popen(command, cwd=BASE_DIR, env=stack.env, stdout=log, stderr=log)
            wait_for(lambda: "requests" in (tmp_path / "simulation.log").read_text(), "its first line")
            for words in (("relay_outbox",), ("gunicorn",), ("consume", "analytics")):
                child = stack.child(*words)
                assert child is not None, words
                os.kill(child.pid, signal.SIGKILL)
            assert simulation.wait(180) == 0, (tmp_path / "simulation.log").read_text()
        said = (tmp_path / "simulation.log").read_text()
        assert "counted exactly that" in said and " 0 replies of" not in said
        assert json.loads((stack.data_dir / "services.json").read_text())["web_url"].endswith(stack.env["WEB_PORT"])
    finally:
        if stack.process and stack.process.poll() is None:
            stack.end(signal.SIGTERM)
