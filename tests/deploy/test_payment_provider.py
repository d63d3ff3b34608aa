"""The payment provider of the local cluster: one effect a key, a ledger that survives, and each way to misbehave."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from standalone import ROOT, Standalone, started

MODULE = "deploy.local.payments"


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standalone]:
    with started(MODULE, tmp_path_factory.mktemp("payments") / "data", "--port") as running:
        yield running


@pytest.fixture
async def client(provider: Standalone) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=provider.http, timeout=20) as client:
        yield client
        await client.post("/mode", json={"mode": "ok"})


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    return request.node.name


async def authorize(client: httpx.AsyncClient, key: str, method: str = "tok_ok", **change: Any) -> httpx.Response:
    body = {"amount": 1999, "currency": "EUR", "payment_method": method, "reference": f"order of {key}", **change}
    return await client.post("/authorizations", json=body, headers={"Idempotency-Key": key})


async def entry(client: httpx.AsyncClient, key: str) -> dict[str, Any] | None:
    return (await client.get("/ledger")).json().get(key)


async def test_an_authorisation_is_made_once_however_often_it_is_asked_for(client: httpx.AsyncClient, key: str) -> None:
    answers = await asyncio.gather(*(authorize(client, key) for _ in range(8)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.text for answer in answers}) == 1
    assert sorted(answer.headers.get("idempotent-replayed", "no") for answer in answers) == ["no"] + ["true"] * 7
    view = answers[0].json()
    assert (view["status"], view["amount"], view["currency"]) == ("authorized", 1999, "EUR")
    line = await entry(client, key)
    assert line is not None
    assert (line["id"], line["charges"], line["captured"]) == (view["id"], 1, 0)
    assert line["reference"] == f"order of {key}"


@pytest.mark.sabotage("deploy/local/payments.py", '_CURRENCY = re.compile("[A-Z]{3}")', '_CURRENCY = re.compile("EUR")')
async def test_every_currency_that_a_product_may_have_is_taken(client: httpx.AsyncClient, key: str) -> None:
    for currency in ("EUR", "USD", "JPY"):
        answer = await authorize(client, f"{key}-{currency}", currency=currency)
        assert (answer.status_code, answer.json()["currency"]) == (201, currency), answer.text


async def test_a_key_with_another_content_is_a_conflict(client: httpx.AsyncClient, key: str) -> None:
    first = (await authorize(client, key)).json()
    for answer in (
        await authorize(client, key, amount=2000),
        await client.post(f"/authorizations/{first['id']}/capture", headers={"Idempotency-Key": key}),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "idempotency_key_reused")


async def test_a_double_charge_under_two_keys_is_visible(client: httpx.AsyncClient, key: str) -> None:
    for suffix in "ab":
        await authorize(client, key + suffix, reference=key)
    entries = (await client.get("/ledger")).json().values()
    assert sum(line["charges"] for line in entries if line["reference"] == key) == 2


@pytest.mark.parametrize(
    ("method", "reason"), [("tok_declined", "card_declined"), ("tok_of_mars", "unknown_payment_method")]
)
async def test_a_declined_method_moves_no_money(client: httpx.AsyncClient, key: str, method: str, reason: str) -> None:
    answer = await authorize(client, key, method)
    assert (answer.status_code, answer.json()["status"], answer.json()["decline_reason"]) == (201, "declined", reason)
    line = await entry(client, key)
    assert line is not None
    assert (line["status"], line["charges"]) == ("declined", 0)


async def test_a_flaky_method_fails_twice_for_each_key_and_then_works(client: httpx.AsyncClient, key: str) -> None:
    for suffix in "ab":
        answers = [(await authorize(client, key + suffix, "tok_flaky")).status_code for _ in range(4)]
        assert answers == [503, 503, 201, 201]
        line = await entry(client, key + suffix)
        assert line is not None
        assert line["charges"] == 1


async def test_a_lost_answer_closes_the_connection_and_the_repeat_tells_what_happened(
    client: httpx.AsyncClient, key: str
) -> None:
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        await authorize(client, key, "tok_lost")
    line = await entry(client, key)
    assert line is not None
    assert (line["status"], line["charges"]) == ("authorized", 1)
    found = await client.get("/authorizations", params={"idempotency_key": key})
    assert [item["id"] for item in found.json()["items"]] == [line["id"]]
    repeat = await authorize(client, key, "tok_lost")
    assert (repeat.status_code, repeat.json()["id"]) == (201, line["id"])
    assert (await entry(client, key) or {})["charges"] == 1


@pytest.mark.sabotage("deploy/local/payments.py", "if answer.lost:", "if False:")
async def test_a_lost_answer_leaves_not_a_single_byte_on_the_wire(provider: Standalone, key: str) -> None:
    host, port = provider.http.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = b'{"amount": 1, "currency": "EUR", "payment_method": "tok_lost", "reference": "r"}'
    head = f"POST /authorizations HTTP/1.1\r\nHost: h\r\nIdempotency-Key: {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()
    assert "Traceback" not in provider.log.read_text()


async def test_a_slow_method_answers_five_seconds_after_its_first_call(client: httpx.AsyncClient, key: str) -> None:
    began = time.monotonic()
    with pytest.raises(httpx.ReadTimeout):
        await client.post(
            "/authorizations",
            json={"amount": 1, "currency": "EUR", "payment_method": "tok_slow", "reference": "r"},
            headers={"Idempotency-Key": key},
            timeout=1,
        )
    assert (await entry(client, key) or {})["charges"] == 1
    answer = await authorize(client, key, "tok_slow", amount=1, reference="r")
    assert answer.status_code == 201
    assert time.monotonic() - began > 4.5


async def test_the_whole_amount_is_captured_and_refunded_or_voided_once(client: httpx.AsyncClient, key: str) -> None:
    async def step(identity: str, action: str, step_key: str) -> httpx.Response:
        return await client.post(f"/authorizations/{identity}/{action}", headers={"Idempotency-Key": step_key})

    paid = (await authorize(client, f"{key} paid")).json()["id"]
    early = await step(paid, "refund", f"{key} early")
    assert (early.status_code, early.json()["error"]["code"]) == (409, "illegal_transition")
    first, again = await step(paid, "capture", f"{key} c"), await step(paid, "capture", f"{key} c")
    assert (first.status_code, first.json()["status"], first.text) == (200, "captured", again.text)
    assert (await step(paid, "capture", f"{key} c2")).status_code == 409
    assert (await step(paid, "void", f"{key} v")).status_code == 409
    assert (await step(paid, "refund", f"{key} r")).json()["status"] == "refunded"
    line = await entry(client, f"{key} paid")
    assert line is not None
    assert (line["status"], line["captured"], line["refunded"], line["charges"]) == ("refunded", 1999, 1999, 1)

    held = (await authorize(client, f"{key} held")).json()["id"]
    assert (await step(held, "void", f"{key} hv")).json()["status"] == "voided"
    assert (await step(held, "capture", f"{key} hc")).status_code == 409
    assert (await client.get(f"/authorizations/{held}")).json()["status"] == "voided"
    assert (await step("auth_nowhere", "void", f"{key} n")).status_code == 404


async def test_down_refuses_customers_and_still_shows_the_ledger(client: httpx.AsyncClient, key: str) -> None:
    assert (await client.post("/mode", json={"mode": "down"})).json() == {"mode": "down"}
    assert (await authorize(client, key)).status_code == 503
    assert (await client.get("/authorizations", params={"idempotency_key": key})).status_code == 503
    assert (await client.get("/health/live")).status_code == 200
    assert await entry(client, key) is None
    await client.post("/mode", json={"mode": "ok"})
    assert (await authorize(client, key)).status_code == 201


async def test_slow_delays_every_customer_and_not_the_switch(client: httpx.AsyncClient, key: str) -> None:
    await client.post("/mode", json={"mode": "slow"})
    began = time.monotonic()
    slow = asyncio.create_task(authorize(client, key))
    assert (await client.get("/mode")).json() == {"mode": "slow"}
    assert await entry(client, key) is None
    assert not slow.done()
    assert (await slow).status_code == 201
    assert time.monotonic() - began >= 5


async def test_a_killed_provider_has_forgotten_nothing_it_acknowledged(tmp_path: Path) -> None:
    with started(MODULE, tmp_path / "data", "--port") as running:
        async with httpx.AsyncClient(base_url=running.http, timeout=20) as client:
            kept = await asyncio.gather(*(authorize(client, f"k{number}") for number in range(20)))
            assert (await authorize(client, "flaky", "tok_flaky")).status_code == 503
        running.kill()
    with started(MODULE, tmp_path / "data", "--port") as running:
        async with httpx.AsyncClient(base_url=running.http, timeout=20) as client:
            ledger = (await client.get("/ledger")).json()
            assert {line["id"] for line in ledger.values()} == {answer.json()["id"] for answer in kept}
            assert (await authorize(client, "k7")).text == kept[7].text
            flaky = [(await authorize(client, "flaky", "tok_flaky")).status_code for _ in range(2)]
            assert flaky == [503, 201]


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (b"", "amount"),
        (b"{", "JSON"),
        (b"[]", "object"),
        (b"[" * 9000, "JSON"),
        (b'{"amount": 0, "currency": "EUR", "payment_method": "tok_ok", "reference": "r"}', "amount"),
        (b'{"amount": true, "currency": "EUR", "payment_method": "tok_ok", "reference": "r"}', "amount"),
        (b'{"amount": 1e3, "currency": "EUR", "payment_method": "tok_ok", "reference": "r"}', "amount"),
        (b'{"amount": 1, "currency": "usd", "payment_method": "tok_ok", "reference": "r"}', "currency"),
        (b'{"amount": 1, "currency": "EUR", "payment_method": "\\ud800", "reference": "r"}', "payment_method"),
        (b'{"amount": 1, "currency": "EUR", "payment_method": "tok_ok", "reference": "\\u0000"}', "reference"),
        (b'{"amount": 1, "currency": "EUR", "payment_method": "tok_ok", "reference": "r", "tip": 1}', "tip"),
    ],
)
async def test_a_bad_body_is_a_400_that_names_the_field(
    client: httpx.AsyncClient, key: str, body: bytes, names: str
) -> None:
    headers = {"Idempotency-Key": key.encode("ascii", "replace")[:200]}
    answer = await client.post("/authorizations", content=body, headers=headers)
    assert answer.status_code == 400
    assert names in answer.json()["error"]["message"]


async def test_other_bad_calls_are_clear_json_errors(client: httpx.AsyncClient, key: str) -> None:
    answers = {
        "no key": (await client.post("/authorizations", json={}), 400),
        "long key": (await client.post("/authorizations", json={}, headers={"Idempotency-Key": "k" * 256}), 400),
        "large body": (
            await client.post("/authorizations", content=b"x" * 20_000, headers={"Idempotency-Key": key}),
            413,
        ),
        "no query": (await client.get("/authorizations"), 400),
        "unknown action": (await client.post("/authorizations/a/eat", headers={"Idempotency-Key": key}), 404),
        "unknown path": (await client.get("/nowhere"), 404),
        "wrong verb": (await client.delete("/ledger"), 405),
        "unknown mode": (await client.post("/mode", json={"mode": ["ok"]}), 400),
    }
    for name, (answer, status) in answers.items():
        assert answer.status_code == status, name
        assert answer.json()["error"]["message"], name


def test_a_taken_port_is_named_in_one_sentence(provider: Standalone, tmp_path: Path) -> None:
    port = provider.http.rsplit(":", 1)[1]
    command = [sys.executable, "-m", MODULE, "--port", port, "--data", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"Cannot listen on 127.0.0.1 port {port}")


async def test_a_stop_signal_ends_it_even_with_a_slow_call_in_flight(tmp_path: Path) -> None:
    with started(MODULE, tmp_path / "data", "--port") as running:
        async with httpx.AsyncClient(base_url=running.http, timeout=20) as client:
            slow = asyncio.create_task(authorize(client, "k", "tok_slow"))
            async with asyncio.timeout(10):
                while await entry(client, "k") is None:
                    pass
            running.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(running.process.wait, 4)
            await asyncio.gather(slow, return_exceptions=True)
