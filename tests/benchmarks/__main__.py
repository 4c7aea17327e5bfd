"""See the package: the command behind `make bench`."""

import argparse
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from tests.benchmarks.report import Row, exit_code, markdown, table, write_json
from tests.benchmarks.services import Services

ROOT = Path(__file__).resolve().parents[2]
PARTS = (
    "relay",
    "table",
    "transaction",
    "latency",
    "memory",
    "idle",
    "emit",
    "size",
    "consumer",
    "monitoring",
    "admin",
    "service",
    "claims",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Measure speed and size.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; none: all of them")
    parser.add_argument("--quick", action="store_true", help="a smoke run: small numbers, nothing is judged")
    parser.add_argument("--doc", action="store_true", help="write docs/benchmarks.md too; needs a full run")
    options = parser.parse_args()
    if unknown := sorted({*options.parts} - {*PARTS}):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if options.doc and (options.parts or options.quick):
        parser.error("docs/benchmarks.md keeps full runs only")
    os.environ["DJANGO_SETTINGS_MODULE"] = "voicehelper.settings"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: gigabytes of data are to be removed
    started = time.monotonic()
    with Services() as services:
        from tests.benchmarks import machine

        described = machine.describe(services.postgres.url, services.data_dir)
        rows = _run([part for part in PARTS if part in options.parts or not options.parts], services, options.quick)
    minutes = (time.monotonic() - started) / 60
    write_json(rows, ROOT / "build" / "bench.json")
    print("\n".join(f"{name}: {what}" for name, what in described.items()))
    print(f"\n{table(rows)}\n\n{minutes:.1f} minutes; written to build/bench.json")
    if float(described["load before the run"].split()[0]) > 0.5:
        print("something else was running on this machine: do not trust these figures")
    if options.doc:
        (ROOT / "docs").mkdir(exist_ok=True)
        (ROOT / "docs" / "benchmarks.md").write_text(_page(rows, described, minutes))
    if options.quick:
        print("a smoke run: nothing is judged")
        return int(any(row.value is None for row in rows))
    return exit_code(rows)


def _run(parts: Sequence[str], services: Services, quick: bool) -> list[Row]:
    import django

    django.setup()
    from tests.benchmarks.bench import FULL, QUICK, Bench

    bench = Bench(services, QUICK if quick else FULL, lambda text: print(text, file=sys.stderr, flush=True))
    rows: list[Row] = []
    for part in parts:
        started = time.monotonic()
        bench.say(f"{part} ...")
        try:
            got = importlib.import_module(f"tests.benchmarks.{part}").run(bench)
        except Exception as error:
            # The other parts' figures are worth keeping.
            traceback.print_exc()
            got = [
                Row(
                    measure=f"{part}: could not be measured",
                    value=None,
                    unit="",
                    must="measured",
                    detail=str(error)[-300:],
                )
            ]
        rows += got
        bench.say(f"{part}: {time.monotonic() - started:.0f} s\n{table(got)}\n")
    return rows


def _page(rows: Sequence[Row], described: dict[str, str], minutes: float) -> str:
    promises = [row for row in rows if row.must is not None]
    claims = [row for row in rows if row.claim is not None]
    others = [row for row in rows if row.must is None and row.claim is None]
    machine = "\n".join(f"| {name} | {what} |" for name, what in described.items())
    return f"""# Benchmarks

Written by `make bench DOC=1` on {datetime.now(UTC):%Y-%m-%d}, in {minutes:.0f} minutes. `make bench` measures again,
prints the table and writes `build/bench.json`. `make bench ONLY=relay` runs a part: {", ".join(PARTS)}.
A promise that is not kept makes it exit 1.

Every ratio is against a baseline of the same run, the two taking turns; figures are medians. A drain rate is that of
`Relay.run(until_empty=True)` in a process of its own, less the start of its baseline, which is measured with a few
events: each new producer waits half a second for its id, and that would make any two look alike.

## Machine

| | |
|---|---|
{machine}

## What is promised

{markdown(promises)}

## What bounds a drain

CPU, on two cores: relay, broker and PostgreSQL have to work on every event there, a bare producer shares them with
the broker alone. The row above has the CPU time of both processes; to it the broker adds 4 to 6 µs an event,
PostgreSQL 2 to 3. Tried without gain: pages read in a thread (it and the loop wait for each other), several pages
under way in a batch (the wait at its end costs 4 to 6 ms), the driver's pipeline mode, `produce_batch()` (it takes no
headers), batches of 250 to 5,000, no garbage collection. A loop of nothing but libpq, `produce()` and `flush()`,
without lead, cursor and tracing, reached 0.45 to 0.65 of the bare producer here.

## Measured along the way

{markdown(others)}

## What the specification claims

Its sections on key features and on monitoring, beside what was measured. A claim that does not hold here is shown and
fails nothing.

{markdown(claims)}
"""


if __name__ == "__main__":
    sys.exit(main())
