"""That who answers a query, or registers, knows the shared secret.

HTTP headers beside in-tree's messages: who knows no secret (routers) sends and sees the plain
ones. The asker's nonce makes each answer's proof its own. A registration is proved against a
challenge that lasts as long as the endpoint, which is enough: repeated there, it changes nothing.
"""

import hashlib
import hmac

NONCE = "X-KVConnect-Nonce"
PROOF = "X-KVConnect-Proof"
CHALLENGE = "X-KVConnect-Challenge"
NONCE_CHARS = 32


def prove_answer(secret: bytes, nonce: str, body: bytes) -> str:
    """The proof that goes with the answer to a query with this nonce."""
    return _mac(secret, b"answer", nonce, body)


def prove_registration(secret: bytes, challenge: str, body: bytes) -> str:
    """The proof that goes with a registration at the endpoint with this challenge."""
    return _mac(secret, b"registration", challenge, body)


def is_nonce(text: str) -> bool:
    """Whether it is one, and no text of somebody's choice."""
    return len(text) == NONCE_CHARS and set(text) <= set("0123456789abcdef")


def agree(given: str | None, expected: str) -> bool:
    """Whether a proof is right; takes as long for any that is wrong."""
    return hmac.compare_digest((given or "").encode(errors="replace"), expected.encode())


def _mac(secret: bytes, what: bytes, nonce: str, body: bytes) -> str:
    text = b"kvconnect bootstrap " + what + b"|" + nonce.encode(errors="replace") + b"|" + body
    return hmac.new(secret, text, hashlib.sha256).hexdigest()
