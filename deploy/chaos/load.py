"""Clients of the shop that never stop asking, as real ones do, and write down everything that they see.

Authors change one profile from two sessions at once, each change naming the version before it; buyers place orders
and follow them; visitors look around. A call without an answer is asked again only where a client may: an order with
its key, a change after a look at what is there.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any
from uuid import uuid4

import httpx

from deploy.chaos.history import FINAL, NO_ANSWER, Call, End

PASSWORD = "a long enough pass phrase"  # noqa: S105 - of customers that are gone with their cluster
ADMIN = {"email": "admin@example.com", "password": "correct horse battery"}
API = "/api/v1"
AUTHORS, BUYERS, VISITORS = 3, 2, 2
# Seconds between an answer and the next request of a session. With it the ten sessions ask some 40 times a second
# together: enough to meet every moment of a fault, little enough that a laptop's cores are idle most of the time.
LEAST_PAUSE, LONGEST_PAUSE = 0.1, 0.3
# Of what a buyer does, so much is to place an order: a worker has six tasks for each, and the rest is following them.
ORDERS = 0.3
# Longer than anybody behind lets a client wait (NGINX gives up after 15 s), so that every answer is seen.
PATIENCE = 20.0
STOCK = 1_000_000


class Session:
    """One signed-in client; its calls follow each other.

    Args:
        name: in the history.
        url: of the balancer.
        note: takes each call.
        bound: whether it sends the Consistency-Token of its last write along, as a client may.
    """

    def __init__(self, name: str, url: str, note: Callable[[Call], None], *, bound: bool = False) -> None:
        self.name = name
        self.profile_id = ""
        self._client = httpx.AsyncClient(base_url=f"{url}{API}", timeout=PATIENCE)
        self._note = note
        self._bound = bound

    async def sign_in(self, email: str, password: str = PASSWORD) -> None:
        """Sign in."""
        answer = await self._client.post("/sessions", json={"email": email, "password": password})
        signed_in = answer.raise_for_status().json()
        self._client.cookies.clear()
        self._client.headers["Authorization"] = f"Bearer {signed_in['token']}"
        self.profile_id = signed_in["profile_id"]

    async def call(
        self,
        what: str,
        method: str,
        path: str,
        *,
        subject: str = "",
        based: int = 0,
        read: Callable[[dict[str, Any]], tuple[int, str]] = lambda _: (0, ""),
        **sent: Any,
    ) -> Call:
        """Send a request, note what came of it, and return that.

        Args:
            what: see `Call`.
            method: of HTTP.
            path: below the API's.
            subject: see `Call`.
            based: see `Call`.
            read: takes version and value from the body of a success.
            sent: what httpx takes: json, headers.
        """
        begun, bound = monotonic(), "Consistency-Token" in self._client.headers
        status, version, value = NO_ANSWER, 0, ""
        try:
            answer = await self._client.request(method, path, **sent)
        except httpx.TransportError:
            pass
        else:
            status = answer.status_code
            if answer.is_success:
                version, value = read(answer.json())
                if self._bound and "consistency-token" in answer.headers:
                    self._client.headers["Consistency-Token"] = answer.headers["consistency-token"]
        call = Call(what, self.name, subject, begun, monotonic(), status, based, version, value, bound)
        self._note(call)
        return call

    async def everything(self, path: str) -> list[dict[str, Any]]:
        """Return all items of a list."""
        items: list[dict[str, Any]] = []
        cursor: str | None = ""
        while cursor is not None:
            asked = {"limit": 100} | ({"cursor": cursor} if cursor else {})
            page = (await self._client.get(path, params=asked)).raise_for_status().json()
            items += page["items"]
            cursor = page["next_cursor"]
        return items

    async def one(self, path: str) -> dict[str, Any]:
        """Return a resource, without noting it."""
        found: dict[str, Any] = (await self._client.get(path)).raise_for_status().json()
        return found

    async def make(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Create a resource, without noting it."""
        made: dict[str, Any] = (await self._client.post(path, json=body)).raise_for_status().json()
        return made

    async def close(self) -> None:
        """Close its connections."""
        await self._client.aclose()


class Author:
    """Changes a profile from one of its two sessions."""

    def __init__(self, session: Session, chance: random.Random) -> None:
        self.session = session
        self._chance = chance
        self._version = 1
        self._changes = 0

    async def go(self) -> None:
        """Do one thing: change the profile, or look at it, as its owner or as anybody."""
        subject = self.session.profile_id
        match self._chance.choices(("write", "own", "public"), (2, 2, 1))[0]:
            case "write":
                self._changes += 1
                value = f"{self.session.name} {self._changes}"
                call = await self.session.call(
                    "write",
                    "PATCH",
                    f"/profiles/{subject}",
                    subject=subject,
                    based=self._version,
                    read=_profile,
                    json={"bio": value},
                    headers={"If-Match": f'"v{self._version}"'},
                )
            case "own":
                call = await self._look("/profiles/me")
            case _:
                call = await self._look(f"/profiles/{subject}")
        if call.ok:
            self._version = call.version
        elif call.what == "write":
            # Somebody was faster, or nobody can say whether it was done.
            seen = await self._look("/profiles/me")
            self._version = seen.version or self._version

    async def _look(self, path: str) -> Call:
        return await self.session.call("read", "GET", path, subject=self.session.profile_id, read=_profile)


