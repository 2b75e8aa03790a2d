"""Peers that we dial: Greet → Welcome; requests to them are `kvconnect.control.calls`.

One round trip, once per pair of ranks, over a link that is encrypted to the key in the address; one
more where that says none, to ask for it. We show leases that we were told of and that we know the
secret, if there is one; the peer shows the latter, too. Its fingerprint is checked before its body
is decoded, and its claims about memory before they are used.

* `greet` returns a Peer at once; its state moves on in `receive` and `tick`.
* A peer that knows none of the leases that were shown is shown those that were added meanwhile.
  Without any it has FAILED, but the next lease may be shown at once: it may come from a client.
* What is due is kept by time: a step costs nothing for the peers that are not.
* `changes` grows whenever a peer has become READY or FAILED.
* What goes wrong with a peer makes it FAILED, with the reason; nothing is raised.
"""

import hmac
import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping

from kvconnect.control import wire
from kvconnect.control.calls import LOOK_S, MAX_RESEND_S, Calls
from kvconnect.control.channel import Channel, Frame, Link
from kvconnect.control.peer import LeaseRef, Peer, PeerState
from kvconnect.control.proof import DIALER, LISTENER, prove, why_not_proved, why_unlike
from kvconnect.control.wire import Address
from kvconnect.deadlines import Deadlines, soonest
from kvconnect.errors import GeometryError, WireError
from kvconnect.geometry.blocks import check_views
from kvconnect.lease import Clock

logger = logging.getLogger(f"vllm.{__name__}")

MAX_GREETINGS = 128  # under way at once; addresses may come from clients
MAX_IN_LINE = 4096  # that wait for one of those to end
BACKOFF_S = (0.5, 4.0)  # between greetings of an address that fails: first, at most
MAX_BACKOFFS = 1024
MAX_GONE = 4096
MAX_SILENT = 2  # greetings in a row that a READY peer left unanswered, before it is given up
MAX_REFUSED = 3  # connections, one after the other, before a peer is given up

HUNG_UP = "we hung up"
NO_LEASE = "knows none of the leases that we were told of: they are over, or it was restarted"


