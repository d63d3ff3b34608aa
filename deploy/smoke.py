"""The main job against any running deployment: sign up, order, wait until it is confirmed, fetch the invoice.

It needs nothing but the address, so it says of Compose, Kubernetes and a cloud alike whether a customer can buy:
`python -m deploy.smoke http://127.0.0.1:8000`. It leaves one profile and one order behind.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urljoin
from uuid import uuid4

import httpx

T = TypeVar("T")

PASSWORD = "three calm otters swim"  # noqa: S105 - of a profile that exists for this run only

# A saga takes a second, a cold worker that loads fonts for its first invoice a few, and an order behind many others
# on a busy machine a minute. Past this, it is stuck.
PATIENCE_SECONDS = 120.0
# The order is looked at less and less often: the free tier's hundred requests an hour are enough for the whole run.
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 5.0


class SmokeError(Exception):
    """The deployment did not do its main job; the text says at which step and what it answered."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a run leaves: the order's id and its profile's token, to ask for it again later."""

    id: str
    token: str


def run(url: str, say: Callable[[str], None], *, payment_method: str = "tok_ok") -> Order:
    """Buy one piece of the first product at the deployment `url` and return the order.

    Args:
        url: where NGINX or another balancer listens, without a path.
        say: told one line for each step.
        payment_method: one of the provider's; `tok_ok` is what its sandbox accepts.

    Raises:
        SmokeError: a step failed.
    """
    with httpx.Client(base_url=f"{url.rstrip('/')}/api/v1/", timeout=15) as client:
        email = f"smoke-{uuid4().hex}@example.com"
        person = {"email": email, "password": PASSWORD}
        _ask(client, "POST", "profiles", 201, json=person | {"name": "Smoke"})
        session = _ask(client, "POST", "sessions", 201, json=person).json()
        client.headers["Authorization"] = f"Bearer {session['token']}"
        say(f"signed up and in as {email}")
        products = _ask(client, "GET", "products?limit=1", 200).json()["items"]
        if not products:
            raise SmokeError("The shop is empty: run `scaleout seed` there, or add a product.")
        placed = _ask(
            client,
            "POST",
            "orders",
            202,
            json={"items": [{"product_id": products[0]["id"], "quantity": 1}], "payment_method": payment_method},
            headers={"Idempotency-Key": uuid4().hex},
        ).json()
        say(f"ordered {products[0]['name']}: {placed['id']}")
        order = Order(placed["id"], session["token"])
        wait_until_confirmed(client, order.id)
        say("confirmed")
        pdf = _until(lambda: _invoice(client, order.id), f"There is no invoice for order {order.id}.")
        say(f"invoice: {len(pdf):,} bytes of PDF")
        return order


def wait_until_confirmed(client: httpx.Client, order_id: str) -> None:
    """Wait until the order is confirmed.

    Args:
        client: signed in as its customer, with `…/api/v1/` as its base.
        order_id: which.

    Raises:
        SmokeError: it was rejected, or nothing happened in time.
    """

    def confirmed() -> bool:
        order = _ask(client, "GET", f"orders/{order_id}", 200).json()
        if order["status"] in {"rejected", "cancelled"}:
            raise SmokeError(f"Order {order_id} is {order['status']}: {order.get('reason')}.")
        return bool(order["status"] == "confirmed")

    _until(confirmed, f"Order {order_id} was not confirmed: look at the relay's and the workers' logs.")


def _invoice(client: httpx.Client, order_id: str) -> bytes:
    answer = client.get(f"orders/{order_id}/invoice")
    if answer.status_code == httpx.codes.NOT_FOUND:
        return b""
    if answer.status_code != httpx.codes.FOUND:
        raise SmokeError(f"GET orders/{order_id}/invoice answered {answer.status_code}: {answer.text[:300]}")
    # Fetched without the session: the link alone must be enough.
    found = httpx.get(urljoin(str(answer.url), answer.headers["Location"]), timeout=15)
    if found.status_code != httpx.codes.OK or not found.content.startswith(b"%PDF-"):
        raise SmokeError(f"The link to the invoice answered {found.status_code}: {found.text[:300]}")
    return found.content


def _until(look: Callable[[], T], failure: str) -> T:
    deadline = time.monotonic() + PATIENCE_SECONDS
    pause = FIRST_PAUSE_SECONDS
    while not (seen := look()):
        if time.monotonic() > deadline:
            raise SmokeError(failure)
        time.sleep(pause)
        pause = min(pause * 1.2, LONGEST_PAUSE_SECONDS)
    return seen


def _ask(client: httpx.Client, method: str, path: str, expected: int, **request: Any) -> httpx.Response:
    try:
        answer = client.request(method, path, **request)
    except httpx.TransportError as error:
        raise SmokeError(f"{method} {client.base_url}{path} got no answer: {error!r}") from error
    if answer.status_code != expected:
        raise SmokeError(f"{method} {path} answered {answer.status_code}, not {expected}: {answer.text[:300]}")
    return answer


def main() -> None:
    """Run the main job and end with 0, or with 1 and a sentence."""
    parser = argparse.ArgumentParser(description="Buys something at a running deployment.")
    parser.add_argument("url", help="such as http://127.0.0.1:8000")
    parser.add_argument("--payment-method", default="tok_ok", help="of the provider in use (tok_ok)")
    options = parser.parse_args()
    try:
        run(options.url, print, payment_method=options.payment_method)
    except SmokeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
