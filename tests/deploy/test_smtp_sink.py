"""The mail sink of the local cluster: what it keeps and shows, and each way to misbehave."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from email.message import EmailMessage
from pathlib import Path

import aiosmtplib
import httpx
import pytest
from standalone import Standalone, started

from deploy.local import smtp_sink
from deploy.local.sandbox import Book

MODULE = "deploy.local.smtp_sink"
PDF = b"%PDF-1.7\n" + bytes(range(256)) * 300


@pytest.fixture(scope="module")
def sink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standalone]:
    with started(MODULE, tmp_path_factory.mktemp("smtp") / "data", "--port", "--http-port") as running:
        yield running


@pytest.fixture
async def client(sink: Standalone) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=sink.http, timeout=20) as client:
        assert (await client.delete("/messages")).status_code == 204
        yield client
        await client.post("/mode", json={"mode": "ok"})


def mail(to: str = "ada@example.com", subject: str = "Your order is confirmed: ありがとう, thank you") -> EmailMessage:
    message = EmailMessage()
    message["From"] = "Northwind & Pine <orders@northwind-pine.example>"
    message["To"] = to
    message["Subject"] = subject
    message["Message-ID"] = "<order-1@northwind-pine.example>"
    message.set_content("Grüße, and thank you.\n.\n..dots\n")
    message.add_alternative("<p>Thank you</p>", subtype="html")
    message.add_attachment(PDF, maintype="application", subtype="pdf", filename="Rechnung Nº 1/2.pdf")
    return message


async def send(sink: Standalone, message: EmailMessage, patience: float = 20) -> None:
    host, port = sink.smtp
    await aiosmtplib.send(message, hostname=host, port=port, timeout=patience)


async def send_raw(sink: Standalone, raw: bytes) -> None:
    host, port = sink.smtp
    async with aiosmtplib.SMTP(hostname=host, port=port, timeout=20) as smtp:
        await smtp.sendmail("a@example.com", ["b@example.com"], raw)


async def items(client: httpx.AsyncClient, **query: str) -> list[dict]:
    return (await client.get("/messages", params=query)).json()["items"]


async def test_a_message_is_listed_with_its_subject_and_attachments(
    sink: Standalone, client: httpx.AsyncClient
) -> None:
    await send(sink, mail())
    [listed] = await items(client)
    assert listed["from"] == "orders@northwind-pine.example"
    assert listed["to"] == ["ada@example.com"]
    assert listed["subject"] == "Your order is confirmed: ありがとう, thank you"
    assert listed["message_id"] == "<order-1@northwind-pine.example>"
    assert listed["received_at"].endswith("Z")
    name = "Rechnung Nº 1/2.pdf"
    assert listed["attachments"] == [{"filename": name, "content_type": "application/pdf", "size": len(PDF)}]

    whole = (await client.get(f"/messages/{listed['id']}")).json()
    assert "Grüße, and thank you.\n.\n..dots" in whole["text"].replace("\r\n", "\n")
    attachment = await client.get(f"/messages/{listed['id']}/attachments/{name}")
    assert (attachment.content, attachment.headers["content-type"]) == (PDF, "application/pdf")
    assert attachment.headers["content-disposition"].startswith("attachment;")
    raw = await client.get(f"/messages/{listed['id']}/raw")
    assert b"Message-ID: <order-1@northwind-pine.example>" in raw.content


async def test_the_newest_comes_first_and_a_filter_finds_one_recipient(
    sink: Standalone, client: httpx.AsyncClient
) -> None:
    for number, to in enumerate(["ada@example.com", "alan@example.com, ada@example.com", "alan@example.com"]):
        await send(sink, mail(to, f"mail {number}"))
    assert [item["subject"] for item in await items(client)] == ["mail 2", "mail 1", "mail 0"]
    assert [item["subject"] for item in await items(client, to="ADA@example.com")] == ["mail 1", "mail 0"]
    assert await items(client, to="nobody@example.com") == []


async def test_a_killed_sink_still_has_every_message_it_accepted(tmp_path: Path) -> None:
    with started(MODULE, tmp_path / "data", "--port", "--http-port") as running:
        await asyncio.gather(*(send(running, mail(subject=f"mail {number}")) for number in range(10)))
        running.kill()
    with started(MODULE, tmp_path / "data", "--port", "--http-port") as running:
        async with httpx.AsyncClient(base_url=running.http) as client:
            assert {item["subject"] for item in await items(client)} == {f"mail {number}" for number in range(10)}


async def test_down_answers_421_at_connect_and_to_every_command(sink: Standalone, client: httpx.AsyncClient) -> None:
    host, port = sink.smtp
    async with aiosmtplib.SMTP(hostname=host, port=port, timeout=20) as open_before:
        await client.post("/mode", json={"mode": "down"})
        with pytest.raises(aiosmtplib.SMTPResponseException) as refused:
            await open_before.mail("a@example.com")
        assert refused.value.code == 421
    with pytest.raises(aiosmtplib.SMTPConnectResponseError) as greeted:
        await send(sink, mail())
    assert greeted.value.code == 421
    assert await items(client) == []
    await client.post("/mode", json={"mode": "ok"})
    await send(sink, mail())
    assert len(await items(client)) == 1


async def test_reject_refuses_each_recipient_with_550(sink: Standalone, client: httpx.AsyncClient) -> None:
    await client.post("/mode", json={"mode": "reject"})
    with pytest.raises(aiosmtplib.SMTPRecipientsRefused) as refused:
        await send(sink, mail("ada@example.com, alan@example.com"))
    assert [each.code for each in refused.value.recipients] == [550, 550]
    assert await items(client) == []


async def test_a_client_that_leaves_a_slow_sink_early_has_sent_nothing(
    sink: Standalone, client: httpx.AsyncClient
) -> None:
    await client.post("/mode", json={"mode": "slow"})
    began = time.monotonic()
    patient = asyncio.create_task(send(sink, mail(subject="patient")))
    with pytest.raises(aiosmtplib.SMTPTimeoutError):
        await send(sink, mail(subject="impatient"), patience=1)
    await patient
    assert time.monotonic() - began >= 5
    await client.post("/mode", json={"mode": "ok"})
    await send(sink, mail(subject="last"))
    assert [item["subject"] for item in await items(client)] == ["last", "patient"]


async def test_a_message_past_ten_megabytes_is_refused(sink: Standalone, client: httpx.AsyncClient) -> None:
    message = mail()
    message.add_attachment(b"x" * 9 * 1024 * 1024, maintype="application", subtype="octet-stream", filename="big")
    with pytest.raises(aiosmtplib.SMTPResponseException) as refused:
        await send(sink, message)
    assert refused.value.code == 552
    assert await items(client) == []


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"no header at all\r\n",
        b"Subject: \xff\xfe raw bytes\r\n\r\n\xff\xfe",
        b"Content-Type: multipart/mixed\r\n\r\nno boundary",
        b"Content-Type: nonsense\r\nSubject: =?nope?Q?x?=\r\n\r\nx",
        b"Content-Type: message/rfc822\r\n\r\nSubject: inner\r\n\r\ninner",
        b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\nContent-Disposition: attachment\r\n\r\nx\r\n--b--",
        b"Content-Type: text/plain; charset=martian\r\n\r\nx",
    ],
)
async def test_a_malformed_message_is_kept_or_refused_and_the_listing_goes_on(
    sink: Standalone, client: httpx.AsyncClient, raw: bytes
) -> None:
    kept = True
    try:
        await send_raw(sink, raw)
    except aiosmtplib.SMTPDataError:
        kept = False
    listed = await items(client)
    assert len(listed) == kept
    for item in listed:
        assert (await client.get(f"/messages/{item['id']}")).status_code == 200
        for attachment in item["attachments"]:
            address = f"/messages/{item['id']}/attachments/{attachment['filename']}"
            assert (await client.get(address)).status_code == 200
    await send(sink, mail(subject="next"))
    assert (await items(client))[0]["subject"] == "next"


async def test_an_attachment_never_runs_in_the_browser_of_its_reader(
    sink: Standalone, client: httpx.AsyncClient
) -> None:
    message = mail()
    message.add_attachment("<script>", subtype="html", filename='a"\u2028.html')
    await send(sink, message)
    [item] = await items(client)
    found = await client.get(f"/messages/{item['id']}/attachments/{item['attachments'][1]['filename']}")
    assert found.headers["content-disposition"].startswith("attachment; filename*=utf-8''a%22")
    assert found.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/messages/1", "/messages/99999999999999999999999", "/messages/x", "/nowhere"])
async def test_what_is_not_there_is_a_404_in_json(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["message"]


async def test_an_unknown_mode_is_refused_with_the_known_ones(client: httpx.AsyncClient) -> None:
    answer = await client.post("/mode", json={"mode": "sideways"})
    assert answer.status_code == 400
    assert "ok, down, slow, reject" in answer.json()["error"]["message"]
    assert (await client.get("/mode")).json() == {"mode": "ok"}


async def test_only_the_newest_messages_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smtp_sink, "MAX_MESSAGES", 3)
    with contextlib.closing(Book(tmp_path / "book.sqlite3", smtp_sink.SCHEMA)) as book:
        for number in range(5):
            raw = f"Subject: mail {number}\r\n\r\n".encode()
            await book.run(lambda connection, raw=raw: smtp_sink.keep(connection, "a@x", ["b@x"], raw))
        kept = await book.run(lambda connection: smtp_sink.listing(connection, None))
    assert [item["subject"] for item in kept] == ["mail 4", "mail 3", "mail 2"]
