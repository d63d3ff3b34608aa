"""Who is erased is named by no invoice, whenever it was made."""

from typing import Any

import pytest
from sagas import Shop

from workers.relay import ROUTES

pytest_plugins = ("sagas",)


async def erase_buyer(shop: Shop, profile_id: Any) -> None:
    """Erase the profile, and have all done that follows from it."""
    profiles = shop.apart.resources.profiles
    await profiles.erase(profile_id, (await profiles.own(profile_id)).version)
    (erased,) = [message for message in await shop.due() if message.event == "profile.erased"]
    for task in ROUTES[erased.event]:
        await shop.run(erased, task)


@pytest.mark.sabotage(
    "workers/tasks/confirmed.py",
    "        await resources.invoices.issue(order)\n    async with once(resources, delivery):\n",
    "        pass\n    async with once(resources, delivery):\n",
)
async def test_an_invoice_forgets_its_buyer(shop: Shop) -> None:
    order = await shop.order(2)
    await shop.drain()
    invoices = shop.apart.resources.invoices
    named = await invoices.pdf(order)
    await erase_buyer(shop, order.profile_id)
    assert await invoices.pdf(order) != named


@pytest.mark.sabotage(
    "workers/tasks/confirmed.py", "        await resources.invoices.keep(writer, order, stored)\n", ""
)
async def test_an_invoice_in_the_making_forgets_a_buyer_who_is_erased_meanwhile(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = await shop.order(2)
    resources = shop.apart.resources
    put, made = resources.storage.put, 0

    async def put_late(*arguments: Any, **more: Any) -> None:
        nonlocal made
        made += 1
        if made == 1:
            await erase_buyer(shop, order.profile_id)
        await put(*arguments, **more)

    monkeypatch.setattr(resources.storage, "put", put_late)
    await shop.drain()
    stored = await resources.invoices.pdf(order)
    assert (await shop.now(order)).invoice_key is not None
    assert not (await resources.invoices.issue(await shop.now(order))).names_buyer
    assert await resources.invoices.pdf(order) == stored
