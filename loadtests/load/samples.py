"""What a load tool wrote down, a line for each answer, summed up by seconds as it is read.

Latencies go into logarithmic buckets 5 % wide, so a night's run takes no more memory than a minute's, and percentiles
are right to 5 %.
"""

import csv
import gzip
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

WIDTH = math.log(1.05)
LIMITED = 429
FAILED_FROM = 500
HITS, MISSES = {"l1", "l2"}, {"miss", "bypass"}
COLUMNS = ("second", "kind", "status", "milliseconds", "cache", "node", "instance")


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer: its second, what was asked for, the status (0 for none), how long it took, and who answered.

    Attributes:
        cache: l1, l2, miss or bypass, as Server-Timing says; empty if it does not.
        node: the database node that was asked, or empty.
        instance: that answered, or empty.
    """

    second: int
    kind: str
    status: int
    milliseconds: float
    cache: str = ""
    node: str = ""
    instance: str = ""


@dataclass
class Latencies:
    """How long answers took."""

    buckets: Counter[int] = field(default_factory=Counter)

    def add(self, milliseconds: float) -> None:
        """Count one."""
        self.buckets[math.ceil(math.log(max(milliseconds, 0.01)) / WIDTH)] += 1

    def percentile(self, share: float) -> float:
        """Return the milliseconds within which this share was answered, to 5 %; 0 of none."""
        wanted, seen = share * self.buckets.total(), 0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket]
            if seen >= wanted:
                return round(math.exp(bucket * WIDTH), 2)
        return 0.0


@dataclass
class Second:
    """What happened in one second, or in all of them."""

    requests: int = 0
    failed: int = 0
    limited: int = 0
    hits: int = 0
    reads: int = 0
    latencies: Latencies = field(default_factory=Latencies)
    instances: set[str] = field(default_factory=set)
    replicas: set[str] = field(default_factory=set)

    def add(self, sample: Sample) -> None:
        """Count one answer."""
        self.requests += 1
        # A 429 is an answer that the limit promises; no answer at all and a 5xx are not.
        self.failed += sample.status == 0 or sample.status >= FAILED_FROM
        self.limited += sample.status == LIMITED
        self.latencies.add(sample.milliseconds)
        self.hits += sample.cache in HITS
        self.reads += sample.cache in HITS | MISSES
        if sample.instance:
            self.instances.add(sample.instance)
        if sample.node.startswith("replica"):
            self.replicas.add(sample.node)


@dataclass
class Sums:
    """A run: all of it, by kind of request, and by seconds from its first answer."""

    everything: Second = field(default_factory=Second)
    kinds: dict[str, Second] = field(default_factory=dict)
    seconds: dict[int, Second] = field(default_factory=dict)

    def add(self, sample: Sample) -> None:
        """Count one answer wherever it belongs."""
        self.everything.add(sample)
        self.kinds.setdefault(sample.kind, Second()).add(sample)
        self.seconds.setdefault(sample.second, Second()).add(sample)


def summed(samples: Iterable[Sample]) -> Sums:
    """Return the sums of a run."""
    sums = Sums()
    for sample in samples:
        sums.add(sample)
    return sums


def of_locust(file: Path) -> Iterator[Sample]:
    """Read what `loadtests/locust/shop.py` wrote: one line an answer, in `COLUMNS`."""
    with file.open(newline="") as lines:
        for row in csv.DictReader(lines, COLUMNS):
            yield Sample(
                int(row["second"]),
                row["kind"],
                int(row["status"]),
                float(row["milliseconds"]),
                row["cache"],
                row["node"],
                row["instance"],
            )


def of_k6(file: Path) -> Iterator[Sample]:
    """Read k6's own CSV; of its metrics only `answered`, a trend of ours with an answer's latency and who gave it."""
    with gzip.open(file, "rt", newline="") as lines:
        for row in csv.DictReader(lines):
            if row["metric_name"] != "answered":
                continue
            tags = dict(tag.partition("=")[::2] for tag in row["extra_tags"].split("&") if tag)
            yield Sample(
                int(row["timestamp"]),
                tags.get("kind", "other"),
                int(tags.get("answer", "0")),
                float(row["metric_value"]),
                tags.get("cache", ""),
                tags.get("node", ""),
                tags.get("instance", ""),
            )
