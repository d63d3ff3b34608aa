"""The pods that an autoscaler drives, second by second: arrivals, a queue, CPU, latency, and requests given up.

A model, not a measurement: requests of one kind, evenly balanced, on pods of one core each. What a request costs is
measured (docs/deployment/autoscaling.md says how); nodes are taken to be there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deploy.k8s.simulation.autoscaler import SYNC_SECONDS, Autoscaler

# An instance is one process on one event loop: more than one core it cannot use, whatever the node has.
CORES_A_POD = 1.0
# A request that would wait longer is answered 504: the deadline of API.md.
DEADLINE_SECONDS = 10.0
# From the decision to the first request: scheduling, container, imports, readiness. Twice what Compose shows here.
START_SECONDS = 14
# metrics-server's resolution, and the range of the adapter's rate().
CPU_WINDOW = 15
RATE_WINDOW = 60
# Above this share of its capacity a queue's mean wait says nothing any more; the queue itself is counted instead.
STEADY = 0.95


@dataclass(frozen=True, slots=True)
class Pod:
    """What a pod asks for and what a request costs it."""

    cpu_request: float  # cores
    memory_share: float  # of its memory request, with the application loaded
    cpu_seconds: float  # of one request


@dataclass(frozen=True, slots=True)
class Second:
    """One second of a run: pods that exist and that are ready, requests a second in and given up, mean latency."""

    time: int
    arriving: float
    pods: int
    ready: int
    latency: float
    failed: float


def run(load: Sequence[float], scaler: Autoscaler, pod: Pod) -> Iterator[Second]:
    """Yield what happens in each second of `load`, which is in requests a second.

    Args:
        load: one number for each second.
        scaler: is asked every 15 s, as Kubernetes does.
        pod: what each pod is.
    """
    pods = ready = scaler.minimum
    starting: deque[tuple[int, int]] = deque()
    queue = 0.0
    lately: deque[float] = deque(maxlen=RATE_WINDOW)
    for time, arriving in enumerate(load):
        while starting and starting[0][0] <= time:
            ready += starting.popleft()[1]
        capacity = ready * CORES_A_POD / pod.cpu_seconds
        waiting = queue + arriving
        served = min(waiting, capacity)
        # What cannot be reached before its deadline is given up; the rest stays in the queue.
        queue = waiting - served
        failed = max(0.0, queue - capacity * DEADLINE_SECONDS)
        queue -= failed
        share = min(served / capacity, STEADY)
        latency = pod.cpu_seconds / (1 - share) + queue / capacity
        lately.append(served)
        yield Second(time, arriving, pods, ready, latency, failed)
        if time % SYNC_SECONDS:
            continue
        just_now = list(lately)[-CPU_WINDOW:]
        seen = {
            "cpu": sum(just_now) / len(just_now) * pod.cpu_seconds / ready / pod.cpu_request,
            "memory": pod.memory_share,
            "http_requests_per_second": sum(lately) / len(lately) / ready,
        }
        chosen = scaler.decide(time, pods, ready, seen)
        if chosen > pods:
            starting.append((time + START_SECONDS, chosen - pods))
        elif chosen < pods:
            # Pods that are not ready go first; one that is drains without a failed request.
            leaving = pods - chosen
            while starting and leaving:
                at, count = starting.pop()
                if count > leaving:
                    starting.append((at, count - leaving))
                leaving = max(0, leaving - count)
            ready -= leaving
        pods = chosen
