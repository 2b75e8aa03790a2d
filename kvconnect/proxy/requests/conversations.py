"""Chats that go on: what decode lends of each answer, for the next turn's prefill.

Does not know HTTP or engines.

- A turn has the messages of the one before at its front, so a chat is known by these, and needs no
  name. Who goes on from the same messages twice gets what decode lends once: it is read once.
- What is remembered is bounded in number and time. How much of it is the prompt's prefill finds out
  by the ticket in it. Params without one are not remembered: who takes them checks nothing.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from kvconnect.proxy.policy import CHAT, Body

REMEMBERED = 4096
REMEMBERED_S = 450.0  # decode's own default is 480 s
# An answer ends with its params, block ids and a ticket of a few KiB in them.
KEPT_BYTES = 256 * 1024
_PARAMS = b'"kv_transfer_params":'

_MESSAGES = msgspec.json.Decoder(list[msgspec.Raw])
_TEXT = json.JSONDecoder()


class HeldTurn(NamedTuple):
    """What a decode engine holds of a chat."""

    url: str
    params: dict[str, object]
    until_s: float

    def offer(self) -> msgspec.Raw:
        """Params of a leg that may read it; that engine's own, which holds it, lets go of it."""
        reads = {"do_remote_prefill": True, "do_remote_decode": False}
        return msgspec.Raw(msgspec.json.encode(self.params | reads))


class AnswerEnding:
    """The end of an answer's body, as it passes."""

    def __init__(self) -> None:
        self._kept = bytearray()

    def hear(self, data: bytes) -> None:
        """The next bytes."""
        self._kept += data
        if len(self._kept) > 2 * KEPT_BYTES:
            del self._kept[:-KEPT_BYTES]

    def params(self) -> dict[str, object] | None:
        """What the engine says that it lends; None if nothing."""
        # in a string of the answer's it would have backslashes
        at = self._kept.rfind(_PARAMS + b"{")
        if at < 0:
            return None
        try:
            found, _ = _TEXT.raw_decode(self._kept[at + len(_PARAMS) :].decode())
        except ValueError:
            return None
        lends = isinstance(found, dict) and found.get("do_remote_decode") and found.get("kvconnect")
        return found if lends else None


def chat_keys(path: str, body: Body) -> tuple[bytes, ...]:
    """A digest after each message, of all up to it, model and cache salt; () of what is no chat."""
    if path != CHAT:
        return ()
    try:
        messages = _MESSAGES.decode(body["messages"])
        # requests of another salt share no KV
        owner = msgspec.json.encode([body.get("model"), body.get("cache_salt")])
        h = hashlib.blake2b(owner, digest_size=16)
        keys = []
        for message in messages:
            h.update(msgspec.json.encode(msgspec.json.decode(message)))
            keys.append(h.digest())
    except (KeyError, ValueError, RecursionError):
        return ()
    return tuple(keys)


class Conversations:
    """What decode engines lend of the chats that may go on."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._held: OrderedDict[bytes, HeldTurn] = OrderedDict()

    def remember(self, keys: tuple[bytes, ...], url: str, ending: AnswerEnding) -> None:
        """A chat was answered; nothing happens if its engine lends nothing."""
        if not keys or (params := ending.params()) is None:
            return
        self._held.pop(keys[-1], None)
        self._held[keys[-1]] = HeldTurn(url, params, self._clock() + REMEMBERED_S)
        if len(self._held) > REMEMBERED:
            self._held.popitem(last=False)

    def take(self, keys: tuple[bytes, ...]) -> HeldTurn | None:
        """What is held of the longest beginning of a chat, for this one turn."""
        for key in reversed(keys):
            if (held := self._held.pop(key, None)) is not None:
                return held if self._clock() < held.until_s else None
        return None
