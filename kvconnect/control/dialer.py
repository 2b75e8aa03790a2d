"""Peers that we dial: Hello → Challenge → Prove → Welcome, then requests and answers.

Two round trips, once per pair of ranks. The peer's proof is checked before ours is sent, its
fingerprint before its body is decoded, and its claims about memory before they are used.

* `greet` returns a Peer at once; its state moves on in `receive` and `tick`.
* `call` sends a request and repeats it, ever less often, until it is answered or its deadline
  passes.
* What is due is kept by time: a step costs nothing for the peers and calls that are not.
* `changes` grows whenever a peer has become READY or FAILED.
* What goes wrong with a peer makes it FAILED, with the reason; nothing is raised.
"""

import enum
import heapq
import itertools
import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping

from kvconnect.control import wire
from kvconnect.control.channel import Channel, Frame, Link
from kvconnect.control.session import (
    DIALER,
    NONCE_BYTES,
    PLAIN,
    SEALED,
    Session,
    why_not_proved,
    why_unlike,
)
from kvconnect.control.wire import Address
from kvconnect.errors import GeometryError, WireError
from kvconnect.geometry.blocks import check_views
from kvconnect.lease import Clock

logger = logging.getLogger(f"vllm.{__name__}")

RESEND_S = 1.0
MAX_RESEND_S = 8.0  # readers that wait at a busy prefill engine: ten thousands of calls
MAX_GREETINGS = 128  # under way at once; addresses may come from clients
MAX_IN_LINE = 4096  # that wait for one of those to end
BACKOFF_S = (0.5, 4.0)  # between greetings of an address that fails: first, at most
MAX_BACKOFFS = 1024
MAX_GONE = 4096


HUNG_UP = "we hung up"
NOT_DIALLED = Link(True, b"")


class PeerState(enum.Enum):
    """Of a dialled peer."""

    GREETING = "greeting"
    READY = "ready"
    FAILED = "failed"


class Call:
    """A request to a peer; ``reply`` or ``error`` is set once it is over."""

    def __init__(
        self,
        seq: int,
        message: wire.Message,
        accepts: tuple[type[wire.Message], ...],
        deadline: float,
        resend_at: float,
        asker: str = "",
    ) -> None:
        self.seq = seq
        self.message = message
        self.accepts = accepts
        self.deadline = deadline
        self.resend_at = resend_at
        self.resend_s = RESEND_S
        self.asker = asker
        self.reply: wire.Message | None = None
        self.error = ""


