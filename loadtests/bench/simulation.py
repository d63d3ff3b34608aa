"""A simulation, not a measurement: what one machine cannot show, from the service times that were measured on it.

Requests queue for an instance, then for what all instances share. `closed` is the bench's own arrangement, so that its
answer can be held to the measured curve; `crowd` are people who think between requests, over instances of a whole core
in several regions, of which one may be lost.
"""

import random
import statistics
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import simpy

# Seconds of a run that do not count: until then the queues fill.
WARM = 1.0
# A request that would wait longer counts as failed; its client would not wait either.
PATIENCE = 1.0
LEAST_THOUGHT, MOST_THOUGHT = 1.0, 3.0
Steps = Generator[simpy.Event, Any, None]


@dataclass(frozen=True, slots=True)
class Times:
    """Mean seconds of CPU of a request: at its instance, and at the servers that all instances share."""

    instance: float
    shared: float


def closed(instances: int, clients: int, times: Times, *, share: float, seconds: float, seed: int = 1) -> float:
    """Return the requests a second of clients that each ask again as soon as they are answered.

    Args:
        instances: each with that share of a core.
        clients: of each instance.
        times: what a request costs.
        share: of a core, that an instance has.
        seconds: that are simulated, and count.
        seed: of the chances.
    """
    chance, environment, done = random.Random(seed), simpy.Environment(), [0]
    shared = simpy.Resource(environment)

    def client(own: simpy.Resource) -> Steps:
        while True:
            for place, mean in ((own, times.instance / share), (shared, times.shared)):
                with place.request() as turn:
                    yield turn
                    yield environment.timeout(chance.expovariate(1 / mean))
            done[0] += environment.now > WARM

    for _ in range(instances):
        own = simpy.Resource(environment)
        for _ in range(clients):
            environment.process(client(own))
    environment.run(until=WARM + seconds)
    return done[0] / seconds


@dataclass
class Crowd:
    """What became of the requests of many people, before and after a region is lost."""

    took: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    failed: list[int] = field(default_factory=lambda: [0, 0])

    def told(self, seconds: float, *, after: bool) -> dict[str, float]:
        """Return requests a second, milliseconds of the median and the 95th percentile, and the share that failed."""
        took, failed = self.took[after], self.failed[after]
        percentiles = statistics.quantiles(took, n=100) if len(took) > 1 else [0.0] * 99
        return {
            "requests_per_second": round(len(took) / seconds),
            "p50_ms": round(percentiles[49] * 1000, 1),
            "p95_ms": round(percentiles[94] * 1000, 1),
            "failed": round(failed / max(1, failed + len(took)), 5),
        }


def crowd(
    users: int, instances: int, times: Times, servers: int, *, seconds: float, regions: int = 1, seed: int = 1
) -> Crowd:
    """Return what became of the requests of people who think between them; of several regions one is lost half way.

    Args:
        users: at a time.
        instances: of a whole core each, spread evenly over the regions.
        times: what a request costs.
        servers: cores of what all instances share.
        seconds: that count, as many after the loss as before.
        regions: 1 for none that can be lost.
        seed: of the chances.
    """
    world = _World(instances, times, servers, regions, WARM + seconds, random.Random(seed))
    for _ in range(users):
        world.environment.process(world.person())
    if regions > 1:
        world.environment.process(world.disaster())
    world.environment.run(until=WARM + seconds * (2 if regions > 1 else 1))
    return world.found


class _World:
    """Instances, what they share, and people."""

    def __init__(  # noqa: PLR0917  # its one caller names them
        self, instances: int, times: Times, servers: int, regions: int, loss: float, chance: random.Random
    ) -> None:
        self.environment = simpy.Environment()
        self.found = Crowd()
        self._alive = [simpy.Resource(self.environment) for _ in range(instances)]
        self._shared = simpy.Resource(self.environment, capacity=servers)
        self._times, self._regions, self._loss, self._chance = times, regions, loss, chance

    def person(self) -> Steps:
        """Ask, think, ask."""
        yield self.environment.timeout(self._chance.uniform(0, MOST_THOUGHT))
        while True:
            begun = self.environment.now
            answered = yield from self._ask()
            if begun > WARM:
                after = self._regions > 1 and begun > self._loss
                if answered:
                    self.found.took[after].append(self.environment.now - begun)
                else:
                    self.found.failed[after] += 1
            yield self.environment.timeout(self._chance.uniform(LEAST_THOUGHT, MOST_THOUGHT))

    def disaster(self) -> Steps:
        """Lose the first region. Who waits there goes on: that is milliseconds, and people think for seconds."""
        yield self.environment.timeout(self._loss)
        del self._alive[: len(self._alive) // self._regions]

    def _ask(self) -> Generator[simpy.Event, Any, bool]:
        """Wait for an instance, the less busy of two, then for what all share; return whether both came in time."""
        own = min(self._chance.choice(self._alive), self._chance.choice(self._alive), key=_waits)
        for place, mean in ((own, self._times.instance), (self._shared, self._times.shared)):
            with place.request() as turn:
                yield turn | self.environment.timeout(PATIENCE)
                if not turn.triggered:
                    return False
                yield self.environment.timeout(self._chance.expovariate(1 / mean))
        return True


def _waits(place: simpy.Resource) -> int:
    return int(place.count + len(place.queue))
