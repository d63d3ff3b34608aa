"""Talks to the payment provider. No transaction is open meanwhile; what it answered is recorded by the orders."""

from typing import Any

import httpx

from app.core import tracing
from app.core.errors import Conflict, Unavailable
from app.core.settings import PaymentSettings
from app.domain.payments.rules import Attempt, Authorised, Declined, Held, State, Undone
from app.scaling.outbound import Outbound

_SERVER_ERROR = 500
_TOO_MANY = 429
# The provider's last word on this payment, unlike a key that it does not accept (401) or a key used twice (409).
_NO_FOR_GOOD = frozenset({400, 402, 422})

# What the provider calls it, and what that is for us once nothing is held or kept.
_UNDONE = {"declined": State.DECLINED, "voided": State.VOIDED, "refunded": State.REFUNDED}
_UNDO = {"authorized": "void", "captured": "refund"}


class ProviderDown(Exception):
    """The provider answered that it cannot answer."""


class Payments:
    """The provider's client, one for a process.

    Args:
        settings: its address and how long an answer may take.
    """

    def __init__(self, settings: PaymentSettings) -> None:
        self._client = httpx.AsyncClient(
            base_url=settings.url,
            timeout=httpx.Timeout(settings.timeout, connect=1.0),
            limits=httpx.Limits(max_connections=16, max_keepalive_connections=8),
        )
        self.outbound = Outbound(
            "payments",
            timeout=settings.timeout,
            concurrency=8,
            waiting=32,
            failures=(httpx.TransportError, ProviderDown),
            tries=3,  # a lost answer and one more; longer trouble is for the breaker and for a later delivery
        )

    async def stop(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def authorise(self, attempt: Attempt) -> Authorised | Declined:
        """Ask for the money. Safe to repeat: the attempt's id is the idempotency key.

        Raises:
            Unavailable: `payment_provider_down`; whether money is held is then unknown until the next answer.
            Conflict: `payment_refused`, if the provider does not accept us or our use of the key.
        """
        if not attempt.amount:
            return Authorised(None)
        body = {
            "amount": attempt.amount,
            "currency": attempt.currency,
            "payment_method": attempt.method,
            "reference": str(attempt.order_id),
        }
        response = await self._ask("POST", "/authorizations", key=str(attempt.id), body=body)
        if response.status_code in _NO_FOR_GOOD:
            return Declined(None, "refused")
        answer = _answer(response)
        if answer["status"] == "declined":
            return Declined(answer["id"], str(answer.get("decline_reason") or "declined"))
        return Authorised(answer["id"])

    async def capture(self, attempt: Attempt) -> bool:
        """Take the money that is held. Safe to repeat. False if a cancellation has given it back meanwhile.

        Raises:
            Unavailable, Conflict: as for `authorise`.
        """
        if attempt.provider_id is None:
            return True
        response = await self._advance(attempt, attempt.provider_id, "capture")
        if response.status_code == httpx.codes.CONFLICT and await self._status(attempt.provider_id) in _UNDONE:
            return False
        _answer(response)
        return True

    async def undo(self, attempt: Attempt) -> Undone:
        """Give back whatever the provider holds or keeps for the attempt. Safe to repeat, and at any moment.

        An attempt whose answer was never recorded is asked for once more: under its key that is the answer to a call
        that may still be on its way, and only what has an answer can be voided for good.

        Raises:
            Unavailable, Conflict: as for `authorise`.
        """
        provider_id = attempt.provider_id
        if attempt.state is State.PENDING:
            answer = await self.authorise(attempt)
            if isinstance(answer, Declined):
                return Undone(State.DECLINED, answer.provider_id)
            provider_id = answer.provider_id
        if provider_id is None:
            return Undone(State.VOIDED, None)
        status = await self._status(provider_id)
        if status in _UNDO:
            response = await self._advance(attempt, provider_id, _UNDO[status])
            if response.status_code == httpx.codes.CONFLICT:
                # A capture that was under way came first; what it took is refunded when this is tried again.
                raise Unavailable("The payment has moved meanwhile; look again.", code="payment_changed")
            status = str(_answer(response)["status"])
        return Undone(_UNDONE[status], provider_id)

    async def find(self, attempt: Attempt) -> Held | None:
        """Return what the provider has under the attempt's key, or None if it never heard of it.

        Raises:
            Unavailable, Conflict: as for `authorise`.
        """
        found = _answer(await self._ask("GET", f"/authorizations?idempotency_key={attempt.id}"))["items"]
        if not found:
            return None
        (held,) = found
        return Held(held["id"], held["status"], held["amount"], held["currency"], held["reference"])

    async def _status(self, provider_id: str) -> str:
        return str(_answer(await self._ask("GET", f"/authorizations/{provider_id}"))["status"])

    async def _advance(self, attempt: Attempt, provider_id: str, action: str) -> httpx.Response:
        return await self._ask("POST", f"/authorizations/{provider_id}/{action}", key=f"{attempt.id}-{action}")

    async def _ask(
        self, method: str, path: str, *, key: str | None = None, body: dict[str, Any] | None = None
    ) -> httpx.Response:
        own = {"Idempotency-Key": key} if key else {}

        async def send() -> httpx.Response:
            response = await self._client.request(method, path, json=body, headers=own | tracing.headers())
            if response.status_code >= _SERVER_ERROR or response.status_code == _TOO_MANY:
                raise ProviderDown(str(response.status_code))
            return response

        try:
            return await self.outbound.call(send)
        except (httpx.TransportError, ProviderDown, TimeoutError) as error:
            raise Unavailable("The payment provider does not answer.", code="payment_provider_down") from error


def _answer(response: httpx.Response) -> dict[str, Any]:
    """Return what the provider answered.

    Raises:
        Conflict: `payment_refused`, if it answered with an error.
    """
    if response.is_error:
        raise Conflict(f"The payment provider refuses the request: {response.status_code}.", code="payment_refused")
    answer: dict[str, Any] = response.json()
    return answer
