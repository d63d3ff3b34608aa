"""The buckets of durations: what Prometheus says of a quantile is near the truth from 1 ms to 10 s."""

import pytest

from app.core.telemetry import LATENCY_BUCKETS


def quantile(share: float, durations: list[float]) -> float:
    """Return what `histogram_quantile` makes of durations that were counted in the buckets."""
    counts = [sum(duration <= edge for duration in durations) for edge in LATENCY_BUCKETS]
    rank = share * len(durations)
    number = next(number for number, count in enumerate(counts) if count >= rank)
    below, start = (counts[number - 1], LATENCY_BUCKETS[number - 1]) if number else (0, 0.0)
    return start + (LATENCY_BUCKETS[number] - start) * (rank - below) / (counts[number] - below)


@pytest.mark.sabotage("app/core/telemetry.py", "*(0.1, 0.15, 0.2, 0.3, 0.5, 0.75),", "0.1,")
@pytest.mark.parametrize("share", [0.5, 0.95, 0.99])
def test_quantiles_are_near_the_truth_from_a_millisecond_to_ten_seconds(share: float) -> None:
    for step in range(81):
        middle = 0.001 * 10 ** (step / 20)
        durations = sorted(min(10.0, middle * (0.5 + number / 1000)) for number in range(1000))
        truth = durations[int(share * 1000) - 1]
        if truth >= LATENCY_BUCKETS[0]:
            assert truth / 1.7 <= quantile(share, durations) <= truth * 1.7


def test_the_objective_is_an_edge_of_a_bucket() -> None:
    assert 0.1 in LATENCY_BUCKETS
    assert LATENCY_BUCKETS[-1] == 10
