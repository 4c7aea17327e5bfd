"""Files through which processes share what they count: those of PROMETHEUS_MULTIPROC_DIR."""

import math
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import Gauge
from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from monitoring import exemplars

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
_lock = threading.Lock()  # held while the files are read, or merged


def are_used() -> bool:
    """Whether this process counts into shared files, or answers scrapes with what others have counted there."""
    return bool(os.environ.get(DIRECTORY))


def collect() -> Iterable[Metric]:
    """What all processes have counted."""
    with _lock:
        metrics: list[Metric] = list(MultiProcessCollector(None).collect())  # type: ignore[no-untyped-call]
    for metric in metrics:
        if metric.type == "gauge":
            metric.samples = [sample for sample in metric.samples if not math.isnan(sample.value)]
    exemplars.add_own(metrics)
    return metrics


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

    Left as they are, the files of a process that dies again and again would make every scrape slower.
    """
    directory = Path(os.environ[DIRECTORY])
    with _lock:
        mark_process_dead(pid)  # type: ignore[no-untyped-call]
        for kind in ("counter", "histogram", "summary"):
            file = directory / f"{kind}_{pid}.db"
            if not file.exists() or not file.stat().st_size:
                continue
            all_dead = MmapedDict(str(directory / f"{kind}_dead.db"))  # type: ignore[no-untyped-call]
            for key, value, timestamp, _ in MmapedDict.read_all_values_from_file(str(file)):  # type: ignore[no-untyped-call]
                before, _ = all_dead.read_value(key)  # type: ignore[no-untyped-call]
                all_dead.write_value(key, before + value, timestamp)  # type: ignore[no-untyped-call]
            all_dead.close()  # type: ignore[no-untyped-call]
            file.unlink()
