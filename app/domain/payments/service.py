"""Talks to the payment provider. No transaction is open meanwhile; what it answered is recorded by the orders."""

from typing import Any

import httpx

from app.core.errors import Conflict, Unavailable
from app.core.settings import PaymentSettings
from app.domain.payments.rules import Attempt, Authorised, Declined
from app.scaling.outbound import Outbound

_SERVER_ERROR = 500
_TOO_MANY = 429


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
            Conflict: `payment_refused`, if the provider finds fault with the request itself.
        """
        answer = await self._post(
            "/authorizations",
            key=str(attempt.id),
            body={
                "amount": attempt.amount,
                "currency": attempt.currency,
                "payment_method": attempt.method,
                "reference": str(attempt.order_id),
            },
        )
        if answer["status"] == "declined":
            return Declined(answer["id"], str(answer.get("decline_reason") or "declined"))
        return Authorised(answer["id"])

    async def capture(self, attempt: Attempt) -> None:
        """Take the money that is held. Safe to repeat.

        Raises:
            Unavailable, Conflict: as for `authorise`.
        """
        await self._post(f"/authorizations/{attempt.provider_id}/capture", key=f"{attempt.id}-capture", body=None)

    async def _post(self, path: str, *, key: str, body: dict[str, Any] | None) -> dict[str, Any]:
        async def send() -> httpx.Response:
            response = await self._client.post(path, json=body, headers={"Idempotency-Key": key})
            if response.status_code >= _SERVER_ERROR or response.status_code == _TOO_MANY:
                raise ProviderDown(str(response.status_code))
            return response

        try:
            response = await self.outbound.call(send)
        except (httpx.TransportError, ProviderDown, TimeoutError) as error:
            raise Unavailable("The payment provider does not answer.", code="payment_provider_down") from error
        if response.is_error:
            raise Conflict(f"The payment provider refuses the request: {response.status_code}.", code="payment_refused")
        answer: dict[str, Any] = response.json()
        return answer
