"""How fast the relay drains when millions of published rows are in the table, against few."""

from contextlib import ExitStack

from tests.benchmarks.bench import Bench, start_of
from tests.benchmarks.report import Row, median_and_spread, number


def run(bench: Bench) -> list[Row]:
    scale = bench.scale
    with ExitStack() as stack:
        few, many = (stack.enter_context(bench.database()) for _ in range(2))
        few.fill(scale.events, published=scale.published_rows_small, last=scale.few_events)
        bench.say(f"adding {scale.published_rows:,} published rows")
        many.fill(scale.events, published=scale.published_rows, last=scale.few_events)
        sizes = [number(size) for size in (few.megabytes(), many.megabytes())]
        few.drain("all")
        drains_short, drains_few, drains_many = [], [], []
        for _ in range(scale.rounds):
            drains_short.append(few.drain("last"))
            drains_few.append(few.drain("all"))
            drains_many.append(many.drain("all"))
    start = start_of(drains_short, drains_few)
    with_few, with_many = ([drain.rate(start) for drain in drains] for drains in (drains_few, drains_many))
    ratio, spread = median_and_spread([late / early for early, late in zip(with_few, with_many, strict=True)])
    rate_few, _ = median_and_spread(with_few)
    return [
        Row(
            measure=f"drain rate with {scale.published_rows:,} published rows in the table / with "
            f"{scale.published_rows_small:,}",
            value=ratio,
            unit="x",
            must=">= 0.95",
            baseline=f"with {scale.published_rows_small:,} published rows, {number(rate_few)} events/s",
            detail=f"{spread}; {scale.events:,} events a run; tables with indexes {sizes[1]} and {sizes[0]} MB; "
            f"{start:.2f} s that the relay takes to start with few rows are taken off both",
        )
    ]
