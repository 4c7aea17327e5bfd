"""How much memory a relay takes while it drains a large backlog."""

import os
import time
from pathlib import Path

from tests.benchmarks.bench import Bench
from tests.benchmarks.report import Row


def run(bench: Bench) -> list[Row]:
    count = bench.scale.memory_events
    with bench.database() as outbox:
        outbox.fill(count)
        outbox.rewind("last")
        with bench.relay(outbox.url) as relay:
            time.sleep(2)
            idle = _peak_megabytes(relay.pid)
        outbox.rewind("all")
        before = bench.ends()
        with bench.relay(outbox.url) as relay:
            bench.wait_for_records(before, count, timeout_seconds=300)
            peak = _peak_megabytes(relay.pid)
    return [
        Row(
            measure=f"relay peak memory while draining {count:,} events",
            value=peak,
            unit="MB",
            must="<= 150",
            detail=f"peak resident set (VmHWM) of `manage.py relay_outbox`; with nothing to do: {idle:.0f} MB",
        )
    ]


def _peak_megabytes(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"no VmHWM of {pid} on {os.uname().sysname}")
