"""What the web processes have counted since they started: for when there is no Prometheus to ask."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from prometheus_client import REGISTRY, Metric

from monitoring import shared_files

Labels = Mapping[str, str]


@dataclass(frozen=True)
class Counted:
    """A sample of a counter or histogram."""

    name: str
    labels: Labels
    value: float


class OwnMetrics:
    """A look at this process's metrics; where web processes share a directory, at those of all of them."""

    def __init__(self, families: Iterable[Metric] | None = None) -> None:
        if families is None:
            families = shared_files.collect() if shared_files.are_used() else REGISTRY.collect()
        self._samples: dict[str, list[Counted]] = {}
        for family in families:
            for sample in family.samples:
                found = Counted(sample.name, sample.labels, float(sample.value))
                self._samples.setdefault(sample.name, []).append(found)

    def samples(self, name: str, *, without_paths: Iterable[str] = ()) -> list[Counted]:
        left_out = set(without_paths)
        return [sample for sample in self._samples.get(name, ()) if sample.labels.get("path") not in left_out]

    def quantile(self, share: float, name: str, *, without_paths: Iterable[str] = (), **labels: str) -> float | None:
        """The quantile of a histogram as Prometheus reckons it: evenly spread within a bucket. None: no observation."""
        buckets: dict[float, float] = {}
        for sample in self.samples(f"{name}_bucket", without_paths=without_paths):
            if labels.items() <= sample.labels.items():
                bound = float(sample.labels["le"])
                buckets[bound] = buckets.get(bound, 0.0) + sample.value
        return quantile(share, buckets)


def quantile(share: float, buckets: Mapping[float, float]) -> float | None:
    """`buckets`: upper bound (the last is infinite) -> observations up to it."""
    bounds = sorted(buckets)
    total = buckets[bounds[-1]] if bounds else 0.0
    if total == 0:
        return None
    rank = share * total
    index = bisect_left([buckets[bound] for bound in bounds], rank)
    if index >= len(bounds) - 1:
        return bounds[-2] if len(bounds) > 1 else None
    (low, below), (high, up_to) = list(pairwise([(0.0, 0.0), *((bound, buckets[bound]) for bound in bounds)]))[index]
    return low + (high - low) * (rank - below) / (up_to - below) if up_to > below else high