class Peer:
    """A rank that we dialled. FAILED is final: greet again for a new Peer."""

    def __init__(self, address: Address, link: Link, deadline: float) -> None:
        self.address = address
        self.link = link
        self.deadline = deadline
        self.state = PeerState.GREETING
        self.error = ""
        self.body: wire.Body | None = None
        self.version: tuple[int, int] | None = None
        self.fingerprint: Mapping[str, str] = {}
        self.gone: dict[str, None] = {}
        """Generations that the peer said are over, the last `MAX_GONE` in their order."""
        self.rejected = False  # once, while greeting
        self.ended = False  # its connection broke: its process has ended, if not its host
        self.resend_at = 0.0
        self.calls: dict[int, Call] = {}
        self.begin()

    def begin(self) -> None:
        """Greet from the start: whoever answers now may be another process than before."""
        self.nonce = secrets.token_bytes(NONCE_BYTES)
        self.session: Session | None = None  # set once the peer has proved itself
        self.greeting: wire.Message = wire.Hello(version=wire.VERSION, nonce=self.nonce)

    def __str__(self) -> str:
        return str(self.address)


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
        self._seq = itertools.count(1)
        self.changes = 0
        self._ended: dict[str, None] = {}  # askers of calls that are over
        self._greeting = 0  # peers that are being greeted now
        self._in_line: OrderedDict[Address, Peer] = OrderedDict()  # GREETING, not dialled yet
        # (when to look, order, whom, of its calls which one; None: its greeting)
        self._due: list[tuple[float, int, Peer, Call | None]] = []
        self._pushed = itertools.count()

    def greet(self, address: Address) -> Peer:
        """The peer at ``address``; dials it, in its turn, unless that is under way or done.

        FAILED at once for an address that failed a moment ago or cannot be dialled.
        """
        if (peer := self._peers.get(address)) is not None:
            return peer
        peer = Peer(address, NOT_DIALLED, float("inf"))
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

    def _dial(self, peer: Peer) -> None:
        """Start to greet; FAILED if its address cannot be dialled."""
        try:
            peer.link = self._channel.dial(peer.address)
        except WireError as e:
            self._peers.pop(peer.address, None)
            peer.state, peer.error = PeerState.FAILED, str(e)
            self.changes += 1
            return
        peer.deadline = self._clock() + self._handshake_timeout_s
        self._peers[peer.address] = self._by_link[peer.link] = peer
        self._greeting += 1
        self._send_greeting(peer)
        self._look_at(peer, None)

    def _look_at(self, peer: Peer, call: Call | None) -> None:
        """Have `tick` look at a greeting or a call when there is something to do."""
        of = call or peer
        when = min(of.resend_at, of.deadline)
        heapq.heappush(self._due, (when, next(self._pushed), peer, call))

    def _greeted(self) -> None:
        """One greeting has ended, well or not: the next in line has its turn."""
        self.changes += 1
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
        if greeting and error != HUNG_UP:
            self._back_off(peer.address, error)
        peer.state, peer.error = PeerState.FAILED, error
        self.changes += 1
        for call in peer.calls.values():
            call.error = f"peer {peer}: {error}"
            self._ended[call.asker] = None
        peer.calls.clear()
        del self._peers[peer.address]
        if not in_line:
            del self._by_link[peer.link]
            self._channel.drop(peer.link)
        if greeting:
            self._greeted()

    def call(
        self,
        peer: Peer,
        make: Callable[[int], wire.Message],
        accepts: tuple[type[wire.Message], ...],
        deadline: float,
        asker: str = "",
    ) -> Call:
        """Send the request ``make(seq)``, repeated until one of ``accepts`` answers it.

        ``asker``: whom `take_ended` is to name when it is over.
        """
        seq = next(self._seq)
        call = Call(seq, make(seq), accepts, deadline, self._clock() + RESEND_S, asker)
        if peer.state is PeerState.READY:
            peer.calls[seq] = call
            self.tell(peer, call.message)
            self._look_at(peer, call)
        else:
            call.error = f"peer {peer}: {peer.error or 'not greeted yet'}"
            self._ended[asker] = None
        return call

    def take_ended(self) -> list[str]:
        """The askers of calls that were answered or failed since this was last called."""
        taken, self._ended = list(self._ended), {}
        return taken

    def cancel(self, peer: Peer, call: Call) -> None:
        """No answer is wanted any more: stop repeating."""
        peer.calls.pop(call.seq, None)

    def tell(self, peer: Peer, message: wire.Message) -> None:
        """Send a message to a READY peer; no answer is expected."""
        assert peer.session is not None
        self._channel.send(peer.link, peer.session.seal(wire.encode(message)))

    def tick(self) -> None:
        """Repeat what went unanswered, give up on what is overdue."""
        now = self._clock()
        while self._due and self._due[0][0] <= now:
            _, _, peer, call = heapq.heappop(self._due)
            if self._is_over(peer, call):
                continue
            if call is None:
                self._look_at_greeting(peer, now)
            elif now >= call.deadline:
                del peer.calls[call.seq]
                call.error = f"peer {peer} did not answer in time"
                self._ended[call.asker] = None
            elif now >= call.resend_at:
                call.resend_s = min(2 * call.resend_s, MAX_RESEND_S)
                call.resend_at = now + call.resend_s
                self.tell(peer, call.message)
            if not self._is_over(peer, call):
                self._look_at(peer, call)

    def _look_at_greeting(self, peer: Peer, now: float) -> None:
        if now >= peer.deadline:
            self.fail(
                peer,
                f"did not complete the greeting within {self._handshake_timeout_s:g} s; is "
                "the engine up, and its side channel reachable from here?",
            )
        elif now >= peer.resend_at:
            self._send_greeting(peer)

    @staticmethod
    def _is_over(peer: Peer, call: Call | None) -> bool:
        """Whether there is nothing to wait for any more."""
        if call is None:
            return peer.state is not PeerState.GREETING
        return peer.calls.get(call.seq) is not call

    def next_deadline(self) -> float | None:
        """When `tick` is worth calling next."""
        while self._due and self._is_over(*self._due[0][2:]):
            heapq.heappop(self._due)
        return self._due[0][0] if self._due else None

    def receive(self, frame: Frame) -> None:
        """Take in a frame of a link that we dialled."""
        peer = self._by_link.get(frame.link)
        if peer is None:
            return
        if frame.data is None:
            if peer.state is PeerState.READY:  # while greeting, the listener may only just come up
                peer.ended = True
                self.fail(peer, "closed the connection; has the engine ended?")
            elif peer.session is not None:
                peer.begin()
                self._send_greeting(peer)
            return
        try:
            self._receive(peer, frame.data)
        except WireError as e:
            logger.warning("peer %s: frame dropped: %s", peer, e)

    def _receive(self, peer: Peer, data: bytes) -> None:
        if data[:1] == SEALED:
            if peer.session is not None:
                self._take(peer, wire.decode(peer.session.unseal(data)))
            return
        if isinstance(message := wire.decode(data[1:]), wire.Reject):
            # its proof was right, so its secret is ours: it has forgotten us, or was restarted
            if peer.state is PeerState.GREETING and peer.session is not None and not peer.rejected:
                peer.rejected = True
                peer.begin()
                self._send_greeting(peer)
            else:
                self.fail(peer, f"rejected us: {message.detail}")
        elif isinstance(message, wire.Challenge) and peer.session is None:
            self._prove(peer, message)

    def _take(self, peer: Peer, message: wire.Message) -> None:
        if isinstance(message, wire.Welcome) and peer.state is PeerState.GREETING:
            self._welcomed(peer, message)
        elif isinstance(message, wire.Reply):
            call = peer.calls.get(message.seq)
            if call is not None and isinstance(message, call.accepts):
                del peer.calls[message.seq]
                call.reply = message
                self._ended[call.asker] = None
        elif isinstance(message, wire.Gone):
            peer.gone |= dict.fromkeys(message.lease_ids)
            for oldest in list(peer.gone)[:-MAX_GONE]:
                del peer.gone[oldest]

    def _prove(self, peer: Peer, challenge: wire.Challenge) -> None:
        peer.version = challenge.version
        if challenge.version[0] != wire.VERSION[0]:
            self.fail(peer, f"speaks wire version {challenge.version}, ours is {wire.VERSION}")
            return
        session = Session(DIALER, self._secret, peer.nonce, challenge.nonce)
        if not session.accepts(challenge.proof):
            self.fail(peer, why_not_proved(ours=bool(self._secret), theirs=challenge.secret))
            return
        peer.session = session
        peer.greeting = wire.Prove(proof=session.proof())
        self._send_greeting(peer)

    def _welcomed(self, peer: Peer, welcome: wire.Welcome) -> None:
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
        self._greeted()
        self._backoffs.pop(peer.address, None)
        version = body.versions.get("vllm", "unknown")
        logger.info("peer %s is ready: %d layers, vLLM %.20r", peer, len(body.views), version)

    def _send_greeting(self, peer: Peer) -> None:
        peer.resend_at = self._clock() + RESEND_S
        self._channel.send(peer.link, PLAIN + wire.encode(peer.greeting))
