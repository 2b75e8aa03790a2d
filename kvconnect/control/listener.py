"""Links that peers dialled: asks what they know, then hands their messages up.

* Tells who we are and our memory's addresses (Welcome) only to a dialer that proves the secret or,
  where there is none, shows a lease that stands. To others it says nothing but why not.
* Where a router asks both engines at once, a dialer may come before the lease is known here: it is
  told Later, and welcomed when the lease is.
* Bounded: the longest silent link goes when there are too many; links that wait only ever
  displace their like.
* A malformed message is dropped; nothing is raised.
"""

import hmac
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import NamedTuple

from kvconnect.control import wire
from kvconnect.control.channel import Channel, Frame, Link
from kvconnect.control.proof import DIALER, LISTENER, prove
from kvconnect.errors import WireError

logger = logging.getLogger(f"vllm.{__name__}")

MAX_WELCOME = 4096
MAX_WAITING = 256


class Incoming(NamedTuple):
    """A message from a peer that dialled us and was welcome."""

    link: Link
    message: wire.Message


class Listener:
    """``body`` is asked for whenever a dialer is welcome."""

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
        self.knows: Callable[[str], bool] = lambda lease: False  # noqa: ARG005 - until there are any
        """Whether a lease stands or is promised, by its id or its name; `LeaseServer` sets it."""
        self._welcome: OrderedDict[Link, None] = OrderedDict()
        # early ones, and the leases that they wait for
        self._waiting: OrderedDict[Link, tuple[wire.Greet, frozenset[str]]] = OrderedDict()

    def answer(self, link: Link, message: wire.Message) -> None:
        """Send a message to a dialer; lost if its link is gone."""
        self._channel.send(link, wire.encode(message))

    def receive(self, frame: Frame) -> Incoming | None:
        """Take in a frame of an arrived link; returns a message that must be handled above."""
        assert frame.data is not None, "only links that we dialled are told to be broken"
        try:
            message = wire.decode(frame.data)
        except WireError as e:
            logger.warning("control channel: frame from a peer dropped: %s", e)
            return None
        if isinstance(message, wire.Greet):
            self._greeted(frame.link, message)
        elif frame.link in self._welcome:
            self._welcome.move_to_end(frame.link)
            return Incoming(frame.link, message)
        else:
            self._reject(frame.link, "you are not known here; greet again")
        return None

    def known(self, *names: str) -> None:
        """A lease is known from now on: whoever waits for it under one of ``names`` is welcome."""
        for link, (greet, leases) in list(self._waiting.items()):
            if not leases.isdisjoint(names):
                self._greeted(link, greet)

    def _greeted(self, link: Link, greet: wire.Greet) -> None:
        self._waiting.pop(link, None)
        if greet.version[0] != wire.VERSION[0]:
            self._reject(link, "it is another wire version than ours", greet.seq)
        elif self._secret:
            proof = prove(self._secret, DIALER, self._channel.address.key, greet.nonce)
            if hmac.compare_digest(greet.proof, proof):
                self._let_in(link, greet)
            else:
                self._reject(link, "wrong proof of the auth_secret_file", greet.seq)
        elif any(map(self.knows, (*greet.lease_ids, *greet.request_ids))):
            self._let_in(link, greet)
        elif greet.early and link not in self._welcome:
            self._waiting[link] = greet, frozenset((*greet.lease_ids, *greet.request_ids))
            if len(self._waiting) > MAX_WAITING:
                self._waiting.popitem(last=False)
            self.answer(link, wire.Later())
        else:
            self._reject(link, "no lease that you name stands here", greet.seq)

    def _let_in(self, link: Link, greet: wire.Greet) -> None:
        self._welcome[link] = None  # again, if the Greet was repeated
        if len(self._welcome) > MAX_WELCOME:
            self._welcome.popitem(last=False)
        welcome = wire.Welcome(
            version=wire.VERSION,
            proof=prove(self._secret, LISTENER, self._channel.address.key, greet.nonce),
            fingerprint=self._fingerprint,
            body=wire.encode(self._body()),
        )
        self.answer(link, welcome)

    def _reject(self, link: Link, detail: str, seq: int | None = None) -> None:
        secret = bool(self._secret)
        self.answer(link, wire.Reject(version=wire.VERSION, detail=detail, seq=seq, secret=secret))
