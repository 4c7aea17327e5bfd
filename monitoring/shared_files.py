"""Files through which processes share what they count: those of PROMETHEUS_MULTIPROC_DIR."""

import fcntl
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from prometheus_client import PLATFORM_COLLECTOR, Gauge, ProcessCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector

from monitoring import exemplars

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
_DEAD = "dead"
"""Stands for a process id in the names of the files that keep what the dead have counted."""

_Value = tuple[float, float]
"""With the time when it was set, of a gauge that keeps the most recent value."""


def _sum(one: _Value, other: _Value) -> _Value:
    return one[0] + other[0], 0.0


# How two values of a series become one when their processes are dead. The other gauges are of the living alone.
_MERGED: dict[str, Callable[[_Value, _Value], _Value]] = {
    "counter": _sum,
    "histogram": _sum,
    "summary": _sum,
    "gauge_sum": _sum,
    "gauge_min": min,
    "gauge_max": max,
    "gauge_mostrecent": lambda one, other: max(one, other, key=lambda value: value[1]),
}


def are_used() -> bool:
    """Whether this process counts into shared files, or answers scrapes with what others have counted there."""
    return bool(os.environ.get(DIRECTORY))


def collect() -> Iterable[Metric]:
    """What all processes have counted, and what the living ones take of the machine."""
    with _locked(fcntl.LOCK_SH) as directory:
        # A file that was made this moment is empty.
        files = [file for file in directory.glob("*.db") if file.stat().st_size]
        metrics: list[Metric] = list(MultiProcessCollector.merge([str(file) for file in files]))  # type: ignore[no-untyped-call]
    for metric in metrics:
        if metric.type == "gauge":
            metric.samples = [sample for sample in metric.samples if not math.isnan(sample.value)]
    exemplars.add_own(metrics)
    pids = {file.stem.rpartition("_")[2] for file in files} - {_DEAD} | {str(os.getpid())}
    return [*metrics, *PLATFORM_COLLECTOR.collect(), *_processes(sorted(pids))]


def forget(gauge: Gauge, *labels: str) -> None:
    """Take a series out of the exposition, until it is set again.

    From a shared file nothing can be removed: there it becomes NaN, which the exposition leaves out.
    """
    if are_used():
        gauge.labels(*labels).set(math.nan)
    else:
        gauge.remove(*labels)


def bury(pid: int) -> None:
    """Keep what a dead process has counted, in one file with that of other dead ones, and forget its gauges.

    Left as they are, the files of processes that die again and again would make every scrape slower.
    """
    with _locked(fcntl.LOCK_EX) as directory:
        for file in directory.glob(f"*_{pid}.db"):
            kind = file.stem.rpartition("_")[0]
            if kind in _MERGED and file.stat().st_size:
                _merge(file, directory / f"{kind}_{_DEAD}.db", _MERGED[kind])
            file.unlink()


def _merge(file: Path, into: Path, merged: Callable[[_Value, _Value], _Value]) -> None:
    known = {key: (value, timestamp) for key, value, timestamp, _ in _values(into)} if into.exists() else {}
    all_dead = MmapedDict(str(into))  # type: ignore[no-untyped-call]
    for key, value, timestamp, _ in _values(file):
        value, timestamp = merged(known[key], (value, timestamp)) if key in known else (value, timestamp)
        all_dead.write_value(key, value, timestamp)  # type: ignore[no-untyped-call]
    all_dead.close()  # type: ignore[no-untyped-call]


def _values(file: Path) -> Iterator[tuple[str, float, float, int]]:
    values: Iterator[tuple[str, float, float, int]] = MmapedDict.read_all_values_from_file(str(file))  # type: ignore[no-untyped-call]
    return values


@contextmanager
def _locked(how: int) -> Iterator[Path]:
    """Shared by those who read the files, held alone by who merges some: it may be another process."""
    directory = Path(os.environ[DIRECTORY])
    with (directory / "lock").open("a") as file:
        fcntl.flock(file, how)
        yield directory


def _processes(pids: Iterable[str]) -> list[Metric]:
    """Memory, CPU time, open files and start of these processes; of one that is gone there is nothing.

    By `pid`: their sum would fall with each that ends, and rate() would take that for a counter that began anew.
    """
    families: dict[str, Metric] = {}
    for pid in pids:
        for metric in ProcessCollector(pid=partial(str, pid), registry=None).collect():
            family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            for sample in metric.samples:
                family.add_sample(sample.name, {"pid": pid}, sample.value)
    return list(families.values())
