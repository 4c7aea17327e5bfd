"""What reliability costs: `POST /messages` with and without the outbox, under gunicorn."""

import contextlib
import http.client
import json
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from tests.benchmarks.bench import Bench, drain, wait_until
from tests.benchmarks.report import Row, median_and_spread, number, percentile
from tests.services import free_ports

CLIENTS = 8
CONVERSATIONS = 64
"""The messages of one conversation wait for each other: enough of them that clients seldom meet."""
COMPILED = 0.02
"""Of a core, for the compiler of a broker that has run for long."""
SETTINGS = {"with": "voicehelper.settings", "without": "tests.benchmarks.without_outbox"}


def run(bench: Bench) -> list[Row]:
    _until_compiled(bench, lambda: _take_small_batches(bench))
    with bench.database() as outbox:
        people = bench.call(prepare, url=outbox.url)
        with _server(bench, outbox.url, "with") as ours, _server(bench, outbox.url, "without") as bare:
            servers = {"with": ours, "without": bare}

            def sent_to(which: str, seconds: float) -> dict[str, Any]:
                return bench.call(send, url=outbox.url, server=servers[which], seconds=seconds, **people)

            for which in servers:
                sent_to(which, 2)  # each worker imports it all
            alone = _turns(bench, sent_to)
            bench.call(drain, url=outbox.url, batch_size=None)
            with bench.relay(outbox.url):
                _until_compiled(bench, lambda: sent_to("with", bench.scale.service_seconds))
                both = _turns(bench, sent_to)
        emitted = outbox.connection.execute("SELECT count(*) FROM events_outbox_outboxevent").fetchall()[0][0]
    sent = sum(turn["with"]["count"] for turn in (*alone, *both))
    if emitted < sent:
        raise RuntimeError(f"{emitted} events for {sent} messages")
    p95 = {which: statistics.median(percentile(turn[which]["times"], 0.95) for turn in both) for which in SETTINGS}
    p95_ms = {which: number(seconds * 1e3) for which, seconds in p95.items()}
    title = "POST /messages under gunicorn, requests a second: with the outbox / without"
    return [
        _row(bench, alone, measure=f"{title}, relay stopped", detail="what emit_event() itself costs a request"),
        _row(
            bench,
            both,
            measure=title,
            must=">= 0.9",
            detail=f"P95 without it {p95_ms['without']} ms; relay, broker and database are on the same cores",
        ),
        Row(
            measure="POST /messages with the outbox, P95", value=p95["with"] * 1e3, unit="ms", detail="of the same runs"
        ),
    ]


def _turns(bench: Bench, sent_to: Callable[[str, float], dict[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    """Many short ones, each server first in every other one: what else the machine does is as much for both."""
    turns: list[dict[str, dict[str, Any]]] = []
    for number_ in range(bench.scale.service_turns):
        order = list(SETTINGS)[:: -1 if number_ % 2 else 1]
        turns.append({which: sent_to(which, bench.scale.service_seconds) for which in order})
    return turns


def _row(
    bench: Bench, turns: list[dict[str, dict[str, Any]]], *, measure: str, detail: str, must: str | None = None
) -> Row:
    seconds = bench.scale.service_seconds
    rates = {which: statistics.median(turn[which]["count"] for turn in turns) / seconds for which in SETTINGS}
    ratio, spread = median_and_spread([turn["with"]["count"] / turn["without"]["count"] for turn in turns])
    return Row(
        measure=measure,
        value=ratio,
        unit="x",
        must=must,
        baseline=f"the same without emit_event(), {number(rates['without'])} requests/s",
        detail=f"{spread}; {number(rates['with'])} requests/s by {CLIENTS} clients, {seconds} s a run; {detail}",
    )


def _take_small_batches(bench: Bench) -> None:
    with bench.database() as outbox:
        outbox.seed(bench.scale.warm_up_events)
        bench.call(drain, url=outbox.url, batch_size=1)


def _until_compiled(bench: Bench, work: Callable[[], object]) -> None:
    """Have the broker work until it is one that has run for long: a new one takes more CPU to compile than to serve."""
    broker = bench.services.kafka.process
    assert broker
    for _ in range(bench.scale.warm_up_rounds):
        before, started = _compiling_seconds(broker.pid), time.monotonic()
        work()
        if _compiling_seconds(broker.pid) - before < COMPILED * (time.monotonic() - started):
            return
    bench.say("the broker is still compiling: it takes more from the requests than one that has run for long")


def _compiling_seconds(jvm: int) -> float:
    """CPU seconds of a JVM's compiler threads so far."""
    total = 0.0
    for thread in psutil.Process(jvm).threads():
        with contextlib.suppress(FileNotFoundError):
            if "CompilerThre" in Path(f"/proc/{jvm}/task/{thread.id}/comm").read_text():
                total += thread.user_time + thread.system_time
    return total


@contextmanager
def _server(bench: Bench, database: str, which: str) -> Iterator[str]:
    (port,) = free_ports(1)
    environment = {"DJANGO_SETTINGS_MODULE": SETTINGS[which], "WEB_PORT": str(port), "TENANT_REQUESTS_PER_MINUTE": "0"}
    with bench.web_server(database, **environment):
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: _is_ready(url))
        yield url


def _is_ready(url: str) -> bool:
    try:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=5)
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False


# Jobs


def prepare() -> dict[str, Any]:
    """Job: somebody with conversations to write to."""
    from voicehelper.conversations.services import create_conversation
    from voicehelper.identity.models import ApiToken
    from voicehelper.identity.services import create_tenant, register_user

    user = register_user(tenant=create_tenant(name="Bench"), username="alice", password="correct horse battery")
    conversations = [str(create_conversation(user=user, title="Bench").id) for _ in range(CONVERSATIONS)]
    return {"token": ApiToken.objects.issue(user=user, name="bench").text, "conversations": conversations}


def send(server: str, seconds: float, token: str, conversations: list[str]) -> dict[str, Any]:
    """Job: how many messages were accepted within so many seconds, and the seconds that each took."""
    ends_at = time.monotonic() + seconds
    times: list[float] = []
    failed: list[str] = []

    def client(which: int) -> None:
        chance = random.Random(which)
        connection = http.client.HTTPConnection(urlsplit(server).netloc, timeout=30)
        headers = {"Authorization": f"Token {token}", "Content-Type": "application/json"}
        while time.monotonic() < ends_at:
            body = json.dumps(
                {"conversation_id": chance.choice(conversations), "content": "What is the answer to this?"}
            )
            started = time.perf_counter()
            connection.request("POST", "/api/v1/messages", body, headers)
            answer = connection.getresponse()
            text = answer.read()
            times.append(time.perf_counter() - started)
            if answer.status != 201:
                failed.append(f"{answer.status} {text[:200]!r}")
                return

    threads = [threading.Thread(target=client, args=(which,)) for which in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise RuntimeError(failed[0])
    return {"count": len(times), "times": times}
