"""The same customers as `loadtests/k6/shop.js`, for those who would rather write Python: `make load TOOL=locust`.

LOAD says how many come when and what they do (`loadtests/load/scenarios.py`). Each answer is one line of the file
SAMPLES, which the report is made of.
"""

import csv
import json
import os
import random
import re
import time
from itertools import accumulate
from typing import Any
from uuid import uuid4

from locust import HttpUser, LoadTestShape, between, events, task
from locust.env import Environment

LOAD = json.loads(os.environ["LOAD"])
API = "/api/v1"
WORDS = ("lamp", "oak", "linen", "folding chair", "teapot", "notebook", "garden")
ACCEPTED, CREATED, DONE = 202, 201, 200
LOOKS = 20  # at an order of one's own, twice a second
TIMING = re.compile(r'(cache|db);desc="([^"]*)"')

_file = open(os.environ["SAMPLES"], "w", newline="")  # noqa: SIM115, PTH123  # for as long as the process runs
_lines = csv.writer(_file)


@events.request.add_listener
def note(name: str, response_time: float, response: Any, **_: Any) -> None:
    """Write one answer down: who gave it, and how long it took."""
    headers = {} if response is None else response.headers
    timing = dict(TIMING.findall(headers.get("Server-Timing") or ""))
    status = getattr(response, "status_code", 0) or 0
    who = (timing.get("cache", ""), timing.get("db", ""), headers.get("X-Instance", ""))
    _lines.writerow((int(time.time()), name, status, round(response_time, 3), *who))


@events.quitting.add_listener
def finish(environment: Environment, **_: Any) -> None:  # noqa: ARG001  # Locust names it
    """Write what is left."""
    _file.close()


class Stages(LoadTestShape):
    """As many users as the stages say, on straight lines between them."""

    def tick(self) -> tuple[int, float] | None:
        """Return how many users there are to be now, and how fast they may come; None at the end."""
        now, before = self.get_run_time(), 0
        ends = list(accumulate(length for length, _ in LOAD["stages"]))
        for end, (length, target) in zip(ends, LOAD["stages"], strict=True):
            if now < end:
                there = before + (target - before) * (1 - (end - now) / length)
                return max(1, round(there)), max(1.0, abs(target - before) / length)
            before = target
        return None


class Customer(HttpUser):
    """One customer, with 1 to 3 s of thought in between."""

    wait_time = between(1, 3)

    def on_start(self) -> None:
        """Sign up and sign in."""
        email = f"locust-{uuid4().hex}@example.com"
        person = {"email": email, "password": LOAD["password"], "name": "Load Test"}
        self.client.post(f"{API}/profiles", json=person, name="sign-up")
        credentials = {"email": email, "password": LOAD["password"]}
        signed_in = self.client.post(f"{API}/sessions", json=credentials, name="sign-in")
        self.client.cookies.clear()  # as an API client: the token, not the cookie
        if signed_in.status_code == CREATED:
            self.client.headers["Authorization"] = f"Bearer {signed_in.json()['token']}"

    @task(LOAD["mix"]["browse"])
    def browse(self) -> None:
        """Look at a page of products, then at one of them."""
        products = self._products(20)
        if products:
            self.client.get(f"{API}/products/{random.choice(products)['id']}", name="product")

    @task(LOAD["mix"]["search"])
    def search(self) -> None:
        """Search for something."""
        self.client.get(f"{API}/products/search", params={"q": random.choice(WORDS)}, name="search")

    @task(LOAD["mix"]["purchase"])
    def purchase(self) -> None:
        """Order one product, and look how the order goes."""
        products = self._products(100)
        if not products:
            return
        order = {
            "items": [{"product_id": random.choice(products)["id"], "quantity": 1}],
            "payment_method": "tok_ok",
        }
        answer = self.client.post(f"{API}/orders", json=order, headers={"Idempotency-Key": uuid4().hex}, name="order")
        if answer.status_code != ACCEPTED:
            return
        for _ in range(LOOKS):
            time.sleep(0.5)  # people look again; Locust lets others go on meanwhile
            seen = self.client.get(f"{API}/orders/{answer.json()['id']}", name="own order")
            if seen.status_code == DONE and seen.json()["status"] != "processing":
                return

    def _products(self, limit: int) -> list[dict[str, str]]:
        answer = self.client.get(f"{API}/products", params={"limit": limit}, name="products")
        items: list[dict[str, str]] = answer.json()["items"] if answer.status_code == DONE else []
        return items
