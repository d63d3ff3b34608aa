"""The measured figures that a plan is made from, read from the files that the benches wrote, each with its date.

No figure stands in the code: whoever runs the benches on other machines gets plans for those.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.capacity import ImpossibleError

CHECKOUT = Path(__file__).parents[2]
RESULTS = CHECKOUT / "loadtests" / "bench" / "results"
MICROSECOND = 1e-6


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number: what it is, in its unit, and which file of which day says so."""

    what: str
    value: float
    unit: str
    file: str
    date: str


@dataclass(frozen=True, slots=True)
class Figures:
    """What a plan needs to know.

    Attributes:
        hit: CPU that an instance spends on a read that Redis answers, in microseconds.
        miss: the same of a read that a database answers.
        write: the same of an accepted order, the dearest of the writes.
        worker: orders a second that one worker carries to their end.
        relay: messages a second that one relay publishes.
    """

    hit: Figure
    miss: Figure
    write: Figure
    worker: Figure
    relay: Figure

    @property
    def all(self) -> tuple[Figure, ...]:
        """Each of them."""
        return self.hit, self.miss, self.write, self.worker, self.relay


def read(folder: Path = RESULTS) -> Figures:
    """Return the figures of the benches' last runs.

    Raises:
        ImpossibleError: a file is missing, or does not say what it should.
    """
    cost = "us of CPU"
    return Figures(
        hit=_figure(folder, "bench.json", "a read from the cache", cost, "cpu_us_per_request", "l2"),
        miss=_figure(folder, "reads.json", "a read from a replica", cost, "uncached_cpu_us_per_request", "service"),
        write=_figure(folder, "orders.json", "a write (an order)", cost, "cpu_us_per_order", "service"),
        worker=_figure(folder, "saga.json", "a worker", "orders a second", "orders_per_second_of_one_worker"),
        relay=_figure(folder, "backlog.json", "a relay", "messages a second", "messages_per_second"),
    )


def _figure(folder: Path, name: str, what: str, unit: str, *path: str) -> Figure:
    file = folder / name
    try:
        found: Any = json.loads(file.read_bytes())
        date = found["machine"]["date"]
        for step in path:
            found = found[step]
        # Several rounds of one figure: the one in the middle.
        value = float(sorted(found)[len(found) // 2] if isinstance(found, list) else found)
    except FileNotFoundError:
        raise ImpossibleError(
            f"{file} is missing: a plan is made from measured figures; run it in a checkout, or measure (make help)."
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise ImpossibleError(
            f"{file} does not say {'.'.join(path)} and machine.date; measure again (make help names the benches)."
        ) from error
    shown = file.relative_to(CHECKOUT) if file.is_relative_to(CHECKOUT) else file
    return Figure(what, value, unit, str(shown), date)
