"""The load tests' own sums: scenarios add up, both tools are read alike, what is worse is said."""

import csv
import gzip
import json
import math
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtests.load import LoadError, compare, report, samples
from loadtests.load import __main__ as load
from loadtests.load.samples import Latencies, Sample
from loadtests.load.scenarios import SCENARIOS, scenario, seconds_of

RUN: dict[str, Any] = {
    "scenario": "baseline",
    "tool": "k6",
    "url": "http://127.0.0.1:8000",
    "users": 20,
    "seconds": 4.0,
    "date": "2026-11-21T12:00:00+00:00",
    "mix": "everything",
}


def run(*, failed: int = 0, slow: int = 0, of: int = 10_000) -> dict[str, Any]:
    """Return the report of a run of which so many requests failed or took 150 ms."""
    answers = [
        Sample(
            second=100 + number % 4,
            kind="order" if number % 7 == 0 else "product",
            status=503 if number < failed else 429 if number == of - 1 else 200,
            milliseconds=150.0 if number < slow else 20.0,
            cache=("l1", "l2", "miss")[number % 3],
            node=("replica-1", "replica-2", "primary")[number % 3],
            instance=f"api-{number // 4 % 2 + 1}",
        )
        for number in range(of)
    ]
    return report.summary(samples.summed(answers), RUN, lambda second: 20 if second else 0)


def threshold(told: dict[str, Any], part: str) -> dict[str, Any]:
    (found,) = (each for each in told["thresholds"] if part in each["what"])
    return dict(found)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_takes_its_time_and_reaches_its_users(name: str) -> None:
    asked = scenario(name)
    assert sum((asked.mix.browse, asked.mix.search, asked.mix.purchase)) == 100
    for users, seconds in ((asked.users, asked.seconds), (20, 60)):
        stages = asked.stages(users, seconds)
        assert sum(length for length, _ in stages) == pytest.approx(seconds)
        assert max(count for _, count in stages) == users
        assert load.users_at(stages, 0) <= 1
        assert load.users_at(stages, int(seconds)) == stages[-1][1]


def test_what_is_no_scenario_and_no_time_is_refused_with_what_is_one() -> None:
    with pytest.raises(LoadError, match="There is no scenario 'black-friday'; use one of: smoke, baseline, peak"):
        scenario("black-friday")
    for wrong in ("soon", "0s", "-5m", "nan", "inf"):
        with pytest.raises(LoadError, match=f"DURATION={wrong} is not a time; say 60s, 10m or 8h"):
            seconds_of(wrong)
    assert [seconds_of(text) for text in ("90", "60s", "10m", "8h")] == [90, 60, 600, 28_800]


@pytest.mark.sabotage("loadtests/load/samples.py", "WIDTH = math.log(1.05)", "WIDTH = math.log(3)")
def test_a_percentile_is_right_to_five_per_cent() -> None:
    values = [1.7**number for number in range(-5, 15)] * 5 + [float(number) for number in range(1, 400)]
    kept = Latencies()
    for value in values:
        kept.add(value)
    ordered = sorted(values)
    for share in (0.5, 0.95, 0.99):
        exact = ordered[math.ceil(share * len(ordered)) - 1]
        assert exact <= kept.percentile(share) <= exact * 1.06
    assert Latencies().percentile(0.95) == 0


def test_k6_and_locust_are_read_alike(tmp_path: Path) -> None:
    answers = [("product", 200, 12.5, "l1", "", "api-1"), ("order", 503, 900.0, "", "primary", "api-2")]
    with gzip.open(tmp_path / "k6.csv.gz", "wt", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(("metric_name", "timestamp", "metric_value", "scenario", "extra_tags", "metadata"))
        for kind, status, took, cache, node, instance in answers:
            tags = {"kind": kind, "answer": status, "cache": cache, "node": node, "instance": instance}
            lines.writerow(("http_req_duration", 7, took, "shop", "", ""))
            text = "&".join(f"{name}={value}" for name, value in tags.items())
            lines.writerow(("answered", 7, took, "shop", text, ""))
    with (tmp_path / "locust.csv").open("w", newline="") as file:
        csv.writer(file).writerows((7, kind, status, took, *who) for kind, status, took, *who in answers)
    ours = list(samples.of_k6(tmp_path / "k6.csv.gz"))
    assert ours == list(samples.of_locust(tmp_path / "locust.csv"))
    assert ours == [Sample(7, *answer) for answer in answers]


@pytest.mark.sabotage("loadtests/load/report.py", "LEAST_ANSWERED = 0.9999", "LEAST_ANSWERED = 0.99")
def test_the_thresholds_are_the_services_objectives() -> None:
    assert report.held(run())
    assert report.held(run(failed=1))
    assert not threshold(run(failed=2), "answered")["held"]
    # 5 % may take longer; a 429 is an answer.
    assert report.held(run(slow=490))
    assert not threshold(run(slow=510), "95th")["held"]
    assert run()["figures"]["limited"] == 1
    rules = (Path(__file__).parents[2] / "deploy" / "prometheus" / "rules" / "slo.yml").read_text()
    assert f'le="{report.LONGEST_P95 / 1000:g}"' in rules
    assert f"> 14.4 * {1 - report.LEAST_ANSWERED:.4f}" in rules


def test_the_page_shows_everything_and_loads_nothing() -> None:
    told = run(failed=3)
    page = report.page(told)
    assert page.count("<svg") == page.count("</svg>") == 5
    for words in ("Requests a second", "p95", "Failed and limited", "cache answered", "Instances and replicas"):
        assert words in page
    assert "missed" in page
    assert not re.search(r"(?:src|href)=|@import|url\(", page)
    assert told["series"][0] | {"second": 0, "instances": 2, "replicas": 2} == told["series"][0]
    # A run of which nothing came is a page, too.
    assert "<svg" in report.page(report.summary(samples.summed(()), RUN, lambda _: 0))


@pytest.mark.sabotage("loadtests/load/compare.py", "return WORSE if found else SAME", "return SAME")
@pytest.mark.parametrize(
    ("before", "after", "code"),
    [
        (run(), run(), compare.SAME),
        (run(failed=2), run(failed=2), compare.SAME),
        (run(), run(failed=1), compare.SAME),
        (run(), run(failed=2), compare.WORSE),
        (run(failed=2), run(failed=9), compare.WORSE),
        (run(failed=9), run(), compare.SAME),
        (run(), run(slow=600), compare.WORSE),
        (run(slow=600), run(), compare.SAME),
    ],
)
def test_a_comparison_ends_with_1_where_a_threshold_is_worse(
    before: dict[str, Any],
    after: dict[str, Any],
    code: int,
    *,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, told in zip(files, (before, after), strict=True):
        file.write_text(json.dumps(told))
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, files)])
    assert compare.main() == code
    said = capsys.readouterr().out
    assert ("Worse: " in said) == (code == compare.WORSE)
    assert "requests per second" in said


def test_a_file_that_is_no_report_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert compare.main() == compare.MISUSED
    assert "cannot be read as a report" in capsys.readouterr().out


@pytest.mark.sabotage("loadtests/load/__main__.py", "        look(url, users, seconds)\n", "")
def test_without_a_cluster_it_says_how_to_start_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(sys, "argv", ["load", "--url", url, "--users", "20", "--to", str(tmp_path)])
    assert load.main() == load.MISUSED
    said = capsys.readouterr().out
    assert f"No cluster answers at {url}" in said
    assert re.search(r"RATE_LIMIT_SIGN_IN=\d+/minute .* make run", said)
