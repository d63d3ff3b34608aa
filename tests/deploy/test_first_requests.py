"""What a newcomer pastes works as it is written: README's first requests, those that `make run` prints, and the tour.

They run in a real shell, on the cluster of the tests: nothing in them is changed but the addresses, and the command
`scaleout`, which is called by its module. A product of their own comes first on the list, with enough in stock.
"""

import asyncio
import re
import shlex
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from conftest import PATIENCE, Customer, replayed, until

from deploy.local import tour
from deploy.local.cluster import Cluster

CHECKOUT = Path(__file__).parents[2]
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
TOUR = (CHECKOUT / "docs" / "tour.md").read_text(encoding="utf-8")
# These go on until Ctrl-C, or break something: a stream, a consumer of events, a replica.
NOT_PASTED = (10, 14, 15)
LONG = 4 * PATIENCE  # seconds; some orders, an invoice, a mail, a picture and a report, one after the other

NewCustomer = Callable[..., Awaitable[Customer]]
NewProduct = Callable[..., Awaitable[dict[str, Any]]]


def addresses(cluster: Cluster) -> tuple[str, str]:
    """Return where the cluster is, and where its mailbox lists messages."""
    return cluster.url, next(process.http_address or "" for process in cluster.processes if process.kind == "smtp")


def on(cluster: Cluster, text: str) -> str:
    """Return commands for a cluster on the usual ports as they are for this one."""
    url, mailbox = addresses(cluster)
    scaleout = shlex.join([sys.executable, "-m", "app.cli"])
    return (
        text.replace("http://127.0.0.1:8000", url)
        .replace("http://127.0.0.1:18026", mailbox)
        .replace(".venv/bin/scaleout", scaleout)
    )


def first_requests(cluster: Cluster) -> list[str]:
    """Return README's first requests, by their number less one."""
    (block,) = re.findall(r"^```bash\n(# 1 .*?)^```$", README, re.MULTILINE | re.DOTALL)
    return re.split(r"^(?=# \d+ )", on(cluster, block), flags=re.MULTILINE)[1:]


def commands_of_tour(cluster: Cluster, stop: int) -> list[str]:
    """Return what the tour says in code at one of its stops, in order; some of it names files."""
    (text,) = re.findall(rf"^{stop}\. (.*?)^(?:{stop + 1}\. |\Z)", TOUR, re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`]+)`", on(cluster, text))


async def paste(cluster: Cluster, folder: Path, lines: str) -> str:
    """Run lines in a shell whose folder has the cluster, as a checkout has; return what they print."""
    if not (folder / ".cluster").exists():
        (folder / ".cluster").symlink_to(cluster.layout.root)
    shell = await asyncio.create_subprocess_exec(
        *("bash", "-c", lines),
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(LONG):
            said, complaints = await shell.communicate()
    finally:
        if shell.returncode is None:
            shell.kill()
            await shell.wait()
    assert shell.returncode == 0, complaints.decode()
    return said.decode()


def was_shopped(folder: Path) -> bool:
    """Say whether an invoice and a picture of our own making were downloaded."""
    return (
        (folder / "invoice.pdf").read_bytes().startswith(b"%PDF")
        and (folder / "you.png").read_bytes().startswith(b"\x89PNG")
        and (folder / "avatar.webp").read_bytes()[8:12] == b"WEBP"
    )


@pytest.mark.sabotage("README.md", "curl -sL -o avatar.webp", "curl -s -o avatar.webp")
async def test_the_first_requests_of_the_readme_work_as_they_are_pasted(
    cluster: Cluster, new_product: NewProduct, tmp_path: Path
) -> None:
    product = await new_product(stock=100)
    await replayed(cluster)  # who has just signed up may ask any replica for it
    said = await paste(
        cluster,
        tmp_path,
        "".join(lines for number, lines in enumerate(first_requests(cluster), 1) if number not in NOT_PASTED),
    )
    assert was_shopped(tmp_path)
    assert product["id"] in said
    assert '"source":"' in said
    assert any(line.startswith("day,product_id,") for line in said.splitlines())  # the head of the report


@pytest.mark.sabotage("deploy/local/tour.py", "curl -sL -o avatar.webp", "curl -s -o avatar.webp")
async def test_what_make_run_prints_works_as_it_is_pasted(
    cluster: Cluster, new_product: NewProduct, tmp_path: Path
) -> None:
    await new_product(stock=100)
    await replayed(cluster)  # who has just signed up may ask any replica for it
    printed = [line for stop in tour.stops(*addresses(cluster)) for line in stop.lines]
    said = await paste(cluster, tmp_path, "\n".join(printed))
    assert was_shopped(tmp_path)
    assert '"reason":"payment_declined"' in said
    assert '"reason":"out_of_stock"' in said


@pytest.mark.sabotage("docs/tour.md", ".venv/bin/scaleout stop payments", ".venv/bin/scaleout status")
async def test_the_tours_stops_show_what_they_say(
    cluster: Cluster, new_customer: NewCustomer, new_product: NewProduct, tmp_path: Path
) -> None:
    product, customer = await new_product(stock=100), await new_customer()

    async def is_now(order: dict[str, Any], status: str) -> bool:
        return (await customer.client.get(f"/api/v1/orders/{order['id']}")).json()["status"] == status

    asks, filters = commands_of_tour(cluster, 1)[0], commands_of_tour(cluster, 2)[0]
    lines = [*first_requests(cluster)[:3], *[asks] * 8, f"{asks.partition(' | ')[0]} | {filters}"]

    async def of_both_instances() -> str | None:
        """Return what the shell shows, unless NGINX still keeps an instance out that a test before has stopped."""
        said = await paste(cluster, tmp_path, "\n".join(lines))
        return said if set(re.findall(r"(?i)x-instance: (\S+)", said)) == {"api-1", "api-2"} else None

    said = await until(of_both_instances)
    assert re.search(r'(?i)server-timing: .*cache;desc="(l1|l2|miss)', said)

    order = {"items": [{"product_id": product["id"], "quantity": 1}], "payment_method": "tok_ok"}
    key = {"Idempotency-Key": uuid4().hex}
    once, twice = [await customer.client.post("/api/v1/orders", json=order, headers=key) for _ in range(2)]
    assert once.headers["Consistency-Token"]
    name, _, value = commands_of_tour(cluster, 4)[0].partition(": ")
    assert twice.headers[name] == value

    for stop in (5, 7):
        stopping, status, starting, *_ = commands_of_tour(cluster, stop)
        await paste(cluster, tmp_path, stopping)
        try:
            answer = await customer.order(product["id"])
            assert answer.status_code == 202
            await until(is_now, answer.json(), status)
        finally:
            await paste(cluster, tmp_path, starting)
        assert (await customer.ended(answer.json()["id"]))["status"] == "confirmed"
