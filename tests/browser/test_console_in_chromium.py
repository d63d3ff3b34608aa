"""The console in a real Chromium, as a person and as a keyboard meets it."""

import asyncio
import os
import re
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from conftest import Customer
from playwright.async_api import Browser, ConsoleMessage, Error, Page, async_playwright

from app.scaling.pulse import BEAT_SECONDS, GONE_AFTER
from deploy.local.cluster import Cluster

Make = Callable[..., Awaitable[Customer]]
NewProduct = Callable[..., Awaitable[dict[str, Any]]]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs a Chromium: apt-get install chromium (Debian), or a chromium on the PATH"
)
# Anything that is waited for; what has to be quick is measured by itself.
PATIENCE = 20_000  # milliseconds
WIDTHS = (1440, 360, 320)


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Browser]:
    """The browser. Without its sandbox, which does not start as root in a container; it sees only this cluster."""
    async with async_playwright() as playwright:
        started = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        await started.close()


@asynccontextmanager
async def opened(browser: Browser, url: str, **options: Any) -> AsyncIterator[tuple[Page, list[str]]]:
    """Yield a fresh page at the console, and what it complains of."""
    context = await browser.new_context(**options)
    complaints: list[str] = []

    def note(message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            complaints.append(message.text)

    def fail(error: Error) -> None:
        complaints.append(str(error))

    try:
        page = await context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", note)
        page.on("pageerror", fail)
        await page.goto(f"{url}/console")
        yield page, complaints
    finally:
        await context.close()


async def sign_in(page: Page) -> None:
    """Sign in as the page says that one can on a local cluster, without a mouse."""
    await page.focus("#fill-in")
    await page.keyboard.press("Enter")
    await page.focus("#sign-in button[type=submit]")
    await page.keyboard.press("Enter")
    await page.wait_for_selector("#board:not([hidden])")


def box(name: str, state: str = "") -> str:
    """Return the selector of a box of the picture, in a state if given."""
    return f'#picture .box[data-id="{name}"]' + (f'[data-state="{state}"]' if state else "")


@asynccontextmanager
async def kept_dead(cluster: Cluster, name: str) -> AsyncIterator[None]:
    """Kill a process, and again whenever it comes back, inside the block."""

    async def kill() -> None:
        while True:
            pid = cluster.process(name).pid
            if pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.1)

    killing = asyncio.create_task(kill())
    try:
        yield
    finally:
        killing.cancel()
        await asyncio.wait({killing})


@pytest.mark.sabotage("app/api/console/__init__.py", '    "charts.js": "text/javascript",\n', "")
async def test_it_shows_both_instances_and_an_order_going_through_without_a_complaint(
    browser: Browser, cluster: Cluster, new_customer: Make, new_product: NewProduct
) -> None:
    async with opened(browser, cluster.url) as (page, complaints):
        await sign_in(page)
        for name in ("api-1", "api-2"):
            await page.wait_for_selector(box(name))
            await page.wait_for_selector(f'#words tr[data-id="{name}"]')
        order = (await (await new_customer()).order((await new_product())["id"])).json()
        ending = f"…{order['id'][-6:]}"
        for step in ("placed", "reserved", "confirmed", "invoiced"):
            await page.wait_for_selector(f'#events li[data-state="order.{step}"]:has-text("{ending}")')
        await page.wait_for_selector('#funnel [data-event="order.invoiced"] .count:not(:text-is("0"))')
        assert complaints == []


@pytest.mark.sabotage("app/scaling/pulse.py", "GONE_AFTER = 1.5", "GONE_AFTER = 3.0")
async def test_it_shows_a_killed_instance_as_gone_within_three_seconds_and_as_back_when_it_is(
    browser: Browser, cluster: Cluster
) -> None:
    # At the other instance: what happens when the one that serves the page dies is the next test's.
    (other,) = [process.address for process in cluster.processes if process.name == "api-2"]
    async with opened(browser, other or "") as (page, _):
        await sign_in(page)
        await page.wait_for_selector(box("api-1", "ok"))
        async with kept_dead(cluster, "api-1"):
            await page.wait_for_selector(box("api-1", "bad"))
            said = await page.locator('#troubles li:has-text("api-1 is gone")').first.inner_text()
            heard = re.search(r"nothing heard for ([0-9.]+) s", said)
            assert heard is not None
            # 3 s where nothing else runs: one beat until it is looked at, and as long again for a machine that is busy.
            assert GONE_AFTER + BEAT_SECONDS < 3.0
            assert float(heard[1]) < 2 * 3.0
            assert await page.locator('#words tr[data-id="api-1"] td').first.inner_text() == "gone"
            assert "api-1 is gone" in await page.locator("#verdict-text").inner_text()
        await page.wait_for_selector(box("api-1", "ok"), timeout=3 * PATIENCE)
        await page.wait_for_selector('#troubles li:has-text("api-1 is back")')


