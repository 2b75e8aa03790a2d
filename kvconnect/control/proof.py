"""Proof of a shared secret, and why two sides do not go together.

Links are encrypted by ZMQ (CURVE) to the listener's key, so a proof is seen by nobody else; it is
bound to that key, so one that is handed on is worth nothing at another listener.
"""

import hashlib
import hmac
from collections.abc import Mapping

DIALER = b"dialer"
LISTENER = b"listener"


def prove(secret: bytes, side: bytes, key: str, nonce: bytes) -> bytes:
    """What only ``side`` of a link to the listener of ``key`` says; b"" without a secret.

    ``nonce`` is the dialer's.
    """
    data = b"|".join((b"kvconnect 3", side, key.encode(), nonce))
    return hmac.digest(secret, data, hashlib.sha256) if secret else b""


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
