"""What was given up can be found, looked at, sent once more when its cause is mended, and is not purged before."""

import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from sagas import Shop
from sqlalchemy import update

from app.core.errors import Conflict, NotFound
from app.core.ids import new_id
from app.domain.orders.rules import Order, Step
from app.scaling.outbox import dead_letters, outbox, receipts
from workers.task import Outcome
from workers.tasks.upkeep import attend, purge

pytest_plugins = ("sagas",)


async def given_up(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> Order:
    """Return a confirmed order whose invoice cannot be issued, for a reason that no retry mends."""

    async def refuse(_order: Order) -> str:
        raise Conflict("The printer is out of ink.")

    order = await shop.order(1)
    with monkeypatch.context() as patched:
        patched.setattr(shop.apart.resources.invoices, "issue", refuse)
        await shop.drain()
    assert (await shop.now(order)).step is Step.CONFIRMED
    return order


@pytest.mark.sabotage(
    "app/scaling/deadletters.py",
    "values(due_at=now, done_at=None, failures=failures)",
    "values(failures=failures)",
)
async def test_a_replayed_task_is_done_and_its_neighbours_are_not_done_again(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = await given_up(shop, monkeypatch)
    letters = shop.apart.resources.dead_letters
    (listed,) = (await letters.listed(10, None)).items
    assert (listed["task"], listed["event"], listed["subject_id"]) == ("invoices.issue", "order.confirmed", order.id)
    assert listed["error"] == "Conflict: The printer is out of ink."
    assert await shop.mails(order) == []
    replayed = await letters.replay(listed["id"])
    assert replayed.replayed_at is not None
    await shop.drain()
    assert (await shop.now(order)).invoice_key is not None
    assert await shop.mails(order) == ["order_confirmation"]
    (entry,) = await shop.ledger(order)
    assert (entry["charges"], entry["captured"]) == (1, order.amount)
    assert (await letters.listed(10, None)).items == ()
    assert [letter["id"] for letter in (await letters.listed(10, None, everything=True)).items] == [listed["id"]]
    with pytest.raises(Conflict) as refusal:
        await letters.replay(listed["id"])
    assert refusal.value.code == "already_replayed"
    for ask in (letters.get, letters.replay):
        with pytest.raises(NotFound):
            await ask(new_id())


async def test_pages_show_each_letter_once_newest_first(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(5):
        await given_up(shop, monkeypatch)
    shown, cursor = [], None
    for _ in range(3):
        page = await shop.apart.resources.dead_letters.listed(2, cursor)
        shown += [letter["id"] for letter in page.items]
        cursor = page.next_cursor
    assert cursor is None
    assert len(shown) == 5
    assert shown == sorted(shown, reverse=True)


@pytest.mark.sabotage("workers/tasks/upkeep.py", ", ~kept.besides,", ",")
async def test_nothing_of_an_open_letter_is_purged_and_it_can_be_replayed_a_year_later(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = await given_up(shop, monkeypatch)
    year_ago = datetime.now(UTC) - timedelta(days=365)
    async with shop.apart.resources.database.writer() as writer:
        for table in (outbox, receipts):
            await writer.run(update(table).where(table.c.done_at.is_not(None)).values(done_at=year_ago))
    assert await attend(purge, shop.apart.resources) is Outcome.DONE
    (letter,) = (await shop.apart.resources.dead_letters.listed(10, None)).items
    await shop.apart.resources.dead_letters.replay(letter["id"])
    await shop.drain()
    assert (await shop.now(order)).invoice_key is not None
    assert len(await shop.ledger(order)) == 1
    async with shop.apart.resources.database.writer() as writer:
        await writer.run(update(dead_letters).values(replayed_at=year_ago))
    assert await attend(purge, shop.apart.resources) is Outcome.DONE
    assert await shop.apart.dead_letters() == []


async def test_the_command_line_lists_shows_and_replays(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    order = await given_up(shop, monkeypatch)

    def scaleout(*arguments: str, code: int = 0) -> str:
        done = subprocess.run(  # noqa: S603  # our own command
            [sys.executable, "-m", "app.cli", "dead-letters", *arguments],
            env=shop.apart.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    (line,) = scaleout("list").splitlines()
    letter_id = line.split()[0]
    assert "invoices.issue" in line
    assert "The printer is out of ink." in line
    assert str(order.id) in scaleout("show", letter_id)
    assert letter_id in scaleout("replay", "--all")
    assert scaleout("list") == ""
    assert "already" in scaleout("replay", letter_id, code=1)
    assert "Name one" in scaleout("replay", code=1)
    await shop.drain()
    assert (await shop.now(order)).invoice_key is not None
