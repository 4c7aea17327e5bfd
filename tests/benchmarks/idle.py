"""What a relay costs that has nothing to do."""

import time

import psutil

from tests.benchmarks.bench import Bench, cpu_seconds
from tests.benchmarks.report import Row, median_and_spread
from tests.services import free_ports


def run(bench: Bench) -> list[Row]:
    (port,) = free_ports(1)
    with bench.database() as outbox:
        outbox.seed(100)
        outbox.place("all")
        outbox.rewind("all")
        with bench.relay(outbox.url, "--metrics-port", str(port)) as relay:
            server = psutil.Process(_server_process(outbox.connection))
            time.sleep(min(5, bench.scale.idle_seconds))  # the pauses have grown to their longest
            of_relay, of_server = [], []
            for _ in range(bench.scale.rounds):
                started, relay_before, server_before = time.monotonic(), cpu_seconds(relay), cpu_seconds(server)
                time.sleep(bench.scale.idle_seconds)
                seconds = time.monotonic() - started
                of_relay.append((cpu_seconds(relay) - relay_before) / seconds * 100)
                of_server.append((cpu_seconds(server) - server_before) / seconds * 100)
    relay_share, spread = median_and_spread(of_relay)
    server_share, spread_server = median_and_spread(of_server)
    return [
        Row(
            measure="idle relay",
            value=relay_share,
            unit="% of one core",
            must="<= 2",
            detail=f"{spread}, {bench.scale.idle_seconds} s each; `manage.py relay_outbox` with its metrics port",
        ),
        Row(
            measure="idle relay: its database session",
            value=server_share,
            unit="% of one core",
            detail=f"{spread_server}; the PostgreSQL process that serves it",
        ),
    ]


def _server_process(connection) -> int:
    (pid,) = connection.execute(
        """SELECT pid FROM pg_locks JOIN pg_database d ON d.oid = database
            WHERE locktype = 'advisory' AND granted AND datname = current_database()"""
    ).fetchall()[0]
    return pid