class Buyer:
    """Places one order after the other, each until it is answered, and follows them."""

    def __init__(self, session: Session, product_id: str, chance: random.Random) -> None:
        self.session = session
        self._body = {"items": [{"product_id": product_id, "quantity": 1}], "payment_method": "tok_ok"}
        self._chance = chance
        self._key = ""
        self._open: list[str] = []

    @property
    def waits(self) -> bool:
        """Whether an order has not been answered yet."""
        return bool(self._key)

    async def go(self) -> None:
        """Place an order, or the one before again, or look at one."""
        if self._open and not self.waits and self._chance.random() > ORDERS:
            order = self._chance.choice(self._open)
            call = await self.session.call("look", "GET", f"/orders/{order}", subject=order, read=_order)
            if call.value in FINAL:
                self._open.remove(order)
            return
        self._key = self._key or uuid4().hex
        call = await self.session.call(
            "order",
            "POST",
            "/orders",
            subject=self._key,
            read=lambda order: (0, order["id"]),
            json=self._body,
            headers={"Idempotency-Key": self._key},
        )
        if call.ok:
            self._key = ""
            self._open.append(call.value)


class Visitor:
    """Looks at products and at the profiles of authors."""

    def __init__(self, session: Session, paths: list[str], chance: random.Random) -> None:
        self.session = session
        self._paths = paths
        self._chance = chance

    async def go(self) -> None:
        """Look at something."""
        await self.session.call("browse", "GET", self._chance.choice(self._paths))


class Load:
    """All clients together. Begin with `running`; nothing is asked until then.

    Attributes:
        calls: the history so far.
        product_id: what buyers buy.
    """

    def __init__(self, url: str, chance: random.Random) -> None:
        self._url = url
        self._chance = chance
        self._admin = Session("admin", url, lambda _: None)
        self._may = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._busy = 0
        self._idle = asyncio.Event()  # set whenever somebody has come to rest
        self.calls: list[Call] = []
        self.product_id = ""
        self.authors: list[Author] = []
        self.buyers: list[Buyer] = []
        self.visitors: list[Visitor] = []

    @property
    def clients(self) -> tuple[Author | Buyer | Visitor, ...]:
        """Everybody who asks."""
        return (*self.authors, *self.buyers, *self.visitors)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Sign everybody up and let them ask inside the block."""
        try:
            await self._sign_up()
            # No TaskGroup: a test opens this in one task and closes it in another.
            self._tasks = [asyncio.create_task(self._go_on(client)) for client in self.clients]
            self._may.set()
            yield
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for client in self.clients:
                await client.session.close()
            await self._admin.close()

    async def rest(self) -> None:
        """Let every client finish what it is at, orders until they are answered, and then wait.

        Raises:
            Exception: what a client has stumbled over; answers of any status are no reason for it to stumble.
        """
        self._may.clear()
        while self._busy:
            self._idle.clear()
            await self._idle.wait()
        for task in self._tasks:
            if task.done():
                task.result()

    def go_on(self) -> None:
        """Let everybody ask again."""
        self._may.set()

    async def end(self) -> End:
        """Return what is there now, as its owners see it."""
        profiles = {}
        for author in self.authors[::2]:
            own = await author.session.one("/profiles/me")
            profiles[own["id"]] = _profile(own)
        orders = {
            buyer.session.name: [(order["id"], order["status"]) for order in await buyer.session.everything("/orders")]
            for buyer in self.buyers
        }
        return End(profiles, orders)

    async def _sign_up(self) -> None:
        await self._admin.sign_in(**ADMIN)
        new = {
            "sku": f"CHAOS-{uuid4().hex[:12]}",
            "name": "Thing",
            "description": "Bought while things break.",
            "category": "chaos",
            "price": {"amount": 1250, "currency": "EUR"},
            "stock": STOCK,
        }
        self.product_id = (await self._admin.make("/products", new))["id"]
        for number in range(AUTHORS):
            email = await self._customer()
            for bound in (True, False):
                session = await self._session(f"author-{number}{'-bound' if bound else ''}", email, bound=bound)
                self.authors.append(Author(session, self._chance))
        for number in range(BUYERS):
            # Redis may die right after an order: then only the order's token says which replicas have it.
            session = await self._session(f"buyer-{number}", await self._customer(), bound=True)
            self.buyers.append(Buyer(session, self.product_id, self._chance))
        paths = [f"/products/{self.product_id}", "/products?limit=5", "/products/search?q=lamp"]
        paths += [f"/profiles/{author.session.profile_id}" for author in self.authors[::2]]
        for number in range(VISITORS):
            session = await self._session(f"visitor-{number}", await self._customer())
            self.visitors.append(Visitor(session, paths, self._chance))

    async def _customer(self) -> str:
        email = f"{uuid4().hex}@example.com"
        await self._admin.make("/profiles", {"email": email, "password": PASSWORD, "name": "Chaos"})
        return email

    async def _session(self, name: str, email: str, *, bound: bool = False) -> Session:
        session = Session(name, self._url, self.calls.append, bound=bound)
        await session.sign_in(email)
        return session

    async def _go_on(self, client: Author | Buyer | Visitor) -> None:
        while True:
            await self._may.wait()
            self._busy += 1
            try:
                await client.go()
                # A client does not leave an order in the air.
                while isinstance(client, Buyer) and client.waits:
                    await asyncio.sleep(self._chance.uniform(LEAST_PAUSE, LONGEST_PAUSE))
                    await client.go()
            finally:
                self._busy -= 1
                self._idle.set()
            await asyncio.sleep(self._chance.uniform(LEAST_PAUSE, LONGEST_PAUSE))


def _profile(body: dict[str, Any]) -> tuple[int, str]:
    return body["version"], body["bio"] or ""


def _order(body: dict[str, Any]) -> tuple[int, str]:
    return len(body["history"]), body["status"]
