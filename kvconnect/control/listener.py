"""Links that peers dialled: proves both sides, then hands authentic messages up.

* Shows our memory's addresses (the Body) only to a dialer that proved the secret.
* Bounded: the longest silent link goes when there are too many; links that have proved nothing
  only ever displace their like.
* A malformed or unauthentic frame is dropped and, where the peer cannot know why, answered
  with Reject; nothing is raised.
"""

import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import NamedTuple

from kvconnect.control import wire
from kvconnect.control.channel import Channel, Frame, Link
from kvconnect.control.session import LISTENER, NONCE_BYTES, PLAIN, SEALED, Session
from kvconnect.errors import WireError

logger = logging.getLogger(f"vllm.{__name__}")

MAX_PROVED = 4096
MAX_UNPROVED = 256


class Incoming(NamedTuple):
    """An authentic message from a peer that dialled us."""

    link: Link
    message: wire.Message


class _Arrived:
    """A link somebody dialled, from its Hello on."""

    def __init__(self, hello: wire.Hello, secret: bytes) -> None:
        self.dialer_nonce = hello.nonce
        nonce = secrets.token_bytes(NONCE_BYTES)
        self.session = Session(LISTENER, secret, hello.nonce, nonce)
        self.challenge = wire.Challenge(
            version=wire.VERSION, nonce=nonce, proof=self.session.proof(), secret=bool(secret)
        )


class Listener:
    """``body`` is asked for whenever a dialer has proved itself."""

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
        self._unproved: OrderedDict[Link, _Arrived] = OrderedDict()
        self._proved: OrderedDict[Link, _Arrived] = OrderedDict()

    def answer(self, link: Link, message: wire.Message) -> None:
        """Send a message to a proved dialer; lost if its link is gone."""
        if arrived := self._proved.get(link):
            self._channel.send(link, arrived.session.seal(wire.encode(message)))

    def receive(self, frame: Frame) -> Incoming | None:
        """Take in a frame of an arrived link; returns a message that must be handled above."""
        assert frame.data is not None, "only links that we dialled are told to be broken"
        try:
            return self._receive(frame.link, frame.data)
        except WireError as e:
            logger.warning("control channel: frame from a peer dropped: %s", e)
            return None

    def _receive(self, link: Link, data: bytes) -> Incoming | None:
        if data[:1] == SEALED:
            arrived = self._proved.get(link)
            if arrived is None:
                self._reject(link, "no such session; greet again")
                return None
            message = wire.decode(arrived.session.unseal(data))
            self._proved.move_to_end(link)
            return Incoming(link, message)
        message = wire.decode(data[1:])
        if isinstance(message, wire.Hello):
            self._challenge(link, message)
        elif isinstance(message, wire.Prove):
            self._welcome(link, message)
        return None

    def _challenge(self, link: Link, hello: wire.Hello) -> None:
        arrived = self._unproved.get(link)
        if arrived is None or arrived.dialer_nonce != hello.nonce:  # else: a repeated Hello
            arrived = self._unproved[link] = _Arrived(hello, self._secret)
            if len(self._unproved) > MAX_UNPROVED:
                self._unproved.popitem(last=False)
        self._channel.send(link, PLAIN + wire.encode(arrived.challenge))

    def _welcome(self, link: Link, prove: wire.Prove) -> None:
        arrived = self._unproved.pop(link, None) or self._proved.get(link)
        if arrived is None:
            self._reject(link, "no greeting is under way here; greet again")
            return
        if not arrived.session.accepts(prove.proof):
            self._reject(link, "wrong proof; is your auth_secret_file the same as ours?")
            return
        self._proved[link] = arrived  # again, if the Prove was repeated
        if len(self._proved) > MAX_PROVED:
            self._proved.popitem(last=False)
        body = wire.encode(self._body())
        self.answer(link, wire.Welcome(fingerprint=self._fingerprint, body=body))

    def _reject(self, link: Link, detail: str) -> None:
        self._channel.send(link, PLAIN + wire.encode(wire.Reject(detail=detail)))