class Dialer:
    """All links that one rank dialled."""

    def __init__(
        self,
        channel: Channel,
        clock: Clock,
        fingerprint: Mapping[str, str] | None,
        secret: bytes,
        handshake_timeout_s: float,
    ) -> None:
        """``fingerprint`` None: of whatever model the peers are; only for looking at them."""
        self._channel = channel
        self._clock = clock
        self._fingerprint = fingerprint
        self._secret = secret
        self._handshake_timeout_s = handshake_timeout_s
        self._peers: dict[Address, Peer] = {}
        self._by_link: dict[Link, Peer] = {}
        # address that could not be greeted → (not before, then wait so long, why), oldest first
        self._backoffs: OrderedDict[Address, tuple[float, float, str]] = OrderedDict()
        self.calls = Calls(channel, clock)
        """Requests to peers that are READY."""
        self.changes = 0
        self._greeting = 0  # peers that are being greeted now
        self._in_line: OrderedDict[Address, Peer] = OrderedDict()  # GREETING, not dialled yet
        self.due: Deadlines[Peer] = Deadlines()
        """When to look at a greeting."""

    def greet(self, address: Address, leases: Iterable[LeaseRef] = ()) -> Peer:
        """The peer at ``address``; dials it, in its turn, unless that is under way or done.

        FAILED at once for an address that failed a moment ago or cannot be dialled.
        """
        if (peer := self._peers.get(address)) is not None:
            self.show(peer, leases)
            return peer
        peer = Peer(address)
        self.show(peer, leases)
        not_before, _, why = self._backoffs.get(address, (0.0, 0.0, ""))
        if self._clock() < not_before:
            peer.state, peer.error = PeerState.FAILED, why
        elif self._greeting < MAX_GREETINGS:
            self._dial(peer)
        elif len(self._in_line) < MAX_IN_LINE:
            self._peers[address] = self._in_line[address] = peer
        else:
            why = f"{MAX_IN_LINE} other peers wait to be greeted, {MAX_GREETINGS} at a time"
            peer.state, peer.error = PeerState.FAILED, why
        return peer

    def show(self, peer: Peer, leases: Iterable[LeaseRef]) -> None:
        """While a peer is being greeted: leases that it may know."""
        if peer.state is not PeerState.GREETING:
            return
        now, before = self._clock(), len(peer.leases)
        for lease in leases:
            peer.leases.setdefault(lease, now + lease.wait_s)
        for oldest in list(peer.leases)[: -wire.RENEWED_AT_ONCE]:
            del peer.leases[oldest]
        if peer.waits and len(peer.leases) > before and peer.resend_at > now:
            peer.resend_at = now
            self._look_at(peer)

    def _dial(self, peer: Peer) -> None:
        """Start to greet; FAILED if its address cannot be dialled."""
        peer.deadline = self._clock() + self._handshake_timeout_s
        try:
            self._link(peer)
        except WireError as e:
            self._peers.pop(peer.address, None)
            peer.state, peer.error = PeerState.FAILED, str(e)
            self.changes += 1
            return
        self._peers[peer.address] = peer
        self._greeting += 1
        self._look_at(peer)

    def _link(self, peer: Peer) -> None:
        """Dial, and say the first thing; raises WireError."""
        peer.link = self._channel.dial(peer.at)
        self._by_link[peer.link] = peer
        self._send_greeting(peer)

    def _unlink(self, peer: Peer) -> None:
        self._by_link.pop(peer.link, None)
        self._channel.drop(peer.link)

    def _look_at(self, peer: Peer) -> None:
        """Have `tick` look at a greeting when there is something to do."""
        self.due.set(peer, min(peer.resend_at, peer.deadline))

    def _greeted(self, peer: Peer) -> None:
        """A greeting has ended, well or not, or waits: the next in line has its turn."""
        self.changes += 1
        if peer.waits:
            return
        self._greeting -= 1
        while self._in_line and self._greeting < MAX_GREETINGS:
            self._dial(self._in_line.popitem(last=False)[1])

    def _back_off(self, address: Address, why: str) -> None:
        first, most = BACKOFF_S
        _, wait_s, _ = self._backoffs.pop(address, (0.0, first, ""))
        self._backoffs[address] = (self._clock() + wait_s, min(2 * wait_s, most), why)
        if len(self._backoffs) > MAX_BACKOFFS:
            self._backoffs.popitem(last=False)

    def fail(self, peer: Peer, error: str) -> None:
        """Give up on a peer: all its calls end, its link is closed. Idempotent."""
        if peer.state is not PeerState.FAILED:
            logger.warning("peer %s: %s", peer, error)
            self._end(peer, error)

    def hang_up(self, peer: Peer) -> None:
        """Nothing is wanted of the peer any more. Idempotent."""
        if peer.state is not PeerState.FAILED:
            logger.info("peer %s: hung up, nothing is wanted of it", peer)
            self._end(peer, HUNG_UP)

    def _end(self, peer: Peer, error: str) -> None:
        in_line = self._in_line.pop(peer.address, None) is not None
        greeting = peer.state is PeerState.GREETING and not in_line
        if greeting and error not in (HUNG_UP, NO_LEASE):
            self._back_off(peer.address, error)
        peer.state, peer.error = PeerState.FAILED, error
        self.changes += 1
        self.calls.fail(peer, error)
        self.due.drop(peer)
        del self._peers[peer.address]
        if not in_line:
            self._unlink(peer)
        if greeting:
            self._greeted(peer)

    def tick(self) -> None:
        """Repeat what went unanswered, give up on what is overdue."""
        now = self._clock()
        for peer in self.due.take(now):
            self._look_at_greeting(peer, now)
            if peer.state is PeerState.GREETING:
                self._look_at(peer)
        for peer in self.calls.awaited.take(now):
            if self.calls.waits_for(peer):
                self._look_for_silence(peer, now)
        self.calls.tick()

    def _look_for_silence(self, peer: Peer, now: float) -> None:
        """Give up a link that carries nothing: its peer is stopped, or it is broken unnoticed.

        A call may wait long, so the peer is greeted again: it answers that at once.
        """
        if peer.silent > MAX_SILENT:
            self.fail(peer, f"has answered nothing for {peer.silent * LOOK_S:g} s; is it stopped?")
            return
        if peer.silent:
            self._send_greeting(peer)
        peer.silent += 1
        self.calls.awaited.set(peer, now + LOOK_S)

    def _look_at_greeting(self, peer: Peer, now: float) -> None:
        if now >= peer.deadline:
            self.fail(
                peer,
                f"did not complete the greeting within {self._handshake_timeout_s:g} s; is "
                "the engine up, and its side channel reachable from here?",
            )
        elif now >= peer.resend_at:
            if peer.waits:
                most_s = min(MAX_RESEND_S, self._handshake_timeout_s / 2)
                peer.resend_s = min(2 * peer.resend_s, most_s)
            self._send_greeting(peer)

    def next_deadline(self) -> float | None:
        """When `tick` is worth calling next."""
        return soonest(self.due.next(), self.calls.next_deadline())

    def receive(self, frame: Frame) -> None:
        """Take in a frame of a link that we dialled."""
        peer = self._by_link.get(frame.link)
        if peer is None:
            return
        peer.silent = 0
        try:
            if frame.data is None:
                self._broke(peer, frame.refused)
            elif peer.at.key:
                self._take(peer, wire.decode(frame.data))
            else:
                self._take_key(peer, wire.decode(frame.data.removeprefix(wire.PLAIN)))
        except WireError as e:
            logger.warning("peer %s: frame dropped: %s", peer, e)

    def _broke(self, peer: Peer, refused: bool) -> None:
        """A connection did: ZMQ makes another one."""
        if peer.state is PeerState.READY:  # while greeting, the listener may only just come up
            peer.ended = True
            self.fail(peer, "closed the connection; has the engine ended?")
            return
        peer.refused += refused
        if peer.at.key and peer.refused >= MAX_REFUSED:  # whoever told us the key was up already
            self.fail(peer, "is not there any more; has it ended, or was it restarted?")

    def _take_key(self, peer: Peer, message: wire.Message) -> None:
        """A key port has told the key: the link that is wanted goes elsewhere."""
        if not isinstance(message, wire.KeyTold) or not self._same_version(peer, message.version):
            return
        self._unlink(peer)
        try:
            if not message.key or not message.port:
                raise WireError("told no key")
            peer.at = Address(peer.address.host, message.port, message.key)
            self._link(peer)
        except WireError as e:
            self.fail(peer, str(e))

    def _same_version(self, peer: Peer, version: tuple[int, int]) -> bool:
        peer.version = version
        if version[0] != wire.VERSION[0]:
            self.fail(
                peer,
                f"speaks wire version {version}, ours is {wire.VERSION}; both engines must have "
                "the same major one: upgrade kvconnect on the older",
            )
        return version[0] == wire.VERSION[0]

    def _take(self, peer: Peer, message: wire.Message) -> None:
        if peer.state is PeerState.GREETING:
            self._answered(peer, message)
        elif isinstance(message, wire.Reject) and message.seq is None:
            self.fail(peer, f"rejected us: {message.detail}")
        elif isinstance(message, wire.Reply):
            self.calls.answered(peer, message)
        elif isinstance(message, wire.Gone):
            peer.gone |= dict.fromkeys(message.lease_ids)
            for oldest in list(peer.gone)[:-MAX_GONE]:
                del peer.gone[oldest]

    def _answered(self, peer: Peer, message: wire.Message) -> None:
        """What a peer says to our Greet."""
        peer.refused = 0
        if isinstance(message, wire.Later):
            peer.deadline = self._clock() + self._handshake_timeout_s
            if not peer.waits:
                self._greeted(peer)
                peer.waits = True
        elif isinstance(message, wire.Welcome):
            self._welcomed(peer, message)
        elif isinstance(message, wire.Reject) and self._same_version(peer, message.version):
            self._rejected(peer, message)

    def _rejected(self, peer: Peer, reject: wire.Reject) -> None:
        if reject.secret or self._secret:
            self.fail(peer, why_not_proved(bool(self._secret), reject.secret))
        elif reject.seq == peer.seq:  # else it has been shown others since
            for lease in peer.shown:
                peer.leases.pop(lease, None)
            if peer.leases:
                self._send_greeting(peer)
            else:
                self.fail(peer, NO_LEASE)

    def _welcomed(self, peer: Peer, welcome: wire.Welcome) -> None:
        if not self._same_version(peer, welcome.version):
            return
        expected = prove(self._secret, LISTENER, peer.at.key, peer.nonce)
        if self._secret and not hmac.compare_digest(welcome.proof, expected):
            self.fail(peer, why_not_proved(ours=True, theirs=bool(welcome.proof)))
            return
        peer.fingerprint = theirs = welcome.fingerprint
        ours = theirs if self._fingerprint is None else self._fingerprint
        if why_not := why_unlike(ours, theirs):
            self.fail(peer, why_not)
            return
        try:
            body = wire.decode_body(welcome.body)
            check_views(body.views, body.regions)
        except (WireError, GeometryError) as e:
            self.fail(peer, f"bad description of its memory: {e}")
            return
        peer.body, peer.state = body, PeerState.READY
        self.due.drop(peer)
        self._greeted(peer)
        self._backoffs.pop(peer.address, None)
        version = body.versions.get("vllm", "unknown")
        logger.info("peer %s is ready: %d layers, vLLM %.20r", peer, len(body.views), version)

    def _send_greeting(self, peer: Peer) -> None:
        """Ask for the key, or show what we know."""
        now = self._clock()
        peer.resend_at = now + peer.resend_s
        if not peer.at.key:
            question = wire.AskKey(version=wire.VERSION)
            self._channel.send(peer.link, wire.PLAIN + wire.encode(question))
            return
        leases = tuple(peer.leases)
        if leases != peer.shown:
            peer.seq, peer.shown = peer.seq + 1, leases
        greet = wire.Greet(
            version=wire.VERSION,
            seq=peer.seq,
            nonce=peer.nonce,
            proof=prove(self._secret, DIALER, peer.at.key, peer.nonce),
            lease_ids=[lease.lease_id for lease in leases if lease.lease_id],
            request_ids=[lease.name for lease in leases if not lease.lease_id],
            early=any(now < until for until in peer.leases.values()),
        )
        self._channel.send(peer.link, wire.encode(greet))
