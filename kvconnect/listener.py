"""Links that peers dialled: proves both sides, then hands authentic messages up.

* Shows our memory's addresses (the Body) only to a dialler that proved the secret.
* Bounded: the longest silent session goes when there are too many.
* A malformed or unauthentic frame is dropped and, where the peer cannot know why, answered
  with Reject; nothing is raised.
"""

import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import NamedTuple

from kvconnect import wire
from kvconnect.channel import Channel, Frame, Link
from kvconnect.errors import WireError
from kvconnect.session import LISTENER, NONCE_BYTES, PLAIN, SEALED, Session

logger = logging.getLogger(__name__)

MAX_SESSIONS = 4096


class Incoming(NamedTuple):
    """An authentic message from a peer that dialled us."""

    link: Link
    message: wire.Message


class _Arrived:
    """A link somebody dialled, from its Hello on."""

    def __init__(self, hello: wire.Hello, secret: bytes) -> None:
        self.dialler_nonce = hello.nonce
        nonce = secrets.token_bytes(NONCE_BYTES)
        self.session = Session(LISTENER, secret, hello.nonce, nonce)
        self.proved = False
        self.challenge = wire.Challenge(
            version=wire.VERSION, nonce=nonce, proof=self.session.proof(), secret=bool(secret)
        )


class Listener:
    """``body`` is asked for whenever a dialler has proved itself."""

    def __init__(
        self,
        channel: Channel,
        fingerprint: Mapping[str, str],
        body: Callable[[], wire.Body],
        secret: bytes,
    ) -> None:
        self._channel = channel
        self._fingerprint = dict(fingerprint)
        self._body = body
        self._secret = secret
        self._arrived: OrderedDict[Link, _Arrived] = OrderedDict()

    def answer(self, link: Link, message: wire.Message) -> None:
        """Send a message to a proved dialler; lost if its link is gone."""
        arrived = self._arrived.get(link)
        if arrived is not None and arrived.proved:
            self._channel.send(link, arrived.session.seal(wire.encode(message)))

    def receive(self, frame: Frame) -> Incoming | None:
        """Take in a frame of an arrived link; returns a message that must be handled above."""
        try:
            return self._receive(frame.link, frame.data)
        except WireError as e:
            logger.warning("control channel: frame from a peer dropped: %s", e)
            return None

    def _receive(self, link: Link, data: bytes) -> Incoming | None:
        arrived = self._arrived.get(link)
        if data[:1] == SEALED:
            if arrived is None or not arrived.proved:
                self._reject(link, "no such session; greet again")
                return None
            message = wire.decode(arrived.session.unseal(data))
            self._arrived.move_to_end(link)
            return Incoming(link, message)
        message = wire.decode(data[1:])
        if isinstance(message, wire.Hello):
            self._challenge(link, message)
        elif isinstance(message, wire.Prove):
            self._welcome(link, message)
        return None

    def _challenge(self, link: Link, hello: wire.Hello) -> None:
        arrived = self._arrived.get(link)
        if arrived is None or arrived.dialler_nonce != hello.nonce:  # else: a repeated Hello
            arrived = self._arrived[link] = _Arrived(hello, self._secret)
            if len(self._arrived) > MAX_SESSIONS:
                self._arrived.popitem(last=False)
        self._channel.send(link, PLAIN + wire.encode(arrived.challenge))

    def _welcome(self, link: Link, prove: wire.Prove) -> None:
        arrived = self._arrived.get(link)
        if arrived is None or not arrived.session.accepts(prove.proof):
            self._arrived.pop(link, None)
            self._reject(link, "wrong proof; is your auth_secret_file the same as ours?")
            return
        arrived.proved = True
        body = wire.encode(self._body())
        self.answer(link, wire.Welcome(fingerprint=self._fingerprint, body=body))

    def _reject(self, link: Link, detail: str) -> None:
        self._channel.send(link, PLAIN + wire.encode(wire.Reject(detail=detail)))
