"""The same customers as `loadtests/k6/shop.js`, for those who would rather write Python and watch a page.

With a page on http://127.0.0.1:8089: `locust -f loadtests/locust/shop.py --host http://127.0.0.1:8000`.
In the terminal: the same with `--headless -u 20 -r 5 -t 60s`, which is `make load TOOL=locust`.
"""

import random
from uuid import uuid4

from locust import HttpUser, between, task

API = "/api/v1"
PASSWORD = "three calm otters swim"  # noqa: S105  # of accounts that the test makes
WORDS = ("lamp", "oak", "linen", "folding chair", "teapot", "notebook", "garden")
ACCEPTED, LIMITED = 202, 429


class Customer(HttpUser):
    """One customer: 60 % browsing, 25 % searching, 15 % buying, 1 to 3 s of thought in between."""

    wait_time = between(1, 3)

    def on_start(self) -> None:
        """Sign up and sign in."""
        email = f"locust-{uuid4().hex}@example.com"
        person = {"email": email, "password": PASSWORD, "name": "Load Test"}
        self.client.post(f"{API}/profiles", json=person)
        signed_in = self.client.post(f"{API}/sessions", json={"email": email, "password": PASSWORD})
        self.client.cookies.clear()  # as an API client: the token, not the cookie
        self.client.headers["Authorization"] = f"Bearer {signed_in.json()['token']}"

    @task(60)
    def browse(self) -> None:
        """Look at a page of products, then at one of them."""
        products = self._products(20)
        if products:
            self.client.get(f"{API}/products/{random.choice(products)['id']}", name=f"{API}/products/[id]")

    @task(25)
    def search(self) -> None:
        """Search for something."""
        self.client.get(f"{API}/products/search", params={"q": random.choice(WORDS)}, name=f"{API}/products/search")

    @task(15)
    def buy(self) -> None:
        """Order one product, and look how the order goes."""
        products = self._products(100)
        if not products:
            return
        order = {
            "items": [{"product_id": random.choice(products)["id"], "quantity": 1}],
            "payment_method": "tok_ok",
        }
        key = {"Idempotency-Key": uuid4().hex}
        with self.client.post(f"{API}/orders", json=order, headers=key, catch_response=True) as answer:
            if answer.status_code not in {ACCEPTED, LIMITED}:
                answer.failure(f"{answer.status_code}: {answer.text[:200]}")
            if answer.status_code != ACCEPTED:
                return
            placed = answer.json()["id"]
        self.client.get(f"{API}/orders/{placed}", name=f"{API}/orders/[id]")

    def _products(self, limit: int) -> list[dict[str, str]]:
        with self.client.get(f"{API}/products", params={"limit": limit}, catch_response=True) as answer:
            if answer.status_code == LIMITED:
                answer.success()  # an answer that the limit promises
                return []
            items: list[dict[str, str]] = answer.json()["items"]
            return items