@pytest.mark.sabotage("app/api/console/stream.js", "  while (!signal.aborted) {", "  if (!signal.aborted) {")
async def test_a_page_whose_instance_dies_goes_on_at_another_one(browser: Browser, cluster: Cluster) -> None:
    async with opened(browser, cluster.url) as (page, _):
        await sign_in(page)
        said = await page.locator("#link").inner_text()
        serving = re.search(r"live from (api-\d)", said)
        assert serving is not None
        other = {"api-1": "api-2", "api-2": "api-1"}[serving[1]]
        async with kept_dead(cluster, serving[1]):
            await page.wait_for_selector(f'#link:has-text("live from {other}")')
            await page.wait_for_selector(box(serving[1], "bad"))
        await page.wait_for_selector(box(serving[1], "ok"), timeout=3 * PATIENCE)


@pytest.mark.sabotage("app/api/console/switchboard.js", 'active ? "DELETE" : "PUT"', '"DELETE"')
async def test_its_buttons_break_the_local_cluster_and_mend_it(browser: Browser, cluster: Cluster) -> None:
    async with opened(browser, cluster.url) as (page, complaints):
        await sign_in(page)
        button = page.locator('[data-fault="relay-stopped"]')
        await button.click()
        await page.wait_for_selector(box("relay-1", "bad"))
        assert "frozen" in await page.locator("#switchboard-said").inner_text()
        await page.wait_for_selector('[data-fault="relay-stopped"][aria-pressed="true"]')
        await button.click()
        await page.wait_for_selector(box("relay-1", "ok"))
        assert complaints == []


@pytest.mark.sabotage(
    "app/api/console/console.css",
    "@media (max-width: 40rem) {",
    "body { min-width: 400px }\n@media (max-width: 1rem) {",
)
async def test_it_fits_every_width_and_follows_light_dark_and_stillness(browser: Browser, cluster: Cluster) -> None:
    async with opened(browser, cluster.url, color_scheme="dark", reduced_motion="reduce") as (page, complaints):
        wide = "document.documentElement.scrollWidth > innerWidth"
        assert not await page.evaluate(wide)
        await sign_in(page)
        await page.wait_for_selector(box("api-1"))
        for width in WIDTHS:
            await page.set_viewport_size({"width": width, "height": 800})
            assert not await page.evaluate(wide), width
        running = "document.getAnimations().filter((each) => each.playState === 'running').length"
        assert await page.evaluate(running) == 0
        paper = "getComputedStyle(document.body).backgroundColor"
        dark = await page.evaluate(paper)
        await page.click("#theme")
        assert await page.evaluate(paper) != dark
        await page.reload()
        await page.wait_for_selector("#board:not([hidden])")
        assert await page.evaluate(paper) != dark, "what somebody chose stays"
        assert complaints == []


@pytest.mark.sabotage(
    "app/api/console/console.html", '<button type="button" id="pause"', '<button type="button" tabindex="-1" id="pause"'
)
async def test_a_keyboard_reaches_everything_and_a_screen_reader_is_told(browser: Browser, cluster: Cluster) -> None:
    async with opened(browser, cluster.url) as (page, _):
        await sign_in(page)
        await page.wait_for_selector('[data-fault="instance-killed"]')
        await page.evaluate("document.activeElement.blur()")
        wanted = set(
            await page.evaluate(
                "[...document.querySelectorAll('button, a[href], .events')]"
                ".filter((each) => each.offsetParent || each.className === 'skip')"
                ".map((each) => each.id || each.dataset.fault || each.className)"
            )
        )
        reached = set()
        for _ in range(len(wanted) + 5):
            await page.keyboard.press("Tab")
            reached.add(
                await page.evaluate(
                    "(({id, dataset, className}) => id || dataset.fault || className)(document.activeElement)"
                )
            )
        assert wanted <= reached
        assert {"skip", "theme", "pause", "sign-out", "troubles", "instance-killed"} <= wanted
        await page.focus("#pause")
        await page.keyboard.press("Space")
        assert await page.get_attribute("#pause", "aria-pressed") == "true"
        assert await page.get_attribute("#spoken", "aria-live") == "polite"
        # What the list shows is said; on a busy machine that may be more than "watching from now on".
        await page.wait_for_selector("#spoken:not(:empty)", state="attached")
        said = await page.locator("#spoken").text_content() or ""
        listed = [line.partition(" ")[2] for line in await page.locator("#troubles li").all_text_contents()]
        assert any(text in said for text in listed)
        shown = await page.locator("#picture .box").count()
        assert await page.locator("#words tr").count() == shown + 1  # the outbox has no box
        assert await page.get_attribute("#picture", "role") == "img"
