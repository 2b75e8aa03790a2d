"""Proof of a shared secret, and frames that cannot be forged or replayed.

Both sides contribute a nonce; keys follow from those and the secret (an empty one where none
is configured: one path for both). A frame is ``PLAIN + message`` while greeting, afterwards
``SEALED + mac + counter + message``. HMAC-SHA256, cut to 16 bytes on frames.

Authenticates, does not encrypt: block ids and addresses are readable on the wire.
"""

import hashlib
import hmac
import itertools
from collections.abc import Mapping

from kvconnect.errors import WireError

PLAIN = b"\x00"
SEALED = b"\x01"
MAC_BYTES = 16
COUNTER_BYTES = 8
NONCE_BYTES = 16

DIALER = b"dialler"  # a word of the wire: it is part of what is sealed
LISTENER = b"listener"


class Session:
    """Keys of one greeted link, seen from ``side`` (DIALER or LISTENER)."""

    def __init__(
        self, side: bytes, secret: bytes, dialer_nonce: bytes, listener_nonce: bytes
    ) -> None:
        self._key = _mac(secret, b"kvconnect 1|" + dialer_nonce + b"|" + listener_nonce)
        self._ours, self._theirs = side, LISTENER if side == DIALER else DIALER
        self._sent = itertools.count(1)
        self._seen = 0

    def proof(self) -> bytes:
        """Shows the other side that we know the secret."""
        return _mac(self._key, b"proof|" + self._ours)

    def accepts(self, proof: bytes) -> bool:
        """Whether the other side's proof shows that it knows the secret."""
        return hmac.compare_digest(proof, _mac(self._key, b"proof|" + self._theirs))

    def seal(self, message: bytes) -> bytes:
        """A frame with ``message``."""
        body = next(self._sent).to_bytes(COUNTER_BYTES, "big") + message
        return SEALED + _mac(self._key, self._ours + body)[:MAC_BYTES] + body

    def unseal(self, frame: bytes) -> bytes:
        """The message in a SEALED frame; raises WireError if it is forged or a repetition."""
        mac, body = frame[1 : 1 + MAC_BYTES], frame[1 + MAC_BYTES :]
        if not hmac.compare_digest(mac, _mac(self._key, self._theirs + body)[:MAC_BYTES]):
            raise WireError("frame is not authentic")
        counter = int.from_bytes(body[:COUNTER_BYTES], "big")
        if counter <= self._seen:
            raise WireError(f"frame {counter} is a repetition, expected one after {self._seen}")
        self._seen = counter
        return body[COUNTER_BYTES:]


def sign(secret: bytes, data: bytes) -> bytes:
    """Signature of a ticket's bytes."""
    return _mac(secret, b"kvconnect ticket|" + data)


def _mac(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, hashlib.sha256)


def why_not_proved(ours: bool, theirs: bool) -> str:
    """What a wrong proof means, by whether either side has a secret."""
    if ours and theirs:
        return "its auth_secret_file holds another secret than ours"
    if theirs:
        return "has an auth_secret_file and we have none; set the same one here"
    return "has no auth_secret_file and we have one; set the same one there"


def why_unlike(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """The first field in which two fingerprints differ, and what to do; "" if they are equal."""
    for field in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(field), theirs.get(field)
        if mine is None or other is None:
            remedy = "say it, or neither: give both the same options, and the same kvconnect"
        else:
            remedy = "serve the same model with the same settings"
        if mine != other:
            return f"{field} is {other!r}, ours is {mine!r}; both engines must {remedy}"
    return ""
