"""Opaque strings that clients hand back to us: signed, so that nobody but us can make or change one.

Cursors and consistency tokens travel this way. Each purpose has a key of its own, derived from the one secret, so
that a string made for one use is refused for every other.
"""

import base64
import binascii
import hashlib
import hmac
from typing import Any

from app.core import wire

SIGNATURE_BYTES = 12  # 96 bits: a forgery needs 2**95 tries against a live service, and the string stays short
LONGEST = 1024  # characters; ours are under 200, a longer one is not ours


class BadSignature(ValueError):
    """The string was not made by us for this purpose, or was changed on its way."""


class Signer:
    """Signs and opens small JSON values for one purpose.

    Args:
        secret: the service's secret, at least 32 bytes.
        purpose: what the strings are for, for example `cursor`.
    """

    def __init__(self, secret: bytes, purpose: str) -> None:
        self._key = hashlib.blake2b(purpose.encode(), key=secret[:64], digest_size=32).digest()

    def sign(self, value: Any) -> str:
        """Return `value` (anything JSON can say) as a URL-safe string."""
        body = wire.encode(value)
        return base64.urlsafe_b64encode(self._mac(body) + body).rstrip(b"=").decode()

    def open(self, text: str) -> Any:
        """Return the value inside `text`.

        Raises:
            BadSignature: if `text` is not a string of ours.
        """
        if len(text) > LONGEST or not text.isascii():
            raise BadSignature("not a string of ours")
        try:
            raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadSignature("not a string of ours") from error
        mac, body = raw[:SIGNATURE_BYTES], raw[SIGNATURE_BYTES:]
        if not hmac.compare_digest(mac, self._mac(body)):
            raise BadSignature("not a string of ours")
        return wire.decode(body)

    def _mac(self, body: bytes) -> bytes:
        return hashlib.blake2b(body, key=self._key, digest_size=SIGNATURE_BYTES).digest()
