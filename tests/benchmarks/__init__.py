"""`make bench`: what is promised of speed and size, measured against baselines of the same run.

`python -m tests.benchmarks [part ...]` starts its own PostgreSQL and Apache Kafka, runs the parts, prints a table and
writes `build/bench.json`. A part is a module of this package with `run(bench)`, which returns rows. What is timed runs
in a process of its own (`Bench.call()`, `Bench.relay()`), so that nothing the bench itself holds slows it.
"""
