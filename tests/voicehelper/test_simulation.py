"""`simulate_traffic`: what it sends is counted exactly, whatever is killed meanwhile; differences are told."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from uuid import uuid4

import pytest

from tests.stack import Stack, wait_for
from voicehelper.services import BASE_DIR
from voicehelper.simulation import Ledger, differences

T1, T2 = uuid4(), uuid4()


@pytest.mark.parametrize(
    ("conversations", "messages", "told"),
    [
        ({(T1, "chat"): 2}, {(T1, "chat"): 5}, []),
        ({(T1, "chat"): 1}, {(T1, "chat"): 5}, [f"tenant {T1}, chat: 2 conversations accepted, 1 counted"]),
        ({(T1, "chat"): 2}, {(T1, "chat"): 6}, [f"tenant {T1}, chat: 5 messages accepted, 6 counted"]),
        (
            {(T1, "chat"): 2, (T2, "chat"): 1},
            {(T1, "chat"): 5},
            [f"tenant {T2}, chat: 0 conversations accepted, 1 counted"],
        ),
        ({(T1, "voice"): 2}, {(T1, "chat"): 5}, 2),
    ],
)
def test_differences_are_told(conversations, messages, told):
    ledger = Ledger(Counter({(T1, "chat"): 2}), Counter({(T1, "chat"): 5}))
    before = Counter({(T1, "chat"): 7}), Counter({(T1, "chat"): 1})
    after = before[0] + Counter(conversations), before[1] + Counter(messages)
    found = differences(ledger, before, after)
    assert found == told if isinstance(told, list) else len(found) == told


@pytest.mark.parametrize("option", ["--rate=0", "--seconds=-1", "--error-rate=2", "--tenants=0", "--rate=fast"])
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
        assert "counted exactly that" in (tmp_path / "simulation.log").read_text()
        assert json.loads((stack.data_dir / "services.json").read_text())["web_url"].endswith(stack.env["WEB_PORT"])
    finally:
        if stack.process and stack.process.poll() is None:
            stack.end(signal.SIGTERM)
