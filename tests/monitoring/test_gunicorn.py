"""The web server as it is run, with two workers: a scrape gets the sum over both, the log is JSON lines."""

import http.client
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from .conftest import answers, get, running_gunicorn, sample, wait_until


@pytest.fixture
def server(tmp_path):
    with running_gunicorn(tmp_path) as server:
        wait_until(lambda: len(server.pids()) == 2)
        yield server


def requests_to(server, path="/"):
    return sample(get(f"{server.url}/metrics").text, "http_requests_total", path=path, status="200")


def test_scrape_sums_over_workers_also_dead_ones(server):
    with ThreadPoolExecutor(8) as pool:
        statuses = {answer.status for answer in pool.map(get, [server.url] * 200)}
    assert statuses == {200}
    # Whichever worker answers.
    assert {requests_to(server) for _ in range(20)} == {200.0}

    victim = min(server.pids())
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: len(server.pids()) == 2 and victim not in server.pids())
    assert {requests_to(server) for _ in range(20)} == {200.0}

    text = get(f"{server.url}/metrics").text
    assert sample(text, "http_request_duration_seconds_count", path="/") == 200
    assert text.count("\nproject_items 7.0\n") == 1  # a registered collector, not once a worker
    assert text.count("\noutbox_relay_leader ") == 1


def test_workers_that_die_leave_their_counts_and_no_files(server):
    files = server.data / "metrics" / server.url.rpartition(":")[2]
    for number in range(1, 4):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(get, [server.url] * 20))
        for pid in server.pids():
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: not list(files.glob(f"*_{pid}.db")))
        wait_until(lambda: len(living(server)) == 2)
        assert requests_to(server) == 20 * number
    kinds = [file.name for file in files.glob("counter_*.db")]
    assert len(kinds) == 3  # two living, and all dead in one
    text = get(f"{server.url}/metrics").text
    assert {process(one) for one in text.splitlines() if "{pid=" in one} == server.pids()


def living(server):
    """Workers that answer, when none of them is dying just now."""
    with suppress(OSError, http.client.HTTPException):
        return server.pids()
    return set()


def process(line):
    return int(line.partition('{pid="')[2].partition('"')[0])


def test_what_the_workers_take_of_the_machine(server):
    text = get(f"{server.url}/metrics").text
    for pid in server.pids():
        assert sample(text, "process_resident_memory_bytes", pid=str(pid)) > 10e6
        assert sample(text, "process_open_fds", pid=str(pid)) > 3
        assert abs(sample(text, "process_start_time_seconds", pid=str(pid)) - time.time()) < 120
        assert f'process_cpu_seconds_total{{pid="{pid}"}}' in text
    assert text.count("\npython_info{") == 1


def test_workers_that_are_replaced_keep_counting(server):
    old = server.pids()
    get(server.url)
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: len(now := living(server)) == 2 and not now & old)
    get(server.url)
    wait_until(lambda: requests_to(server) == 2)


def test_scrapes_and_deaths_at_the_same_time(server):
    """No scrape fails or counts twice while the files of the dead are put together."""
    for _ in range(20):
        get(server.url)
    done = threading.Event()

    def kill():
        for _ in range(4):
            for pid in living(server):
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda: len(living(server)) == 2)
        done.set()

    seen = set()
    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill)
        while not done.is_set() and not killing.done():
            with suppress(OSError, http.client.HTTPException):  # asked of one that was killed
                answer = get(f"{server.url}/metrics")
                seen.add((answer.status, sample(answer.text, "http_requests_total", path="/", status="200")))
        killing.result()
    assert seen == {(200, 20.0)}


def test_log_is_json_lines_with_trace_ids(server):
    answer = get(f"{server.url}/items/0191d1f0-0000-7000-8000-000000000000", X_Correlation_ID="abc")
    get(f"{server.url}/fail")
    get(f"{server.url}/health")
    lines = wait_until(lambda: [line for line in server.lines() if line.get("path") == "/fail"]) and server.lines()

    assert {line["service"] for line in lines} == {"project"}
    assert any("Listening at" in line["message"] for line in lines if line["logger"] == "gunicorn.error")
    [shown] = [line for line in lines if line["message"] == "showing"]
    assert shown["trace_id"] == answer.json()["trace_id"]
    assert (shown["correlation_id"], shown["size"]) == ("abc", 3)
    [access] = [line for line in lines if line.get("path") == "/items/<uuid:id>"]
    assert access["trace_id"] == answer.json()["trace_id"]
    assert (access["logger"], access["method"], access["status"]) == ("monitoring.access", "GET", 200)
    [failed] = [line for line in lines if line["logger"] == "django.request"]
    assert "RuntimeError: this view fails" in failed["exception"]
    assert failed["trace_id"] == next(line for line in lines if line.get("path") == "/fail")["trace_id"]
    assert not [line for line in lines if line.get("path") == "/health"]


def test_stops_cleanly(server):
    assert server.stop() == 0
    assert not answers(f"{server.url}/health")


def test_counts_start_at_zero_with_the_server(tmp_path):
    given = tmp_path / "metrics"
    given.mkdir()
    (given / "mine.txt").write_text("not a metric")
    for _ in range(2):
        directory = tmp_path / str(_)
        directory.mkdir()
        with running_gunicorn(directory, PROMETHEUS_MULTIPROC_DIR=str(given)) as server:
            get(server.url)
            assert requests_to(server) == 1
    assert Path(given / "mine.txt").read_text() == "not a metric"
