"""The scale curve's reckoning: the law is found again, and the simulation does what queues must do."""

from xml.etree import ElementTree as ET

import pytest

pytest.importorskip("scipy", reason="make bench-scale installs SciPy and SimPy")
pytest.importorskip("simpy", reason="make bench-scale installs SciPy and SimPy")

from loadtests.bench import scale
from loadtests.bench.picture import draw_curve
from loadtests.bench.simulation import Times, closed, crowd


@pytest.mark.parametrize(("one", "sigma", "kappa"), [(140.0, 0.03, 0.002), (900.0, 0.0, 0.0), (50.0, 0.2, 0.0)])
def test_the_law_is_found_again_in_rates_that_follow_it(one: float, sigma: float, kappa: float) -> None:
    found = scale.fitted({str(count): scale.law(count, one, sigma, kappa) for count in scale.COUNTS})["fit"]
    assert found["one"] == pytest.approx(one, rel=0.01)
    assert found["sigma"] == pytest.approx(sigma, abs=0.002)
    assert found["kappa"] == pytest.approx(kappa, abs=0.0005)
    assert found["largest_error"] < 0.01


def test_a_simulated_instance_does_what_its_share_allows_and_all_do_what_they_share() -> None:
    times = Times(instance=0.001, shared=0.000_05)
    one = closed(1, 6, times, share=0.1, seconds=20)
    assert one == pytest.approx(100, rel=0.1)
    assert closed(8, 6, times, share=0.1, seconds=20) == pytest.approx(8 * one, rel=0.1)
    # However many instances: what all share has an end.
    assert closed(8, 6, Times(0.001, 0.002), share=0.5, seconds=20) == pytest.approx(500, rel=0.1)


def test_a_lost_region_costs_those_who_are_left_their_room() -> None:
    # 100 requests a second of 10 ms are one core's work; four instances carry it, three still do, with longer queues.
    seen = crowd(600, 4, Times(0.01, 0.000_1), 1, seconds=20, regions=4)
    before, after = seen.told(20, after=False), seen.told(20, after=True)
    assert before["requests_per_second"] == pytest.approx(300, rel=0.1)
    assert after["p95_ms"] > 2 * before["p95_ms"]
    alone = crowd(100, 4, Times(0.01, 0.000_1), 1, seconds=10)
    assert alone.told(10, after=False)["failed"] == 0
    assert alone.took[1] == []


def test_the_page_and_the_picture_are_of_the_result() -> None:
    rates = {str(count): scale.law(count, 140.0, 0.03, 0.002) for count in scale.COUNTS}
    seen = {"requests_per_second": 5000, "p50_ms": 3.0, "p95_ms": 9.0, "failed": 0.0}
    simulation = {
        "requests_per_second": dict(rates),
        "simulated / measured": dict.fromkeys(rates, 1.0),
        "crowds": [
            {"users": 10_000, "instances": 20, "regions": 1, **seen},
            {
                "users": 50_000,
                "instances": 100,
                "regions": 4,
                **seen,
                "after_a_region_is_lost": seen | {"p95_ms": 44.0},
            },
        ],
    }
    result = {
        "requests_per_second": rates,
        "cpu_us_per_request": {"instance": 700.0, "shared": 250.0},
        "simulation": simulation,
        "share_of_a_core": 0.1,
        "machine": {"date": "2026-11-21", "cores": 2, "processor": "some"},
        **scale.fitted(rates),
    }
    page = scale.written(f"before\n{scale.BEGIN}old\n{scale.END}after\n", result)
    assert page.startswith(f"before\n{scale.BEGIN}")
    assert page.endswith(f"{scale.END}after\n")
    assert "old" not in page
    assert "| 1 | 140 | 1.00 | 140 | 1.00 |" in page
    assert "| 50,000 | 100 | 4 | 5,000 | 3 | 9 | 0.00% | 3 ms, 44 ms, 0.00% |" in page
    assert scale.written(page, result) == page
    picture = draw_curve(result)
    assert len(ET.fromstring(picture).findall("{http://www.w3.org/2000/svg}circle")) == len(rates)  # noqa: S314
    # Where the tables of the docs go.
    text = scale.PAGE.read_text(encoding="utf-8")
    assert text.count(scale.BEGIN) == text.count(scale.END) == 1
